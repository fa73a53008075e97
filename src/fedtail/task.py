"""Task: what is trained, as a description. Worker: one thread's way to call, differentiate and step it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedtail import trees
from fedtail.errors import ConfigError
from fedtail.models.gan import is_pair
from fedtail.models.layers import Dropout, replace_dropout
from fedtail.models.user import find_classifier
from fedtail.optim import Foreach, ForeachInPlace, Optimizer, Params, PerKey
from fedtail.seeds import Stream, generator

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))  # a larger float64 would become 1 in float32


class Variables(NamedTuple):
    """Everything of a network that travels: buffers (BatchNorm statistics) stand beside the parameters."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Draw(NamedTuple):
    """A random tensor that a local step wants; it is made beforehand and handed in.

    Args:
        kind: "uniform" in [0, 1), "normal" (0, 1), "bernoulli" (1 with probability p) or "integers" in [0, high).
        shape: shape of one step's tensor; for a per-example draw the first entry is the full batch size.
        per_example: cut the draw to the batch's length.
        p: probability of a one.
        high: upper end of integers, exclusive.
    """

    kind: Literal["uniform", "normal", "bernoulli", "integers"]
    shape: tuple[int, ...]
    per_example: bool = False
    p: float = 0.5
    high: int = 1

    def sample(self, rng: np.random.Generator, steps: int) -> np.ndarray[Any, Any]:
        """Returns the draws of `steps` steps, [steps, *shape]; float64, or int64 for integers."""
        size = (steps, *self.shape)
        if self.kind == "normal":
            return rng.standard_normal(size)
        if self.kind == "integers":
            return rng.integers(self.high, size=size)
        uniform = np.minimum(rng.random(size), BELOW_ONE)
        return uniform if self.kind == "uniform" else (uniform < self.p).astype(np.float64)


class Execution(NamedTuple):
    """How a network's calls are computed; at the defaults nothing is changed.

    Args:
        autocast: bfloat16 where torch's autocast takes it; outputs are given back in the task's dtype.
        channels_last: images and activations in that memory format.
        compile: by torch.compile, at the first calls; vmap engines compile the whole stacked step.
    """

    autocast: bool = False
    channels_last: bool = False
    compile: bool = False


PLAIN = Execution()


@dataclass(frozen=True)
class Task:
    """A network, its initial variables and what an algorithm may know of it. Never run: workers run copies."""

    module: nn.Module
    initial: Variables
    num_classes: int
    input_shape: tuple[int, ...]
    # the last linear layer's name: its parameters are f"{classifier}.weight" [classes, d] and f"{classifier}.bias"
    classifier: str | None
    stages: tuple[tuple[str, ...], ...]  # parameter names in groups from input to output
    # of the Dropout layers by name: (shape of one example, probability of dropping)
    dropout: Mapping[str, tuple[tuple[int, ...], float]]
    batch_statistics: bool  # a layer (BatchNorm) computes statistics over the batch
    dtype: torch.dtype
    device: torch.device
    execution: Execution = PLAIN

    def draws(self, batch_size: int) -> dict[str, Draw]:
        """Returns the masks of the Dropout layers as draws: 1 = keep."""
        return {
            f"dropout:{name}": Draw("bernoulli", (batch_size, *shape), per_example=True, p=1 - p)
            for name, (shape, p) in self.dropout.items()
        }

    def worker(self, kind: Literal["eager", "vmap"] = "eager", donate: bool = False) -> "Worker":
        """Returns a private way to run the network; one for each thread."""
        return Worker(self, kind, donate)


