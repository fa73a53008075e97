"""Whole federations on a linear softmax model z = x W^T + b, with every random choice handed in by the caller.

Sources: label_skew_baselines.md section 4 (FedAvg, FedProx, SCAFFOLD, FedNova's a_k), longtail_protocol.md 2.7 and 3,
fedgrab.md section 2. Local training is PyTorch's SGD (buffer <- rho * buffer + g; w <- w - lr * buffer) with a zero
buffer at the start of every round.

`rounds` everywhere: a list with one dictionary a round, client id -> list of batches (index arrays into x and y). The
keys are the cohort. A client without batches is left out of the round (one at least must have some). `sizes[k]` is n_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracles.fedgrab_oracle import Dpa, Sgb

Pair = tuple[np.ndarray, np.ndarray]
Rounds = Sequence[dict[int, list[np.ndarray]]]
Gradient = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[Any, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sgd:
    """Settings of local SGD: learning rate (one, or one a round), momentum, weight decay, global-norm clip."""

    lr: float | Sequence[float]
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None

    def rate(self, t: int) -> float:
        """Learning rate of round t."""
        return float(self.lr[t]) if isinstance(self.lr, Sequence) else float(self.lr)


@dataclass
class Local:
    """Result of one client's round: weights, the batch losses, the raw loss gradients before any correction."""

    W: np.ndarray
    b: np.ndarray
    losses: list[Any] = field(default_factory=list)
    raw: list[Pair] = field(default_factory=list)


@dataclass
class Federation:
    """Result of a run: global (W, b) after each round, local results by round and client, states at the end.

    `clients[k]` and `server` are the method's own: SCAFFOLD (c_k.W, c_k.b) and (c.W, c.b); Fed-GraB Sgb and Dpa.
    `server_log` holds Fed-GraB's (q, closed) used in each round.
    """

    weights: list[Pair] = field(default_factory=list)
    locals: list[dict[int, Local]] = field(default_factory=list)
    clients: dict[int, Any] = field(default_factory=dict)
    server: Any = None
    server_log: list[Pair] = field(default_factory=list)


def softmax_cross_entropy(W: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, Any, Any]:
    """Mean cross-entropy of a batch and its gradients on W [C, d] and b [C], one sample at a time."""
    loss, grad_W, grad_b = 0.0, np.zeros(W.shape), np.zeros(b.shape)
    for features, label in zip(x, y, strict=True):
        z = W @ features + b
        z = z - z.max()
        log_p = z - math.log(np.exp(z).sum())
        loss -= float(log_p[label]) / len(y)
        delta = np.exp(log_p)
        delta[label] -= 1.0
        grad_W += np.outer(delta, features) / len(y)
        grad_b += delta / len(y)
    return loss, grad_W, grad_b


def aggregate(values: Sequence[np.ndarray], sizes: Sequence[float]) -> np.ndarray:
    """Weighted mean sum_k n_k w_k / sum_k n_k."""
    total = sum(sizes)
    mean = np.zeros(np.shape(values[0]))
    for value, size in zip(values, sizes, strict=True):
        mean = mean + np.asarray(value, dtype=np.float64) * (size / total)
    return mean


def fednova_a(steps: int, momentum: float) -> float:
    """FedNova's a_k: l <- rho * l + 1, a <- a + l, `steps` times."""
    length, a = 0.0, 0.0
    for _ in range(steps):
        length = momentum * length + 1.0
        a += length
    return a


