"""Partitions: which client holds which training examples; local test sets; the validation split.

Sources: the experiments of Fed-GraB and FedLoGe (the authors' code) for the multinomial Dirichlet
split and the local test sets; the usual label-skew splits for the others. docs/data.md has every procedure.

What cannot be made is answered here, before anything trains, with values that would work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.random import Generator, RandomState

from fedtail.data import legacy
from fedtail.data.base import (
    MAX_TRIES,
    Partition,
    Users,
    at_least,
    deal,
    infeasible,
    legacy_seed_in_range,
    lists,
    positive,
)
from fedtail.data.dirichlet import draw_until, multinomial_counts, proportional_counts
from fedtail.data.skews import DirichletEqualSize, QuantitySkew, RotatedTails
from fedtail.data.statistics import Ints, class_counts
from fedtail.errors import ConfigError

__all__ = [
    "IID", "PARTITIONS", "ClassSpecific", "DirichletEqualSize", "DirichletMultinomial", "DirichletProportional", "Natural",
    "Partition", "QuantitySkew", "RotatedTails", "Shards", "Users", "describe_partition", "local_test_counts",
    "local_tests", "validation_split",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IID(Partition):
    """A random split into parts whose sizes differ by at most one; nothing is left over (with `legacy_seed` up to K - 1)."""

    clients: int = 10
    """Number of clients, >= 1."""
    legacy_seed: int | None = None
    """Repeats the authors' partition bit for bit: the seed of NumPy's legacy generator (FedLoGe 3407, Fed-GraB 1)."""

    def __post_init__(self) -> None:
        at_least("IID", 1, clients=self.clients)
        legacy_seed_in_range("IID", self.legacy_seed)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        if self.clients > len(labels):
            raise infeasible(
                f"iid cannot give each of {self.clients} clients an example, there are {len(labels)}",
                f"clients <= {len(labels)}",
            )
        if self.legacy_seed is not None:
            return lists(legacy.iid_owners(len(labels), self.clients, self.legacy_seed)[0], self.clients)
        owners = np.empty(len(labels), np.int64)
        owners[rng.permutation(len(labels))] = np.arange(len(labels)) % self.clients
        return lists(owners, self.clients)

    def legacy_stream(self, labels: Ints, num_classes: int) -> RandomState | None:
        """Returns where the legacy split leaves the generator; see `Partition.legacy_stream`."""
        return None if self.legacy_seed is None else legacy.iid_owners(len(labels), self.clients, self.legacy_seed)[1]


@dataclass(frozen=True, kw_only=True)
class DirichletMultinomial(Partition):
    """Each example of class c goes to client k with probability p_kc, p_.c ~ Dirichlet(alpha).

    Unlike the authors' code it draws the counts of a class at once; the distribution is the same.
    """

    clients: int = 40
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = skewed, large = near IID."""
    min_size: int = 0
    """Smallest client that is accepted, >= 0; with 0 the first draw counts and clients may be empty."""
    legacy_seed: int | None = None
    """Repeats the authors' partition bit for bit: the seed of NumPy's legacy generator (FedLoGe 3407, Fed-GraB 1)."""

    def __post_init__(self) -> None:
        at_least("DirichletMultinomial", 1, clients=self.clients)
        at_least("DirichletMultinomial", 0, min_size=self.min_size)
        positive("DirichletMultinomial", self.alpha)
        legacy_seed_in_range("DirichletMultinomial", self.legacy_seed)
        if self.legacy_seed is not None and self.min_size:
            raise ConfigError(
                "DirichletMultinomial: legacy_seed fixes the one draw there is, min_size must then be 0, "
                f"got {self.min_size}. Leave one of them out."
            )

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        available = class_counts(labels, num_classes)
        if self.legacy_seed is not None:
            owners, _ = legacy.dirichlet_owners(labels, available, self.clients, self.alpha, self.legacy_seed)
            return lists(owners, self.clients)

        def draw(clients: int, alpha: float) -> Ints:
            return multinomial_counts(available, clients, alpha, rng)

        counts = draw_until(
            "dirichlet_multinomial", draw, len(labels), self.clients, self.alpha, self.min_size, MAX_TRIES
        )
        return lists(deal(labels, counts, rng), self.clients)

    def legacy_stream(self, labels: Ints, num_classes: int) -> RandomState | None:
        """Returns where the legacy split leaves the generator; see `Partition.legacy_stream`."""
        if self.legacy_seed is None:
            return None
        available = class_counts(labels, num_classes)
        return legacy.dirichlet_owners(labels, available, self.clients, self.alpha, self.legacy_seed)[1]


