"""FedBN: FedAvg of everything but the BatchNorm layers, which every client keeps.

Xiaoxiao Li, Meirui Jiang, Xiaofei Zhang, Michael Kamp and Qi Dou, "FedBN: Federated Learning on Non-IID Features via Local
Batch Normalization", ICLR 2021 (arXiv 2102.07623), Algorithm 1.

    client   w_k <- E epochs of mini-batch SGD on F_k, from w^t with the client's own BatchNorm layers
    server   w^{t+1} = sum_k n_k w_k / sum_k n_k over all but BatchNorm's scale, shift and running statistics
    predict  personal: w with the client's own BatchNorm layers;   the method defines no generic model

Without BatchNorm layers this is FedAvg bit for bit.

Differences from the paper: clients count with n_k (paper: equally).
The generic column of an evaluation has the initial BatchNorm layers, whose statistics fit no data; `share_private = true` sends
the layers for that column alone and puts their mean into it: training and personal models are the same bit for bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # the base of all of them

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.local import Local, delta, descend, empirical_risk, overlay, sgd_step, split, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables, Worker


def batch_norm_names(task: Worker) -> set[str]:
    """Returns the names of the BatchNorm layers' parameters and buffers."""
    layers = {name for name, layer in task.task.module.named_modules() if isinstance(layer, _BatchNorm)}
    return {name for names in task.initial for name in names if name.rpartition(".")[0] in layers}


@dataclass(frozen=True, kw_only=True)
class FedBN(Algorithm):
    """One network for all, but for the BatchNorm layers."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    share_private: bool = False
    """True also sends the BatchNorm layers, for a generic model with their mean; nothing else uses it."""

    personal: ClassVar[bool] = True

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial network without its BatchNorm layers; all of it if these are sent."""
        return ctx.task.initial if self.share_private else split(ctx.task.initial, batch_norm_names(ctx.task))[1]

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """The initial BatchNorm layers."""
        return split(ctx.task.initial, batch_norm_names(ctx.task))[0]

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the message and the client's own BatchNorm layers."""
        return start(self.optimizer, self.variables(ctx, message, client))

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on everything."""
        before = self.variables(ctx, message, client)
        return sgd_step(ctx, local, empirical_risk(self.loss, ctx, before, batch), self.optimizer)

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Local
    ) -> tuple[Variables, Variables]:
        """Sends the change of what the message holds; keeps the BatchNorm layers."""
        return delta(message, local.variables), split(local.variables, batch_norm_names(ctx.task))[0]

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """The network with the client's BatchNorm layers; without a client with their mean, or the initial ones."""
        return overlay(ctx.task.initial, message, client)
