"""Engines: loop (reference), parallel and processes (cores of a CPU), vmap (stacked). They differ in one function, `cohort`."""

import os
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedtail.engines.base import Engine, Setting
from fedtail.engines.loop import LoopEngine
from fedtail.engines.parallel import ParallelEngine
from fedtail.engines.processes import ProcessEngine
from fedtail.engines.vmap import VmapEngine
from fedtail.errors import ConfigError
from fedtail.task import Task

EngineName = Literal["auto", "loop", "parallel", "processes", "vmap"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a cohort is computed. loop, parallel and processes give the same bits; vmap agrees to rounding."""

    name: EngineName = "auto"
    """"auto" chooses by a rule that never looks at a clock; the choice is written into the run's configuration."""
    workers: int = 0
    """Threads of the parallel engine, processes of the other; 0 = as many as there are cores."""
    chunk: int = 32
    """Clients that the vmap engine stacks at once."""
    donate: bool = True
    """Update local parameters in place (same bits, faster); all but vmap."""
    states_mib: int = 4096
    """Most MiB of client states in memory; what is beyond lies on the disk, in $TMPDIR."""
    channels_last: bool = False
    """Images and activations in that memory format; equal to rounding; not with vmap."""
    compile: bool = False
    """The network by torch.compile (minutes at the first round, needs a C++ compiler); equal to rounding; not with vmap."""

    def __post_init__(self) -> None:
        if min(self.workers, self.states_mib) < 0 or self.chunk < 1:
            raise ConfigError("engine: workers and states_mib must be >= 0 and chunk >= 1, got "
                              f"{self.workers}, {self.states_mib} and {self.chunk}.")  # fmt: skip

    def states_bytes(self) -> int:
        """Returns the most bytes of client states to hold in memory."""
        return self.states_mib << 20

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
    for name in ("compile", "channels_last"):  # torch.func has no rule for either
        if getattr(options, name) and options.name == "vmap":
            raise ConfigError(
                f'engine.{name} does not go with the engine vmap. Set engine.name = "parallel" or "loop".'
            )
    if options.name == "loop":
        return LoopEngine(setting, options.donate)
    if options.name == "parallel":
        return ParallelEngine(setting, options.cores(), options.donate)
    if options.name == "processes":
        return ProcessEngine(setting, options.cores(), options.donate)
    if options.name == "vmap":
        return VmapEngine(setting, options.chunk)
    raise ConfigError(f"engine.name must be resolved before an engine is made, got {options.name!r}.")
