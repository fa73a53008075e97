"""Partitions: which client holds which training examples; local test sets; the validation split.

Sources: long-tail protocol, sections 2.3 (IID, multinomial Dirichlet) and 2.4 (local test sets); label-skew baselines,
sections 7.2 (proportional Dirichlet) and 7.3 (class-specific, shards).

What cannot be made is answered here, before anything trains, with values that would work.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtail.data.statistics import Ints, class_counts
from fedtail.errors import ConfigError, PartitionError

MAX_TRIES = 1000  # draws of dirichlet_multinomial with a min_size before it gives up
TRIAL_DRAWS = 20  # draws that judge a value before it is proposed: half of them must reach min_size


class Partition(ABC):
    """A rule that hands every example to a client."""

    @abstractmethod
    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Returns one array of indices into `labels` a client: disjoint, each int64 and ascending.

        Args:
            labels: int64 [N], values 0..num_classes-1.
            num_classes: C, >= 1.
            rng: the partition is a pure function of it, the labels and the rule's fields.
            users: [N], whose example it is; only `Natural` reads it.

        Raises:
            PartitionError: the rule cannot be kept with these data.
        """


@dataclass(frozen=True, kw_only=True)
class IID(Partition):
    """A random split into parts whose sizes differ by at most one; nothing is left over (the protocol's leaves < K)."""

    clients: int = 10
    """Number of clients, >= 1."""

    def __post_init__(self) -> None:
        _at_least("IID", 1, clients=self.clients)

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Splits; see `Partition.split`."""
        if self.clients > len(labels):
            raise _error(f"iid cannot give {self.clients} clients an example each", len(labels), f"clients <= {len(labels)}")
        owners = np.empty(len(labels), np.int64)
        owners[rng.permutation(len(labels))] = np.arange(len(labels)) % self.clients
        return _lists(owners, self.clients)


@dataclass(frozen=True, kw_only=True)
class DirichletMultinomial(Partition):
    """Each example of class c goes to client k with probability p_kc, p_.c ~ Dirichlet(alpha) (protocol section 2.3).

    Unlike the authors' code it draws the counts of a class at once; the distribution is the same.
    """

    clients: int = 40
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = skewed, large = near IID."""
    min_size: int = 0
    """Smallest client that is accepted, >= 0; with 0 the first draw counts and clients may be empty."""
    legacy_seed: int | None = None
    """Repeats the authors' partition bit for bit with this seed of NumPy's legacy generator (FedLoGe 3407, Fed-GraB 1)."""

    def __post_init__(self) -> None:
        _at_least("DirichletMultinomial", 1, clients=self.clients)
        _at_least("DirichletMultinomial", 0, min_size=self.min_size)
        _positive("DirichletMultinomial", self.alpha)
        if self.legacy_seed is not None and not 0 <= self.legacy_seed < 2**32:
            raise ConfigError(f"DirichletMultinomial.legacy_seed must be in 0..2**32-1, got {self.legacy_seed}.")
        if self.legacy_seed is not None and self.min_size:
            raise ConfigError(
                "DirichletMultinomial: legacy_seed fixes the one draw there is, min_size must then be 0, "
                f"got {self.min_size}. Leave one of them out."
            )

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Splits; see `Partition.split`."""
        available = class_counts(labels, num_classes)
        if self.legacy_seed is not None:
            return _lists(self._legacy_owners(labels, available, self.legacy_seed), self.clients)
        return _lists(_deal(labels, _draw_counts(self, available, MAX_TRIES, rng), rng), self.clients)

    def draw(self, available: Ints, rng: np.random.Generator) -> Ints:
        """Returns n_kc of one draw, int64 [clients, C], for class sizes `available`, int64 [C]."""
        shares = rng.dirichlet(np.full(self.clients, self.alpha), size=len(available))
        return rng.multinomial(available, shares).T

    def _legacy_owners(self, labels: Ints, available: Ints, seed: int) -> Ints:
        # The sequence of the authors' code: an unused binomial array, then per class one Dirichlet draw and one choice.
        legacy = np.random.RandomState(seed)
        legacy.binomial(1, 1, size=(self.clients, len(available)))
        owners = np.empty(len(labels), np.int64)
        for c, count in enumerate(available):
            shares = legacy.dirichlet(np.full(self.clients, self.alpha))
            if not np.isfinite(shares).all():
                raise PartitionError(
                    "data.partition: the legacy draw of dirichlet_multinomial is 0/0 at so small an alpha "
                    f"({self.alpha:g}). Use alpha >= 0.001, or leave legacy_seed out."
                )
            owners[labels == c] = legacy.choice(self.clients, int(count), p=shares)
        return owners


@dataclass(frozen=True, kw_only=True)
class DirichletProportional(Partition):
    """Class c is cut at floor(cumsum(q) * N_c), q ~ Dirichlet(alpha) over clients, until all have min_size (7.2)."""

    clients: int = 10
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = skewed, large = near IID."""
    min_size: int = 10
    """Smallest client that is accepted, >= 0; everything is drawn again until it is reached, which favours milder skew."""
    cap: bool = False
    """Give nothing more to clients that already hold N / clients examples; milder skew."""
    max_tries: int = 1000
    """Draws before giving up, >= 1."""

    def __post_init__(self) -> None:
        _at_least("DirichletProportional", 1, clients=self.clients, max_tries=self.max_tries)
        _at_least("DirichletProportional", 0, min_size=self.min_size)
        _positive("DirichletProportional", self.alpha)

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Splits; see `Partition.split`."""
        counts = _draw_counts(self, class_counts(labels, num_classes), self.max_tries, rng)
        return _lists(_deal(labels, counts, rng), self.clients)

    def draw(self, available: Ints, rng: np.random.Generator) -> Ints:
        """Returns n_kc of one draw, int64 [clients, C], for class sizes `available`, int64 [C]."""
        shares = rng.dirichlet(np.full(self.clients, self.alpha), size=len(available))
        counts = np.zeros((self.clients, len(available)), np.int64)
        for c in np.flatnonzero(available):
            q = shares[c]
            if self.cap:
                room = counts.sum(axis=1) < available.sum() / self.clients
                # With a tiny alpha all of q may lie on full clients: those with room then share alike.
                q = np.where(room, q, 0.0) if (q * room).any() else room.astype(np.float64)
                q = q / q.sum()
            inner = np.floor(np.cumsum(q)[:-1] * available[c]).astype(np.int64)
            counts[:, c] = np.diff(inner, prepend=0, append=available[c])
        return counts


@dataclass(frozen=True, kw_only=True)
class Shards(Partition):
    """Sort by label, cut into clients * shards_per_client nearly equal shards, deal them at random (7.3).

    A client holds at most shards_per_client classes if the shard size divides every class size, else up to twice that.
    """

    clients: int = 10
    """Number of clients, >= 1."""
    shards_per_client: int = 2
    """Shards of each client, >= 1."""

    def __post_init__(self) -> None:
        _at_least("Shards", 1, clients=self.clients, shards_per_client=self.shards_per_client)

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Splits; see `Partition.split`."""
        shards, examples = self.clients * self.shards_per_client, len(labels)
        if shards > examples:
            values = [
                f"{name} <= {examples // other}"
                for name, other in (("clients", self.shards_per_client), ("shards_per_client", self.clients))
                if other <= examples
            ]
            raise _error(f"shards cannot cut {shards} shards", examples, " or ".join(values) or "fewer of both")
        shuffled = rng.permutation(examples)
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        dealt = rng.permutation(shards) // self.shards_per_client
        owners = np.empty(examples, np.int64)
        owners[by_label] = np.repeat(dealt, [len(part) for part in np.array_split(by_label, shards)])
        return _lists(owners, self.clients)


