"""FedRep: in every round each client first fits its own classifier to the shared body, then the body to its classifier.

Liam Collins, Hamed Hassani, Aryan Mokhtari and Sanjay Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021 (arXiv 2102.07078), Algorithm 1.

    client   of its tau_k local steps, H_k = round(head_share tau_k) come first:
             steps 1 .. H_k           phi_k   <- phi_k - eta grad_phi F_k(theta^t, phi_k)          body frozen
             steps H_k + 1 .. tau_k   theta_k <- theta_k - eta grad_theta F_k(theta_k, phi_k)      head frozen
    server   theta^{t+1} = sum_k n_k theta_k / sum_k n_k;   the head phi_k stays with its client
    predict  personal: phi_k(f_theta(x));   the method defines no generic model

A part that is frozen keeps everything: values, BatchNorm statistics, and the state of its optimizer, so neither momentum nor
weight decay moves it. Head and body are clipped each by itself. Batch statistics and Dropout are those of training throughout.

Differences from the paper: a share of the experiment's local work instead of two numbers of epochs, so that compared methods do
equal work; clients count with n_k (paper: equally); every client's head begins with the network's initial values.
A client with a single local step trains its head alone at the default share.
The generic column of an evaluation has the initial head, which nobody has trained; `share_private = true` sends the heads for
that column alone and puts their mean into it: training and personal models are the same bit for bit.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.heads import head_names
from fedtail.local import Local, delta, descend, overlay, parted, parts_step, split, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables, Worker
from fedtail.trees import Tree


def _parts(task: Worker) -> tuple[str, str]:
    """Returns how the names of body and head begin."""
    return "", f"{task.classifier}."


@dataclass(frozen=True, kw_only=True)
class FedRep(Algorithm):
    """One body for all, a classifier for each client, trained in turn."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    head_share: float = 10 / 15
    """Share of a client's local steps for the head, in [0, 1]; FedLoGe runs it with 10 epochs of the head and 5 of the body."""
    share_private: bool = False
    """True also sends the heads, for a generic model with their mean; nothing else uses it."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.head_share <= 1:
            raise ConfigError(f"FedRep.head_share must be in [0, 1], got {self.head_share}.")

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial body; the whole network if heads are sent."""
        body = split(ctx.task.initial, head_names(ctx.task, "FedRep"))[1]
        return ctx.task.initial if self.share_private else body

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """The initial head."""
        return split(ctx.task.initial, head_names(ctx.task, "FedRep"))[0]

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the body and the client's own head, at step 0."""
        optimizer = parted(self.optimizer, _parts(ctx.task))
        return start(optimizer, self.variables(ctx, message, client), torch.zeros_like(ctx.here.steps))

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the head or on the body."""
        head = local.extra < torch.round(self.head_share * ctx.here.steps)
        before = self.variables(ctx, message, client)

        def objective(v: Variables, step: Tree) -> Any:
            risk, new = self.loss.risk(ctx, before, v, batch)
            buffers = {k: torch.where(head, v.buffers[k], b) for k, b in new.buffers.items()}  # they are the body's
            return risk, (Variables(new.params, buffers), step + 1, {})

        active = dict(zip(_parts(ctx.task), (~head, head), strict=True))
        return parts_step(ctx, local, objective, self.optimizer, active)

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Local
    ) -> tuple[Variables, Variables]:
        """Sends the change of what the message holds; keeps the head."""
        return delta(message, local.variables), split(local.variables, head_names(ctx.task, "FedRep"))[0]

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """The body with the client's head; without a client with the heads' mean, or the initial one if none is sent."""
        return overlay(ctx.task.initial, message, client)
