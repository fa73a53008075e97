"""What a network costs to run: parameters, operations, memory of one image, and latency with one thread."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedtail.trees import num_bytes

RUNS, WARM = 1000, 50  # timed calls, and untimed ones before them


def sizes(module: nn.Module, image: Tensor) -> dict[str, int]:
    """Returns numbers of parameters and operations, and bytes of weights and activations.

    Args:
        module: in evaluation mode; from raw inputs to scores.
        image: one input, [1, ...].
    """
    params = {name: p.detach() for name, p in module.named_parameters()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return {
        "parameters": sum(p.numel() for p in params.values()),
        "multiply_adds_per_image": counter.get_total_flops() // 2,
        "weights": num_bytes(params),
        "peak_activations_of_one_image": peak_activations(module, image),
    }


class _Live(TorchDispatchMode):
    """Follows how many bytes the tensors that operations make hold, and their largest sum."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self._seen(tensor.untyped_storage())
        return out

    def _seen(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self.known or not storage.nbytes():
            return
        self.known.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, storage.nbytes())

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def peak_activations(module: nn.Module, image: Tensor) -> int:
    """Returns the most bytes that live at once during one forward pass, input included, weights not.

    Args:
        module: in evaluation mode.
        image: one input, [1, ...].
    """
    weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    live = _Live({*weights, image.untyped_storage().data_ptr()})
    with torch.no_grad(), live:
        module(image)
    return live.peak + image.numel() * image.element_size()


def latency(call: Callable[[], Any], calls: int = RUNS) -> dict[str, float]:
    """Returns the median and the 99th percentile of a call's duration, in milliseconds."""
    for _ in range(min(WARM, calls)):
        call()
    durations: list[float] = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        durations.append((time.perf_counter_ns() - begin) / 1e6)
    return {"median": float(np.median(durations)), "p99": float(np.percentile(durations, 99))}
