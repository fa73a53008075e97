"""The surgery of the two-stage lightweight CNN: two trained branches become one network. Pure functions of tensors."""

import dataclasses

from torch import Tensor

from fedtail.errors import ConfigError
from fedtail.models.branches import Dual, Unified, glorot_limit
from fedtail.task import Task, Variables, Worker


def dual_task(task: Task, method: str) -> Task:
    """Returns the task of the unified network's two branches, side by side, with dense classifiers.

    Initial values are the unified network's; a classifier that is a convolution there gets the wider Glorot-uniform
    interval of a dense layer.

    Args:
        task: of a unified network.
        method: who wants it, for the message.

    Raises:
        ConfigError: the network is another one.
    """
    if not isinstance(task.module, Unified):
        raise ConfigError(f"{method} works on a network of two branches, got {type(task.module).__name__}. Set model.name = "
                          '"unified"; its option `branch` takes any network.')  # fmt: skip
    module: Dual = task.module.dual()
    params = {k: _dense(task.initial.params[k], p) for k, p in module.named_parameters()}
    buffers = {k: task.initial.buffers[k] for k, _ in module.named_buffers()}
    dropout = {k: v for k, v in task.dropout.items() if k.startswith(("branch1.", "branch2."))}
    stages = tuple(tuple(group) for group in module.stages())
    return dataclasses.replace(task, module=module, initial=Variables(params, buffers), classifier=None, stages=stages,
                               dropout=dropout)  # fmt: skip


def _dense(value: Tensor, like: Tensor) -> Tensor:
    if value.shape == like.shape:
        return value
    return value.reshape(like.shape) * (glorot_limit(like.shape) / glorot_limit(value.shape))


def transplant(task: Worker, dual: Variables, unified: Variables, heads: str = "both") -> Variables:
    """Returns the unified network with trained branches.

    A classifier [C, 20 h h] becomes the convolution [C, 20, h, h] of the same numbers: its output before the ReLU is the
    branch's logits.

    Args:
        task: of the two branches, as `dual_task` makes it.
        dual: the trained branches.
        unified: the network with initial values, of which the hidden layer and the head stay.
        heads: "first" leaves the second branch's classifier as it is in `unified` too.
    """
    left = {k for k in task.stages[-1] if k.startswith("branch2.")} if heads == "first" else set[str]()
    taken = {k: v for k, v in dual.params.items() if k not in left}
    params = {k: taken[k].reshape(v.shape) if k in taken else v for k, v in unified.params.items()}
    return Variables(params, {**unified.buffers, **dual.buffers})
