"""What all engines share: the setting of a run, the sink that sums updates in order, and the checks on what comes back."""

import contextlib
import math
import sys
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Algorithm, Client, Context, Round, as_tensor
from fedtail.data.augment import augment_draws
from fedtail.data.federated import FederatedData
from fedtail.data.plan import Array, LocalWork, Plan, make_plan
from fedtail.drift import Drift
from fedtail.errors import FedtailError, TrainingError
from fedtail.metrics import ShotGroups
from fedtail.seeds import Stream, generator
from fedtail.states import ClientStates
from fedtail.task import Draw, Task
from fedtail.trees import Tree

Scores = Mapping[str, float | None]
"""What `metrics.client_scores` says of a client."""


class Result(NamedTuple):
    """What one client gives back."""

    client: int
    update: Tree
    weight: float
    state: Tree
    metrics: dict[str, Tensor]  # averaged over the client's steps
    examples: int
    judged: Tree = ()  # sums of engines.local_models, where the client's own model is judged


class Answer(NamedTuple):
    """What is kept of each client's result beside the sums and its state."""

    client: int
    weight: float
    update: Tree  # () where updates are not collected


class Sink:
    """Adds results in ascending client index, whatever the order in which they arrive.

    The sum is sequential, so neither the engine nor the cohort's order changes a bit of the mean.

    Args:
        ids: the clients that will answer.
        collect: keep the updates instead of adding them up.
        drift: also measures the updates.
        limit: bytes of new client states to hold in memory; the others wait on the disk.
    """

    def __init__(
        self, ids: Sequence[int], collect: bool = False, drift: Drift | None = None, limit: int = 1 << 62
    ) -> None:
        self._waiting: dict[int, Result] = {}
        self._order = sorted(ids)
        self._next = 0
        self.collect = collect
        self.drift = drift
        self._sum: Tree | None = None
        self._first: Result | None = None
        self.total = 0.0
        self.answers: list[Answer] = []  # in ascending client index
        self.states = ClientStates(limit)  # the new ones, of clients that have any
        self._metrics: dict[str, Tensor] = {}
        self.examples = 0
        self.dropped: dict[int, str] = {}  # clients whose result never came, and why
        self.notes: dict[str, Any] = {}  # what else the record of the round says
        self.judged: Tree = ()

    @property
    def updates(self) -> list[Tree]:
        """The clients' updates, where they are collected."""
        return [answer.update for answer in self.answers]

    @property
    def weights(self) -> list[float]:
        """The clients' weights."""
        return [answer.weight for answer in self.answers]

    def at_once(self, client: int) -> bool:
        """Says whether this client's update would be added right away and not kept, so that it need not outlive `add`."""
        return not self.collect and self._first is not None and self._order[self._next] == client

    def add(self, result: Result) -> None:
        """Takes one result; adds it, and those that waited for it, when its turn has come."""
        self._waiting[result.client] = result
        self._advance()

    def drop(self, client: int, why: str) -> None:
        """Gives up a client's result: the mean is over the others, with their weights."""
        self.dropped[client] = why
        self._order.remove(client)
        self._advance()

    def _advance(self) -> None:
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._reduce(self._waiting.pop(self._order[self._next]))
            self._next += 1

    def _reduce(self, result: Result) -> None:
        kept = result.update if self.collect else ()
        self.answers.append(Answer(result.client, result.weight, kept))
        if result.state != ():
            self.states[result.client] = result.state
        self.examples += result.examples
        for name, value in result.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value.double() * result.examples
        self.total += result.weight
        if result.judged != ():
            self.judged = trees.tree_map(torch.add, self.judged, result.judged) if self.judged != () else result.judged
        if self.drift is not None:
            self.drift.add(result.update, result.weight)
        if self.collect:
            return
        if self._first is None:
            self._first = result
        else:
            self._sum = trees.tree_map(lambda s, u: s.add_(u, alpha=result.weight), self._begun(), result.update)

    def _begun(self) -> Tree:
        """Returns the sum, which begins with the first result's share."""
        if self._sum is None and self._first is not None:
            weight = self._first.weight
            self._sum = trees.tree_map(lambda u: _wide(u) * weight, self._first.update)
        return self._sum

    def facts(self) -> dict[str, Any]:
        """Returns what the record says beside the metrics: who dropped out and why, and the engine's notes."""
        dropped = {str(client): why for client, why in sorted(self.dropped.items())}
        return {**({"dropped": dropped} if dropped else {}), **self.notes}

    def sums(self) -> Tree:
        """Returns everything that is a sum over clients, as a tree of tensors: what several sinks may add up."""
        numbers = torch.tensor([self.total, self.examples], dtype=torch.float64)
        return {"numbers": numbers, "metrics": self._metrics, "update": () if self.collect else self._begun(),
                "drift": () if self.drift is None else self.drift.sums(), "judged": self.judged}  # fmt: skip

    def take(self, part: "Sink", sums: Tree, answers: Sequence[Answer], states: Mapping[int, Tree]) -> None:
        """Takes over the sums of several sinks, of which `part` is one, with all their clients' answers in order and states."""
        self._first, self._sum = part._first, None if self.collect else sums["update"]
        self.total, self.examples = float(sums["numbers"][0]), int(sums["numbers"][1])
        self._metrics, self.answers, self.judged = sums["metrics"], list(answers), sums["judged"]
        self.states.update(states)
        if self.drift is not None:
            self.drift.restore(sums["drift"])

    def mean(self) -> Tree:
        """Returns sum(w u) / sum(w); a single result as it is; integer buffers are rounded.

        Raises:
            TrainingError: every client answered with weight 0.
        """
        assert self._first is not None
        if self.total == 0:
            raise TrainingError(
                f"All {len(self.weights)} clients answered with weight 0. Look at the algorithm's weight()."
            )
        if self._sum is None:
            return self._first.update
        return trees.tree_map(lambda s, u: _narrow(s / self.total, u.dtype), self._sum, self._first.update)

    def sent_bytes(self) -> int:
        """Returns the size of all clients' updates; those that are added up have one form."""
        if self.collect:
            return sum(map(trees.num_bytes, self.updates))
        return 0 if self._first is None else len(self.answers) * trees.num_bytes(self._first.update)

    def metrics(self) -> dict[str, Tensor]:
        """Returns the clients' metrics, averaged with their numbers of examples, and the drift where it is measured."""
        means = {name: value / max(self.examples, 1) for name, value in self._metrics.items()}
        return means if self.drift is None else {**means, **self.drift.metrics()}