@dataclass(frozen=True, kw_only=True)
class DirichletProportional(Partition):
    """Class c is cut at floor(cumsum(q) * N_c), q ~ Dirichlet(alpha) over clients, until all have min_size."""

    clients: int = 10
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = skewed, large = near IID."""
    min_size: int = 10
    """Smallest client that is accepted, >= 0; all is drawn again until it is reached, which favours milder skew."""
    cap: bool = False
    """Give nothing more to clients that already hold N / clients examples; milder skew."""
    max_tries: int = 1000
    """Draws before giving up, >= 1."""

    def __post_init__(self) -> None:
        at_least("DirichletProportional", 1, clients=self.clients, max_tries=self.max_tries)
        at_least("DirichletProportional", 0, min_size=self.min_size)
        positive("DirichletProportional", self.alpha)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        available = class_counts(labels, num_classes)

        def draw(clients: int, alpha: float) -> Ints:
            return proportional_counts(available, clients, alpha, self.cap, rng)

        counts = draw_until(
            "dirichlet_proportional", draw, len(labels), self.clients, self.alpha, self.min_size, self.max_tries
        )
        return lists(deal(labels, counts, rng), self.clients)


@dataclass(frozen=True, kw_only=True)
class Shards(Partition):
    """Sort by label, cut into clients * shards_per_client nearly equal shards, deal them at random.

    A client holds at most shards_per_client classes if the shard size divides every class size, else up to twice that.
    """

    clients: int = 10
    """Number of clients, >= 1."""
    shards_per_client: int = 2
    """Shards of each client, >= 1."""

    def __post_init__(self) -> None:
        at_least("Shards", 1, clients=self.clients, shards_per_client=self.shards_per_client)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        shards, examples = self.clients * self.shards_per_client, len(labels)
        if shards > examples:
            values = [
                f"{name} <= {examples // other}"
                for name, other in (("clients", self.shards_per_client), ("shards_per_client", self.clients))
                if other <= examples
            ]
            raise infeasible(
                f"shards cannot cut {examples} examples into {shards}", " or ".join(values) or "fewer of both"
            )
        shuffled = rng.permutation(examples)
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        dealt = rng.permutation(shards) // self.shards_per_client
        owners = np.empty(examples, np.int64)
        owners[by_label] = np.repeat(dealt, [len(part) for part in np.array_split(by_label, shards)])
        return lists(owners, self.clients)


@dataclass(frozen=True, kw_only=True)
class ClassSpecific(Partition):
    """Every client holds q classes, every class has r = clients * q / C holders with nearly equal parts."""

    clients: int = 10
    """Number of clients, >= 1; clients * classes_per_client must be a multiple of C."""
    classes_per_client: int = 1
    """q, >= 1; must divide C."""

    def __post_init__(self) -> None:
        at_least("ClassSpecific", 1, clients=self.clients, classes_per_client=self.classes_per_client)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        available = class_counts(labels, num_classes)
        self._check(available)
        rounds = self.clients * self.classes_per_client // num_classes
        # q divides C, so a chunk never straddles two permutations: no class twice on a client.
        dealt = np.concatenate([rng.permutation(num_classes) for _ in range(rounds)])
        owners = np.empty(len(labels), np.int64)
        for c in range(num_classes):
            holders = np.flatnonzero(dealt == c) // self.classes_per_client
            index = rng.permutation(np.flatnonzero(labels == c))
            owners[index] = np.repeat(holders, [len(part) for part in np.array_split(index, rounds)])
        return lists(owners, self.clients)

    def _check(self, available: Ints) -> None:
        classes, q = len(available), self.classes_per_client
        if classes % q:
            divisors = [d for d in range(1, classes + 1) if classes % d == 0]
            near = [*[d for d in divisors if d < q][-1:], *[d for d in divisors if d > q][:1]]
            raise infeasible(
                f"class_specific needs classes_per_client to divide the {classes} classes, got {q}",
                f"classes_per_client = {' or '.join(map(str, near))}",
            )
        step = classes // q  # clients * q is a multiple of C exactly when clients is one of C / q
        if self.clients % step:
            below = self.clients // step * step
            near = [n for n in (below, below + step) if n]
            raise infeasible(
                f"class_specific needs clients to be a multiple of {step} ({classes} / {q}), got {self.clients}",
                f"clients = {' or '.join(map(str, near))}",
            )
        holders, rarest = self.clients // step, int(available.argmin())
        if available[rarest] < holders:
            most = int(available[rarest]) * step
            raise infeasible(
                f"class_specific cannot give each of {holders} holders an example of class {rarest}, "
                f"there are {available[rarest]}",
                f"clients = {most} or fewer" if most else "data that hold every class",
            )


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """One client a user of the data, in ascending order of the user column."""

    min_size: int = 1
    """Users with fewer examples are left out, >= 1."""

    def __post_init__(self) -> None:
        at_least("Natural", 1, min_size=self.min_size)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`. Users left out leave their examples unused."""
        if users is None or len(users) != len(labels):
            got = "none" if users is None else f"one of {len(users)} values for {len(labels)} examples"
            raise infeasible(
                f"natural needs a column that names the user of every example, got {got}",
                "data that come with one, or another partition such as dirichlet_multinomial",
            )
        _, owners, sizes = np.unique(users, return_inverse=True, return_counts=True)
        kept = [part for part in lists(owners.reshape(-1), len(sizes)) if len(part) >= self.min_size]
        if not kept:
            largest = int(sizes.max(initial=0))
            raise infeasible(
                f"natural finds no user with {self.min_size} examples, the largest has {largest}",
                f"min_size <= {largest}" if largest else "data with examples",
            )
        return kept


