"""FedGAN: every client trains a generator and a discriminator, the server averages both.

Rasouli, Sun and Rajagopal, "FedGAN: Federated Generative Adversarial Networks for Distributed Data", 2020 (arXiv
2006.07228), Algorithm 1.

    client   for each batch: one step of phi_k on L_D, then one of theta_k on L_G (fedtail.gan), from theta^t, phi^t
    server   theta^{t+1} = sum_k a_k theta_k,   phi^{t+1} = sum_k a_k phi_k,   a_k = n_k / sum_j n_j over those who answered

`weighting = "kl"` takes FeGAN's weights instead (Guerraoui, Guirguis, Kermarrec and Le Merrer, "FeGAN: Scaling Distributed
GANs", Middleware 2020): a_k = exp(s_k) / sum_j exp(s_j), s_k = sign * KL(h_k || h) n_k / n, h_k and h the shares of the
classes at client k and in the population. With one client that holds everything this is the centralised GAN.

Differences from the paper: BatchNorm statistics are averaged with the same weights, and their integer counters, which
nothing reads, rounded; each network is stepped once a batch with Adam; equal time scales unless `optimizer` says other.
Differences from FeGAN: its groups, drawn for balance of the classes, are not here (cohorts are drawn uniformly), nor are
its schemes "linear" and "dirac", which divide by zero where clients are alike.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor

from fedtail import gan
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Mixture
from fedtail.local import Local
from fedtail.optim import Adam, Optimizer
from fedtail.task import Draw, Task, Variables
from fedtail.trees import Tree


class Averaged(NamedTuple):
    """Server state."""

    model: Variables  # theta and phi
    drift: gan.Drift  # of the last round


@dataclass(frozen=True, kw_only=True)
class FedGAN(Algorithm):
    """Federated averaging of a generator and a discriminator."""

    optimizer: Optimizer = Adam(lr=2e-4, beta1=0.5)
    """What each of the two networks steps with, with a state of its own; DCGAN's Adam (2e-4, .5, .999)."""
    persist_optimizer: bool = False
    """Clients keep the optimizer's state between rounds; by default it is fresh in every round."""
    weighting: Literal["examples", "uniform", "kl"] = "examples"
    """What a client counts in the mean: its examples, as everyone, or by FeGAN's divergence of its labels."""
    kl_sign: Literal[1, -1] = 1
    """With weighting = "kl": 1 gives more weight to clients whose labels differ from all, as FeGAN's code does; -1 less."""

    generative: ClassVar[bool] = True

    @property
    def shares_counts(self) -> bool:
        """With FeGAN's weights."""
        return self.weighting == "kl"

    def draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Latents for each of the two steps."""
        return gan.latent_draws(task, batch_size)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Averaged:
        """The initial pair."""
        return Averaged(ctx.task.initial, gan.no_drift(next(iter(ctx.task.initial.params.values()))))

    def broadcast(self, ctx: Context, server: Averaged) -> Variables:
        """Both networks."""
        return server.model

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Tree:
        """The optimizer's state, where it is kept."""
        return gan.both(self.optimizer).init(message.params) if self.persist_optimizer else ()

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast pair."""
        return Local(message, client if self.persist_optimizer else gan.both(self.optimizer).init(message.params), ())

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step of the discriminator, one of the generator."""
        return gan.gan_step(ctx, local, batch, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[gan.Trained, Tree]:
        """Sends both networks."""
        return gan.trained(message, local.variables), local.optimizer if self.persist_optimizer else client

    def weight(self, ctx: Context) -> Tensor:
        """n_k, 1 or exp(s_k)."""
        here = ctx.here
        if self.weighting == "examples":
            return here.examples
        if self.weighting == "uniform" or ctx.round.counts is None:
            return here.examples * 0 + 1
        return kl_weight(here.counts, ctx.round.counts, self.kl_sign)

    def server_update(self, ctx: Context, server: Averaged, mean: gan.Trained, total: Tensor) -> Averaged:
        """The mean pair."""
        return Averaged(*gan.averaged(server.model, mean))

    def generators(self, ctx: Context, server: Averaged) -> Mixture:
        """The averaged generator."""
        return gan.alone(ctx, server.model)

    def diagnostics(self, ctx: Context, server: Averaged) -> dict[str, Any]:
        """How far the clients' generators went from the common one, and from each other."""
        return {"drift": server.drift.relative, "spread": server.drift.spread}


def kl_weight(own: Tensor, population: Tensor, sign: float) -> Tensor:
    """Returns exp(s_k) of class counts (classes,) of a client and of everyone."""
    share, whole = own / own.sum(), population / population.sum()
    tiny = 1e-30  # 0 log 0 = 0; who holds a class is in the population too
    divergence = (share * (share.clamp(min=tiny) / whole.clamp(min=tiny)).log()).sum()
    return (sign * divergence * own.sum() / population.sum()).exp()
