"""Long-tail cuts: which examples of a balanced training set are kept so that class sizes fall from class 0 on.

Source: the experiments of Fed-GraB and FedLoGe (the authors' code).
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from fedtail.data.statistics import Ints, class_counts
from fedtail.errors import ConfigError, PartitionError


class LongTail(ABC):
    """A rule that says how many examples of each class are kept, and which."""

    @abstractmethod
    def counts(self, class_counts: Ints) -> Ints:
        """Returns the examples to keep of each class, int64 [C], class 0 the most frequent.

        Args:
            class_counts: the examples there are, int64 [C].

        Raises:
            PartitionError: a class would be left without an example, or does not have enough of them.
        """

    @abstractmethod
    def cut(self, labels: Ints, num_classes: int, rng: np.random.Generator) -> Ints:
        """Returns the indices into `labels` that are kept, int64 [sum of counts].

        Args:
            labels: int64 [N], values 0..num_classes-1.
            num_classes: C, >= 1.
            rng: decides which examples of a class are kept.

        Raises:
            PartitionError: as in `counts`.
        """


@dataclass(frozen=True, kw_only=True)
class NoTail(LongTail):
    """No cut: everything is kept, in the order of the data."""

    def counts(self, class_counts: Ints) -> Ints:
        """Returns `class_counts`."""
        return class_counts

    def cut(self, labels: Ints, num_classes: int, rng: np.random.Generator) -> Ints:
        """Returns 0..N-1."""
        return np.arange(len(labels), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Exponential(LongTail):
    """Class sizes fall exponentially: n_c = floor(n_max * factor^(-c / (C - 1))).

    `cut` returns class after class, within a class in the order drawn.
    """

    factor: float = 100.0
    """Imbalance factor, largest class / smallest class, >= 1 (the authors' option is its reciprocal)."""
    num_max: int | None = None
    """n_max, the size of class 0, >= 1; by default the smallest class of the data."""
    legacy_seed: int | None = None
    """Repeats the authors' choice of examples bit for bit with this seed of NumPy's legacy generator (theirs: 0)."""

    def __post_init__(self) -> None:
        _check("Exponential", self.factor, self.num_max, self.legacy_seed)

    def counts(self, class_counts: Ints) -> Ints:
        """Returns n_c, int64 [C]; see `LongTail.counts`."""
        position = np.arange(len(class_counts)) / max(len(class_counts) - 1, 1)
        return _counts("exponential", self.factor**-position, class_counts, self.factor, self.num_max)

    def cut(self, labels: Ints, num_classes: int, rng: np.random.Generator) -> Ints:
        """Returns the indices that are kept; see `LongTail.cut`."""
        return _cut(labels, self.counts(class_counts(labels, num_classes)), rng, self.legacy_seed)


@dataclass(frozen=True, kw_only=True)
class Step(LongTail):
    """The first classes keep n_max examples each, the others floor(n_max / factor).

    `cut` returns class after class, within a class in the order drawn.
    """

    factor: float = 100.0
    """Imbalance factor, size of a head class / size of a tail class, >= 1."""
    head_share: float = 0.5
    """Share of the classes that are head classes, in (0, 1): floor(head_share * C) of them, at least one."""
    num_max: int | None = None
    """n_max, the size of a head class, >= 1; by default the smallest class of the data."""
    legacy_seed: int | None = None
    """Repeats the authors' choice of examples bit for bit with this seed of NumPy's legacy generator (theirs: 0)."""

    def __post_init__(self) -> None:
        _check("Step", self.factor, self.num_max, self.legacy_seed)
        if not 0 < self.head_share < 1:
            raise ConfigError(f"Step.head_share must be in (0, 1), got {self.head_share}.")

    def counts(self, class_counts: Ints) -> Ints:
        """Returns n_c, int64 [C]; see `LongTail.counts`."""
        head = max(int(self.head_share * len(class_counts) + 1e-9), 1)
        share = np.where(np.arange(len(class_counts)) < head, 1.0, 1 / self.factor)
        return _counts("step", share, class_counts, self.factor, self.num_max)

    def cut(self, labels: Ints, num_classes: int, rng: np.random.Generator) -> Ints:
        """Returns the indices that are kept; see `LongTail.cut`."""
        return _cut(labels, self.counts(class_counts(labels, num_classes)), rng, self.legacy_seed)


LONGTAILS: dict[str, type[LongTail]] = {"none": NoTail, "exponential": Exponential, "step": Step}


def _check(owner: str, factor: float, num_max: int | None, legacy_seed: int | None) -> None:
    if not 1 <= factor < inf:
        raise ConfigError(f"{owner}.factor must be in [1, inf), got {factor}.")
    if num_max is not None and num_max < 1:
        raise ConfigError(f"{owner}.num_max must be >= 1, got {num_max}.")
    if legacy_seed is not None and not 0 <= legacy_seed < 2**32:
        raise ConfigError(f"{owner}.legacy_seed must be in 0..2**32-1, got {legacy_seed}.")


def _counts(name: str, share: NDArray[np.float64], available: Ints, factor: float, num_max: int | None) -> Ints:
    """Returns floor(n_max * share), checked against what there is."""

    def kept(largest: int) -> Ints:
        # 5000 * 50^-1 may come out as 99.99...: the margin is far above rounding and far below 1 / n_max.
        return np.floor(largest * share * (1 + 1e-12)).astype(np.int64)

    if available.min() < 1:
        empty = int(available.argmin())
        raise PartitionError(
            f"data.longtail: class {empty} has no examples at all, so {name} has nothing to cut. "
            'Use data that hold every class, or longtail "none".'
        )
    largest = int(available.min()) if num_max is None else num_max
    counts = kept(largest)
    if (counts > available).any():
        short = int((counts > available).argmax())
        fitting = bisect_left(range(1, largest + 1), True, key=lambda n: bool((kept(n) > available).any()))
        raise PartitionError(
            f"data.longtail: {name} with num_max {largest} wants {counts[short]} examples of class {short}, "
            f"the data hold {available[short]}. Use num_max <= {fitting}, or leave it out."
        )
    if counts.min() < 1:
        raise PartitionError(
            f"data.longtail: {name} with factor {factor:g} leaves class {int((counts < 1).argmax())} without an "
            f"example (class 0 has {largest}). Use factor <= {largest}."
        )
    return counts


def _cut(labels: Ints, counts: Ints, rng: np.random.Generator, legacy_seed: int | None) -> Ints:
    """Returns a random choice of counts[c] examples of every class c, class after class."""
    # The authors' order of work: seed once; per class shuffle the indices (in file order) in place, keep the first.
    shuffler = rng if legacy_seed is None else np.random.RandomState(legacy_seed)
    chosen: list[Ints] = []
    for c, count in enumerate(counts):
        index = np.flatnonzero(labels == c).astype(np.int64)
        shuffler.shuffle(index)
        chosen.append(index[:count])
    return np.concatenate(chosen)
