"""Losses that shift or scale the logits of training by class counts; prediction takes the plain ones."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtail.algorithm import Batch, Context
from fedtail.errors import ConfigError
from fedtail.losses.base import EXCLUDED, Loss, counts_of, mean_cross_entropy, one_hot, require
from fedtail.losses.weighted import effective_weights
from fedtail.task import Variables


def analyse(weight: Tensor) -> Tensor:
    """Fed-GraB's direct prior analyser: returns the class shares that a classifier's rows [classes, d] tell.

    pi_c = (nu_c - min nu) / sum_j (nu_j - min nu) with nu_c = ||W_c||, (classes,); uniform if all are equal.
    """
    norms = torch.linalg.vector_norm(weight, dim=1)
    shifted = norms - norms.min()
    total = shifted.sum()
    return torch.where(total > 0, shifted / total.clamp(min=torch.finfo(norms.dtype).tiny), 1 / len(norms))


@dataclass(frozen=True, kw_only=True)
class LDAM(Loss):
    """Label-distribution-aware margins: cross-entropy on scale * (z_c - [c = y] m_c), wide margins for rare classes.

    Cao, Wei, Gaidon, Arechiga and Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS
    2019 (arXiv 1906.07413). m_c = max_margin n_c^(-1/4) / max_j n_j^(-1/4), the maximum over classes that are not missing;
    a missing class is no example's label, so it has no margin, and it stays in the softmax. `drw` (LDAM-DRW): in the last
    20 % of the rounds an example's loss is multiplied by (1 - beta) / (1 - beta^{n_y}), scaled so that the mean over the
    classes that are not missing is 1. max_margin = 0, scale = 1 is the cross-entropy.

    Differences from the paper: margins and weights come from the client's own counts (`counts = "shared"`: from the
    whole set's, as there). From the authors' code: the classifier is the model's own (theirs has normalised rows and
    features, which bounds z); re-weighted losses are divided by the batch's size (theirs by the sum of the weights).
    """

    max_margin: float = 0.5
    """Margin of the rarest class, >= 0; .5 in the authors' code."""
    scale: float = 30.0
    """Factor on the logits, > 0; 30 in the authors' code."""
    drw: bool = False
    """Deferred re-weighting in the last 20 % of the rounds."""
    beta: float = 0.9999
    """Of the deferred weights, in (0, 1); .9999 in the authors' code."""
    counts: Literal["local", "shared"] = "local"
    """Whose class counts: the client's own, or the population's (which are then shared)."""

    def __post_init__(self) -> None:
        require(0 <= self.max_margin < math.inf, "LDAM.max_margin", "[0, inf)", self.max_margin)
        require(0 < self.beta < 1, "LDAM.beta", "(0, 1)", self.beta)
        require(0 < self.scale < math.inf, "LDAM.scale", "(0, inf)", self.scale)

    @property
    def shares_counts(self) -> bool:
        """Only for `counts = "shared"`."""
        return self.counts == "shared"

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        n = counts_of(ctx, self.counts)
        held = n > 0
        root = torch.where(held, n.clamp(min=1) ** -0.25, 0.0)
        margin = self.max_margin * root / root.max()
        each = F.cross_entropy(self.scale * (z - one_hot(batch.y, len(n), z.dtype) * margin), batch.y, reduction="none")
        if self.drw and 5 * (ctx.round.index + 1) > 4 * ctx.round.rounds:
            weights = effective_weights(n, self.beta)
            each = each * (weights * held.sum() / weights.sum())[batch.y]
        return batch.mean(each)


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(Loss):
    """Balanced softmax: cross-entropy on z_c + gamma log n_c with the client's counts, missing classes excluded.

    Ren, Yu, Sheng, Ma, Zhao, Yi and Li, "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020 (arXiv
    2007.10740). Prediction takes the plain z. Equal counts of all classes give the cross-entropy. A client of one class
    has gradient 0 exactly: with one class a client nothing is learned, which is no fault.

    Differences from the paper: `gamma` (public code has it; 1 is the paper's); counts are the client's own.
    """

    gamma: float = 1.0
    """Exponent of the counts, >= 0; 0 excludes missing classes and does no more."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma < math.inf, "BalancedSoftmax.gamma", "[0, inf)", self.gamma)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        n = ctx.here.counts
        return mean_cross_entropy(torch.where(n > 0, z + self.gamma * n.clamp(min=1).log(), EXCLUDED), batch)


@dataclass(frozen=True, kw_only=True)
class LogitAdjustment(Loss):
    """Logit adjustment: cross-entropy on z_c + tau log pi_c, where pi are class shares.

    Menon, Jayasumana, Rawat, Jain, Veit and Kumar, "Long-tail learning via logit adjustment", ICLR 2021 (arXiv
    2007.07314). Prediction takes the plain z. `prior` says whose shares: the client's or the population's counts (1 is
    added to counts of 0, so no class is excluded), `given` ones, or "estimated": what Fed-GraB's prior analyser reads off
    the broadcast classifier's rows, pi_c + epsilon / classes, for the smallest row gives 0; uniform, hence the
    cross-entropy, while the norms are flat (max / min < 1.1). tau = 0 and equal shares are the cross-entropy.

    Differences from the paper: several clients and sources of pi; its post-hoc form (adjusting at prediction) is no loss.
    """

    tau: float = 1.0
    """Strength, >= 0; 1 is the paper's."""
    prior: Literal["local", "shared", "given", "estimated"] = "local"
    """Where the shares come from; "shared": the population's counts are shared with all clients."""
    given: tuple[float, ...] = ()
    """For prior = "given": one number > 0 a class, in proportion to the shares."""
    epsilon: float = 0.1
    """For prior = "estimated": what a share has added, in units of 1 / classes, > 0."""

    def __post_init__(self) -> None:
        require(0 <= self.tau < math.inf, "LogitAdjustment.tau", "[0, inf)", self.tau)
        require(0 < self.epsilon < math.inf, "LogitAdjustment.epsilon", "(0, inf)", self.epsilon)
        if not all(share > 0 and math.isfinite(share) for share in self.given):
            raise ConfigError(f"LogitAdjustment.given must hold finite numbers > 0, got {self.given}.")
        if self.prior == "given" and not self.given:
            raise ConfigError('LogitAdjustment.prior = "given" needs the shares: given = [0.6, 0.3, 0.1].')

    @property
    def shares_counts(self) -> bool:
        """Only for `prior = "shared"`."""
        return self.prior == "shared"

    def shares(self, ctx: Context, model: Variables, z: Tensor) -> Tensor:
        """Returns pi up to a factor, which a softmax does not see; (classes,), all > 0."""
        classes = z.shape[-1]
        if self.prior in ("local", "shared"):
            return counts_of(ctx, self.prior).clamp(min=1)
        if self.prior == "given":
            if len(self.given) != classes:
                raise ConfigError(
                    f"LogitAdjustment.given has {len(self.given)} shares, but there are {classes} classes."
                )
            return torch.tensor(self.given, dtype=z.dtype, device=z.device)
        if ctx.task.classifier is None:
            raise ConfigError('LogitAdjustment.prior = "estimated" reads the classifier\'s rows, but the model has no linear '
                              "layer with one output a class. Name it in the model's attribute `classifier`.")  # fmt: skip
        rows = model.params[f"{ctx.task.classifier}.weight"]
        norms = torch.linalg.vector_norm(rows, dim=1)
        return torch.where(norms.max() < 1.1 * norms.min(), 1.0, analyse(rows) + self.epsilon / classes)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        return mean_cross_entropy(z + self.tau * self.shares(ctx, model, z).log(), batch)