def _wide(update: Tensor) -> Tensor:
    return update if update.is_floating_point() else update.double()


def _narrow(mean: Tensor, dtype: torch.dtype) -> Tensor:
    return mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)


@dataclass(frozen=True)
class Setting:
    """What stays the same from round to round: everything an engine needs besides message and states."""

    algorithm: Algorithm
    task: Task
    data: FederatedData
    work: LocalWork
    seed: int
    constants: Tree = ()
    local_models: int = 0  # rounds between two in which the clients' own models are judged; 0 = never
    batch_size: int = 500  # images in an evaluation batch
    double_softmax: bool = False  # of the error asymmetry

    def judges(self, round: Round) -> bool:
        """Says whether the clients' own models are judged in this phase: "train", of a round that is due; tuning is not."""
        due = self.local_models and ((round.index + 1) % self.local_models == 0 or round.index + 1 == round.rounds)
        return bool(due) and round.phase.local and round.phase.name == "train"

    @cached_property
    def draws(self) -> dict[str, Draw]:
        """All draws of a training step: the algorithm's, the Dropout layers', the augmentation's."""
        size = self.work.batch_size
        return {
            **self.algorithm.draws(self.task, size),
            **self.task.draws(size),
            **augment_draws(self.data.augmentation, size),
        }

    def shared(self, index: int) -> dict[str, Tensor]:
        """Returns the draws that server and clients share in round `index`."""
        wanted = self.algorithm.round_draws(self.task, self.work.batch_size)
        keys = {name: zlib.crc32(name.encode()) for name in wanted}
        found = {n: draw.sample(generator(self.seed, Stream.ROUND, index, keys[n]), 1)[0] for n, draw in wanted.items()}
        return {name: as_tensor(value, self.task.dtype, self.task.device) for name, value in found.items()}

    def plans(self, round: Round, trained: int, ids: Sequence[int]) -> dict[int, Plan]:
        """Returns the plan of each client that has at least one step."""
        phase, work, rows = round.phase, self.work, self.rows(round)
        draws = self.draws if phase.local else {}
        work = replace(work, epochs=phase.epochs, steps=0) if phase.epochs else work
        plans = {i: make_plan(self.seed, round.index, trained, i, rows[i], work, draws, phase.local) for i in ids}
        return {i: plan for i, plan in plans.items() if len(plan.lengths)}

    def rows(self, round: Round) -> Sequence[Array]:
        """Returns the examples that each client goes through in this phase."""
        return self.data.held if round.phase.split == "validation" else self.data.owners

    def clients(self, plans: Mapping[int, Plan]) -> Client:
        """Returns what the algorithm may know of these clients, stacked along a first axis in the plans' order."""
        ids, dtype, device = list(plans), self.task.dtype, self.task.device
        return Client(
            torch.tensor(ids, device=device),
            torch.tensor([len(self.data.owners[i]) for i in ids], dtype=dtype, device=device),
            torch.from_numpy(self.data.counts_of(ids)).to(device, dtype),
            torch.tensor([len(plans[i].lengths) for i in ids], dtype=dtype, device=device),
        )

    def state(
        self, ctx: Context, message: Tree, states: Mapping[int, Tree], client: int, device: torch.device | None = None
    ) -> Tree:
        """Returns a client's state, kept or (at its first participation) initial, on a device (None: the task's)."""
        if client in states:
            found = states[client]
        elif type(self.algorithm).init_client is Algorithm.init_client:  # a generator costs as much as a small step
            return ()
        else:
            found = self.algorithm.init_client(ctx, message, generator(self.seed, Stream.CLIENT, client))
        return trees.tree_map(lambda t: t.to(device or self.task.device), found)