def build_task(
    build: Callable[[], nn.Module],
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    execution: Execution = PLAIN,
) -> Task:
    """Makes a task; torch's global generator is seeded for the constructor alone and restored.

    Args:
        build: makes the network.
        num_classes: number of classes, >= 2.
        input_shape: shape of one example, (channels, height, width) or (features,).
        seed: the experiment's seed.
        dtype: of parameters and inputs.
        device: where training happens.
        execution: how the network's calls are computed.

    Raises:
        ConfigError: the network does not accept the inputs or does not return [batch, classes].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, Stream.INITIAL).integers(2**63)))
        module = build().to(dtype)
    replace_dropout(module)
    recurrent = [name for name, layer in module.named_modules() if isinstance(layer, nn.RNNBase)]
    if recurrent:
        raise ConfigError(f"model: the layers {recurrent} are recurrent and keep their weights in a private list, "
                          "which fedtail cannot exchange. Use a convolutional, dense or attention model.")  # fmt: skip
    dropout = _probe(module, 1 if is_pair(module) else num_classes, input_shape, dtype)
    names = [name for name, _ in module.named_parameters()]
    stages: Any = getattr(module, "stages", None)
    groups: Any = stages() if callable(stages) else [[n] for n in names]
    module = module.to(device)
    initial = Variables(
        {n: p.detach().clone() for n, p in module.named_parameters()}, {n: b.clone() for n, b in module.named_buffers()}
    )
    statistics = any(
        isinstance(m, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm) for m in module.modules()
    )
    return Task(
        module, initial, num_classes, input_shape, find_classifier(module, num_classes),
        tuple(tuple(g) for g in groups), dropout, statistics, dtype, torch.device(device), execution,
    )  # fmt: skip


def _probe(
    module: nn.Module, outputs: int, input_shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], float]]:
    """Runs the network once in evaluation mode: checks the output and sees the shapes that reach Dropout layers."""
    shapes: dict[str, tuple[tuple[int, ...], float]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name, p=layer.p: shapes.__setitem__(name, (tuple(inputs[0].shape[1:]), p))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, Dropout)
    ]
    module.eval()
    try:
        with torch.no_grad():
            out = module(torch.zeros((2, *input_shape), dtype=dtype))
    except RuntimeError as error:
        raise ConfigError(f"model: {type(module).__name__} fails on inputs of shape {input_shape}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or tuple(out.shape) != (2, outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"model: {type(module).__name__} must return logits [batch, {outputs}], got {got} for a batch of 2."
        )
    return shapes


def _storage(tensor: Tensor) -> int:
    """Returns where a tensor's memory begins, the same for all views of it."""
    return tensor.untyped_storage().data_ptr()


