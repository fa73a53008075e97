"""Small made-up problems for `fedtail check` and for the library's own tests, and the runs of one algorithm on them.

Everything is in float64 and on one core: there two engines that do the same work agree to rounding, so that a difference
is a fault of the method and not of the arithmetic.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail import config, trees
from fedtail.algorithm import Algorithm, Context
from fedtail.checks.source import outside
from fedtail.config import Evaluation, Experiment, Participation
from fedtail.data.federated import FederatedData
from fedtail.data.plan import LocalWork, Plan
from fedtail.engines import EngineOptions
from fedtail.engines.base import Sink
from fedtail.experiment import Federation
from fedtail.models.layers import Network
from fedtail.models.specs import MLP, ModelSpec, Unified, UserModel
from fedtail.schedule import Constant, Schedule
from fedtail.task import Variables
from fedtail.trees import Tree

CLASSES, ROUNDS = 4, 3
CONSTANT = Constant()
LOOP, PARALLEL, VMAP = EngineOptions(name="loop"), EngineOptions(name="parallel", workers=3), EngineOptions(name="vmap")


class ConvNet(Network):
    """Two convolutions with BatchNorm; its maps have more than one pixel, so that a batch of one is possible."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        # no bias before BatchNorm: its gradient would be rounding noise, which Adam scales up
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Maps images to features [B, 4]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return F.relu(self.bn2(self.conv2(x))).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class BatchNormNet(ModelSpec):
    """The network with batch statistics."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Makes the network."""
        return ConvNet(input_shape[0], num_classes)


def pair(**options: Any) -> ModelSpec:
    """Returns the generator and discriminator that generative methods get in the place of a network that classifies."""
    return UserModel(target=f"{Path(__file__).with_name('pair.py')}:Pair", options=options)


class Problem(NamedTuple):
    """Data and network."""

    sizes: tuple[int, ...]  # examples of each client
    model: ModelSpec = MLP(hidden=(6,))
    images: bool = False
    clients: int = 4  # of the cohort, where there are so many


RAGGED = (9, 1, 12, 0, 4, 7)  # one client of a single example, one of none
PROBLEMS = {
    "ragged": Problem(RAGGED),
    "batchnorm": Problem(RAGGED, BatchNormNet(), images=True),
    "dropout": Problem(RAGGED, MLP(hidden=(6,), dropout=0.3)),
    "alone": Problem((11,)),
    "single": Problem((1, 6)),
}


def federated(
    sizes: Sequence[int], images: bool, columns: Sequence[str] = ("x", "y"), complete: bool = False
) -> FederatedData:
    """Returns data of clients with these sizes, eight examples of the server's and a test set; always the same.

    Args:
        sizes: examples of each client.
        images: images [1, 6, 6] with their augmentation in the place of five features.
        columns: what the algorithm wants; a column besides x and y is filled with class probabilities [N, classes].
        complete: the first examples are one of each class, so that no class is absent from the population.
    """
    rng = np.random.default_rng(7)
    held = sum(sizes)
    train = held + 8
    y = rng.choice(CLASSES, train + 30, p=[0.45, 0.3, 0.15, 0.1])
    if complete:
        y[:CLASSES] = np.arange(CLASSES)
    if images:
        shade = 40 * (y % 3)[:, None, None, None]
        x = torch.from_numpy((rng.integers(0, 120, (len(y), 1, 6, 6)) + shade).astype(np.uint8))
    else:
        x = torch.from_numpy(rng.normal(size=(len(y), 5)) + rng.normal(size=(CLASSES, 5))[y])
    ends, labels = np.cumsum([0, *sizes]), torch.from_numpy(y)
    more = {
        name: torch.from_numpy(rng.dirichlet(np.ones(CLASSES), train)) for name in columns if name not in ("x", "y")
    }
    return FederatedData(
        {"x": x[:train], "y": labels[:train], **more}, [np.arange(a, b) for a, b in itertools.pairwise(ends)],
        {"x": x[train:], "y": labels[train:]}, [np.arange(5 * i, 5 * i + 5) for i in range(len(sizes))], CLASSES,
        mean=(0.4,) if images else (), std=(0.2,) if images else (), augmentation="crop_flip" if images else "none",
        server=np.arange(held, train),
        held=[np.arange(held + i, min(held + i + 2, train)) if i else np.zeros(0, np.int64) for i in range(len(sizes))]
        if len(sizes) > 1 else [np.arange(held, train)],
    )  # fmt: skip


