"""Engines: loop (reference), parallel and processes (cores of a CPU), vmap (stacked). They differ in one function, `cohort`."""

import os
from dataclasses import dataclass
from typing import Literal

from fedtail.engines.base import Engine, Setting
from fedtail.engines.loop import LoopEngine
from fedtail.engines.parallel import ParallelEngine
from fedtail.engines.processes import ProcessEngine
from fedtail.engines.vmap import VmapEngine
from fedtail.errors import ConfigError

EngineName = Literal["auto", "loop", "parallel", "processes", "vmap"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a cohort is computed. loop, parallel and processes give the same bits; vmap agrees to rounding."""

    name: EngineName = "auto"
    """"auto" chooses by a rule that never looks at a clock; the choice is written into the run's configuration."""
    workers: int = 0
    """Threads of the parallel engine, processes of the other; 0 = as many as there are cores."""
    chunk: int = 0
    """Clients that the vmap engine stacks at once; 0 = as many as free memory holds, at most 32 on a CPU and 256 elsewhere."""
    donate: bool = True
    """Update local parameters in place (same bits, faster); all but vmap."""
    states_mib: int = 4096
    """Most MiB of client states in memory; what is beyond lies on the disk, in $TMPDIR."""
    channels_last: bool = False
    """Images and activations in that memory format; equal to rounding; not with vmap."""
    compile: bool = False
    """By torch.compile (minutes at the first round, needs a C++ compiler): the network, with vmap the whole stacked step; equal
    to rounding."""

    def __post_init__(self) -> None:
        if min(self.workers, self.states_mib, self.chunk) < 0:
            raise ConfigError("engine: workers, states_mib and chunk must be >= 0, got "
                              f"{self.workers}, {self.states_mib} and {self.chunk}.")  # fmt: skip

    def states_bytes(self) -> int:
        """Returns the most bytes of client states to hold in memory."""
        return self.states_mib << 20

    def cores(self) -> int:
        """Returns the number of threads to use."""
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or own


def make_engine(options: EngineOptions, setting: Setting) -> Engine:
    """Returns the engine of a run; `options.name` must be resolved (not "auto")."""
    if options.name == "vmap" and (options.channels_last or (options.compile and setting.task.dropout)):
        option = "channels_last" if options.channels_last else "compile, with a model that has Dropout layers,"
        raise ConfigError(f'engine.{option} does not go with the engine vmap. Set engine.name = "parallel" or "loop".')
    if options.name == "loop":
        return LoopEngine(setting, options.donate)
    if options.name == "parallel":
        return ParallelEngine(setting, options.cores(), options.donate)
    if options.name == "processes":
        return ProcessEngine(setting, options.cores(), options.donate)
    if options.name == "vmap":
        return VmapEngine(setting, options.chunk)
    raise ConfigError(f"engine.name must be resolved before an engine is made, got {options.name!r}.")
