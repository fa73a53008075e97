"""Partitions that isolate one kind of skew: labels at equal sizes, sizes at equal labels, a tail on every client.

Sources: the experiments of FedGA (the authors' code) for the equal-size Dirichlet split; Li, Diao, Chen and He, Federated
Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022 (arXiv 2102.02079) for quantity skew; the experiments of
FedLoGe (the authors' code, its option "balanced_global") for rotated tails. docs/data.md has every procedure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.random import Generator

from fedtail.data.base import MAX_TRIES, Partition, Users, at_least, deal, infeasible, lists, positive
from fedtail.data.dirichlet import draw_until, equal_size_counts
from fedtail.data.statistics import Ints, class_counts
from fedtail.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DirichletEqualSize(Partition):
    """Clients of nearly equal size s, client k with label shares r_k ~ Dirichlet(alpha) over classes; data are left over.

    s = min_c N_c / sum_k r_kc is as large as the scarcest class allows, n_kc = round(s r_kc), and clients take the shuffled
    examples of a class in turn. Meant for balanced data: after a long-tail cut the rarest class keeps every client small.
    """

    clients: int = 10
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = skewed, large = near IID."""
    min_size: int = 1
    """Smallest client that is accepted, >= 1; all is drawn again until it is reached."""

    def __post_init__(self) -> None:
        at_least("DirichletEqualSize", 1, clients=self.clients, min_size=self.min_size)
        positive("DirichletEqualSize", self.alpha)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        available = class_counts(labels, num_classes)
        if not available.all():
            raise infeasible(
                f"dirichlet_equal_size makes every client as small as the rarest class allows, and class "
                f"{int(available.argmin())} has no examples",
                "data that hold every class",
            )

        def draw(clients: int, alpha: float) -> Ints:
            return equal_size_counts(available, rng.dirichlet(np.full(num_classes, alpha), size=clients))

        counts = draw_until(
            "dirichlet_equal_size", draw, len(labels), self.clients, self.alpha, self.min_size, MAX_TRIES, empty=False
        )
        return lists(deal(labels, counts, rng), self.clients)


@dataclass(frozen=True, kw_only=True)
class QuantitySkew(Partition):
    """Client sizes are skewed, label shares are not: shuffled data cut at floor(cumsum(q) * N), q ~ Dirichlet(alpha)."""

    clients: int = 10
    """Number of clients, >= 1."""
    alpha: float = 0.5
    """Concentration, > 0: small = a few clients hold nearly everything, large = equal sizes."""
    min_size: int = 1
    """Smallest client that is accepted, >= 0; q is drawn again until it is reached, which favours milder skew."""

    def __post_init__(self) -> None:
        at_least("QuantitySkew", 1, clients=self.clients)
        at_least("QuantitySkew", 0, min_size=self.min_size)
        positive("QuantitySkew", self.alpha)

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        examples = len(labels)

        def draw(clients: int, alpha: float) -> Ints:
            q = rng.dirichlet(np.full(clients, alpha))
            cuts = np.floor(np.cumsum(q)[:-1] * examples).astype(np.int64)
            return np.diff(np.minimum(cuts, examples), prepend=0, append=examples)[:, None]

        sizes = draw_until("quantity_skew", draw, examples, self.clients, self.alpha, self.min_size, MAX_TRIES)
        return lists(deal(np.zeros_like(labels), sizes, rng), self.clients)


@dataclass(frozen=True, kw_only=True)
class RotatedTails(Partition):
    """Every client is long-tailed, client k with head class k mod C, so that the union is balanced; data are left over.

    An IID split; then client k keeps, of its n_k examples, at most floor(n_k / C * factor^(-j / (C - 1))) of class
    (k + j) mod C. Use it with data.longtail = none: on balanced data and with `clients` a multiple of C the union is
    balanced but for the chance of the IID split. After a long-tail cut the union stays long-tailed, and a class that the
    cut made rare keeps what each client has of it.
    """

    clients: int = 10
    """Number of clients, >= 1; a multiple of C balances the union."""
    factor: float = 10.0
    """Imbalance factor within a client, head class / last class, >= 1."""

    def __post_init__(self) -> None:
        at_least("RotatedTails", 1, clients=self.clients)
        if not 1 <= self.factor < inf:
            raise ConfigError(f"RotatedTails.factor must be in [1, inf), got {self.factor}.")

    def split(self, labels: Ints, num_classes: int, rng: Generator, users: Users = None) -> Sequence[Ints]:
        """Splits; see `Partition.split`."""
        self._check(len(labels), num_classes)
        # Place i of the shuffled data belongs to client i mod K; `cell` numbers the pairs (client, class).
        shuffled = rng.permutation(len(labels))
        owner = np.arange(len(labels)) % self.clients
        cell = owner * num_classes + labels[shuffled]
        sizes = np.bincount(owner, minlength=self.clients)
        held = np.bincount(cell, minlength=self.clients * num_classes)
        order = np.argsort(cell, kind="stable")
        rank = np.arange(len(labels)) - (np.cumsum(held) - held)[cell[order]]
        kept = order[rank < self.targets(sizes, num_classes).reshape(-1)[cell[order]]]
        owners = np.full(len(labels), self.clients, np.int64)
        owners[shuffled[kept]] = owner[kept]
        return lists(owners, self.clients)

    def targets(self, sizes: Ints, num_classes: int) -> Ints:
        """Returns what each client keeps of each class if it has as much, int64 [clients, C].

        Args:
            sizes: n_k after the IID split, int64 [clients].
            num_classes: C, >= 1.
        """
        place = (np.arange(num_classes) - np.arange(len(sizes))[:, None]) % num_classes
        share = self.factor ** (-place / max(num_classes - 1, 1))
        # 50 * 50^-1 may come out below 1: the margin is far above rounding and far below 1 / n_k.
        return np.floor(sizes[:, None] / num_classes * share * (1 + 1e-12)).astype(np.int64)

    def _check(self, examples: int, num_classes: int) -> None:
        size, last = examples // self.clients, self.factor if num_classes > 1 else 1.0
        if size < num_classes * last:
            most = int(examples / (num_classes * last))
            values = [
                *([f"clients <= {most}"] if most else []),
                *([f"factor <= {size // num_classes}"] if size >= num_classes and num_classes > 1 else []),
            ]
            raise infeasible(
                f"rotated_tails with factor {self.factor:g} leaves the last class of a client without an example: each of "
                f"{self.clients} clients has {size} examples of {num_classes} classes",
                " or ".join(values) or f"data with at least {int(num_classes * last)} examples",
            )
