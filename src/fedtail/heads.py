"""The classifier apart from the backbone: what the methods share that replace or retrain it.

A head is a dict of parameters under the names that they have in the model, so that it can take the model's place there.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import as_tensor
from fedtail.errors import ConfigError
from fedtail.optim import SGD, Params
from fedtail.task import Task, Variables, Worker


def head_names(task: Task | Worker, method: str) -> list[str]:
    """Returns the names of the classifier's weight and, if it has one, bias.

    Raises:
        ConfigError: the model has no classifier; `method` is who wants one.
    """
    if task.classifier is None:
        raise ConfigError(f"{method} works on the classifier, but the model has no linear layer with one output a class. "
                          "Name it in the model's attribute `classifier`.")  # fmt: skip
    return [name for name in (f"{task.classifier}.weight", f"{task.classifier}.bias") if name in task.initial.params]


def feature_size(task: Task, method: str) -> int:
    """Returns the number d of features that reach the classifier.

    Raises:
        ConfigError: the model has no classifier, or no method `features` that gives its input.
    """
    names = head_names(task, method)
    size = task.initial.params[names[0]].shape[1]
    if not (callable(getattr(task.module, "features", None)) and _features_reach_head(task, names, size)):
        raise ConfigError(f"{method} works on features, but {type(task.module).__name__} has no method `features` that returns "
                          f"what its classifier is applied to, [batch, {size}]. Give it one.")  # fmt: skip
    return size


def _features_reach_head(task: Task, names: list[str], size: int) -> bool:
    """Says, by one try, whether the logits are the classifier of the features."""
    worker = task.worker()
    count = 2 * math.prod(task.input_shape)
    x = torch.linspace(-1, 2, count, dtype=task.dtype, device=task.device).reshape(2, *task.input_shape)
    with torch.no_grad():
        h = features(worker, task.initial, x)
        if h.shape != (2, size):
            return False
        z = worker.apply(task.initial, x, train=False)[0]
        return torch.allclose(logits(worker, {name: task.initial.params[name] for name in names}, h), z, atol=1e-4)


def fresh_head(task: Task | Worker, rng: np.random.Generator, method: str) -> Params:
    """Returns a new head with PyTorch's initial values: uniform within 1 / sqrt(d) of zero."""
    initial = {name: task.initial.params[name] for name in head_names(task, method)}
    bound = initial[f"{task.classifier}.weight"].shape[1] ** -0.5
    return {k: as_tensor(rng.uniform(-bound, bound, v.shape), task.dtype, task.device) for k, v in initial.items()}


def with_head(model: Variables, head: Params) -> Variables:
    """Returns the model with another head."""
    return Variables({**model.params, **head}, model.buffers)


def features(task: Worker, model: Variables, x: Tensor) -> Tensor:
    """Returns the features [batch, d] of inputs, in evaluation mode."""
    return task.apply(model, x, part="features", train=False)[0]


def logits(task: Worker, head: Params, h: Tensor) -> Tensor:
    """Returns the logits [..., classes] of features [..., d]."""
    return F.linear(h, head[f"{task.classifier}.weight"], head.get(f"{task.classifier}.bias"))


def minimise(task: Worker, function: Callable[[Params], Tensor], params: Params, lr: float, steps: int) -> Params:
    """Returns the parameters after steps of plain gradient descent on a function of them."""
    optimizer = SGD(lr=lr, momentum=0.0)
    state = optimizer.init(params)
    for _ in range(steps):
        _, _, grads = task.value_and_grad(lambda p: (function(p), {}), params)
        params, state = task.update(optimizer, grads, state, params)
    return params


def fit_head(task: Worker, head: Params, h: Tensor, weight: Tensor, lr: float, steps: int) -> Params:
    """Trains a head on features by plain gradient descent on the weighted mean cross-entropy.

    Args:
        task: the server's worker.
        head: where to begin.
        h: features [classes, count, d].
        weight: of each class's features, (classes,); all zero leaves the head as it is.
        lr: learning rate.
        steps: number of steps, each on all features.
    """
    y = torch.arange(len(h), device=h.device).repeat_interleave(h.shape[1])
    each = weight.repeat_interleave(h.shape[1])

    def risk(params: Params) -> Tensor:
        losses = F.cross_entropy(logits(task, params, h.flatten(0, 1)), y, reduction="none")
        return (losses * each).sum() / each.sum().clamp(min=1)

    return minimise(task, risk, head, lr, steps)
