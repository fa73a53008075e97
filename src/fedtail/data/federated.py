"""FederatedData: one copy of the columns, clients are index lists."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtail.data.augment import Augmentation, augment
from fedtail.data.members import Members
from fedtail.errors import DataError

Array = np.ndarray[Any, Any]


def prepare(x: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales uint8 images [N, C, ...] to 0..1 and normalises by channel; float inputs are taken to be scaled already."""
    out = x.to(dtype, copy=True)
    if x.dtype == torch.uint8:
        out.div_(255)
    if mean:
        shape = (-1, *[1] * (x.dim() - 2))
        out.sub_(out.new_tensor(mean).view(shape)).div_(out.new_tensor(std).view(shape))
    return out


@dataclass(frozen=True)
class FederatedData:
    """Training columns with their owners, and the test set with each client's local part of it.

    Args:
        columns: by name, each [N, ...]; "x" (uint8 images or float features) and "y" (int64) are required. Images may
            be a `LazyImages`, which decodes the rows that `index_select` asks for.
        owners: one int64 array of training indices a client; kept as `Members`.
        test: columns of the test set, "x" and "y".
        local_tests: one int64 array of test indices a client.
        num_classes: number of classes.
        mean: per channel, on the scale 0..1; empty: no normalisation.
        std: likewise.
        augmentation: applied to training batches.
        validation: training indices kept out of every client for model selection.
        server: training indices that the server holds.
        sources: what was loaded, cut and split, in words, for reports.
        held: one int64 array of training indices a client that it keeps out of its training, for validation; empty: none.
        probe: training indices that a teacher's head is fitted on, nobody else's.
        class_names: name of each class; empty: not known.
    """

    columns: Mapping[str, Any]
    owners: Sequence[Array]
    test: Mapping[str, Any]
    local_tests: Sequence[Array]
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Augmentation = "none"
    validation: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    server: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    sources: tuple[str, ...] = ()
    held: Sequence[Array] = ()
    probe: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    class_names: tuple[str, ...] = ()

    local_tests_are: ClassVar[str] = "matched part of the test set"

    def __post_init__(self) -> None:
        if not len(self.held):
            object.__setattr__(self, "held", Members(np.zeros(0, np.int64), np.zeros(len(self.owners) + 1, np.int64)))
        for name in ("owners", "local_tests", "held"):
            object.__setattr__(self, name, Members.of(getattr(self, name)))
        for name in ("x", "y"):
            if name not in self.columns or name not in self.test:
                raise DataError(
                    f"data: the column {name!r} is missing; found {sorted(self.columns)}, {sorted(self.test)}."
                )

    @property
    def clients(self) -> int:
        """Number of clients in the population."""
        return len(self.owners)

    def counts(self) -> Array:
        """Returns the class counts of every client, int64 [clients, classes]."""
        return self._counts[0].copy()

    def counts_of(self, clients: Sequence[int]) -> Array:
        """Returns the class counts of some clients, int64 [len(clients), classes], without looking at the others."""
        return Members.of(self.owners).class_counts(self._labels[0], self.num_classes, clients)

    def class_totals(self, without: Sequence[int] = ()) -> Array:
        """Returns the class counts of all clients together, but for some of them, int64 [classes]."""
        totals = np.bincount(self._labels[0][Members.of(self.owners).members], minlength=self.num_classes)
        return totals - self.counts_of(without).sum(0) if len(without) else totals

    def test_counts(self) -> Array:
        """Returns the class counts of every client's local test set, int64 [clients, classes]."""
        return self._counts[1].copy()

    def server_rows(self, per_class: int) -> Array:
        """Returns the server's training indices, or so many of each class (0: all; of unlabelled ones as many in all)."""
        if not per_class:
            return self.server
        y = self._labels[0][self.server]
        many = {int(c): per_class if c >= 0 else per_class * self.num_classes for c in np.unique(y)}
        return np.sort(np.concatenate([self.server[y == c][:n] for c, n in many.items()]))

    @cached_property
    def _counts(self) -> tuple[Array, Array]:
        parts = (Members.of(self.owners), Members.of(self.local_tests))
        first, second = (part.class_counts(y, self.num_classes) for part, y in zip(parts, self._labels, strict=True))
        return first, second

    @cached_property
    def _labels(self) -> tuple[Array, Array]:
        return self.columns["y"].numpy(force=True), self.test["y"].numpy(force=True)

    def fold(self, number: int, folds: int) -> "FederatedData":
        """Returns the data with another validation part: of each client's examples, every `folds`-th from `number` on."""
        all_rows = [np.sort(np.concatenate(pair)) for pair in zip(self.owners, self.held, strict=True)]
        out = [np.arange(len(rows)) % folds == number for rows in all_rows]
        owners, held = ([r[o == part] for r, o in zip(all_rows, out, strict=True)] for part in (False, True))
        return dataclasses.replace(self, owners=owners, held=held)

    def prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Turns raw inputs into what the network sees."""
        return prepare(x, dtype, self.mean, self.std)

    def gather(
        self, index: Tensor, dtype: torch.dtype, draws: Mapping[str, Tensor], columns: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns training examples by index, augmented (where their draws are given) and prepared.

        Args:
            index: (n,) int64.
            dtype: of the inputs.
            draws: per-example augmentation draws, each [n, ...].
            columns: which columns.
        """
        out: dict[str, Tensor] = {}
        for name in columns:
            if name not in self.columns:
                raise DataError(f"data: the algorithm wants the column {name!r}; the data have {sorted(self.columns)}.")
            value = self.columns[name].index_select(0, index)
            out[name] = self.prepare(augment(value, draws), dtype) if name == "x" else value
        return out
