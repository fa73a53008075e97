"""Losses, each with its equation. `z` are logits [batch, classes], `y` labels (batch,), sums run over classes.

A `Loss` is an option of every method whose clients minimise one (`algorithm.loss`), so it goes with each of them.
p = softmax(z); n_c is the number of training examples of class c, a client's own unless it is said otherwise; a class
with n_c = 0 is *missing*. Where nothing else is written the loss is the mean over the batch.
"""

from fedtail.losses.alignment import FedGA
from fedtail.losses.base import (
    EXCLUDED,
    CrossEntropy,
    Loss,
    binary_cross_entropy,
    cross_entropy,
    mean_cross_entropy,
    one_hot,
)
from fedtail.losses.logits import LDAM, BalancedSoftmax, FedLC, FedRS, LogitAdjustment, analyse
from fedtail.losses.weighted import ClassWeighted, FedIR, Focal, LabelSmoothing, effective_weights

__all__ = [
    "EXCLUDED", "LDAM", "LOSSES", "BalancedSoftmax", "ClassWeighted", "CrossEntropy", "FedGA", "FedIR", "FedLC", "FedRS",
    "Focal", "LabelSmoothing", "LogitAdjustment", "Loss", "analyse", "binary_cross_entropy", "cross_entropy",
    "effective_weights", "mean_cross_entropy", "one_hot",
]  # fmt: skip

LOSSES: dict[str, str] = {
    "cross_entropy": "fedtail.losses.base:CrossEntropy",
    "focal": "fedtail.losses.weighted:Focal",
    "class_weighted": "fedtail.losses.weighted:ClassWeighted",
    "fedir": "fedtail.losses.weighted:FedIR",
    "ldam": "fedtail.losses.logits:LDAM",
    "balanced_softmax": "fedtail.losses.logits:BalancedSoftmax",
    "logit_adjustment": "fedtail.losses.logits:LogitAdjustment",
    "label_smoothing": "fedtail.losses.weighted:LabelSmoothing",
    "fedlc": "fedtail.losses.logits:FedLC",
    "fedrs": "fedtail.losses.logits:FedRS",
    "fedga": "fedtail.losses.alignment:FedGA",
}
"""From the name used in configurations to module:Class."""
