"""A loss that aligns the gradients of a class: those that push it down weigh as much as those that pull it up."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedtail.algorithm import Batch, Context
from fedtail.losses.base import Loss, mean_cross_entropy, one_hot, require
from fedtail.task import Variables


@dataclass(frozen=True, kw_only=True)
class FedGA(Loss):
    """Gradient alignment: -log p_y + strength * sum_c n_c p_c / n_y with the class counts n of the batch.

    Xiao, Zuo and Wang, "FedGA: Federated Learning with Gradient Alignment for Error Asymmetry Mitigation", AAAI 2025 (arXiv
    2412.16582). m = sum_c n_c p_c; the gradient on logit c, of an example, is by `form`

        official   p_c (1 + strength (n_c - m) / n_y) - [c = y]        of the loss above
        exact      p_c (1 + strength (n_c / n_y - 1)) - [c = y]        of no scalar loss; its value is the cross-entropy

    "exact" is the stated idea (the push-down by an example of class y is multiplied with n_c / n_y); "official" is what
    training with the calibrated label of the authors' code does, p_c (1 - n_c / n_y) + [c = y], because soft-label
    cross-entropy back-propagates p times the label's sum. Equal counts of all classes, and strength = 0, give the
    cross-entropy's gradient.

    Differences from the authors' code: the loss in closed form has the gradient of theirs, and a value that is >= 0 (theirs
    may be negative and means nothing); `strength`, `counts` and `form` are additions, the defaults are theirs.
    """

    form: Literal["official", "exact"] = "official"
    """The closed-form loss, or the nominal aligned gradient, which is worse under strong skew."""
    counts: Literal["batch", "client"] = "batch"
    """Whose class counts: the batch's, as in the authors' code, or the client's."""
    strength: float = 1.0
    """Weight of the alignment, >= 0; 1 is the paper's; 0 is the cross-entropy."""

    def __post_init__(self) -> None:
        require(0 <= self.strength < math.inf, "FedGA.strength", "[0, inf)", self.strength)

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        plain = mean_cross_entropy(z, batch)
        if self.strength == 0:
            return plain
        true = one_hot(batch.y, z.shape[-1], z.dtype)
        n = ctx.here.counts if self.counts == "client" else batch.sum(true)
        own = n[batch.y].clamp(min=1)[:, None]  # 0 for padding alone
        p = torch.softmax(z, -1)
        if self.form == "official":
            return plain + self.strength * batch.mean((p * n / own).sum(-1))
        gradient = p * (1 + self.strength * (n / own - 1)) - true
        linear = batch.mean((z * gradient.detach()).sum(-1))
        return plain.detach() + linear - linear.detach()