def local_sgd(
    W: np.ndarray,
    b: np.ndarray,
    batches: Sequence[np.ndarray],
    gradient: Gradient,
    sgd: Sgd,
    t: int = 0,
    correction: Callable[[np.ndarray, np.ndarray], Pair] | None = None,
) -> Local:
    """One client's round. `gradient(W, b, index, step)` gives loss and raw gradients; `correction(W, b)` is added.

    The clip acts on gradient plus correction over W and b together, scale min(1, clip / (norm + 1e-6)) as PyTorch has
    it; weight decay belongs to the optimiser, so it comes after the clip and is not clipped.
    """
    local = Local(W.astype(np.float64), b.astype(np.float64))
    buffer_W, buffer_b = np.zeros(W.shape), np.zeros(b.shape)
    for step, index in enumerate(batches):
        loss, grad_W, grad_b = gradient(local.W, local.b, index, step)
        local.losses.append(loss)
        local.raw.append((grad_W, grad_b))
        if correction is not None:
            extra_W, extra_b = correction(local.W, local.b)
            grad_W, grad_b = grad_W + extra_W, grad_b + extra_b
        if sgd.clip is not None:
            norm = math.sqrt(float((grad_W**2).sum() + (grad_b**2).sum()))
            scale = min(1.0, sgd.clip / (norm + 1e-6))
            grad_W, grad_b = grad_W * scale, grad_b * scale
        buffer_W = sgd.momentum * buffer_W + grad_W + sgd.weight_decay * local.W
        buffer_b = sgd.momentum * buffer_b + grad_b + sgd.weight_decay * local.b
        local.W = local.W - sgd.rate(t) * buffer_W
        local.b = local.b - sgd.rate(t) * buffer_b
    return local


def _cross_entropy_on(x: np.ndarray, y: np.ndarray) -> Gradient:
    """Gradient function of the cross-entropy on this data."""
    return lambda W, b, index, _: softmax_cross_entropy(W, b, x[index], y[index])


def _cohort(batches: dict[int, list[np.ndarray]]) -> list[int]:
    """Clients of the round that have something to train on, in ascending order."""
    return [k for k in sorted(batches) if len(batches[k]) > 0]


def fedavg(
    W: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, rounds: Rounds, sizes: Sequence[int], sgd: Sgd
) -> Federation:
    """FedAvg: w <- sum_k n_k w_k / sum_k n_k."""
    return fedprox(W, b, x, y, rounds, sizes, sgd, mu=0.0)


def fedprox(
    W: np.ndarray,
    b: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rounds: Rounds,
    sizes: Sequence[int],
    sgd: Sgd,
    mu: float,
) -> Federation:
    """FedProx: gradient + mu (w - w^t); aggregation as FedAvg. FedAvg is the same with mu = 0."""
    run = Federation()
    for t, batches in enumerate(rounds):
        cohort, results = _cohort(batches), {}
        for k in cohort:
            pull = _proximal(W, b, mu) if mu != 0.0 else None
            results[k] = local_sgd(W, b, batches[k], _cross_entropy_on(x, y), sgd, t, pull)
        W = aggregate([results[k].W for k in cohort], [sizes[k] for k in cohort])
        b = aggregate([results[k].b for k in cohort], [sizes[k] for k in cohort])
        run.weights.append((W, b))
        run.locals.append(results)
    return run


def _proximal(W0: np.ndarray, b0: np.ndarray, mu: float) -> Callable[[np.ndarray, np.ndarray], Pair]:
    """The gradient of (mu / 2) norm(w - w^t)^2."""
    return lambda W, b: (mu * (W - W0), mu * (b - b0))


def scaffold(
    W: np.ndarray,
    b: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rounds: Rounds,
    clients: int,
    sgd: Sgd,
    server_lr: float = 1.0,
) -> Federation:
    """SCAFFOLD: step on g - c_k + c; c_k+ = c_k - c + (w^t - w_k) / (a_k lr); unweighted server mean.

    a_k is the true step count for momentum 0 and FedNova's a_k otherwise. `clients` is K, the number of all clients:
    w += server_lr * mean over the cohort of (w_k - w^t); c += (1 / K) sum over the cohort of (c_k+ - c_k).
    """
    run = Federation()
    own = {k: (np.zeros(W.shape), np.zeros(b.shape)) for k in range(clients)}
    c_W, c_b = np.zeros(W.shape), np.zeros(b.shape)
    for t, batches in enumerate(rounds):
        results: dict[int, Local] = {}
        step_W, step_b, change_W, change_b = (np.zeros(s.shape) for s in (W, b, W, b))
        cohort = _cohort(batches)
        for k in cohort:
            shift = (c_W - own[k][0], c_b - own[k][1])
            local = local_sgd(W, b, batches[k], _cross_entropy_on(x, y), sgd, t, _constant(shift))
            scale = fednova_a(len(batches[k]), sgd.momentum) * sgd.rate(t)
            new = (own[k][0] - c_W + (W - local.W) / scale, own[k][1] - c_b + (b - local.b) / scale)
            step_W, step_b = step_W + (local.W - W), step_b + (local.b - b)
            change_W, change_b = change_W + (new[0] - own[k][0]), change_b + (new[1] - own[k][1])
            own[k], results[k] = new, local
        W, b = W + server_lr * step_W / len(cohort), b + server_lr * step_b / len(cohort)
        c_W, c_b = c_W + change_W / clients, c_b + change_b / clients
        run.weights.append((W, b))
        run.locals.append(results)
    run.clients, run.server = dict(own), (c_W, c_b)
    return run