def fitting(algorithm: Algorithm, model: ModelSpec) -> ModelSpec:
    """Returns the model for an algorithm: itself, or two branches of it."""
    return Unified(branch=model, width=5) if algorithm.needs_branches else model


def experiment(
    algorithm: Algorithm, problem: str, engine: EngineOptions = LOOP, seed: int = 0, schedule: Schedule = CONSTANT
) -> Experiment:
    """Returns the experiment of an algorithm on a problem; its data are to be replaced by the problem's."""
    chosen = PROBLEMS[problem]
    model = chosen.model
    if algorithm.generative:
        model = pair(dropout=model.dropout) if isinstance(model, MLP) and model.dropout else pair()
    return Experiment(
        seed=seed, rounds=ROUNDS, algorithm=algorithm, model=fitting(algorithm, model), dtype="float64", engine=engine,
        local=LocalWork(epochs=2, batch_size=4), participation=Participation(clients=chosen.clients),
        schedule=schedule, evaluation=Evaluation(every=ROUNDS),
    )  # fmt: skip


class Outcome(NamedTuple):
    """What a run leaves after each round."""

    servers: list[Tree]
    states: list[dict[str, Tree]]  # client states, by index
    metrics: list[dict[str, Tensor]]
    stages: list[int]
    initial: Variables
    final: Variables  # what the method exports as the plain network


class Cohort(NamedTuple):
    """What the clients of a phase get."""

    ctx: Context
    trained: int
    message: Tree
    states: dict[int, Tree]
    plans: dict[int, Plan]

    @property
    def collects(self) -> bool:
        """Says whether the server gets every single update."""
        return self.ctx.round.phase.reduce == "collect"

    def sink(self) -> Sink:
        """Returns an empty sink for the phase's results."""
        return Sink(list(self.plans), self.collects)


class Subject:
    """An algorithm under examination; whole runs are kept, since several rules look at the same one."""

    def __init__(self, algorithm: Algorithm, frozen: Sequence[str] = ()):
        self.algorithm, self.frozen = algorithm, tuple(frozen)
        self.outside = outside(algorithm)  # before anything has run
        self.broken = set[str]()  # rules that do not hold
        self._known: dict[Any, Outcome] = {}

    def fresh(self) -> Algorithm:
        """Returns the same algorithm as a new process would have it: from its configuration alone."""
        table = config.to_dict(self.algorithm)
        table.pop("name", None)
        return config.from_dict(type(self.algorithm), table, "algorithm")

    def federation(
        self, problem: str, engine: EngineOptions = LOOP, seed: int = 0, algorithm: Algorithm | None = None,
        schedule: Schedule = CONSTANT,
    ) -> Federation:  # fmt: skip
        """Returns a federation that is ready for round 0."""
        chosen = PROBLEMS[problem]
        wanted = (*self.algorithm.columns, *self.algorithm.server_columns)
        data = federated(chosen.sizes, chosen.images, wanted, complete=True)
        return Federation(experiment(algorithm or self.algorithm, problem, engine, seed, schedule), data)

    def warm(self, problem: str, engine: EngineOptions = LOOP) -> Federation:
        """Returns a federation after one round, so that clients have states."""
        running = self.federation(problem, engine)
        running.advance(running.step())
        return running

    def outcome(self, problem: str, engine: EngineOptions = LOOP) -> Outcome:
        """Returns the outcome of seed 0, computed at most once."""
        key = (problem, dataclasses.astuple(engine))
        if key not in self._known:
            with contextlib.closing(self.federation(problem, engine)) as running:
                self._known[key] = follow(running)
        return self._known[key]


def follow(running: Federation) -> Outcome:
    """Runs what is left of a federation's rounds."""
    initial = running.engine.setting.task.initial
    found = Outcome([], [], [], [], initial, initial)
    while running.round < ROUNDS:
        found.stages.append(running.stage)
        record = running.step()
        found.servers.append(running.server)
        found.states.append(by_name(running.states))
        found.metrics.append(_flat(record))
        running.advance(record)
    return found._replace(final=running.variables())


