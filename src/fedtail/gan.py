"""What adversarial methods share: the losses, one step of each network, what a generator is given, and drift.

    discriminator   L_D = mean_i sp(-D(x_i)) + mean_i sp(D(G(z_i)))        sp(u) = log(1 + e^u), D a logit
    generator       L_G = mean_i sp(-D(G(z_i)))                            the non-saturating loss of Goodfellow et al.

Goodfellow et al., "Generative Adversarial Nets", NeurIPS 2014 (arXiv 1406.2661). Real and generated images pass the
discriminator in calls of their own, so that each has its own batch statistics; both networks stay in training mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Batch, Context, Metrics, Mixture
from fedtail.local import Local, overlay, parted, sgd_step
from fedtail.losses import one_hot
from fedtail.models.gan import with_label
from fedtail.optim import Optimizer, Params
from fedtail.task import Draw, Task, Variables, Worker
from fedtail.trees import Tree

GENERATOR, DISCRIMINATOR = "generator.", "discriminator."


def both(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer with a state of its own for each of the two networks."""
    return parted(optimizer, (GENERATOR, DISCRIMINATOR))


def part(variables: Variables, prefix: str) -> Variables:
    """Returns the tensors of one of the two networks."""
    return Variables(*({k: v for k, v in tensors.items() if k.startswith(prefix)} for tensors in variables))


def names(params: Params, prefix: str) -> list[str]:
    """Returns the names of one network's parameters."""
    return [name for name in params if name.startswith(prefix)]


def latent_size(task: Task) -> int:
    """Returns the number of latents that a pair takes."""
    latent: Any = task.module.latent
    return int(latent)


def latent_draws(task: Task, batch_size: int) -> dict[str, Draw]:
    """Returns the latents of a step: one set for the discriminator's fakes, a fresh one for the generator."""
    noise = Draw("normal", (batch_size, latent_size(task)), per_example=True)
    return {"latent_discriminator": noise, "latent_generator": noise}


def code_of(task: Worker, y: Tensor) -> Tensor | None:
    """Returns labels (B,) as the pair is told them: one-hot [B, C]; None for a pair that is told no class."""
    return one_hot(y, task.num_classes, task.dtype) if task.task.module.conditional else None


def judge(
    task: Worker, v: Variables, x: Tensor, code: Tensor | None, draws: Any, train: bool = True
) -> tuple[Tensor, Variables]:
    """Returns the discriminator's logits (B,) of images, and the variables with the new statistics."""
    logits, v = task.apply(v, with_label(x, code), part="discriminator", train=train, draws=draws)
    return logits[:, 0], v


def fake(task: Worker, v: Variables, z: Tensor, code: Tensor | None, draws: Any) -> tuple[Tensor, Variables]:
    """Returns images of latents [B, latent], and the variables with the new statistics."""
    return task.apply(v, with_label(z, code), part="generator", draws=draws)