def _constant(pair: Pair) -> Callable[[np.ndarray, np.ndarray], Pair]:
    """A correction that does not depend on the weights."""
    return lambda _W, _b: pair


def fedgrab(
    W: np.ndarray,
    b: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rounds: Rounds,
    sizes: Sequence[int],
    sgd: Sgd,
    *,
    gate: str = "rank",
    warm: int = 3,
    order: str = "dpa",
    bypass: Any = None,
    uniforms: Any = None,
    **balancer: float,
) -> Federation:
    """Fed-GraB with a trained classifier (fedgrab.md 2.1-2.3). Losses are (weighted, unweighted) pairs.

    Args:
        W, b: initial classifier [C, d], [C].
        x, y: features [N, d] and labels [N].
        rounds: batches by round and client; the keys are the cohort.
        sizes: n_k of all clients.
        sgd: optimiser settings.
        gate: kind of gate; it also decides which classes are closed.
        warm: number of estimates before the gate acts.
        order: "dpa", or "class_id" (gate rank only).
        bypass: bypass[t][k][step] -> bool[C]: the decisions themselves.
        uniforms: uniforms[t][k][step] -> [C] in [0, 1): class c is bypassed when uniform < q_c, q from the own DPA.
            Exactly one of bypass and uniforms is given.
        balancer: keyword arguments of Sgb (kp, ki, kd, a, zeta, clip).
    """
    if (bypass is None) == (uniforms is None):
        raise ValueError("give exactly one of bypass and uniforms")
    run, dpa = Federation(), Dpa()
    balancers = {k: Sgb(len(b), **balancer) for k in range(len(sizes))}
    for t, batches in enumerate(rounds):
        q, closed = dpa.gate(gate, len(b), warm, order=order)
        cohort, results = _cohort(batches), {}
        for k in cohort:
            decisions = bypass[t][k] if bypass is not None else [np.asarray(row) < q for row in uniforms[t][k]]
            gradient = _balanced_on(x, y, balancers[k], decisions, closed)
            results[k] = local_sgd(W, b, batches[k], gradient, sgd, t)
        W = aggregate([results[k].W for k in cohort], [sizes[k] for k in cohort])
        b = aggregate([results[k].b for k in cohort], [sizes[k] for k in cohort])
        dpa.update(W)
        run.weights.append((W, b))
        run.locals.append(results)
        run.server_log.append((q, closed))
    run.clients, run.server = dict(balancers), dpa
    return run


def _balanced_on(x: np.ndarray, y: np.ndarray, sgb: Sgb, decisions: Any, closed: np.ndarray) -> Gradient:
    """Gradient function of the balanced BCE on this data; every call is one step of the controller."""

    def gradient(W: np.ndarray, b: np.ndarray, index: np.ndarray, step: int) -> tuple[Any, np.ndarray, np.ndarray]:
        weighted, unweighted, grad_z = sgb.step(x[index] @ W.T + b, y[index], decisions[step], closed)
        return (weighted, unweighted), grad_z.T @ x[index], grad_z.sum(axis=0)

    return gradient
