"""Optimizers as pure functions of (gradients, state, parameters), each written once over a small set of operations.

The engine chooses the operations: `PerKey` works under vmap, `Foreach` runs on lists of tensors, `ForeachInPlace` does the
same and overwrites its first argument (for tensors that the engine has given away). The latter two give the same bits; the
first gives them too but for a step of SGD, which torch's fused kernel rounds less often.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtail.errors import ConfigError

Params = dict[str, Tensor]


class PerKey:
    """Operations tensor by tensor. Contract of every set: the first argument may be overwritten, the others never."""

    def add(self, a: Params, b: Params, alpha: float = 1.0) -> Params:
        """Returns a + alpha * b."""
        return {k: v.add(b[k], alpha=alpha) for k, v in a.items()}

    def scale(self, a: Params, factor: float | Tensor) -> Params:
        """Returns factor * a, the factor a number or a 0-d tensor."""
        return {k: v.mul(factor) for k, v in a.items()}

    def shift(self, a: Params, value: float) -> Params:
        """Returns a + value."""
        return {k: v.add(value) for k, v in a.items()}

    def mul(self, a: Params, b: Params) -> Params:
        """Returns a * b, entry by entry."""
        return {k: v.mul(b[k]) for k, v in a.items()}

    def div(self, a: Params, b: Params) -> Params:
        """Returns a / b, entry by entry."""
        return {k: v.div(b[k]) for k, v in a.items()}

    def sqrt(self, a: Params) -> Params:
        """Returns the square root, entry by entry."""
        return {k: v.sqrt() for k, v in a.items()}

    def copy(self, a: Params) -> Params:
        """Returns a copy, so that the original survives an overwriting operation."""
        return {k: v.clone() for k, v in a.items()}

    def norm(self, a: Params) -> Tensor:
        """Returns the Euclidean norm over all entries, shape ()."""
        return torch.stack([v.square().sum() for v in a.values()]).sum().sqrt()

    def sgd(self, params: Params, buffer: Params, grads: Params, lr: float, hyper: "SGD") -> tuple[Params, Params]:
        """Returns the (parameters, momentum buffers) after a step of SGD; both may be overwritten, the gradients never."""
        if hyper.coupled:
            grads = self.add(self.copy(grads), params, hyper.coupled)
        if hyper.momentum:
            buffer = self.add(self.scale(buffer, hyper.momentum), grads)
            grads = self.add(self.copy(grads), buffer, hyper.momentum) if hyper.nesterov else buffer
        return self.add(params, grads, -lr), buffer


class Foreach(PerKey):
    """The same on lists of tensors, with torch's multi-tensor kernels (a private interface, used here only)."""

    suffix = ""

    def _call(self, name: str, a: Params, *args: Any, **kwargs: Any) -> Params:
        if not a:  # nothing is trainable
            return a
        lists = [[arg[k] for k in a] if isinstance(arg, dict) else arg for arg in args]
        values = list(a.values())
        result = getattr(torch, f"_foreach_{name}{self.suffix}")(values, *lists, **kwargs)
        return dict(zip(a, values if self.suffix else result, strict=True))

    def add(self, a: Params, b: Params, alpha: float = 1.0) -> Params:
        """Returns a + alpha * b."""
        return self._call("add", a, b, alpha=alpha)

    def scale(self, a: Params, factor: float | Tensor) -> Params:
        """Returns factor * a."""
        return self._call("mul", a, factor)

    def shift(self, a: Params, value: float) -> Params:
        """Returns a + value."""
        return self._call("add", a, value)

    def mul(self, a: Params, b: Params) -> Params:
        """Returns a * b."""
        return self._call("mul", a, b)

    def div(self, a: Params, b: Params) -> Params:
        """Returns a / b."""
        return self._call("div", a, b)

    def sqrt(self, a: Params) -> Params:
        """Returns the square root."""
        return self._call("sqrt", a)

    def sgd(self, params: Params, buffer: Params, grads: Params, lr: float, hyper: "SGD") -> tuple[Params, Params]:
        """The same in one pass over memory instead of three."""
        fused = getattr(torch, "_fused_sgd_", None)
        if fused is None or not params or next(iter(params.values())).device.type not in ("cpu", "cuda"):
            return super().sgd(params, buffer, grads, lr, hyper)
        if not self.suffix:
            params, buffer = self.copy(params), self.copy(buffer)
        fused(
            list(params.values()), [grads[k] for k in params], [buffer[k] for k in params] if buffer else [],
            weight_decay=hyper.coupled, momentum=hyper.momentum, lr=lr, dampening=0.0, nesterov=hyper.nesterov,
            maximize=False, is_first_step=False,
        )  # fmt: skip
        return params, buffer


class ForeachInPlace(Foreach):
    """The same, overwriting the first argument."""

    suffix = "_"


