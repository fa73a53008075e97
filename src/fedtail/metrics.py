"""Metrics from confusion counts, and the rules that sort classes into shot groups (head, medium, tail).

A confusion matrix is int64 [C, C], row = true class, column = predicted class. Its entries are counts, so matrices may
be added over batches and clients before anything here is computed. What has no value (no test examples) is None.

Sources: the evaluation of Fed-GraB's, FedLoGe's and (error asymmetry) FedGA's experiments (the authors' code),
docs/metrics.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtail.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
CountsOf = Literal["local_test", "train"]

TINY = 1e-12  # of soft errors: less counts as this much
_NAMES = {"local_test": "local test counts", "train": "training counts"}


class ShotGroups(NamedTuple):
    """Class ids by frequency group; disjoint. All three empty: there are no groups."""

    head: tuple[int, ...]
    medium: tuple[int, ...]
    tail: tuple[int, ...]


class GroupRule(ABC):
    """A rule that sorts the classes into shot groups by their counts."""

    @property
    @abstractmethod
    def counts_of(self) -> CountsOf:
        """Which counts `split` is to be given: "local_test" (m_kc summed over clients) or "train" (n_c)."""

    @abstractmethod
    def split(self, counts: Ints) -> ShotGroups:
        """Returns the groups.

        Args:
            counts: examples of each class, int64 [C].
        """

    @abstractmethod
    def describe(self) -> str:
        """Returns the rule in words; it stands beside every number of a group."""


@dataclass(frozen=True, kw_only=True)
class Cumulative(GroupRule):
    """Classes in descending order of count; head and medium end where the cumulative share reaches a threshold.

    Ties keep the order of the class ids. The class that reaches a threshold belongs to the group that it completes; one
    class may reach both, then medium is empty. Counts that are all zero give no groups.
    """

    head: float = 0.75
    """Cumulative share that the head classes reach, in (0, 1]."""
    medium: float = 0.95
    """Cumulative share that head and medium classes reach together, in [head, 1]."""
    of: CountsOf = "local_test"
    """Which counts: of the local test sets, summed over the clients, or of the training set."""

    def __post_init__(self) -> None:
        if not 0 < self.head <= self.medium <= 1:
            raise ConfigError(
                f"Cumulative.head and Cumulative.medium must satisfy 0 < head <= medium <= 1, "
                f"got {self.head} and {self.medium}."
            )

    @property
    def counts_of(self) -> CountsOf:
        """Returns `of`."""
        return self.of

    def split(self, counts: Ints) -> ShotGroups:
        """Returns the groups; see `GroupRule.split`."""
        if not counts.any():
            return ShotGroups((), (), ())
        order = np.argsort(-counts, kind="stable")
        share = np.cumsum(counts[order]) / counts.sum()
        first, second = (int(np.argmax(share >= threshold)) + 1 for threshold in (self.head, self.medium))
        return _groups(order[:first], order[first:second], order[second:])

    def describe(self) -> str:
        """Returns for example "cumulative 75/95 % of the summed local test counts"."""
        summed = "summed " if self.of == "local_test" else ""
        return f"cumulative {100 * self.head:g}/{100 * self.medium:g} % of the {summed}{_NAMES[self.of]}"


@dataclass(frozen=True, kw_only=True)
class OLTR(GroupRule):
    """Fixed thresholds on training counts: head above `many`, tail below `few` (Liu et al., CVPR 2019)."""

    many: int = 100
    """Head classes have more training examples than this, >= few."""
    few: int = 20
    """Tail classes have fewer training examples than this, >= 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.few <= self.many:
            raise ConfigError(f"OLTR.few and OLTR.many must satisfy 0 <= few <= many, got {self.few} and {self.many}.")

    @property
    def counts_of(self) -> CountsOf:
        """Returns "train"."""
        return "train"

    def split(self, counts: Ints) -> ShotGroups:
        """Returns the groups; see `GroupRule.split`."""
        head, tail = counts > self.many, counts < self.few
        return _groups(np.flatnonzero(head), np.flatnonzero(~head & ~tail), np.flatnonzero(tail))

    def describe(self) -> str:
        """Returns for example "more than 100 / 20 to 100 / fewer than 20 training examples"."""
        return f"more than {self.many} / {self.few} to {self.many} / fewer than {self.few} training examples"


