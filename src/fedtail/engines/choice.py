"""What "auto" means: a rule that never looks at a clock, and the number of clients that memory holds at once."""

import dataclasses
import os
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedtail import trees
from fedtail.data.plan import Array
from fedtail.engines import EngineName, EngineOptions
from fedtail.task import Task

LIGHT = 2_000_000  # parameters of a model whose steps are so short that threads wait for Python's lock
MOST = {"cpu": 32}  # clients stacked at once; more gain nothing there
COPIES = 6  # of the parameters that a stacked client needs: itself, gradients, momentum, their successors


def choose(task: Task, cohort: int, cores: int) -> tuple[EngineName, str]:
    """Returns what "auto" means for this task and cohort, and why."""
    if task.device.type != "cpu":
        return "vmap", f"the device is {task.device}"
    size = sum(p.numel() for p in task.initial.params.values())
    dense = not any(isinstance(m, nn.modules.conv._ConvNd) for m in task.module.modules())
    if dense and size <= 50_000 and cohort >= 25:
        return "vmap", f"a dense model of {size:,} parameters and {cohort} clients a round, on a CPU"
    if cohort >= 2 and cores >= 2:
        # a fork beside other threads (a notebook has some) may inherit a lock that nobody gives back
        alone = threading.active_count() == 1
        if size <= LIGHT and sys.platform == "linux" and alone:
            return "processes", f"a model of {size:,} parameters and {cohort} clients a round on {cores} cores"
        beside = "" if alone else ", in a process with other threads"
        return "parallel", f"{cohort} clients a round on {cores} cores{beside}"
    return "loop", f"{cohort} client(s) a round on {cores} core(s)"


def resolve(options: EngineOptions, task: Task, cohort: int, batch_size: int) -> tuple[EngineOptions, str]:
    """Returns options without "auto" and without a chunk of 0 where it matters, and the reason for the engine."""
    reason = "as configured"
    if options.name == "auto":
        name, reason = choose(task, cohort, options.cores())
        options = dataclasses.replace(options, name=name)
    if options.name == "vmap" and not options.chunk:
        options = dataclasses.replace(options, chunk=fitting(task, cohort, batch_size, free_memory(task.device)))
    return options, reason


def fitting(task: Task, cohort: int, batch_size: int, free: int) -> int:
    """Returns how many clients to stack: as many as half of the free bytes hold, at least one."""
    each = COPIES * trees.num_bytes(task.initial) + batch_size * activation_bytes(task)
    return max(1, min(cohort, MOST.get(task.device.type, 256), free // 2 // each))


def activation_bytes(task: Task) -> int:
    """Returns what the backward pass of one example keeps, in bytes: it runs the network once, on two examples."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.zeros((2, *task.input_shape), dtype=task.dtype, device=task.device)
    params = {name: p.detach().requires_grad_() for name, p in task.initial.params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.worker().apply(task.initial._replace(params=params), x, train=False)
    own = {p.data_ptr() for p in params.values()}
    return max(1, sum(size for place, size in kept.items() if place not in own) // 2)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device; on a CPU what the system calls available, without swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def padded_share(lengths: Sequence[Array], chunk: int) -> float:
    """Returns the share of rows that the vmap engine computes for nothing, in [0, 1).

    Args:
        lengths: the batch sizes of each client of a cohort, int64 (steps,) each.
        chunk: clients stacked at once.
    """
    computed = real = 0
    order = sorted(lengths, key=len, reverse=True)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        for step in range(len(part[0])):
            here = np.array([each[step] for each in part if len(each) > step])
            computed += int(here.max()) * len(here)
            real += int(here.sum())
    return 1 - real / computed if computed else 0.0
