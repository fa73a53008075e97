"""FedMD: personal models that learn from each other by their mean class scores of public images.

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019 (arXiv 1910.03581).

    from round 1 on, with public images X drawn anew in each round:
    client   sends z(X; w_k)
    server   c = 1 / |cohort| sum_k z(X; w_k)                                       the consensus
    client   one pass over X in batches, each a step on the mean squared difference of z(X; w_k) and c
    then, as in round 0, E epochs of SGD on the cross-entropy of D_k

X are the server's images, which every client sees; their labels are never read. Each client keeps its model: there is none
of the whole federation, so the generic scores are those of the initial network and say nothing.

Differences from the paper: clients of one architecture; public data are not used for pre-training; a fixed number of public
batches (5 of 32, as in public code). The pass over X is in evaluation mode (no Dropout; BatchNorm's statistics stay).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase, ServerWork
from fedtail.errors import ConfigError
from fedtail.local import empirical_risk, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables
from fedtail.trees import Tree


class Public(NamedTuple):
    """Server state, and message."""

    images: Tensor  # X [public_batches * public_batch, ...], of the next round
    consensus: Tensor  # c [public_batches * public_batch, classes]


@dataclass(frozen=True, kw_only=True)
class FedMD(Algorithm):
    """Personal models that fit the clients' mean class scores of public images, then train at home."""

    personal: ClassVar[bool] = True
    needs_server_data = True

    loss: Loss = CrossEntropy()
    """What a client minimises on its own data (fedtail list losses)."""
    public_batches: int = 5
    """Steps towards the consensus in a round, >= 1; 5 in public code."""
    public_batch: int = 32
    """Public images in such a step, >= 1; 32 in public code."""

    def __post_init__(self) -> None:
        if min(self.public_batches, self.public_batch) < 1:
            raise ConfigError("FedMD needs public_batches and public_batch >= 1, got "
                              f"{self.public_batches} and {self.public_batch}.")  # fmt: skip

    @property
    def needs_server_labels(self) -> bool:
        """Never."""
        return False

    @property
    def server_work(self) -> ServerWork:
        """One batch: the next round's public images."""
        return ServerWork(self.public_batches * self.public_batch, 1)

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Asking, where public images are known, then training, of the same clients."""
        return (Phase("ask", local=False), Phase()) if index else (Phase(),)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Public:
        """Nothing is known."""
        size, like = self.public_batches * self.public_batch, next(iter(ctx.task.initial.params.values()))
        return Public(like.new_zeros(size, *ctx.round.columns["x"]), like.new_zeros(size, ctx.task.num_classes))

    def sent(self, ctx: Context, message: Public) -> Tree:
        """The images to who is asked, then the consensus alone to the same clients; nothing in round 0."""
        if not ctx.round.index:
            return ()
        return message.consensus if ctx.round.phase.local else message.images

    def init_client(self, ctx: Context, message: Public, rng: np.random.Generator) -> Variables:
        """The initial network."""
        return ctx.task.initial

    def local_init(self, ctx: Context, message: Public, client: Variables) -> Any:
        """The scores of the public images; or the client's own model after its steps towards the consensus."""
        if not ctx.round.phase.local:
            return ctx.task.apply(client, message.images, train=False)[0]
        local = start(self.optimizer, trees.clone(client))  # a step may overwrite what it starts from
        if ctx.round.index:
            pairs = (v.split(self.public_batch) for v in message)
            for x, c in zip(*pairs, strict=True):

                def objective(v: Variables, extra: Tree, x: Tensor = x, c: Tensor = c) -> Any:
                    z, _ = ctx.task.apply(v, x, train=False)
                    return (z - c).square().mean(), (v, extra, {})

                local, _ = sgd_step(ctx, local, objective, self.optimizer)
        return start(self.optimizer, local.variables)

    def local_step(
        self, ctx: Context, message: Public, client: Variables, local: Any, batch: Batch
    ) -> tuple[Any, Metrics]:
        """One SGD step on the client's loss; nothing while it is asked."""
        if not ctx.round.phase.local:
            return local, {}
        return sgd_step(ctx, local, empirical_risk(self.loss, ctx, client, batch), self.optimizer)

    def local_final(self, ctx: Context, message: Public, client: Variables, local: Any) -> tuple[Tree, Variables]:
        """Sends the scores; after training its number of examples alone (an update is never empty), and keeps the model."""
        return ({"examples": ctx.here.examples}, local.variables) if ctx.round.phase.local else ({"z": local}, client)

    def weight(self, ctx: Context) -> Tensor:
        """1: every client's scores count the same."""
        return torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Public, mean: Any, total: Tensor) -> Public:
        """Keeps the consensus."""
        return server if ctx.round.phase.local else server._replace(consensus=mean["z"])

    def server_step(self, ctx: Context, server: Public, batch: Batch) -> tuple[Public, Metrics]:
        """Keeps the next round's public images, some of them twice where there are not enough."""
        rows = torch.arange(len(server.images), device=batch.x.device) % len(batch.x)
        return server._replace(images=batch.x.index_select(0, rows)), {}

    def variables(self, ctx: Context, message: Public, client: Variables | None) -> Variables:
        """The client's own; without a client the initial network."""
        return ctx.task.initial if client is None else client
