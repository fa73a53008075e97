"""FedPer: the body is averaged, every client keeps a classifier of its own; both are trained together.

Manoj Ghuhan Arivazhagan, Vinay Aggarwal, Aaditya Kumar Singh and Sunav Choudhary, "Federated Learning with Personalization
Layers", 2019 (arXiv 1912.00818), Algorithms 1 and 2.

    client   (theta_k, phi_k) <- E epochs of mini-batch SGD on F_k, from (theta^t, phi_k)
    server   theta^{t+1} = sum_k n_k theta_k / sum_k n_k;   the head phi_k stays with its client
    predict  personal: phi_k(f_theta(x));   the method defines no generic model

Differences from the paper: the personalisation layers are the classifier, nothing before it; every client's head begins with
the network's initial values (paper: with draws of its own); BatchNorm statistics belong to the body and are averaged.
The generic column of an evaluation has the initial head, which nobody has trained; `share_private = true` sends the heads for
that column alone and puts their mean into it: training and personal models are the same bit for bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.heads import head_names
from fedtail.local import Local, delta, descend, empirical_risk, overlay, sgd_step, split, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables


@dataclass(frozen=True, kw_only=True)
class FedPer(Algorithm):
    """One body for all, a classifier for each client."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    share_private: bool = False
    """True also sends the heads, for a generic model with their mean; nothing else uses it."""

    personal: ClassVar[bool] = True

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial body; the whole network if heads are sent."""
        body = split(ctx.task.initial, head_names(ctx.task, "FedPer"))[1]
        return ctx.task.initial if self.share_private else body

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """The initial head."""
        return split(ctx.task.initial, head_names(ctx.task, "FedPer"))[0]

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the body and the client's own head."""
        return start(self.optimizer, self.variables(ctx, message, client))

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on body and head."""
        before = self.variables(ctx, message, client)
        return sgd_step(ctx, local, empirical_risk(self.loss, ctx, before, batch), self.optimizer)

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Local
    ) -> tuple[Variables, Variables]:
        """Sends the change of what the message holds; keeps the head."""
        return delta(message, local.variables), split(local.variables, head_names(ctx.task, "FedPer"))[0]

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """The body with the client's head; without a client with the heads' mean, or the initial one if none is sent."""
        return overlay(ctx.task.initial, message, client)