def by_name(states: Mapping[int, Tree]) -> dict[str, Tree]:
    """Returns client states as a tree."""
    return {f"client {number}": state for number, state in sorted(states.items())}


def _flat(record: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the numbers of a record by path."""
    found: dict[str, Tensor] = {}
    for part, values in record.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            found[f"{part}/{name}"] = torch.as_tensor(value, dtype=torch.float64)
    return found


def cohorts(running: Federation) -> Iterator[Cohort]:
    """Yields what each phase of the present round starts from; the caller runs it and calls `serve`."""
    trained, setting = 0, running.engine.setting
    running.engine.open()
    for phase in running.algorithm.phases(running.round, ROUNDS):
        ids = running.draw(phase)
        ctx = running.context(phase, len(ids))
        message = running.message(ctx)
        plans = setting.plans(ctx.round, trained, ids)
        states = {i: setting.state(ctx, message, running.states, i) for i in plans}
        yield Cohort(ctx, trained, message, states, plans)
        trained += phase.local


def reduce(cohort: Cohort, sink: Sink) -> Tree:
    """Returns what the server gets: the mean of the updates, or all of them."""
    return tuple(sink.updates) if cohort.collects else sink.mean()


def serve(running: Federation, cohort: Cohort, sink: Sink, received: Tree) -> None:
    """Moves the server on with what it received."""
    dtype, algorithm = running.task.dtype, running.algorithm
    with torch.no_grad():
        if cohort.collects:
            weights = torch.tensor(sink.weights, dtype=dtype)
            running.server = algorithm.server_collect(cohort.ctx, running.server, received, weights)
        else:
            total = torch.tensor(sink.total, dtype=dtype)
            running.server = algorithm.server_update(cohort.ctx, running.server, received, total)
    running.states.update(sink.states)


def form(tree: Tree) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns structure, shapes and dtypes of a tree."""
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in trees.named_leaves(tree).items()}


def describe(leaf: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    """Returns an entry of `form` in words."""
    return "absent" if leaf is None else f"{str(leaf[1]).removeprefix('torch.')} of shape {leaf[0]}"


def other_form(first: Tree, second: Tree) -> str:
    """Returns where the forms of two trees differ, "" if nowhere."""
    a, b = form(first), form(second)
    for name in [*a, *b]:
        if a.get(name) != b.get(name):
            return f"{name or 'the tensor'} was {describe(a.get(name))}, then {describe(b.get(name))}"
    return ""


def difference(first: Tree, second: Tree, tolerance: float = 0.0) -> str:
    """Returns in which tensor two trees differ most, and by how much; "" if by no more than the tolerance."""
    if other := other_form(first, second):
        return other
    b, worst, size = trees.named_leaves(second), "", tolerance
    for name, leaf in trees.named_leaves(first).items():
        gap = (leaf.double() - b[name].double()).abs()
        gap = torch.where(leaf.isnan() & b[name].isnan(), 0.0, gap).nan_to_num(nan=float("inf"))
        if gap.numel() and float(gap.max()) > size:
            worst, size = name or "the tensor", float(gap.max())
    return f"{worst} differs by {size:.2g}" if worst else ""


def not_finite(tree: Tree) -> str:
    """Returns the first tensor that has a NaN or an infinity, "" if none has."""
    found = (k or "the tensor" for k, v in trees.named_leaves(tree).items() if not bool(torch.isfinite(v).all()))
    return next(found, "")


def runs_differ(first: Outcome, second: Outcome, tolerance: float = 0.0) -> str:
    """Returns where two runs part first, "" if nowhere."""
    for index in range(min(len(first.servers), len(second.servers))):
        for what in ("servers", "states", "metrics"):
            found = difference(getattr(first, what)[index], getattr(second, what)[index], tolerance)
            if found:
                words = {"servers": "the server state", "states": "a client state", "metrics": "a metric"}[what]
                return f"{words} after round {index}: {found}"
    return ""
