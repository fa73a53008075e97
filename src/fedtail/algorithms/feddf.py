"""FedDF: after each mean the server lets the model learn from the ensemble of the clients' models.

Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020 (arXiv
2006.07242), Algorithm 1, for clients of one architecture.

    client   w_k <- E epochs of SGD on the cross-entropy of D_k, from w^t
    server   wbar = sum_k n_k w_k / sum_k n_k
             w^{t+1} <- steps on T^2 KL(softmax(t / T) || softmax(z / T)) over the server's images S, from wbar
    t      = 1 / |cohort| sum_k z(x; w_k)       the mean of the clients' logits, in evaluation mode

No labels, no other teacher. The server sees each client's model: the mean alone (secure aggregation) does not suffice. wbar
is judged too (reading "before"). server_steps = 0 is FedAvg.

Differences from the paper: temperature as an option (its loss is that of T = 1). From the authors' code: a fixed number of
steps, one pass over S (theirs: up to 10,000 a round, stopped early by a validation set), so that it does the work of the
methods that it is compared with; clipping at norm 5, Adam with a cosine and batches of 128 are theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase, ServerWork
from fedtail.distillation import distil, server_descent, weighted_mean
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import Adam, Optimizer
from fedtail.task import Variables
from fedtail.trees import Tree


class Server(NamedTuple):
    """Server state."""

    model: Variables
    before: Variables  # wbar, the model before the server's steps
    members: Variables  # the cohort's models, each tensor [cohort, ...]
    optimizer: Tree  # of the round's last server step


@dataclass(frozen=True, kw_only=True)
class FedDF(Algorithm):
    """FedAvg, and after each mean steps of the server towards the ensemble of the clients' models."""

    needs_server_data = True

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    temperature: float = 1.0
    """T, > 0; 1 is the paper's."""
    server_steps: int = -1
    """Steps of the server in a round; -1 = one pass over its images; 0 = none, which is FedAvg."""
    server_images: int = 0
    """Of the server's images, how many of each class it uses, >= 0; 0 = all."""
    server_batch: int = 128
    """Images in a step of the server, >= 1; the authors' code."""
    server_optimizer: Optimizer = Adam(lr=0.001, clip=5.0)
    """What the server steps with, its state fresh every round; the authors' code."""
    server_cosine: bool = True
    """Whether its learning rate falls along a half cosine within the round; the authors' code."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.server_steps < -1 or min(self.server_batch - 1, self.server_images) < 0:
            got = f"{self.temperature}, {self.server_steps}, {self.server_batch} and {self.server_images}"
            raise ConfigError("FedDF needs temperature > 0, server_steps >= -1, server_batch >= 1 and server_images >= 0, "
                              f"got {got}.")  # fmt: skip

    @property
    def needs_server_labels(self) -> bool:
        """Never."""
        return False

    @property
    def server_work(self) -> ServerWork:
        """As the options say."""
        return ServerWork(self.server_batch, self.server_steps, self.server_images)

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """One training phase, whose updates the server gets one by one."""
        return (Phase(reduce="collect"),)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Server:
        """The initial model, which stands for every member too."""
        model = ctx.task.initial
        members = trees.tree_map(lambda t: torch.stack([t] * ctx.round.cohort), model)
        return Server(model, model, members, self.server_optimizer.init(model.params))

    def broadcast(self, ctx: Context, server: Server) -> Variables:
        """Sends the model alone."""
        return server.model

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the client's loss."""
        return sgd_step(ctx, local, empirical_risk(self.loss, ctx, message, batch), self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Server, mean: Variables, total: Tensor) -> Server:
        """Not called: the only phase collects."""
        return server

    def server_collect(self, ctx: Context, server: Server, updates: Sequence[Variables], weights: Tensor) -> Server:
        """Adds the mean change and keeps every member."""
        model = descend(server.model, weighted_mean(updates, weights))
        members = trees.stack([descend(server.model, update) for update in updates])
        return Server(model, model, members, server.optimizer)

    def server_step(self, ctx: Context, server: Server, batch: Batch) -> tuple[Server, Metrics]:
        """One step towards the mean of the members' logits."""
        cohort = len(trees.leaves(server.members)[0])
        each = [trees.tree_map(lambda v, k=k: v[k], server.members) for k in range(cohort)]
        t = torch.stack([ctx.task.apply(member, batch.x, train=False)[0] for member in each]).mean(0)

        def objective(v: Variables, extra: Tree) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            return distil(z, t, self.temperature, batch), (v, extra, {})

        local, metrics = server_descent(
            ctx, server.model, server.optimizer, objective, self.server_optimizer, self.server_cosine
        )
        return server._replace(model=local.variables, optimizer=local.optimizer), metrics

    def also_judged(self, ctx: Context, server: Server) -> Mapping[str, Variables]:
        """The model before the server's steps."""
        return {"before": server.before}
