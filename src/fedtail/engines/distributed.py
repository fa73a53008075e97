"""A cohort split over the processes that torchrun started, on one machine or several.

    torchrun --nproc-per-node 2 -m fedtail run EXPERIMENT.toml

Each rank trains its share with the engine of the experiment, and the sums are added up by torch.distributed: equal to one
process to rounding. Every rank holds the data and the kept client states, and computes the server's part; rank 0 writes.
"""

import atexit
import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from fedtail import trees
from fedtail.algorithm import Round
from fedtail.data.plan import Plan
from fedtail.drift import Drift
from fedtail.engines.base import Engine, Sink
from fedtail.errors import ConfigError, TrainingError
from fedtail.trees import Tree


def ranks() -> int:
    """Returns how many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Returns which of them this is; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def join(device: str) -> None:
    """Meets the other ranks, at the first call."""
    if ranks() > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo" if device == "cpu" else None)
        atexit.register(distributed.destroy_process_group)


@contextlib.contextmanager
def together(what: str) -> Generator[None]:
    """Says what it means when another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"Rank {rank()} of {ranks()} lost the others while {what}: {str(error).splitlines()[0]} If one of them ended with "
            "an error of its own, that is the cause. `torchrun ... -m fedtail resume RUN` continues from the last checkpoint."
        ) from error


def everyone(value: Any) -> list[Any]:
    """Returns the values of all ranks, in their order."""
    found: list[Any] = [None] * ranks()
    distributed.all_gather_object(found, value)
    return found


def add_up(tree: Tree) -> Tree:
    """Returns the sums over all ranks, leaf by leaf."""
    total = trees.tree_map(lambda t: t.clone(memory_format=torch.contiguous_format), tree)
    for leaf in trees.leaves(total):
        distributed.all_reduce(leaf)
    return total


class DistributedEngine(Engine):
    """Another engine, on this rank's share of the cohort."""

    def __init__(self, inner: Engine):
        super().__init__(inner.setting)
        self.inner, self.name = inner, inner.name

    def open(self) -> None:
        """Opens the engine of this rank."""
        self.inner.open()

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Deals the clients to the ranks, the longest first, and brings the sums together.

        Raises:
            ConfigError: fewer clients than ranks.
            TrainingError: another rank is gone.
        """
        if len(plans) < ranks():
            raise ConfigError(f"a cohort of {len(plans)} clients cannot be split over {ranks()} ranks. Start fewer "
                              "(torchrun --nproc-per-node), or let more clients take part.")  # fmt: skip
        order = sorted(plans, key=lambda number: (-len(plans[number].order), number))
        mine = {number: plans[number] for number in sorted(order[rank() :: ranks()])}
        own = Sink([*mine], sink.collect, Drift() if sink.drift is not None else None)
        self.inner.cohort(round, trained, message, states, mine, own)
        with together(f"adding up round {round.index}"):
            sums = add_up(own.sums())
            answers = [answer for part in everyone(own.answers) for answer in part]
            states = {client: state for part in everyone(dict(own.states)) for client, state in part.items()}
        sink.take(own, sums, sorted(answers, key=lambda answer: answer.client), states)

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs this rank's share of the items; every rank gets all results."""
        share = self.inner.map_batches(function, items[rank() :: ranks()])
        found: list[Any] = [None] * len(items)
        with together("evaluating"):
            for number, part in enumerate(everyone(share)):
                found[number :: ranks()] = part
        return found

    def close(self) -> None:
        """Closes the engine of this rank."""
        self.inner.close()
