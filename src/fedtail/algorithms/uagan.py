"""UA-GAN: one generator at the server, whose critic is an aggregate of the clients' discriminators.

Zhang, Qu, Chang, Liu, Metaxas and Chen, "Training Federated GANs with Theoretical Guarantees: A Universal Aggregation
Approach", 2021 (arXiv 2102.04655); `aggregate = "max"` and "soft": Yonetani, Takahashi, Hashimoto and Ushiku, "Decentralized
Learning of Generative Adversarial Networks from Non-iid Data", 2019 (arXiv 1905.09684), F2U and F2A. A round is one iteration:

    server   two batches X_d, X_g of images, labels uniform
    client   steps of phi_k on scale * (L_real + L_fake) + penalty * mean_i ||grad_x s(l_k(x_i))||^2; sends its logits l_k
             of X_g and their gradients dl_k / dX_g
    server   L_G = -log D(X_g) on average, D of all l_k, s = sigmoid, pi_ky = n_ky / sum_j n_jy (1 / K without labels):
             odds   D / (1 - D) = sum_k pi_ky s(l_k) / (1 - s(l_k)):  logit D = logsumexp_k(l_k + log pi_ky)      UA-GAN
             mean   D = mean_k s(l_k)                                                                             AvgGAN
             max    D = max_k s(l_k)                                                                              F2U
             soft   D = sum_k w_k s(l_k), w = softmax_k(sharpness * s(l_k)): 0 is mean, infinity max               F2A
             theta steps along sum_k (dL_G / dl_k) (dl_k / dX_g), back-propagated through G

Every logit is needed by itself, so the phase collects: no secure aggregation. What a client sends of X_g is judged in
evaluation mode: an image's gradient must not hang on the other images of its batch.

Differences from the paper and the authors' code: two batches a round where the code has one for both; no decay of the
learning rate unless `schedule` says so; networks by `model`, theirs are residual ones; images are weighted as the engine's
batches are. F2A's sharpness is fixed, there it is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail import gan
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Mixture, Phase
from fedtail.errors import ConfigError
from fedtail.local import Local, overlay, sgd_step
from fedtail.optim import Adam, Optimizer
from fedtail.task import Draw, Task, Variables
from fedtail.trees import Tree

Aggregate = Literal["odds", "mean", "max", "soft"]


class Central(NamedTuple):
    """Server state."""

    model: Variables  # the generator
    optimizer: Tree
    loss: Tensor  # () L_G of the last round


class Own(NamedTuple):
    """Client state."""

    discriminator: Variables
    optimizer: Tree


class Judged(NamedTuple):
    """What a client sends."""

    logits: Tensor  # (batch,) l_k
    slopes: Tensor  # [batch, ...] dl_k / dx
    counts: Tensor  # (batch,) n_ky of each image's label; 1 without labels


def generator_loss(logits: Tensor, counts: Tensor, aggregate: Aggregate, sharpness: float) -> Tensor:
    """Returns the mean over images of -log D, shape ().

    Args:
        logits: l_k, [clients, batch].
        counts: n_ky, [clients, batch]; a label that nobody holds counts 1 for everyone.
        aggregate: how D is made of them.
        sharpness: of "soft".
    """
    if aggregate == "odds":
        known = torch.where(counts.sum(0) > 0, counts, torch.ones_like(counts))
        return F.softplus(-torch.logsumexp(logits + (known / known.sum(0)).log(), 0)).mean()
    if aggregate == "max":
        return F.softplus(-logits.amax(0)).mean()
    shares = F.log_softmax((sharpness if aggregate == "soft" else 0.0) * logits.sigmoid(), 0)
    return -torch.logsumexp(shares + F.logsigmoid(logits), 0).mean()


@dataclass(frozen=True, kw_only=True)
class UAGAN(Algorithm):
    """A generator at the server learns from an aggregate of discriminators that stay with the clients."""

    optimizer: Optimizer = Adam(lr=2e-4, beta1=0.5)
    """What clients and server step with; their states last from round to round."""
    aggregate: Aggregate = "odds"
    """How the clients' outputs become one: odds (UA-GAN), mean (AvgGAN), max (F2U), soft (F2A)."""
    sharpness: float = 1.0
    """Of "soft", >= 0: 0 is the mean, large values the maximum."""
    scale: float = 0.1
    """Factor of the discriminator's loss, > 0; .1 in the authors' code."""
    penalty: float = 10.0
    """Factor of the squared gradient of the discriminator's output at real images, >= 0; 10 in the authors' code."""

    generative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sharpness < 0 or not self.scale > 0 or self.penalty < 0:
            raise ConfigError("UAGAN: sharpness and penalty must be >= 0 and scale > 0; "
                              f"got {self.sharpness}, {self.penalty} and {self.scale}.")  # fmt: skip

    @property
    def shares_counts(self) -> bool:
        """For the odds, where the pair is told classes."""
        return self.aggregate == "odds"

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """One phase that collects."""
        return (Phase(reduce="collect"),)

    def round_draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Latents and classes of the two batches."""
        return gan.served_draws(task, batch_size)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Central:
        """The initial generator."""
        model = gan.part(ctx.task.initial, gan.GENERATOR)
        return Central(model, self.optimizer.init(model.params), next(iter(model.params.values())).new_zeros(()))

    def broadcast(self, ctx: Context, server: Central) -> gan.Served:
        """Two batches of images."""
        return gan.serve(ctx, server.model)

    def init_client(self, ctx: Context, message: Tree, rng: np.random.Generator) -> Own:
        """The initial discriminator."""
        own = gan.part(ctx.task.initial, gan.DISCRIMINATOR)
        return Own(own, self.optimizer.init(own.params))

    def local_init(self, ctx: Context, message: Tree, client: Own) -> Local:
        """Goes on with its own discriminator."""
        return Local(client.discriminator, client.optimizer, ())

    def local_step(
        self, ctx: Context, message: gan.Served, client: Own, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step of the discriminator."""
        made, real = gan.code_of(ctx.task, message.labels), gan.code_of(ctx.task, batch.y)

        def objective(v: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
            whole = overlay(ctx.task.initial, v)

            def probability(x: Tensor) -> Tensor:
                return gan.judge(ctx.task, whole, x, real, batch.draws)[0].sigmoid().sum()

            good, new = gan.judge(ctx.task, whole, batch.x, real, batch.draws)
            bad, new = gan.judge(ctx.task, new, message.training, made, ctx.round.draws)
            loss = self.scale * (batch.mean(F.softplus(-good)) + F.softplus(bad).mean())
            if self.penalty:
                slope = ctx.task.slope(probability, batch.x)
                loss = loss + self.penalty * batch.mean(slope.flatten(1).square().sum(1))
            return loss, (gan.part(new, gan.DISCRIMINATOR), extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: gan.Served, client: Own, local: Local) -> tuple[Judged, Own]:
        """Sends logits of the second batch and their gradients."""
        v, code = overlay(ctx.task.initial, local.variables), gan.code_of(ctx.task, message.labels)

        def total(images: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits, _ = gan.judge(ctx.task, v, images["x"], code, {}, train=False)
            return logits.sum(), logits

        _, logits, slopes = ctx.task.value_and_grad(total, {"x": message.feedback})
        held = torch.ones_like(logits) if code is None else code @ ctx.here.counts
        return Judged(logits, slopes["x"], held), Own(local.variables, local.optimizer)

    def server_update(self, ctx: Context, server: Central, mean: Tree, total: Tensor) -> Central:
        """Never called: the phase collects."""
        return server

    def server_collect(self, ctx: Context, server: Central, updates: Sequence[Judged], weights: Tensor) -> Central:
        """One step of the generator against the aggregate."""
        counts, slopes = (torch.stack([u[i] for u in updates]) for i in (2, 1))

        def loss(logits: dict[str, Tensor]) -> tuple[Tensor, Tree]:
            return generator_loss(logits["l"], counts, self.aggregate, self.sharpness), ()

        value, _, grads = ctx.task.value_and_grad(loss, {"l": torch.stack([u.logits for u in updates])})
        pull = grads["l"].reshape(*grads["l"].shape, *[1] * (slopes.dim() - 2))
        model, state = gan.follow(ctx, server.model, server.optimizer, (pull * slopes).sum(0), self.optimizer)
        return Central(model, state, value)

    def generators(self, ctx: Context, server: Central) -> Mixture:
        """The server's generator."""
        return gan.alone(ctx, server.model)

    def variables(self, ctx: Context, message: Any, client: Tree | None) -> Variables:
        """The initial pair: a message holds no network."""
        return ctx.task.initial

    def diagnostics(self, ctx: Context, server: Central) -> dict[str, Any]:
        """L_G against the aggregate."""
        return {"loss_generator": server.loss}