@dataclass(frozen=True, kw_only=True)
class FedLC(Loss):
    """Logits calibration: cross-entropy on z_c - tau n_c^(-1/4) with the client's counts, missing classes excluded.

    Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits Calibration", ICML
    2022 (arXiv 2209.00189). With all classes held, tau = 0 and equal counts are the cross-entropy. A client of one class
    has gradient 0 exactly: with one class a client nothing is learned, which is no fault.

    Differences from the paper: the true class stays in the softmax's denominator; without it the gradient on the true
    logit is -1 for ever and the logits grow without bound.
    """

    tau: float = 1.0
    """Strength of the calibration, >= 0."""

    def __post_init__(self) -> None:
        require(0 <= self.tau < math.inf, "FedLC.tau", "[0, inf)", self.tau)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        n = ctx.here.counts
        return mean_cross_entropy(torch.where(n > 0, z - self.tau * n.clamp(min=1) ** -0.25, EXCLUDED), batch)


@dataclass(frozen=True, kw_only=True)
class FedRS(Loss):
    """Restricted softmax: cross-entropy on a_c z_c, a_c = 1 for the client's own classes and alpha for missing ones.

    Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data", KDD 2021. `soft`:
    a_c = alpha + (1 - alpha) n_c / max n. Prediction takes the plain z. alpha = 1 is the cross-entropy.

    Differences from the authors' code: the logits include the classifier's bias (theirs are without); it has the soft form.
    """

    alpha: float = 0.5
    """Factor on the logits of missing classes, in [0, 1]."""
    soft: bool = False
    """Factors in proportion to the counts instead of 1 or alpha."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "FedRS.alpha", "[0, 1]", self.alpha)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        n = ctx.here.counts
        share = n / n.max() if self.soft else (n > 0).to(z.dtype)
        return mean_cross_entropy((self.alpha + (1 - self.alpha) * share) * z, batch)
