"""What local training is made of: the local state, one step, and the two halves of averaging."""

from __future__ import annotations  # torch's compiler cannot follow inner functions whose annotations are evaluated

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Batch, Context, Metrics
from fedtail.losses import Loss
from fedtail.optim import Optimizer, Params, Partition
from fedtail.task import Variables
from fedtail.trees import Tree

Objective = Callable[[Variables, Tree], tuple[Tensor, tuple[Variables, Tree, Metrics]]]


class Local(NamedTuple):
    """A client's state within one round."""

    variables: Variables
    optimizer: Tree
    extra: Tree  # whatever else the method advances batch by batch, () if nothing


def start(
    optimizer: Optimizer, variables: Variables, extra: Tree = (), trainable: Iterable[str] | None = None
) -> Local:
    """Returns a local state with a fresh optimizer over the trainable names (None: all)."""
    params = variables.params if trainable is None else {name: variables.params[name] for name in trainable}
    return Local(variables, optimizer.init(params), extra)


def sgd_step(
    ctx: Context,
    local: Local,
    objective: Objective,
    optimizer: Optimizer,
    correct: Callable[[Params], Params] | None = None,
    trainable: Iterable[str] | None = None,
) -> tuple[Local, Metrics]:
    """Makes one optimizer step on an objective.

    Args:
        ctx: the context of the call.
        local: the local state.
        objective: `(variables, extra) -> (scalar, (variables with new buffers, extra, metrics))`.
        optimizer: whose state `local.optimizer` is.
        correct: changes the gradients before the step (SCAFFOLD's control variates).
        trainable: names to differentiate and step; the others stay. None: all.

    Returns:
        (new local state, metrics with "loss", the objective's value).
    """
    params = local.variables.params
    free = {k: params[k] for k in (params if trainable is None else trainable)}
    fixed = {k: v for k, v in params.items() if k not in free}

    def function(free: Params) -> tuple[Tensor, Any]:
        value, (variables, extra, metrics) = objective(
            Variables({**fixed, **free}, local.variables.buffers), local.extra
        )
        return value, (variables.buffers, extra, metrics)

    value, (buffers, extra, metrics), grads = ctx.task.value_and_grad(function, free)
    if correct is not None:
        grads = correct(grads)
    free, state = ctx.task.update(optimizer, grads, local.optimizer, free, ctx.round.lr_scale)
    new = {k: free.get(k, v) for k, v in params.items()}
    return Local(Variables(new, buffers), state, extra), {"loss": value, **metrics}


def parts_step(
    ctx: Context,
    local: Local,
    objective: Objective,
    optimizer: Optimizer,
    active: Mapping[str, Tensor],
    trainable: Iterable[str] | None = None,
) -> tuple[Local, Metrics]:
    """Makes one step of those parts of a network whose turn it is; the others keep value and optimizer state bit for bit.

    Whose turn it is may hang on the step's number, which is a tensor: every part is stepped, and those that wait are put
    back. So a step costs the same whoever moves, and no momentum or weight decay moves who waits.

    Args:
        ctx: the context of the call.
        local: the local state; it starts with the optimizer `parted(optimizer, active)`.
        objective: as in `sgd_step`.
        optimizer: what each part steps with, by itself.
        active: from the beginning of a part's names (the longest that fits counts) to whether it moves, bool ().
        trainable: as in `sgd_step`.

    Returns:
        (new local state, metrics with "loss").
    """
    copy = trees.clone(local)  # an engine may overwrite what is stepped
    new, metrics = sgd_step(ctx, copy, objective, parted(optimizer, active), trainable=trainable)

    def chosen(part: str, old: Tree, new: Tree) -> Tree:
        return trees.tree_map(lambda a, b: torch.where(active[part], b, a), old, new)

    def part_of(name: str) -> str:
        return max((part for part in active if name.startswith(part)), key=len)

    params = {k: chosen(part_of(k), v, new.variables.params[k]) for k, v in local.variables.params.items()}
    states = {part: chosen(part, state, new.optimizer[part]) for part, state in local.optimizer.items()}
    return Local(Variables(params, new.variables.buffers), states, new.extra), metrics


def parted(optimizer: Optimizer, parts: Iterable[str]) -> Optimizer:
    """Returns the optimizer with a state of its own for each part, the parameters whose names begin so."""
    return Partition(parts=dict.fromkeys(parts, optimizer))


def empirical_risk(loss: Loss, ctx: Context, model: Variables, batch: Batch) -> Objective:
    """Returns the objective of a client that minimises a loss and nothing else.

    Args:
        loss: the method's option `loss`.
        ctx: the context of the step.
        model: the broadcast model.
        batch: the mini-batch.
    """

    def objective(variables: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
        risk, variables = loss.risk(ctx, model, variables, batch)
        return risk, (variables, extra, {})

    return objective


def squared_distance(params: Params, anchor: Params) -> Tensor:
    """Returns ||w - w^t||^2 over all parameters of the anchor w^t, shape (): what a proximal term is made of."""
    return torch.stack([(params[k] - w).square().sum() for k, w in anchor.items()]).sum()


def effective_steps(tau: Tensor, momentum: float) -> Tensor:
    """Returns FedNova's a_k for tau steps of SGD: by how much a constant gradient moves the model, over the learning rate.

    Sum over s = 1..tau of (1 - momentum^s) / (1 - momentum), in closed form; tau itself without momentum (Wang et al.,
    NeurIPS 2020, section 4).
    """
    wide = tau.double()  # a difference of nearly equal numbers for few steps and a momentum near 1
    return ((wide - momentum * (1 - momentum**wide) / (1 - momentum)) / (1 - momentum)).to(tau.dtype)


def delta(message: Variables, variables: Variables) -> Variables:
    """Returns a client's update, of what the message holds: the change of the parameters, and the buffers as they are."""
    return Variables(
        {k: variables.params[k] - v for k, v in message.params.items()},
        {k: variables.buffers[k] for k in message.buffers},
    )


def descend(server: Variables, mean: Variables, server_lr: float = 1.0) -> Variables:
    """Returns w + server_lr * (mean change); buffers are replaced by their mean, whatever the rate."""
    return Variables({k: v + server_lr * mean.params[k] for k, v in server.params.items()}, dict(mean.buffers))


def split(variables: Variables, names: Collection[str]) -> tuple[Variables, Variables]:
    """Returns (the tensors of these names, all others): what is shared and what is private, or the other way round."""
    kept, rest = (
        Variables(*({k: v for k, v in tensors.items() if (k in names) is inside} for tensors in variables))
        for inside in (True, False)
    )
    return kept, rest


def overlay(*parts: Variables | tuple[()] | None) -> Variables:
    """Returns one network from parts: a later tensor takes the place of an earlier one of its name; None and () add none."""
    found = [part for part in parts if part]
    return Variables(
        {k: v for part in found for k, v in part.params.items()},
        {k: v for part in found for k, v in part.buffers.items()},
    )
