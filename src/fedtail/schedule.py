"""Learning-rate schedules over rounds: factors on the optimizer's learning rate, computed before a round starts."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedtail.errors import ConfigError


class Schedule(ABC):
    """A frozen dataclass with one pure function."""

    @abstractmethod
    def scale(self, index: int, rounds: int) -> float:
        """Returns the factor of round `index` (0-based) of `rounds`."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same learning rate in every round: the long-tail protocol's."""

    def scale(self, index: int, rounds: int) -> float:
        """Returns 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `final`, after a linear warm-up."""

    final: float = 0.0
    """Factor that the last round approaches, in [0, 1]."""
    warmup: int = 0
    """Rounds of linear increase before, >= 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1 or self.warmup < 0:
            raise ConfigError(f"schedule: final must be in [0, 1] and warmup >= 0, got {self.final} and {self.warmup}.")

    def scale(self, index: int, rounds: int) -> float:
        """Returns the factor."""
        if index < self.warmup:
            return (index + 1) / (self.warmup + 1)
        progress = (index - self.warmup) / max(rounds - self.warmup, 1)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """Multiplies by `factor` after every `every` rounds (1 gives an exponential decay)."""

    every: int = 100
    """Rounds between two decays, >= 1."""
    factor: float = 0.1
    """Multiplier, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.factor <= 1:
            raise ConfigError(f"schedule: every must be >= 1 and factor in (0, 1], got {self.every} and {self.factor}.")

    def scale(self, index: int, rounds: int) -> float:
        """Returns the factor."""
        return self.factor ** (index // self.every)


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "cosine": Cosine, "step": StepDecay}