@dataclass(frozen=True, kw_only=True)
class ClassSpecific(Partition):
    """Every client holds exactly q classes, every class has r = clients * q / C holders with nearly equal parts (7.3)."""

    clients: int = 10
    """Number of clients, >= 1; clients * classes_per_client must be a multiple of C."""
    classes_per_client: int = 1
    """q, >= 1; must divide C."""

    def __post_init__(self) -> None:
        _at_least("ClassSpecific", 1, clients=self.clients, classes_per_client=self.classes_per_client)

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
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
        return _lists(owners, self.clients)

    def _check(self, available: Ints) -> None:
        classes, q = len(available), self.classes_per_client
        if classes % q:
            divisors = [d for d in range(1, classes + 1) if classes % d == 0]
            near = [*[d for d in divisors if d < q][-1:], *[d for d in divisors if d > q][:1]]
            raise PartitionError(
                f"data.partition: class_specific needs classes_per_client to divide the {classes} classes, got {q}. "
                f"Use classes_per_client = {' or '.join(map(str, near))}."
            )
        step = classes // q  # clients * q is a multiple of C exactly when clients is one of C / q
        if self.clients % step:
            below = self.clients // step * step
            near = [n for n in (below, below + step) if n]
            raise PartitionError(
                f"data.partition: class_specific needs clients to be a multiple of {step} ({classes} classes / {q} a client), "
                f"got {self.clients}. Use clients = {' or '.join(map(str, near))}."
            )
        holders, rarest = self.clients // step, int(available.argmin())
        if available[rarest] < holders:
            most = int(available[rarest]) * step
            raise _error(
                f"class_specific cannot give each of the {holders} holders of class {rarest} an example of it",
                int(available[rarest]),
                f"clients <= {most}" if most else "data that hold every class",
            )


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """One client a user of the data, in ascending order of the user column."""

    min_size: int = 1
    """Users with fewer examples are left out, >= 1."""

    def __post_init__(self) -> None:
        _at_least("Natural", 1, min_size=self.min_size)

    def split(
        self, labels: Ints, num_classes: int, rng: np.random.Generator, users: NDArray[Any] | None = None
    ) -> list[Ints]:
        """Splits; see `Partition.split`. Users left out leave their examples unused."""
        if users is None or len(users) != len(labels):
            got = "none" if users is None else f"one of {len(users)} values for {len(labels)} examples"
            raise PartitionError(
                f"data.partition: natural needs a column that names the user of every example, got {got}. "
                "Use data that come with one, or another partition such as dirichlet_multinomial."
            )
        _, owners, sizes = np.unique(users, return_inverse=True, return_counts=True)
        kept = [part for part in _lists(owners.reshape(-1), len(sizes)) if len(part) >= self.min_size]
        if not kept:
            largest = int(sizes.max(initial=0))
            raise _error(
                f"natural finds no user with {self.min_size} examples (the largest has {largest})",
                len(labels),
                f"min_size <= {largest}" if largest else "data with examples",
            )
        return kept


PARTITIONS: dict[str, type[Partition]] = {
    "iid": IID,
    "dirichlet_multinomial": DirichletMultinomial,
    "dirichlet_proportional": DirichletProportional,
    "shards": Shards,
    "class_specific": ClassSpecific,
    "natural": Natural,
}
