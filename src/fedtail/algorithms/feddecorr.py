"""FedDecorr: a penalty on correlated features, against the collapse of their dimensions under label skew.

Shi, Liang, Zhang, Tan and Bai, "Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous Federated
Learning", ICLR 2023 (arXiv 2210.00226). h: features [B, d] of a batch.

    client   Z = (h - mean h) / sqrt(var h + 1e-8) over the batch, var divided by B - 1;   G = Z^T Z   [d, d]
             L = loss + beta (1/B) mean_{a != b} G_ab^2                                    B = 1: no penalty
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

G is not divided by B before it is squared (the authors' code), so the penalty grows with the batch: of two equal features,
(B - 1)^2 / B.

Differences from the paper: `loss`; the penalty is in the form of the authors' code. Differences from the authors' code: none
known.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.heads import feature_size, head_names, logits
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Task, Variables
from fedtail.trees import Tree


def correlation(h: Tensor, batch: Batch) -> Tensor:
    """Returns (1/B) mean_{a != b} G_ab^2 of features [B, d], shape (); 0 for one example or one feature."""
    size, d = batch.size, h.shape[-1]
    centred = h - batch.mean(h)
    variance = batch.sum(centred.square()) / (size - 1).clamp(min=1)
    scaled = centred / (variance + 1e-8).sqrt()
    if batch.mask is not None:
        scaled = scaled * batch.mask[:, None]
    off = (scaled.mT @ scaled).square() * (1 - torch.eye(d, dtype=h.dtype, device=h.device))
    return off.sum() / max(d * (d - 1), 1) / size


@dataclass(frozen=True, kw_only=True)
class FedDecorr(Algorithm):
    """FedAvg with a penalty on the correlation of the features within a batch."""

    loss: Loss = CrossEntropy()
    """What a client minimises beside the penalty (fedtail list losses); the paper has cross-entropy."""
    beta: float = 0.1
    """Weight of the penalty, >= 0; the authors have .1, and .05 for CIFAR-100; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"FedDecorr.beta must be in [0, inf), got {self.beta}.")

    def constants(self, task: Task, rng: np.random.Generator) -> Tree:
        """None; refuses a model without features."""
        feature_size(task, "FedDecorr")
        return ()

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on both terms."""

        def objective(v: Variables, extra: Tree) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            z = logits(ctx.task, {name: v.params[name] for name in head_names(ctx.task, "FedDecorr")}, h)
            penalty = correlation(h, batch)
            risk = self.loss(ctx, message, z, batch) + self.beta * penalty
            return risk, (new, extra, {"correlation": penalty.detach()})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
