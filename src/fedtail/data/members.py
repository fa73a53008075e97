"""Who holds which examples: two arrays for a population of any size, read like a list of index arrays."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

Array = np.ndarray[Any, Any]

CHUNK = 1 << 22  # examples that are counted at once


class Members(Sequence[Array]):
    """Each client's examples, one client after another in one array.

    A million clients of 20 examples are 84 MB here; as a million small arrays they would be three times as much and
    seconds slower to make.

    Args:
        members: example indices, (examples,) of any integer type.
        offsets: int64 (clients + 1,): client k holds members[offsets[k]:offsets[k + 1]].
    """

    def __init__(self, members: Array, offsets: Array):
        self.members, self.offsets = members, offsets

    @classmethod
    def of(cls, parts: Iterable[Array]) -> "Members":
        """Returns the same as a list of arrays, or what already is one."""
        if isinstance(parts, Members):
            return parts
        each = list(parts)
        return cls(np.concatenate(each or [np.zeros(0, np.int64)]), np.cumsum([0, *map(len, each)]))

    @property
    def sizes(self) -> Array:
        """Number of examples of each client, int64 (clients,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"client {index} of {len(self)}")
        index %= len(self)
        return self.members[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def class_counts(self, labels: Array, classes: int, clients: Sequence[int] | None = None) -> Array:
        """Returns how many examples of each class clients hold, int64 [clients, classes].

        Args:
            labels: int64, by example.
            classes: number of classes.
            clients: whose; None: everyone's.
        """
        if clients is not None:
            return np.stack([np.bincount(labels[self[k]], minlength=classes) for k in clients])
        counts = np.zeros((len(self), classes), np.int64)
        first = 0
        while first < len(self):
            last = max(int(np.searchsorted(self.offsets, self.offsets[first] + CHUNK, side="right")) - 1, first + 1)
            held = labels[self.members[self.offsets[first] : self.offsets[last]]]
            rows = np.repeat(np.arange(last - first), np.diff(self.offsets[first : last + 1]))
            flat = np.bincount(rows * classes + held, minlength=(last - first) * classes)
            counts[first:last] = flat.reshape(last - first, classes)
            first = last
        return counts
