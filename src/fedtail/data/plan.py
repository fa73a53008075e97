"""What a client will do in a phase, known before it does it: a pure function of (seed, round, phase, client, local work)."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedtail.errors import ConfigError
from fedtail.seeds import Stream, generator
from fedtail.task import Draw

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """How much a client trains in a round; outside the algorithm, so that compared methods do equal work."""

    epochs: int = 5
    """Passes over the client's data, >= 1; 5 in the long-tail protocol. Ignored if steps > 0."""
    steps: int = 0
    """Number of batches instead of epochs; 0 = use epochs."""
    batch_size: int = 10
    """Examples in a batch, >= 1; the last batch of an epoch is short."""
    min_batch: int = 1
    """Batches with fewer examples are left out (2 for models whose BatchNorm would see a single value)."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.steps < 0:
            raise ConfigError(
                f"local: epochs and batch_size must be >= 1 and steps >= 0, got {self.epochs}, {self.batch_size}, {self.steps}."
            )
        if not 1 <= self.min_batch <= self.batch_size:
            raise ConfigError(f"local.min_batch must be in [1, batch_size = {self.batch_size}], got {self.min_batch}.")

    def count(self, examples: Array) -> Array:
        """Returns the numbers of training steps of clients with so many examples, both int64 (clients,)."""
        full, rest = np.divmod(examples, self.batch_size)
        epoch = full + ((rest > 0) & (rest >= self.min_batch))
        return np.where(epoch > 0, self.steps or epoch * self.epochs, 0)

    def lengths(self, examples: int, training: bool = True) -> Array:
        """Returns the sizes of all batches of a client with so many examples, (steps,) int64."""
        full, rest = divmod(examples, self.batch_size)
        epoch = [self.batch_size] * full + ([rest] if rest else [])
        if not training:
            return np.array(epoch, np.int64)
        epoch = [n for n in epoch if n >= self.min_batch]
        times = -(-self.steps // len(epoch)) if self.steps and epoch else self.epochs
        return np.array((epoch * times)[: self.steps or None], np.int64)


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Who takes part in a round: drawn uniformly without replacement among the clients that hold data."""

    fraction: float = 1.0
    """Share of the population, in (0, 1]; max(floor(fraction * clients), 1) clients are drawn."""
    clients: int = 0
    """Number of clients instead of a share; 0 = use the share."""
    newcomers: int = 0
    """Number of clients that hold data but join after training: they never take part and are judged apart."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or min(self.clients, self.newcomers) < 0:
            raise ConfigError("participation: fraction must be in (0, 1], clients and newcomers >= 0; "
                              f"got {self.fraction}, {self.clients} and {self.newcomers}.")  # fmt: skip

    def size(self, population: int) -> int:
        """Returns the cohort's size."""
        # 0.29 * 100 comes out as 28.99...: the margin is far above rounding and far below 1.
        return min(self.clients, population) if self.clients else max(int(self.fraction * population + 1e-9), 1)

    def late(self, holders: Array, seed: int) -> Array:
        """Returns the newcomers among the clients that hold a batch, both int64 in ascending order.

        Raises:
            ConfigError: nobody would be left to train.
        """
        if self.newcomers >= len(holders):
            raise ConfigError(f"participation.newcomers = {self.newcomers} leaves nobody to train: {len(holders)} clients hold "
                              "a batch. Lower it.")  # fmt: skip
        return np.sort(generator(seed, Stream.NEWCOMERS).choice(holders, self.newcomers, replace=False))


class Plan(NamedTuple):
    """A client's batches and draws for one phase."""

    order: Array  # int64 indices into the columns, batch after batch
    lengths: Array  # (steps,) int64
    draws: dict[str, Array]  # name -> [steps, *shape]


def make_plan(
    seed: int,
    round: int,
    trained: int,
    client: int,
    owned: Array,
    work: LocalWork,
    draws: Mapping[str, Draw],
    training: bool = True,
) -> Plan:
    """Returns a client's plan.

    Args:
        seed: the experiment's seed.
        round: 0-based.
        trained: number of earlier training phases in this round.
        client: index in the population.
        owned: the client's example indices.
        work: the local work.
        draws: what is wanted at each step, by name.
        training: False goes through the data once, in order, and uses no random stream.
    """
    lengths = work.lengths(len(owned), training)
    if not training:
        return Plan(owned, lengths, {})
    rng = generator(seed, Stream.BATCHES, round, trained, client)
    order: list[Array] = []
    left = int(lengths.sum())
    while left > 0:  # an epoch: a new permutation, without the examples of a batch that is left out
        rest = len(owned) % work.batch_size
        used = len(owned) - (rest if rest < work.min_batch else 0)
        order.append(owned[rng.permutation(len(owned))[: min(used, left)]])
        left -= len(order[-1])
    values = {
        name: draw.sample(
            generator(seed, Stream.DRAWS, round, trained, client, zlib.crc32(name.encode())), len(lengths)
        )
        for name, draw in draws.items()
    }
    return Plan(np.concatenate(order) if order else owned[:0], lengths, values)