def gan_step(ctx: Context, local: Local, batch: Batch, optimizer: Optimizer) -> tuple[Local, Metrics]:
    """Makes one step of the discriminator, then one of the generator with fresh latents.

    Args:
        ctx: the context of the step.
        local: the local state, whose optimizer state is that of `both(optimizer)`.
        batch: real images, with the draws of `latent_draws`.
        optimizer: what each of the two steps with.

    Returns:
        (new local state, metrics "loss" = L_D + L_G, "loss_discriminator", "loss_generator").
    """
    code, params = code_of(ctx.task, batch.y), local.variables.params

    def discriminator(v: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
        images, v = fake(ctx.task, v, batch.draws["latent_discriminator"], code, batch.draws)
        real, v = judge(ctx.task, v, batch.x, code, batch.draws)
        made, v = judge(ctx.task, v, images, code, batch.draws)
        return batch.mean(F.softplus(-real)) + batch.mean(F.softplus(made)), (v, extra, {})

    def generator(v: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
        images, v = fake(ctx.task, v, batch.draws["latent_generator"], code, batch.draws)
        made, v = judge(ctx.task, v, images, code, batch.draws)
        return batch.mean(F.softplus(-made)), (v, extra, {})

    step = both(optimizer)
    local, first = sgd_step(ctx, local, discriminator, step, trainable=names(params, DISCRIMINATOR))
    local, second = sgd_step(ctx, local, generator, step, trainable=names(params, GENERATOR))
    a, b = first["loss"], second["loss"]
    return local, {"loss": a + b, "loss_discriminator": a, "loss_generator": b}


class Trained(NamedTuple):
    """A client's update: the pair as it has become (not its change, so that a single client's mean is itself)."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    moved: Tensor  # () ||theta_k - theta^t|| / ||theta^t||, theta the generator's parameters
    square: Tensor  # () ||theta_k - theta^t||^2


class Drift(NamedTuple):
    """How far the clients' generators went in a round."""

    relative: Tensor  # () mean over clients of ||theta_k - theta^t|| / ||theta^t||
    spread: Tensor  # () root mean square over clients of ||theta_k - mean_j theta_j||


def no_drift(like: Tensor) -> Drift:
    """Returns the drift before any round: zeros."""
    return Drift(like.new_zeros(()), like.new_zeros(()))


def norm_of_change(old: Params, new: Params) -> tuple[Tensor, Tensor]:
    """Returns (||new - old||^2, ||old||^2) over the generator's parameters, each ()."""
    keys = names(old, GENERATOR)
    change = torch.stack([(new[k] - old[k]).square().sum() for k in keys]).sum()
    return change, torch.stack([old[k].square().sum() for k in keys]).sum()


def trained(message: Variables, variables: Variables) -> Trained:
    """Returns a client's update."""
    square, size = norm_of_change(message.params, variables.params)
    return Trained(variables.params, variables.buffers, (square / size).sqrt(), square)


def averaged(message: Variables, mean: Trained) -> tuple[Variables, Drift]:
    """Returns the mean pair, and the drift; the spread is the root of mean_k ||theta_k - theta^t||^2 - ||mean - theta^t||^2."""
    common, _ = norm_of_change(message.params, mean.params)
    return Variables(mean.params, mean.buffers), Drift(mean.moved, (mean.square - common).clamp(min=0).sqrt())


def spread(model: Variables, sent: Variables) -> Drift:
    """Returns the drift of generators [clients, ...] from the common one."""

    def squares(centre: dict[str, Tensor]) -> Tensor:
        return torch.stack([(v - centre[k]).square().flatten(1).sum(1) for k, v in sent.params.items()]).sum(0)

    size = torch.stack([model.params[k].square().sum() for k in sent.params]).sum()
    centre = {k: v.mean(0) for k, v in sent.params.items()}
    return Drift((squares(model.params) / size).sqrt().mean(), squares(centre).mean().sqrt())


def alone(ctx: Context, network: Variables) -> Mixture:
    """Returns the mixture that is one generator, with equal shares for all classes."""
    classes = ctx.task.num_classes
    shares = torch.full((1, classes), 1 / classes, dtype=ctx.task.dtype, device=ctx.task.device)
    own = part(network, GENERATOR)
    return Mixture(shares, Variables(*({k: v[None] for k, v in tensors.items()} for tensors in own)))


class Served(NamedTuple):
    """Images that a generator at the server sends."""

    training: Tensor  # [batch, ...] X_d, for the discriminators' steps
    feedback: Tensor  # [batch, ...] X_g, whose gradients come back
    labels: Tensor  # (batch,) int64, of both; not looked at by pairs that are told no class


def served_draws(task: Task, batch_size: int) -> dict[str, Draw]:
    """Returns a round's latents of two batches, their labels, uniform, and the masks of Dropout layers for both."""
    noise = Draw("normal", (batch_size, latent_size(task)))
    labels = Draw("integers", (batch_size,), high=task.num_classes)
    return {"training": noise, "feedback": noise, "labels": labels, **task.draws(batch_size)}


def serve(ctx: Context, model: Variables) -> Served:
    """Returns the round's two batches of a generator, in training mode."""
    draws, v = ctx.round.draws, overlay(ctx.task.initial, model)
    code = code_of(ctx.task, draws["labels"])
    first, second = (fake(ctx.task, v, draws[name], code, draws)[0] for name in ("training", "feedback"))
    return Served(first, second, draws["labels"])


def follow(
    ctx: Context, model: Variables, state: Tree, feedback: Tensor, optimizer: Optimizer
) -> tuple[Variables, Tree]:
    """Makes a generator's step along the gradient of a loss with respect to its images X_g.

    Args:
        ctx: the server's context.
        model: the generator.
        state: its optimizer's.
        feedback: dL / dX_g, [batch, ...].
        optimizer: what it steps with.

    Returns:
        (the generator with new statistics, the optimizer's new state).
    """
    code = code_of(ctx.task, ctx.round.draws["labels"])

    def product(params: Params) -> tuple[Tensor, Any]:  # its gradient is the feedback, back-propagated
        v = overlay(ctx.task.initial, model, Variables(params, {}))
        images, v = fake(ctx.task, v, ctx.round.draws["feedback"], code, ctx.round.draws)
        return (images * feedback).sum(), part(v, GENERATOR).buffers

    _, buffers, grads = ctx.task.value_and_grad(product, model.params)
    params, state = ctx.task.update(optimizer, grads, state, model.params, ctx.round.lr_scale)
    return Variables(params, buffers), state