class Optimizer(ABC):
    """A frozen dataclass whose fields are the hyper-parameters. Its state is fresh at every client and round."""

    @abstractmethod
    def init(self, params: Params) -> Any:
        """Returns the state for these parameters: a tree of tensors."""

    @abstractmethod
    def update(self, ops: PerKey, grads: Params, state: Any, params: Params, scale: float = 1.0) -> tuple[Params, Any]:
        """Returns the new (parameters, state); `scale` multiplies the learning rate (the schedule over rounds)."""


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{owner}.{name} must be > 0, got {value}.")


def _non_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{owner}.{name} must be >= 0, got {value}.")


def clip_by_norm(ops: PerKey, grads: Params, limit: float) -> Params:
    """Scales the gradients down to a global norm of at most `limit`; 0 leaves them as they are."""
    if limit == 0 or not grads:
        return grads
    return ops.scale(grads, (limit / (ops.norm(grads) + 1e-6)).clamp(max=1.0))


class SGDState(NamedTuple):
    """State of SGD: one buffer a parameter, empty without momentum."""

    momentum: Params


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum as torch.optim.SGD computes it (buffer <- momentum * buffer + g)."""

    lr: float = 0.03
    """Learning rate, > 0; .03 is the long-tail protocol's."""
    momentum: float = 0.5
    """Momentum in [0, 1); .5 is the long-tail protocol's."""
    weight_decay: float = 0.0
    """Added to the gradient: weight_decay * parameter, >= 0."""
    decoupled: bool = False
    """Weight decay on the parameters themselves, by the factor 1 - lr * weight_decay, beside the step (as Keras has it)."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    clip: float = 0.0
    """Global norm that the gradient is cut to before the step, after every correction; 0 = no clipping."""

    def __post_init__(self) -> None:
        _positive("SGD", lr=self.lr)
        _non_negative("SGD", weight_decay=self.weight_decay, clip=self.clip, momentum=self.momentum)
        if self.momentum >= 1:
            raise ConfigError(f"SGD.momentum must be in [0, 1), got {self.momentum}.")
        if self.nesterov and not self.momentum:
            raise ConfigError(
                "SGD.nesterov is a form of the momentum, which is 0. Set momentum > 0, or nesterov = false."
            )

    @property
    def coupled(self) -> float:
        """The weight decay that goes through the gradient."""
        return 0.0 if self.decoupled else self.weight_decay

    def init(self, params: Params) -> SGDState:
        """Returns zero buffers."""
        return SGDState({k: torch.zeros_like(v) for k, v in params.items()} if self.momentum else {})

    def update(
        self, ops: PerKey, grads: Params, state: SGDState, params: Params, scale: float = 1.0
    ) -> tuple[Params, SGDState]:
        """Returns the new (parameters, state)."""
        grads = clip_by_norm(ops, grads, self.clip)
        if self.decoupled and self.weight_decay:
            params = ops.scale(params, 1 - self.lr * scale * self.weight_decay)
        params, buffer = ops.sgd(params, state.momentum, grads, self.lr * scale, self)
        return params, SGDState(buffer)


class AdamState(NamedTuple):
    """State of Adam."""

    step: Tensor  # shape (), number of updates made
    mean: Params  # running mean of the gradients
    square: Params  # running mean of their squares


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, ICLR 2015), as torch.optim.Adam computes it; `decoupled` gives AdamW.

    In float32 the bias corrections are rounded, so the first steps differ from torch's by about 1e-5 of themselves.
    """

    lr: float = 0.001
    """Learning rate, > 0."""
    beta1: float = 0.9
    """Decay of the mean, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the squares, in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator, > 0."""
    weight_decay: float = 0.0
    """Weight decay, >= 0."""
    decoupled: bool = False
    """Weight decay on the parameters themselves (AdamW; Loshchilov and Hutter, ICLR 2019)."""
    clip: float = 0.0
    """Global norm that the gradient is cut to; 0 = no clipping."""

    def __post_init__(self) -> None:
        _positive("Adam", lr=self.lr, eps=self.eps)
        _non_negative("Adam", weight_decay=self.weight_decay, clip=self.clip, beta1=self.beta1, beta2=self.beta2)
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ConfigError(f"Adam.beta1 and Adam.beta2 must be in [0, 1), got {self.beta1} and {self.beta2}.")

    def init(self, params: Params) -> AdamState:
        """Returns zero moments."""
        like = next(iter(params.values()), torch.zeros(()))
        zeros = {k: torch.zeros_like(v) for k, v in params.items()}
        return AdamState(
            torch.zeros((), dtype=like.dtype, device=like.device), zeros, {k: v.clone() for k, v in zeros.items()}
        )

    def update(
        self, ops: PerKey, grads: Params, state: AdamState, params: Params, scale: float = 1.0
    ) -> tuple[Params, AdamState]:
        """Returns the new (parameters, state)."""
        grads = clip_by_norm(ops, grads, self.clip)
        if self.weight_decay and not self.decoupled:
            grads = ops.add(grads, params, self.weight_decay)
        if self.weight_decay and self.decoupled:
            params = ops.scale(params, 1 - self.lr * scale * self.weight_decay)
        step = state.step + 1
        mean = ops.add(ops.scale(state.mean, self.beta1), grads, 1 - self.beta1)
        square = ops.add(ops.scale(state.square, self.beta2), ops.mul(grads, ops.copy(grads)), 1 - self.beta2)
        denominator = ops.shift(ops.scale(ops.sqrt(ops.copy(square)), (1 - self.beta2**step).rsqrt()), self.eps)
        direction = ops.scale(ops.div(ops.copy(mean), denominator), 1 / (1 - self.beta1**step))
        return ops.add(params, direction, -self.lr * scale), AdamState(step, mean, square)