class _Plain(nn.Module):
    """A network whose parts are chosen by an argument, for torch's functional_call."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, part: str) -> Tensor:
        return self.inner(x) if part == "forward" else getattr(self.inner, part)(x)


class Worker:
    """One thread's skeleton of the network: parameters and buffers are put in for each call.

    All engines share `apply`; what `value_and_grad` and `update` do is the engine's choice: "eager" uses autograd and
    multi-tensor updates (in place when the engine has given the tensors away), "vmap" uses torch.func and per-key updates.
    """

    def __init__(self, task: Task, kind: Literal["eager", "vmap"], donate: bool):
        self.task, self.kind, self.donate = task, kind, donate
        self.num_classes, self.classifier, self.stages = task.num_classes, task.classifier, task.stages
        self.initial, self.dtype, self.device = task.initial, task.dtype, task.device
        self._ops: PerKey = PerKey() if kind == "vmap" else ForeachInPlace() if donate else Foreach()
        self._skeleton = copy.deepcopy(task.module)
        self._slots, self._masks = self._empty()
        self._training: bool | None = None
        self._special = any(task.execution)
        self._compiled: dict[str, Callable[[Tensor], Tensor]] = {}
        self._plain = _Plain(copy.deepcopy(task.module)) if task.execution.compile and kind == "vmap" else None
        self._foreign: set[int] = set()  # storages that are not to be overwritten

    def protect(self, shared: Sequence[trees.Tree]) -> None:
        """Names the trees (message, client state, constants, ...) whose tensors no update in place may touch."""
        self._foreign = {_storage(t) for tree in shared for t in trees.leaves(tree)}

    def own(self, tree: trees.Tree) -> trees.Tree:
        """Returns the tree with copies of those tensors whose memory is protected."""
        foreign = self._foreign
        return trees.tree_map(lambda t: t.clone() if _storage(t) in foreign else t, tree)

    def _empty(self) -> tuple[list[tuple[str, bool, dict[str, Any], str]], list[tuple[str, dict[str, Any]]]]:
        """Takes parameters and buffers out of the skeleton; returns where each one goes (tied ones share a name)."""
        params = {id(p): name for name, p in self._skeleton.named_parameters()}
        buffers = {id(b): name for name, b in self._skeleton.named_buffers()}
        slots: list[tuple[str, bool, dict[str, Any], str]] = []
        masks: list[tuple[str, dict[str, Any]]] = []
        for path, module in self._skeleton.named_modules():
            for own, known, is_buffer in ((module._parameters, params, False), (module._buffers, buffers, True)):
                for attribute in [a for a, value in own.items() if value is not None]:
                    name = known[id(own.pop(attribute))]
                    slots.append((name, is_buffer, module.__dict__, attribute))
            if isinstance(module, Dropout):
                masks.append((f"dropout:{path}", module.__dict__))
        return slots, masks

    def apply(
        self,
        variables: Variables,
        x: Tensor,
        part: str = "forward",
        train: bool = True,
        draws: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Variables]:
        """Runs the network, or a part of it.

        Args:
            variables: what to run it with; names that the network lacks are ignored.
            x: the input, [batch, ...].
            part: "forward", or the name of a method or submodule ("features", "head", "generator").
            train: training mode (batch statistics, Dropout).
            draws: the batch's draws, for the masks of Dropout layers.

        Returns:
            (output, variables with the new buffers); the given ones are not modified.
        """
        if self._training is not train:
            self._skeleton.train(train)
            self._training = train
        params, buffers = variables
        if buffers and train:
            buffers = {name: value.clone() for name, value in buffers.items()}
        if self._plain is not None and torch.compiler.is_compiling():
            return self._followed(Variables(params, buffers), x, part, train), Variables(params, buffers)
        for name, is_buffer, place, attribute in self._slots:
            place[attribute] = (buffers if is_buffer else params)[name]
        for name, place in self._masks:
            place["mask"] = (draws or {}).get(name)
        out = self._run(x, part) if self._special else self._function(part)(x)
        return out, Variables(params, buffers)

    def _followed(self, variables: Variables, x: Tensor, part: str, train: bool) -> Tensor:
        """Runs the network so that a compiler can follow: it cannot where tensors are put into a dictionary."""
        assert self._plain is not None
        self._plain.train(train)
        known = self.initial.params.keys() | self.initial.buffers.keys()
        tensors = {f"inner.{name}": v for tree in variables for name, v in tree.items() if name in known}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.execution.autocast):
            return torch.func.functional_call(self._plain, tensors, (x, part)).to(self.dtype)

    def _function(self, part: str) -> Callable[[Tensor], Tensor]:
        return self._skeleton if part == "forward" else getattr(self._skeleton, part)

    def _run(self, x: Tensor, part: str) -> Tensor:
        """Runs the network in the ways that `Execution` offers."""
        execution = self.task.execution
        if execution.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        function = self._function(part)
        if execution.compile and self._plain is None:
            if part not in self._compiled:
                self._compiled[part] = torch.compile(function)
            function = self._compiled[part]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=execution.autocast):
            return function(x).to(self.dtype)

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Tensor, Any, Params]:
        """Differentiates `function(params) -> (scalar, aux)`; returns (value, aux, gradients), all detached."""
        if self.kind == "vmap":
            grads, (value, aux) = torch.func.grad_and_value(function, has_aux=True)(params)
            return value, aux, grads
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():  # a server's methods are called without
            value, aux = function(leaves)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            grads = dict(zip(leaves, self._own(found), strict=True))
        else:
            grads = {name: torch.zeros_like(p) for name, p in params.items()}
        if not trees.leaves(aux):
            return value.detach(), aux, grads
        owned = {_storage(p) for p in params.values()} if self.donate else set[int]()

        def release(leaf: Tensor) -> Tensor:  # what the objective returns must survive the update in place
            leaf = leaf.detach() if leaf.requires_grad else leaf
            return leaf.clone() if _storage(leaf) in owned else leaf

        return value.detach(), trees.tree_map(release, aux), grads

    def slope(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns d function(x) / dx of a scalar function, [as x]; it can be differentiated further (gradient penalties)."""
        if self.kind == "vmap":
            return torch.func.grad(function)(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            [found] = torch.autograd.grad(function(leaf), [leaf], create_graph=True)
        return found

    def _own(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Makes gradients fit to be overwritten: autograd may return one tensor twice, or an expanded view."""
        if not self.donate or (
            len({g.data_ptr() for g in grads}) == len(grads) and all(g.is_contiguous() for g in grads)
        ):
            return grads
        return tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)

    def update(
        self, optimizer: Optimizer, grads: Params, state: Any, params: Params, scale: float = 1.0
    ) -> tuple[Params, Any]:
        """Makes one step of the optimizer; returns the new (parameters, state)."""
        if self.donate:  # a step must not pay for the generality of `own`
            grads, params = (
                {k: t.clone() if _storage(t) in self._foreign else t for k, t in tree.items()}
                for tree in (grads, params)
            )
        return optimizer.update(self._ops, grads, state, params, scale)
