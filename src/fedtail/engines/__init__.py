"""Engines: loop (reference), parallel (cores of a CPU), vmap (stacked). They differ in one function, `cohort`."""

import os
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedtail.engines.base import Engine, Setting
from fedtail.engines.loop import LoopEngine
from fedtail.engines.parallel import ParallelEngine
from fedtail.engines.vmap import VmapEngine
from fedtail.errors import ConfigError
from fedtail.task import Task

EngineName = Literal["auto", "loop", "parallel", "vmap"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a cohort is computed. loop and parallel give the same bits; vmap agrees to rounding."""

    name: EngineName = "auto"
    """"auto" chooses by a rule that never looks at a clock; the choice is written into the run's configuration."""
    workers: int = 0
    """Threads of the parallel engine; 0 = as many as there are cores."""
    chunk: int = 32
    """Clients that the vmap engine stacks at once."""
    donate: bool = True
    """Update local parameters in place (same bits, faster); loop and parallel only."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.chunk < 1:
            raise ConfigError(f"engine: workers must be >= 0 and chunk >= 1, got {self.workers} and {self.chunk}.")

    def cores(self) -> int:
        """Returns the number of threads to use."""
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or own


def choose(task: Task, cohort: int, cores: int) -> tuple[EngineName, str]:
    """Returns what "auto" means for this task and cohort, and why."""
    if task.device.type != "cpu":
        return "vmap", f"the device is {task.device}"
    size = sum(p.numel() for p in task.initial.params.values())
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in task.module.modules())
    if not convolutional and size <= 50_000 and cohort >= 25:
        return "vmap", f"a dense model of {size:,} parameters and {cohort} clients a round, on a CPU"
    if cohort >= 2 and cores >= 2:
        return "parallel", f"{cohort} clients a round on {cores} cores"
    return "loop", f"{cohort} client(s) a round on {cores} core(s)"


def make_engine(options: EngineOptions, setting: Setting) -> Engine:
    """Returns the engine of a run; `options.name` must be resolved (not "auto")."""
    if options.name == "loop":
        return LoopEngine(setting, options.donate)
    if options.name == "parallel":
        return ParallelEngine(setting, options.cores(), options.donate)
    if options.name == "vmap":
        return VmapEngine(setting, options.chunk)
    raise ConfigError(f"engine.name must be resolved before an engine is made, got {options.name!r}.")
