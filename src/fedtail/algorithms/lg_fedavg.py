"""LG-FedAvg: the classifier is averaged, every client keeps a body of its own.

Paul Pu Liang, Terrance Liu, Liu Ziyin, Nicholas B. Allen, Randy P. Auerbach, David Brent, Ruslan Salakhutdinov and
Louis-Philippe Morency, "Think Locally, Act Globally: Federated Learning with Local and Global Representations", 2020
(arXiv 2001.01523).

    client   (theta_k, phi_k) <- E epochs of mini-batch SGD on F_k, from (theta_k, phi^t)
    server   phi^{t+1} = sum_k n_k phi_k / sum_k n_k;   the body theta_k, BatchNorm included, stays with its client
    predict  personal: phi(f_theta_k(x));   the method defines no generic model

Differences from the paper: what is shared is the classifier, nothing before it; bodies learn from the labels alone (the paper
also has unsupervised and adversarial losses for them); a client that the paper has not seen asks all bodies, which is not here.
The authors' code begins with a model that FedAvg has trained: `start` gives that.
The generic column of an evaluation has the initial body; `share_private = true` sends the bodies for that column alone and puts
their mean into it: training and personal models are the same bit for bit.
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
class LGFedAvg(Algorithm):
    """One classifier for all, a body for each client."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    share_private: bool = False
    """True also sends the bodies, for a generic model with their mean; nothing else uses it."""

    personal: ClassVar[bool] = True

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial head; the whole network if bodies are sent."""
        head = split(ctx.task.initial, head_names(ctx.task, "LGFedAvg"))[0]
        return ctx.task.initial if self.share_private else head

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """The initial body."""
        return split(ctx.task.initial, head_names(ctx.task, "LGFedAvg"))[1]

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the client's own body and the head."""
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
        """Sends the change of what the message holds; keeps the body."""
        return delta(message, local.variables), split(local.variables, head_names(ctx.task, "LGFedAvg"))[1]

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """The head on the client's body; without a client on the bodies' mean, or the initial one if none is sent."""
        return overlay(ctx.task.initial, message, client)
