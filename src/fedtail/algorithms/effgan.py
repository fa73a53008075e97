"""EFFGAN: federated training of a GAN, then every client fine-tunes it alone, and the server keeps all generators.

Ekblom, Listo Zec and Mogren, "EFFGAN: Ensembles of fine-tuned federated GANs", IEEE Big Data 2022 (arXiv 2206.11682).

    rounds 0 .. T - 1   FedGAN: local steps on L_D and L_G (fedtail.gan), the means of theta_k and phi_k weighted by n_k
    round T, the last   every client goes on from theta^T, phi^T for `finetune_epochs` and sends its generator theta_k*
    model               the mixture sum_k w_k p(G(z; theta_k*)): draw k with w_k = n_k / n, z ~ N(0, I); nothing is averaged

`rounds` is T + 1: with equal local epochs the experts are the local models of FedGAN's round T + 1, bit for bit, which
there would be averaged, so that FedGAN and EFFGAN of as many rounds cost the same but for the last upload of phi_k.
rounds = 1 is the ensemble of clients that train alone from a common start.

Differences from the paper, of which only this skeleton was available: networks, optimizer, loss, the length of the
fine-tuning, weights and the discriminators' part (averaged, fine-tuned, never sent in the end) are our choice; so is
`weights = "classes"` for conditional pairs: an expert is then asked for its client's classes only, whose counts it reveals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import gan, trees
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Mixture, Phase
from fedtail.errors import ConfigError
from fedtail.local import Local
from fedtail.optim import Adam, Optimizer
from fedtail.task import Draw, Task, Variables
from fedtail.trees import Tree


class Expert(NamedTuple):
    """What a client sends at the end."""

    generator: Variables
    client: Tensor  # () whose it is
    share: Tensor  # (classes,) what it counts, by class


class Ensemble(NamedTuple):
    """Server state."""

    model: Variables  # theta and phi, FedGAN's
    experts: Variables  # a slot a client, [population, ...]; zeros until the last round and for who sent none
    shares: (
        Tensor  # [1 + population, classes] of the model, which is all there is until the last round, and the experts
    )
    drift: gan.Drift  # of the last round


@dataclass(frozen=True, kw_only=True)
class EFFGAN(Algorithm):
    """FedGAN, whose last local models are kept as an ensemble of generators instead of being averaged."""

    optimizer: Optimizer = Adam(lr=2e-4, beta1=0.5)
    """What each of the two networks steps with, with a state of its own; DCGAN's Adam (2e-4, .5, .999)."""
    finetune_epochs: int = -1
    """Epochs of the last, unaveraged training, >= 0; -1: as long as a round's. 0: all experts are the common model."""
    weights: Literal["examples", "uniform", "classes"] = "examples"
    """What an expert counts in the mixture: its client's examples, as every other, or its examples class by class."""

    generative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.finetune_epochs < -1:
            raise ConfigError(f"EFFGAN.finetune_epochs must be >= -1, got {self.finetune_epochs}.")

    @property
    def shares_counts(self) -> bool:
        """If experts count by class."""
        return self.weights == "classes"

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training; in the last round the fine-tuning of everyone, of which the server gets every generator."""
        if index + 1 < rounds:
            return (Phase(),)
        epochs = self.finetune_epochs
        return (Phase("finetune", cohort="all", reduce="collect", local=epochs != 0, epochs=max(epochs, 0)),)

    def draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Latents for each of the two steps."""
        return gan.latent_draws(task, batch_size)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Ensemble:
        """The initial pair and empty slots."""
        model, size, classes = ctx.task.initial, ctx.round.population, ctx.task.num_classes
        slots = trees.tree_map(lambda t: t.new_zeros((size, *t.shape)), gan.part(model, gan.GENERATOR))
        shares = torch.zeros((1 + size, classes), dtype=ctx.task.dtype, device=ctx.task.device)
        shares[0] = 1 / classes
        return Ensemble(model, slots, shares, gan.no_drift(shares))

    def broadcast(self, ctx: Context, server: Ensemble) -> Variables:
        """Both networks."""
        return server.model

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast pair."""
        return Local(message, gan.both(self.optimizer).init(message.params), ())

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step of the discriminator, one of the generator; none without fine-tuning."""
        return gan.gan_step(ctx, local, batch, self.optimizer) if ctx.round.phase.local else (local, {})

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Tree, Tree]:
        """Sends both networks; at the end the generator alone."""
        if ctx.round.phase.reduce == "mean":
            return gan.trained(message, local.variables), client
        by_class = ctx.here.counts
        whole = ctx.here.examples if self.weights == "examples" else ctx.here.examples * 0 + 1
        share = by_class if self.weights == "classes" else (whole / ctx.task.num_classes).expand_as(by_class)
        return Expert(gan.part(local.variables, gan.GENERATOR), ctx.here.index, share), client

    def server_update(self, ctx: Context, server: Ensemble, mean: gan.Trained, total: Tensor) -> Ensemble:
        """The mean pair."""
        model, drift = gan.averaged(server.model, mean)
        return server._replace(model=model, drift=drift)

    def server_collect(self, ctx: Context, server: Ensemble, updates: Sequence[Expert], weights: Tensor) -> Ensemble:
        """Puts every generator into its slot; the shared model then has no share."""
        rows = torch.stack([u.client for u in updates])
        sent: Variables = trees.stack([u.generator for u in updates])
        experts = trees.tree_map(lambda slots, new: slots.index_copy(0, rows, new), server.experts, sent)
        share = torch.stack([u.share for u in updates])
        shares = torch.zeros_like(server.shares).index_copy(0, rows + 1, share / share.sum())
        return server._replace(experts=experts, shares=shares, drift=gan.spread(server.model, sent))

    def generators(self, ctx: Context, server: Ensemble) -> Mixture:
        """The experts; before the last round the shared generator."""
        common = gan.part(server.model, gan.GENERATOR)
        return Mixture(
            server.shares, trees.tree_map(lambda one, rest: torch.cat([one[None], rest]), common, server.experts)
        )

    def diagnostics(self, ctx: Context, server: Ensemble) -> dict[str, Any]:
        """How far the clients' generators went from the common one, and from each other."""
        return {"drift": server.drift.relative, "spread": server.drift.spread}
