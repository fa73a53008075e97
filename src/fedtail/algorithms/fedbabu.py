"""FedBABU: only the body is trained and averaged, against a random head that never changes; afterwards each client tunes.

Jaehoon Oh, Sangmook Kim and Se-Young Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR
2022 (arXiv 2106.06042), Algorithm 1.

    client   theta_k <- E epochs of mini-batch SGD on F_k(theta, phi^0), from theta^t;   phi^0: the initial head, of everyone
    server   theta^{t+1} = sum_k n_k theta_k / sum_k n_k
    after    the last round every client with data takes E epochs of SGD from (theta^T, phi^0) on its own data: phase "tune"
    predict  generic: phi^0(f_theta(x));   personal: what the client has tuned, before that the generic model

The head never travels: everyone knows it. Tuning has the experiment's local work and the optimizer's learning rate without the
schedule, since it comes after training. A tuned head alone has the body in evaluation mode: its BatchNorm statistics stay and
nothing is dropped.

Differences from the paper: the head has the network's initial values, whatever these are (with `start`, that run's head).
Differences from FedLoGe's code for it: clients are weighted with their own sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase
from fedtail.heads import head_names
from fedtail.local import Local, delta, descend, empirical_risk, overlay, sgd_step, split, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedBABU(Algorithm):
    """A body trained against a fixed random head; then each client tunes the head, or everything."""

    loss: Loss = CrossEntropy()
    """What a client minimises, in training and in tuning (fedtail list losses)."""
    tune: Literal["head", "all"] = "head"
    """What a client tunes after training; the paper's abstract names the head, its experiments compare both."""

    personal: ClassVar[bool] = True

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training; after the last round everyone tunes."""
        return (Phase(), Phase("tune", cohort="all")) if index + 1 == rounds else (Phase(),)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial body."""
        return split(ctx.task.initial, head_names(ctx.task, "FedBABU"))[1]

    def _tunes(self, ctx: Context) -> bool:
        return ctx.round.phase.name == "tune"

    def _trainable(self, ctx: Context, message: Variables) -> list[str]:
        head = head_names(ctx.task, "FedBABU")
        if not self._tunes(ctx):
            return list(message.params)
        return head if self.tune == "head" else [*message.params, *head]

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the body and the fixed head."""
        return start(self.optimizer, self.variables(ctx, message, None), trainable=self._trainable(ctx, message))

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the body, or on what is tuned."""
        before = self.variables(ctx, message, None)

        def frozen(v: Variables, extra: Tree) -> Any:
            z, _ = ctx.task.apply(v, batch.x, train=False)
            return self.loss(ctx, before, z, batch), (v, extra, {})

        objective = empirical_risk(self.loss, ctx, before, batch)
        if self._tunes(ctx):
            ctx = ctx._replace(round=ctx.round._replace(lr_scale=1.0))
            objective = frozen if self.tune == "head" else objective
        return sgd_step(ctx, local, objective, self.optimizer, trainable=self._trainable(ctx, message))

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Tree, Tree]:
        """Sends the change of the body; after tuning sends nothing and keeps what was tuned."""
        if not self._tunes(ctx):
            return delta(message, local.variables), client
        head = split(local.variables, head_names(ctx.task, "FedBABU"))[0]
        return {"nothing": torch.zeros_like(ctx.here.examples)}, head if self.tune == "head" else local.variables

    def server_update(self, ctx: Context, server: Variables, mean: Any, total: Tensor) -> Variables:
        """Adds the mean change; tuning changes nothing here."""
        return server if self._tunes(ctx) else descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Tree | None) -> Variables:
        """The body with the fixed head, or with what the client has tuned in their place."""
        return overlay(ctx.task.initial, message, client)
