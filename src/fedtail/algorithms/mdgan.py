"""MD-GAN: one generator at the server, a discriminator at every client; only images and their gradients travel.

Hardy, Le Merrer and Sericola, "MD-GAN: Multi-Discriminator Generative Adversarial Networks for Distributed Datasets",
IPDPS 2019 (arXiv 1811.03850), Algorithm 1. A round is one iteration:

    server   two batches X_d = G(z), X_g = G(z'), the same for all clients
    client   `local.steps` steps of phi_k on L_D of its own images and X_d; then the feedback F_k = dL_G(X_g; phi_k) / dX_g
    server   one step of theta with (mean_k F_k) back-propagated through G, the gradient of mean_k L_G(theta; phi_k)
    swap     every `swap_every` rounds each client goes on with another one's discriminator

Set local.steps = 1, and evaluation.every and checkpoint_every to some hundreds: rounds are short.

Differences from the paper: all discriminators start alike; the server makes one batch for all (k = 1) and the non-saturating
loss is used; a swap takes the next client's discriminator, then the next but one's, and so on, not a random one's, and goes
through the server, which keeps a copy of each (workers exchange them directly in the paper); the optimizer's state stays at
the client. Differences from public re-implementations: the generator's gradient is used, not averaged copies of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail import gan, trees
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Mixture, Phase
from fedtail.errors import ConfigError
from fedtail.local import Local, overlay, sgd_step
from fedtail.optim import Adam, Optimizer
from fedtail.task import Draw, Task, Variables
from fedtail.trees import Tree


class Central(NamedTuple):
    """Server state."""

    model: Variables  # the generator
    optimizer: Tree
    loss: Tensor  # () the clients' mean L_G of the last round
    held: Variables  # discriminators of the last swap, a slot a client, [population, ...]
    giver: Tensor  # (population,) int64, whose discriminator a client gets in a swap


class Own(NamedTuple):
    """Client state."""

    discriminator: Variables
    optimizer: Tree


class Held(NamedTuple):
    """What a client sends for a swap."""

    discriminator: Variables
    client: Tensor  # () whose it is


@dataclass(frozen=True, kw_only=True)
class MDGAN(Algorithm):
    """A generator at the server learns from discriminators that stay with the clients and are swapped now and then."""

    optimizer: Optimizer = Adam(lr=2e-4, beta1=0.5)
    """What clients and server step with; their states last from round to round."""
    swap_every: int = 100
    """Rounds between two swaps of discriminators, >= 0; 0: never. The paper swaps once an epoch."""

    generative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.swap_every < 0:
            raise ConfigError(f"MDGAN.swap_every must be >= 0, got {self.swap_every}.")

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training; a swap is a collecting phase and one that hands out."""
        if not self.swap_every or (index + 1) % self.swap_every:
            return (Phase(),)
        gather = Phase("gather", cohort="all", reduce="collect", local=False)
        return Phase(), gather, Phase("hand_out", cohort="all", local=False)

    def round_draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Latents and classes of the two batches."""
        return gan.served_draws(task, batch_size)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Central:
        """The initial generator, empty slots."""
        model = gan.part(ctx.task.initial, gan.GENERATOR)
        held = gan.part(ctx.task.initial, gan.DISCRIMINATOR)
        slots = trees.tree_map(lambda t: t.new_zeros((ctx.round.population, *t.shape)), held)
        zero = next(iter(model.params.values())).new_zeros(())
        giver = torch.zeros(ctx.round.population, dtype=torch.int64, device=zero.device)
        return Central(model, self.optimizer.init(model.params), zero, slots, giver)

    def broadcast(self, ctx: Context, server: Central) -> Tree:
        """Two batches of images; for a swap the discriminators."""
        if ctx.round.phase.name == "hand_out":
            return {"held": server.held, "giver": server.giver}
        return {} if ctx.round.phase.name == "gather" else gan.serve(ctx, server.model)

    def init_client(self, ctx: Context, message: Tree, rng: np.random.Generator) -> Own:
        """The initial discriminator."""
        own = gan.part(ctx.task.initial, gan.DISCRIMINATOR)
        return Own(own, self.optimizer.init(own.params))

    def local_init(self, ctx: Context, message: Tree, client: Own) -> Local:
        """Goes on with its own discriminator."""
        return Local(client.discriminator, client.optimizer, ())

    def local_step(self, ctx: Context, message: Any, client: Own, local: Local, batch: Batch) -> tuple[Local, Metrics]:
        """One step of the discriminator; none while discriminators are swapped."""
        if not ctx.round.phase.local:
            return local, {}
        made, real = gan.code_of(ctx.task, message.labels), gan.code_of(ctx.task, batch.y)

        def objective(v: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
            v = overlay(ctx.task.initial, v)
            good, v = gan.judge(ctx.task, v, batch.x, real, batch.draws)
            bad, v = gan.judge(ctx.task, v, message.training, made, ctx.round.draws)
            loss = batch.mean(F.softplus(-good)) + F.softplus(bad).mean()
            return loss, (gan.part(v, gan.DISCRIMINATOR), extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Any, client: Own, local: Local) -> tuple[Tree, Own]:
        """Sends the gradient of its L_G with respect to the images; its discriminator; or nothing, and takes another's."""
        if ctx.round.phase.name == "gather":
            return Held(client.discriminator, ctx.here.index), client
        if ctx.round.phase.name == "hand_out":
            whose = message["giver"].index_select(0, ctx.here.index.reshape(1))
            other = trees.tree_map(lambda t: t.index_select(0, whose)[0], message["held"])
            return {"done": torch.ones_like(ctx.here.examples)}, client._replace(discriminator=other)
        v, code = overlay(ctx.task.initial, local.variables), gan.code_of(ctx.task, message.labels)

        def loss(images: dict[str, Tensor]) -> tuple[Tensor, Any]:
            logits, new = gan.judge(ctx.task, v, images["x"], code, ctx.round.draws)
            return F.softplus(-logits).mean(), new.buffers

        value, buffers, feedback = ctx.task.value_and_grad(loss, {"x": message.feedback})
        found = gan.part(Variables(v.params, buffers), gan.DISCRIMINATOR)
        return {"feedback": feedback["x"], "loss": value}, Own(found, local.optimizer)

    def weight(self, ctx: Context) -> Tensor:
        """Every discriminator counts the same."""
        return torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Central, mean: Any, total: Tensor) -> Central:
        """One step of the generator along the mean feedback."""
        if ctx.round.phase.name == "hand_out":
            return server
        model, state = gan.follow(ctx, server.model, server.optimizer, mean["feedback"], self.optimizer)
        return server._replace(model=model, optimizer=state, loss=mean["loss"])

    def server_collect(self, ctx: Context, server: Central, updates: Sequence[Held], weights: Tensor) -> Central:
        """Keeps the discriminators, and says who gets whose: those of the clients s places on, s = 1, 2, ..."""
        rows = torch.stack([u.client for u in updates])
        places = (ctx.round.index // max(self.swap_every, 1)) % max(len(updates) - 1, 1) + 1
        sent = trees.stack([u.discriminator for u in updates])
        held = trees.tree_map(lambda slots, new: slots.index_copy(0, rows, new), server.held, sent)
        return server._replace(held=held, giver=server.giver.index_copy(0, rows, rows.roll(-places)))

    def generators(self, ctx: Context, server: Central) -> Mixture:
        """The server's generator."""
        return gan.alone(ctx, server.model)

    def variables(self, ctx: Context, message: Any, client: Tree | None) -> Variables:
        """The initial pair: a message holds no network."""
        return ctx.task.initial

    def diagnostics(self, ctx: Context, server: Central) -> dict[str, Any]:
        """The clients' mean L_G."""
        return {"loss_generator": server.loss}