@dataclass(frozen=True, kw_only=True)
class Thirds(GroupRule):
    """Thirds of the classes by descending count, ties by class id; what does not divide goes to head, then medium."""

    of: CountsOf = "train"
    """Which counts: of the local test sets, summed over the clients, or of the training set."""

    @property
    def counts_of(self) -> CountsOf:
        """Returns `of`."""
        return self.of

    def split(self, counts: Ints) -> ShotGroups:
        """Returns the groups; see `GroupRule.split`."""
        return _groups(*np.array_split(np.argsort(-counts, kind="stable"), 3))

    def describe(self) -> str:
        """Returns for example "thirds of the classes by training counts"."""
        return f"thirds of the classes by {'summed ' if self.of == 'local_test' else ''}{_NAMES[self.of]}"


@dataclass(frozen=True, kw_only=True)
class Explicit(GroupRule):
    """Groups by class id, whatever the counts."""

    head: tuple[int, ...] = ()
    """Class ids of the head."""
    medium: tuple[int, ...] = ()
    """Class ids of the medium group."""
    tail: tuple[int, ...] = ()
    """Class ids of the tail. The three must be disjoint and together hold every class."""

    def __post_init__(self) -> None:
        classes = [*self.head, *self.medium, *self.tail]
        double = sorted({c for c in classes if classes.count(c) > 1})
        if double or min(classes, default=0) < 0:
            what = f"class {double[0]} stands twice" if double else f"class {min(classes)} does not exist"
            raise ConfigError(f"Explicit: {what}. Name every class from 0 on in exactly one of head, medium and tail.")

    @property
    def counts_of(self) -> CountsOf:
        """Returns "train"; the counts decide nothing."""
        return "train"

    def split(self, counts: Ints) -> ShotGroups:
        """Returns the groups; see `GroupRule.split`.

        Raises:
            ConfigError: the groups do not hold exactly the classes 0..C-1.
        """
        named, classes = {*self.head, *self.medium, *self.tail}, set(range(len(counts)))
        if named != classes:
            missing, unknown = sorted(classes - named), sorted(named - classes)
            raise ConfigError(
                f"Explicit: the data have the classes 0..{len(counts) - 1}; not in a group: {missing or 'none'}, "
                f"not in the data: {unknown or 'none'}. Name every class in exactly one of head, medium and tail."
            )
        return ShotGroups(tuple(self.head), tuple(self.medium), tuple(self.tail))

    def describe(self) -> str:
        """Returns for example "explicit, 2/4/4 classes"."""
        return f"explicit, {len(self.head)}/{len(self.medium)}/{len(self.tail)} classes"


GROUP_RULES: dict[str, type[GroupRule]] = {
    "cumulative": Cumulative,
    "oltr": OLTR,
    "thirds": Thirds,
    "explicit": Explicit,
}


def from_confusion(confusion: Ints, groups: ShotGroups) -> dict[str, Any]:
    """Returns the metrics of one model on one test set.

    Args:
        confusion: int64 [C, C], row = true class, column = predicted class.
        groups: shot groups of the C classes.

    Returns:
        `accuracy`: share of examples predicted right; `balanced_accuracy`: mean recall of the classes with test
        examples; `macro_f1`: mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in truth or prediction
        (scikit-learn's default; F1 is 0 where precision and recall are 0 or 0/0); `per_class_recall`: one value a
        class; `head`, `medium`, `tail`: accuracy on the examples of the group's classes. All in [0, 1], or None.
    """
    support = confusion.sum(axis=1)
    recall = _ratio(np.diagonal(confusion), support)
    return {
        "accuracy": _accuracy(confusion),
        "balanced_accuracy": _mean(recall[support > 0]),
        "macro_f1": _macro_f1(confusion),
        "per_class_recall": [float(r) if n else None for r, n in zip(recall, support, strict=True)],
        **{name: _accuracy(confusion, classes) for name, classes in groups._asdict().items()},
    }


def error_asymmetry(soft: Floats, support: Ints) -> Floats:
    """Returns EA_c = (1 - pi_cc) / sum_{j != c} pi_jc, soft misses over soft false alarms, float64 [C].

    pi_jc is the mean probability of class c on the examples of class j. 1: balanced; above 1: the class is predicted too
    rarely; below 1: too often. Both sides are clamped at 1e-12, and 1 if both are below it. Classes without examples are
    left out of the sum; they themselves get NaN.

    Args:
        soft: float64 [C, C], row = true class: the predicted probabilities, summed over its examples.
        support: examples of each class, int64 [C].
    """
    pi = _ratio(soft, support[:, None])
    np.fill_diagonal(pi, 0.0)  # a sum of what is wrong keeps the digits that 1 - pi_cc loses
    misses, alarms = (np.maximum(pi.sum(axis=axis), TINY) for axis in (1, 0))
    return np.where(support > 0, misses / alarms, np.nan)


