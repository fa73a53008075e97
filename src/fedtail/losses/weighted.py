"""Losses that change how much an example counts, or what its target is."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtail.algorithm import Batch, Context
from fedtail.losses.base import Loss, counts_of, require
from fedtail.task import Variables


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """Returns (1 - beta) / (1 - beta^n_c) for each class, (classes,); 0 for missing ones."""
    held = counts > 0
    number = -torch.expm1(counts * math.log(beta))  # 1 - beta^n without the loss of digits
    return torch.where(held, (1 - beta) / torch.where(held, number, 1.0), 0.0)


def _weighted(z: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """Returns sum_i v_{y_i} CE_i / sum_i v_{y_i} with the class weights v (classes,)."""
    each = weights[batch.y]
    return batch.sum(each * F.cross_entropy(z, batch.y, reduction="none")) / batch.sum(each)


@dataclass(frozen=True, kw_only=True)
class Focal(Loss):
    """Focal loss: easy examples count less, -(1 - p_y)^gamma log p_y.

    Lin, Goyal, Girshick, He and Dollar, "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv 1708.02002); on
    federations: Sarkar, Narang and Rai, "Fed-Focal Loss for imbalanced data classification in Federated Learning", 2020
    (arXiv 2011.06283). gamma = 0 is the cross-entropy.

    Differences from the papers: softmax instead of one sigmoid a class; no class weights (the first paper's alpha); no
    choice of clients by their losses (the second's).
    """

    gamma: float = 2.0
    """How fast an example loses its weight as it becomes certain, >= 0; 2 is the paper's."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma < math.inf, "Focal.gamma", "[0, inf)", self.gamma)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        each = F.cross_entropy(z, batch.y, reduction="none")  # -log p_y
        wrong = (-torch.expm1(-each)).clamp(min=torch.finfo(z.dtype).tiny)  # 1 - p_y; at 0 a power may have no slope
        return batch.mean(wrong**self.gamma * each)


@dataclass(frozen=True, kw_only=True)
class ClassWeighted(Loss):
    """Class-weighted cross-entropy, sum_i v_{y_i} CE_i / sum_i v_{y_i}, with weights from the client's own counts.

    "inverse": v_c = 1 / n_c. "effective": v_c = (1 - beta) / (1 - beta^n_c); Cui, Jia, Lin, Song and Belongie,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (arXiv 1901.05555). Missing classes: v_c = 0.
    Equal counts give the cross-entropy.

    Differences from the paper: counts are the client's own; it divides by the batch's size and lets the weights sum
    to the number of classes; divided by the sum of the weights, as a class-weighted mean usually is, their scale
    drops out.
    """

    by: Literal["inverse", "effective"] = "inverse"
    """Inverse frequency, or the inverse effective number of examples."""
    beta: float = 0.9999
    """Of the effective number, in (0, 1): near 0 weighs all classes alike, near 1 as "inverse"; .9999 is the paper's."""

    def __post_init__(self) -> None:
        require(0 < self.beta < 1, "ClassWeighted.beta", "(0, 1)", self.beta)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        n = ctx.here.counts
        if self.by == "effective":
            return _weighted(z, batch, effective_weights(n, self.beta))
        return _weighted(z, batch, torch.where(n > 0, 1 / n.clamp(min=1), 0.0))


@dataclass(frozen=True, kw_only=True)
class FedIR(Loss):
    """Importance re-weighting: class-weighted cross-entropy with v_c = pi_c / q_kc, the global over the local share.

    Hsu, Qi and Brown, "Federated Visual Classification with Real-World Data Distribution", ECCV 2020 (arXiv 2003.08082).
    sum_i v_{y_i} CE_i / sum_i v_{y_i}. The population's class counts are shared with all clients. Clients whose shares
    are the global ones minimise the cross-entropy.

    Differences from public code: a batch of one class has the cross-entropy's gradient, whatever its weight, because
    of the division by the sum, which is that of a class-weighted mean; missing classes have weight 0 (it gives them
    the smallest count that is not 0); training starts from scratch unless the experiment names a run to start from.
    """

    @property
    def shares_counts(self) -> bool:
        """Always."""
        return True

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        own, everyone = ctx.here.counts, counts_of(ctx, "shared")
        ratio = (everyone / everyone.sum()) / (own.clamp(min=1) / own.sum())
        return _weighted(z, batch, torch.where(own > 0, ratio, 0.0))


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Loss):
    """Label smoothing: cross-entropy with the target (1 - epsilon) [c = y] + epsilon / classes.

    Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016
    (arXiv 1512.00567). It knows no counts. epsilon = 0 is the cross-entropy. Differences from the paper: none.
    """

    epsilon: float = 0.1
    """Share of the target that is spread over all classes, in [0, 1); .1 is the paper's."""

    def __post_init__(self) -> None:
        require(0 <= self.epsilon < 1, "LabelSmoothing.epsilon", "[0, 1)", self.epsilon)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        return batch.mean(F.cross_entropy(z, batch.y, reduction="none", label_smoothing=self.epsilon))
