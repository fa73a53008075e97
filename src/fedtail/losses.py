"""Losses, each with its equation. `z` are logits [batch, classes], `y` labels (batch,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtail.algorithm import Batch
from fedtail.task import Variables, Worker


def one_hot(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Returns labels (batch,) as [batch, classes] of zeros and ones; works under vmap, unlike torch's own."""
    return (y[..., None] == torch.arange(num_classes, device=y.device)).to(dtype)


def cross_entropy(task: Worker, variables: Variables, batch: Batch) -> tuple[Tensor, Variables]:
    """Returns (mean over the batch of -log softmax(z)_y, variables with new buffers) of the network in training mode."""
    z, variables = task.apply(variables, batch.x, draws=batch.draws)
    if batch.mask is None:
        return F.cross_entropy(z, batch.y), variables
    return batch.mean(F.cross_entropy(z, batch.y, reduction="none")), variables


def binary_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Returns -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)) for each entry, computed stably; shape of z."""
    return F.binary_cross_entropy_with_logits(z, target, reduction="none")