@contextlib.contextmanager
def blame(method: str) -> Generator[None]:
    """Names the server method of the algorithm in which an unexpected error arose."""
    try:
        yield
    except FedtailError:
        raise
    except Exception as error:
        raise TrainingError(f"The algorithm failed in {method}: {type(error).__name__}: {error}") from error


def remedy(error: Exception) -> str:
    """Returns what to do about an error that arose on a client."""
    if "more than 1 value per channel" in str(error):  # BatchNorm and a batch of one
        return 'Set local.min_batch = 2 to leave such batches out, or use a model with norm = "group".'
    return 'Re-run with engine.name = "loop" to step through it.'


class _Machine:
    """What the process had before the first user of `one_thread`."""

    lock = threading.Lock()
    users = 0
    threads = 1
    interval = 0.005


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Holds torch at one intra-op thread, so that no machine's cores change a bit; the last user restores it.

    The interpreter switches threads often meanwhile: steps of a small model are shorter than its default of 5 ms.
    """
    with _Machine.lock:
        if _Machine.users == 0:
            _Machine.threads, _Machine.interval = torch.get_num_threads(), sys.getswitchinterval()
            torch.set_num_threads(1)
            sys.setswitchinterval(1e-4)
        _Machine.users += 1
    try:
        yield
    finally:
        with _Machine.lock:
            _Machine.users -= 1
            if _Machine.users == 0:
                torch.set_num_threads(_Machine.threads)
                sys.setswitchinterval(_Machine.interval)


class Engine(ABC):
    """Runs a cohort: the only function in which engines differ."""

    name: str = ""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._alone: contextlib.AbstractContextManager[None] | None = None

    def open(self) -> None:
        """Takes threads, at the first use (an engine that is never used changes nothing); may be called again."""
        if self._alone is None:
            self._alone = one_thread()
            self._alone.__enter__()

    @abstractmethod
    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Runs every client of `plans` and hands its Result to the sink.

        Args:
            round: the circumstance.
            trained: number of earlier training phases in this round.
            message: the broadcast.
            states: kept client states; a client without one gets its initial state.
            plans: what each client does.
            sink: where results go.
        """

    @abstractmethod
    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Returns [function(worker, item) for item in items], on whatever the engine runs (evaluation)."""

    def client_scores(
        self, round: Round, message: Tree, states: Mapping[int, Tree], groups: Sequence[ShotGroups]
    ) -> list[list[Mapping[str, Scores]]] | None:
        """Returns what the clients of a deployment find on test sets of their own; None: those are here.

        Of every client for each way to predict (`evaluate.readings`): its scores as "local", by the generic model, and
        "personal"; [] where nobody has a test set. `groups`: each client's.
        """
        return None

    def close(self) -> None:
        """Gives threads back; may be called again."""
        if self._alone is not None:
            self._alone.__exit__(None, None, None)
            self._alone = None


def check_result(result: Result, losses: Tensor | None, round: Round) -> Result:
    """Raises TrainingError if a client's losses (steps,), update, weight or metrics are not finite, or the weight is < 0."""
    where = f"client {result.client} in round {round.index}"
    remedy = ("Lower algorithm.optimizer.lr, set algorithm.optimizer.clip (for example 5), or look for bad inputs "
              "(fedtail inspect).")  # fmt: skip
    if losses is not None and not math.isfinite(float(losses.sum())) and not bool(torch.isfinite(losses).all()):
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise TrainingError(f"The loss is {float(losses[step])} on {where}, at local step {step}. {remedy}")
    if not trees.all_finite(result.update):
        bad = next(k for k, v in trees.named_leaves(result.update).items() if not bool(torch.isfinite(v).all()))
        raise TrainingError(f"The update of {where} is not finite (first in {bad}). {remedy}")
    if not 0 <= result.weight < math.inf:
        raise TrainingError(f"The weight of {where} is {result.weight:g}; it must be finite and >= 0. Mend the algorithm's "
                            "weight().")  # fmt: skip
    for name, value in result.metrics.items():
        if name != "loss" and not bool(torch.isfinite(value).all()):  # the losses have been looked at
            raise TrainingError(f"The metric {name!r} of {where} is {float(value[~torch.isfinite(value)][0])} at some local "
                                "step. Guard the division or logarithm in the algorithm's local_step.")  # fmt: skip
    return result