def asymmetry_scores(soft: Floats, support: Ints) -> dict[str, Any]:
    """Returns `error_asymmetry`, one value a class or None, and `mean_abs_log_ea`, the mean of abs(log EA) over the others."""
    ea = error_asymmetry(soft, support)
    return {
        "error_asymmetry": [None if np.isnan(value) else float(value) for value in ea],
        "mean_abs_log_ea": _mean(np.abs(np.log(ea[support > 0]))),
    }


def client_spread(
    confusions: Ints, groups: ShotGroups | Sequence[ShotGroups], examples: Ints | None = None
) -> dict[str, Any]:
    """Returns how the clients fare, each on its own local test set.

    Clients with an empty local test set are left out. Every other client counts once, except in `macro_f1`.

    Args:
        confusions: int64 [K, C, C], one confusion matrix a client.
        groups: the same groups for all, or one `ShotGroups` a client, for example `[rule.split(row) for row in m]`, as
            the protocol's personal models have them.
        examples: n_k, int64 [K], weights of `macro_f1`; by default every client weighs the same.

    Returns:
        `clients`: K', the number of clients that count; `mean` and `std` of their accuracies, the latter the
        population's (divided by K'); `worst_decile`: mean accuracy of the worst max(1, floor(K' / 10)) clients;
        `macro_f1`: mean of their macro F1, weighted by `examples`; `head`, `medium`, `tail`: mean accuracy in the group
        over the clients with at least one test example in it. None where no client counts.
    """
    each = [groups] * len(confusions) if isinstance(groups, ShotGroups) else groups
    if len(each) != len(confusions):
        raise ValueError(f"client_spread: {len(confusions)} clients, but groups for {len(each)}.")
    return spread([client_scores(*pair) for pair in zip(confusions, each, strict=True)], examples)


def client_scores(confusion: Ints, groups: ShotGroups) -> dict[str, float | None]:
    """Returns one client's accuracy, macro F1 and accuracy in each group on its local test set, None where it has no example.

    All that `spread` needs of a client: a node of a deployment sends these numbers, and no counts.
    """
    return {
        "accuracy": _accuracy(confusion),
        "macro_f1": _macro_f1(confusion),
        **{name: _accuracy(confusion, classes) for name, classes in groups._asdict().items()},
    }


def spread(scores: Sequence[Mapping[str, float | None]], examples: Ints | None = None) -> dict[str, Any]:
    """Returns `client_spread` from the clients' scores (`client_scores`)."""
    present = [k for k, each in enumerate(scores) if each["accuracy"] is not None]
    columns = {
        name: _known([scores[k][name] for k in present]) for name in ("accuracy", "macro_f1", *ShotGroups._fields)
    }
    accuracy, f1 = np.sort(columns["accuracy"]), columns["macro_f1"]
    weights = np.ones(len(present)) if examples is None else examples[present]
    return {
        "clients": len(present),
        "mean": _mean(accuracy),
        "std": float(accuracy.std()) if len(present) else None,
        "worst_decile": _mean(accuracy[: max(1, len(present) // 10)]),
        "macro_f1": float(f1 @ weights / weights.sum()) if weights.any() else None,
        **{name: _mean(columns[name]) for name in ShotGroups._fields},
    }


def _groups(*parts: Ints) -> ShotGroups:
    return ShotGroups(*(tuple(part.tolist()) for part in parts))


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """Returns above / below, 0 for 0/0."""
    return above / np.maximum(below, 1)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _known(values: list[float | None]) -> Floats:
    return np.array([value for value in values if value is not None], np.float64)


def _accuracy(confusion: Ints, classes: tuple[int, ...] | None = None) -> float | None:
    """Returns the accuracy on the examples whose true class is in `classes` (all by default)."""
    rows = list(range(len(confusion)) if classes is None else classes)
    total = int(confusion[rows].sum())
    return float(confusion[rows, rows].sum() / total) if total else None


def _macro_f1(confusion: Ints) -> float | None:
    occurring = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    return _mean(_ratio(2 * np.diagonal(confusion), occurring)[occurring > 0])