class NadamState(NamedTuple):
    """State of Nadam."""

    step: Tensor  # shape (), number of updates made
    product: Tensor  # shape (), u_1 ... u_step
    mean: Params  # running mean of the gradients
    square: Params  # running mean of their squares


@dataclass(frozen=True, kw_only=True)
class Nadam(Optimizer):
    """Adam with Nesterov's momentum (Dozat, ICLR 2016 workshop), as Keras computes it; in step t, with gradient g:

    u_t = beta1 (1 - 0.96^t / 2),   U_t = u_1 ... u_t,   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (u_{t+1} m / (1 - U_t u_{t+1}) + (1 - u_t) g / (1 - U_t)) / (sqrt(v / (1 - beta2^t)) + eps)

    torch.optim.NAdam does the same with momentum_decay=1 (its default, .004, changes u far more slowly) and eps=1e-7.
    """

    lr: float = 0.001
    """Learning rate, > 0."""
    beta1: float = 0.9
    """Decay of the mean, in (0, 1)."""
    beta2: float = 0.999
    """Decay of the squares, in (0, 1)."""
    eps: float = 1e-7
    """Added to the denominator, > 0; Keras' default."""
    clip: float = 0.0
    """Global norm that the gradient is cut to; 0 = no clipping."""

    def __post_init__(self) -> None:
        _positive("Nadam", lr=self.lr, eps=self.eps)
        _non_negative("Nadam", clip=self.clip)
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError(f"Nadam.beta1 and Nadam.beta2 must be in (0, 1), got {self.beta1} and {self.beta2}.")

    def init(self, params: Params) -> NadamState:
        """Returns zero moments."""
        like = next(iter(params.values()), torch.zeros(()))
        step = torch.zeros((), dtype=like.dtype, device=like.device)
        zeros = {k: torch.zeros_like(v) for k, v in params.items()}
        return NadamState(step, step + 1, zeros, {k: v.clone() for k, v in zeros.items()})

    def update(
        self, ops: PerKey, grads: Params, state: NadamState, params: Params, scale: float = 1.0
    ) -> tuple[Params, NadamState]:
        """Returns the new (parameters, state)."""
        grads = clip_by_norm(ops, grads, self.clip)
        step = state.step + 1
        now, ahead = (self.beta1 * (1 - 0.5 * 0.96 ** (step + more)) for more in (0, 1))
        product = state.product * now
        mean = ops.add(ops.scale(state.mean, self.beta1), grads, 1 - self.beta1)
        square = ops.add(ops.scale(state.square, self.beta2), ops.mul(ops.copy(grads), grads), 1 - self.beta2)
        correction = -torch.expm1(step * math.log(self.beta2))  # 1 - beta2^t without the loss of digits
        denominator = ops.shift(ops.scale(ops.sqrt(ops.copy(square)), correction.rsqrt()), self.eps)
        above = ops.scale(ops.copy(mean), ahead / (1 - product * ahead))
        direction = ops.div(ops.add(above, ops.scale(grads, (1 - now) / (1 - product))), denominator)
        return ops.add(params, direction, -self.lr * scale), NadamState(step, product, mean, square)


@dataclass(frozen=True, kw_only=True)
class Partition(Optimizer):
    """Several optimizers, each for the parameters whose names begin with its prefix (a GAN's two networks, a head)."""

    parts: dict[str, Optimizer] = field(default_factory=dict[str, Optimizer])
    """From name prefix to optimizer; the longest matching prefix counts."""

    def _groups(self, params: Params) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in params:
            matching = [prefix for prefix in self.parts if name.startswith(prefix)]
            if not matching:
                raise ConfigError(f"Partition: no prefix of {sorted(self.parts)} matches the parameter {name!r}.")
            groups.setdefault(max(matching, key=len), []).append(name)
        return groups

    def init(self, params: Params) -> dict[str, Any]:
        """Returns one state a prefix."""
        return {p: self.parts[p].init({n: params[n] for n in names}) for p, names in self._groups(params).items()}

    def update(
        self, ops: PerKey, grads: Params, state: dict[str, Any], params: Params, scale: float = 1.0
    ) -> tuple[Params, dict[str, Any]]:
        """Updates only the groups that receive gradients; the others keep their state."""
        params, state = dict(params), dict(state)
        for prefix, names in self._groups(grads).items():
            new, state[prefix] = self.parts[prefix].update(
                ops, {n: grads[n] for n in names}, state[prefix], {n: params[n] for n in names}, scale
            )
            params.update(new)
        return params, state


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "nadam": Nadam, "partition": Partition}
