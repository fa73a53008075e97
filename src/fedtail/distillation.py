"""What methods share that let a model learn from a teacher's outputs: the terms of the loss, and a server's step on them.

z, t: logits of student and teacher [batch, classes]; T: temperature; h, f: their features [batch, d_s], [batch, d];
P [d, d_s]: a projector.

    distil         T^2 mean KL(softmax(t / T) || softmax(z / T)),   with the gradient T (softmax(z / T) - softmax(t / T)) / B
    match          mean (1 - cos(P h, f))
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail import trees
from fedtail.algorithm import Batch, Context, Metrics, as_tensor
from fedtail.errors import ConfigError
from fedtail.heads import logits
from fedtail.local import Local, Objective, sgd_step
from fedtail.optim import Optimizer, Params
from fedtail.task import Variables
from fedtail.trees import Tree

PROJECTOR = "teacher.projector"  # P's name among the parameters of a server's step


def distil(z: Tensor, t: Tensor, temperature: float, batch: Batch) -> Tensor:
    """Returns T^2 KL(softmax(t / T) || softmax(z / T)), the mean over the batch, shape ()."""
    teacher, student = (torch.log_softmax(v / temperature, -1) for v in (t, z))
    return temperature**2 * batch.mean((teacher.exp() * (teacher - student)).sum(-1))


def match(h: Tensor, projector: Tensor, f: Tensor, batch: Batch) -> Tensor:
    """Returns 1 - cos(P h, f), the mean over the batch, shape ()."""
    return batch.mean(1 - F.cosine_similarity(h @ projector.T, f, dim=-1))


def projector(ctx: Context, rng: np.random.Generator) -> Params:
    """Returns P [d, d_s] under its name, uniform within 1 / sqrt(d_s) of zero.

    Raises:
        ConfigError: the teacher has no features, or the student no classifier.
    """
    if "teacher_features" not in ctx.round.columns:
        raise ConfigError("lam_feat > 0 needs a teacher with features; this one gives class scores alone. Set it to 0.")
    if ctx.task.classifier is None:
        raise ConfigError("lam_feat > 0 needs the student's features, but the model has no linear layer with one output a "
                          "class. Name it in the model's attribute `classifier`, or set lam_feat = 0.")  # fmt: skip
    size, (width,) = (
        ctx.task.initial.params[f"{ctx.task.classifier}.weight"].shape[1],
        ctx.round.columns["teacher_features"],
    )
    values = rng.uniform(-(size**-0.5), size**-0.5, (width, size))
    return {PROJECTOR: as_tensor(values, ctx.task.dtype, ctx.task.device)}


def outputs(ctx: Context, v: Variables, batch: Batch) -> tuple[Tensor, Tensor, Variables]:
    """Returns (logits, features, variables with new buffers) of one pass through the network in training mode."""
    h, v = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
    return logits(ctx.task, v.params, h), h, v


def cosine(ctx: Context) -> float:
    """Returns the factor of a learning rate that falls from 1 towards 0 over the round's server steps."""
    return (1 + math.cos(math.pi * ctx.round.step / ctx.round.steps)) / 2


def server_descent(
    ctx: Context, model: Variables, state: Tree, objective: Objective, optimizer: Optimizer, decay: bool
) -> tuple[Local, Metrics]:
    """Makes one step on the server; the optimizer's state is fresh in every round.

    Args:
        ctx: of `server_step`.
        model: what is trained; may hold parameters of its own beside the network's.
        state: the optimizer's, of the step before.
        objective: as in `sgd_step`.
        optimizer: what to step with.
        decay: whether the learning rate falls by `cosine`.
    """
    if ctx.round.step == 0:
        state = optimizer.init(model.params)
    scale = ctx.round.lr_scale * (cosine(ctx) if decay else 1.0)
    return sgd_step(
        ctx._replace(round=ctx.round._replace(lr_scale=scale)), Local(model, state, ()), objective, optimizer
    )


def weighted_mean(updates: Sequence[Tree], weights: Tensor) -> Tree:
    """Returns sum(w_i u_i) / sum(w_i) of collected updates, as the engine computes it; integers are rounded."""
    each = [float(w) for w in weights]

    def one(*leaves: Tensor) -> Tensor:
        if len(leaves) == 1:
            return leaves[0]
        wide = [leaf if leaf.is_floating_point() else leaf.double() for leaf in leaves]
        mean = wide[0] * each[0]
        for weight, leaf in zip(each[1:], wide[1:], strict=True):
            mean = mean.add(leaf, alpha=weight)
        mean = mean / sum(each)
        return mean if leaves[0].is_floating_point() else mean.round().to(leaves[0].dtype)

    return trees.tree_map(one, *updates)
