"""What every partition shares: the abstract rule, the checks of its options, and dealing examples to clients."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.random import Generator, RandomState
from numpy.typing import NDArray

from fedtail.data.members import Members
from fedtail.data.statistics import Ints
from fedtail.errors import ConfigError, PartitionError

Users = NDArray[Any] | None

MAX_TRIES = 1000
"""Draws of a random partition with a min_size before it gives up, where it has no option for that."""


class Partition(ABC):
    """A rule that hands examples to clients: every example to at most one."""

    @abstractmethod
    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Returns one array of indices into `labels` a client: disjoint, each int64 and ascending.

        Args:
            labels: int64 [N], values 0..num_classes-1.
            num_classes: C, >= 1.
            rng: the partition is a pure function of it, the labels and the rule's fields.
            users: [N], whose example it is; only `Natural` reads it.

        Raises:
            PartitionError: the rule cannot be kept with these data.
        """

    def legacy_stream(self, labels: Ints, num_classes: int) -> RandomState | None:
        """Returns NumPy's legacy generator as the authors' split leaves it; None where `legacy_seed` is not used.

        Args:
            labels: as in `split`.
            num_classes: as in `split`.
        """
        return None


def at_least(owner: str, low: int, **values: int) -> None:
    """Raises ConfigError for the first option below `low`."""
    for name, value in values.items():
        if value < low:
            raise ConfigError(f"{owner}.{name} must be >= {low}, got {value}.")


def positive(owner: str, alpha: float) -> None:
    """Raises ConfigError unless alpha is in (0, inf)."""
    if not 0 < alpha < inf:
        raise ConfigError(f"{owner}.alpha must be in (0, inf), got {alpha}.")


def legacy_seed_in_range(owner: str, seed: int | None) -> None:
    """Raises ConfigError unless NumPy's legacy generator takes the seed."""
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"{owner}.legacy_seed must be in 0..2**32-1, got {seed}.")


def infeasible(what: str, remedy: str) -> PartitionError:
    """Returns the error that says what a partition cannot do and which values would work."""
    return PartitionError(f"data.partition: {what}. Use {remedy}.")


def lists(owners: Ints, clients: int) -> Members:
    """Returns the ascending indices of every owner 0..clients-1; an example of owner `clients` is nobody's."""
    offsets = np.cumsum([0, *np.bincount(owners, minlength=clients)[:clients]])
    order = np.argsort(owners, kind="stable")[: offsets[-1]]
    return Members(order.astype(np.int32 if len(owners) < 2**31 else np.int64), offsets)


def deal(labels: Ints, counts: Ints, rng: Generator) -> Ints:
    """Returns the owner of every example, int64 [N]: counts[k, c] random examples of class c go to client k.

    What the counts leave over gets the owner len(counts), nobody.
    """
    owners = np.full(len(labels), len(counts), np.int64)
    for c in range(counts.shape[1]):
        index = rng.permutation(np.flatnonzero(labels == c))
        owners[index[: counts[:, c].sum()]] = np.repeat(np.arange(len(counts)), counts[:, c])
    return owners