PARTITIONS: dict[str, type[Partition]] = {
    "iid": IID,
    "dirichlet_multinomial": DirichletMultinomial,
    "dirichlet_proportional": DirichletProportional,
    "dirichlet_equal_size": DirichletEqualSize,
    "shards": Shards,
    "class_specific": ClassSpecific,
    "quantity_skew": QuantitySkew,
    "rotated_tails": RotatedTails,
    "natural": Natural,
}


def describe_partition(partition: Partition) -> str:
    """Returns one line for people: the registry's name, every setting that is set, and what the rule does.

    Example:
        >>> describe_partition(IID(clients=4))[:15]
        'iid (clients=4)'
    """
    names = [name for name, cls in PARTITIONS.items() if type(partition) is cls] or [type(partition).__name__]
    values = {f.name: getattr(partition, f.name) for f in fields(partition)}  # pyright: ignore[reportArgumentType]
    settings = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"{names[0]} ({settings}): {(type(partition).__doc__ or '').strip().splitlines()[0]}"


def local_test_counts(counts: Ints, num_test: int, pool: Ints) -> Ints:
    """Returns m_kc = min(floor(N_test * n_kc / n_tot), pool_c), int64 [clients, C].

    Args:
        counts: n_kc of the training partition, int64 [clients, C].
        num_test: N_test, the size of the balanced test set, >= 0.
        pool: test examples of each class, int64 [C].
    """
    total = max(int(counts.sum()), 1)  # no training data at all: no local tests
    return np.minimum(counts * num_test // total, pool)


def local_tests(m: Ints, test_labels: Ints, rng: Generator) -> list[Ints]:
    """Returns every client's local test set: ascending int64 indices into the test set, m[k, c] of class c.

    Drawn without replacement within a client and independently for every client, so the sets of two clients may overlap
    and all are subsets of the global test set.

    Args:
        m: int64 [clients, C], from `local_test_counts`.
        test_labels: int64 [N_test], values 0..C-1.
        rng: what is drawn.

    Raises:
        PartitionError: a client wants more examples of a class than the test set has.
    """
    classes = m.shape[1]
    pool = class_counts(test_labels, classes)
    if (m > pool).any():
        client, c = np.argwhere(m > pool)[0].tolist()
        raise infeasible(
            f"client {client} wants {m[client, c]} local test examples of class {c}, the test set has {pool[c]}",
            "counts from local_test_counts",
        )
    by_class = [np.flatnonzero(test_labels == c) for c in range(classes)]
    tests: list[Ints] = []
    for row in m:
        drawn = [rng.choice(by_class[c], row[c], replace=False) for c in np.flatnonzero(row)]
        tests.append(np.sort(np.concatenate([np.zeros(0, np.int64), *drawn])))
    return tests


def validation_split(labels: Ints, num_classes: int, per_class: int, rng: Generator) -> tuple[Ints, Ints]:
    """Takes a balanced validation set out of the training pool, before any long-tail cut.

    Args:
        labels: int64 [N], values 0..num_classes-1.
        num_classes: C, >= 1.
        per_class: validation examples of each class, >= 0.
        rng: which ones.

    Returns:
        (train, validation): disjoint ascending int64 indices that together are 0..N-1.

    Raises:
        PartitionError: a class would keep no training example.
    """
    at_least("validation", 0, per_class=per_class)
    available = class_counts(labels, num_classes)
    rarest = int(available.argmin())
    if per_class and available[rarest] <= per_class:
        most = max(int(available[rarest]) - 1, 0)
        raise infeasible(
            f"{per_class} validation examples of class {rarest} leave none to train on, there are {available[rarest]}",
            f"at most {most} a class",
        )
    mask = np.zeros(len(labels), bool)
    for c in range(num_classes):
        mask[rng.permutation(np.flatnonzero(labels == c))[:per_class]] = True
    return np.flatnonzero(~mask).astype(np.int64), np.flatnonzero(mask).astype(np.int64)
