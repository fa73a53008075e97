"""What all losses share: the class `Loss`, the cross-entropy, and the mathematics that several of them use."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtail.algorithm import Batch, Context
from fedtail.errors import ConfigError
from fedtail.task import Variables, Worker

EXCLUDED = -1e30  # the logit of an excluded class: its exponential is 0 exactly, and 0 times it is no NaN, as of -inf


def one_hot(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Returns labels (batch,) as [batch, classes] of zeros and ones; works under vmap, unlike torch's own."""
    return (y[..., None] == torch.arange(num_classes, device=y.device)).to(dtype)


def mean_cross_entropy(z: Tensor, batch: Batch) -> Tensor:
    """Returns the mean over the batch of -log softmax(z)_y, shape ()."""
    if batch.mask is None:
        return F.cross_entropy(z, batch.y)
    return batch.mean(F.cross_entropy(z, batch.y, reduction="none"))


def cross_entropy(task: Worker, variables: Variables, batch: Batch) -> tuple[Tensor, Variables]:
    """Returns (mean cross-entropy, variables with new buffers) of the network in training mode."""
    z, variables = task.apply(variables, batch.x, draws=batch.draws)
    return mean_cross_entropy(z, batch), variables


def binary_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Returns -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)) for each entry, computed stably; shape of z."""
    return F.binary_cross_entropy_with_logits(z, target, reduction="none")


def counts_of(ctx: Context, source: str) -> Tensor:
    """Returns the client's own class counts, or the population's for "shared"; (classes,)."""
    if source != "shared":
        return ctx.here.counts
    assert ctx.round.counts is not None, "an algorithm with such a loss has shares_counts = loss.shares_counts"
    return ctx.round.counts


def require(good: bool, option: str, interval: str, value: float) -> None:
    """Refuses an option's value that does not lie in its interval."""
    if not good:
        raise ConfigError(f"{option} must be in {interval}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """What a client minimises, as a function of the logits."""

    @property
    def shares_counts(self) -> bool:
        """Says whether the loss needs the population's class counts, `ctx.round.counts`."""
        return False

    @abstractmethod
    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        """Returns the loss of a batch, shape ().

        Args:
            ctx: the context of a client's step; `ctx.here.counts` are its own class counts.
            model: the broadcast model, for losses that read the classifier.
            z: logits [batch, classes].
            batch: labels, mask, draws.
        """

    def risk(self, ctx: Context, model: Variables, variables: Variables, batch: Batch) -> tuple[Tensor, Variables]:
        """Returns (loss, variables with new buffers) of the network in training mode."""
        z, variables = ctx.task.apply(variables, batch.x, draws=batch.draws)
        return self(ctx, model, z, batch), variables


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy: the mean of -log p_y."""

    def __call__(self, ctx: Context, model: Variables, z: Tensor, batch: Batch) -> Tensor:
        return mean_cross_entropy(z, batch)
