"""The workloads: federations whose data have the shape of the real ones and look like images (pooling is slower on noise)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import serve
import torch

from fedtail import config
from fedtail.algorithm import Phase
from fedtail.config import Experiment
from fedtail.data.federated import FederatedData
from fedtail.experiment import Federation, RoundResult, start

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """What a workload looks like; every client makes one epoch of SGD .01 with momentum .9."""

    image: tuple[int, int, int]
    clients: int
    examples: int  # of a client; on average where they differ
    cohort: int
    batch_size: int
    model: str
    skewed: bool = False  # unequal clients: each class by a Dirichlet of .5, at least 10 examples a client


SHAPES = {
    "W1": Shape((1, 28, 28), 100, 600, 10, 32, "lenet", skewed=True),
    "W2a": Shape((1, 28, 28), 1000, 60, 100, 20, "lenet"),
    "W2b": Shape((1, 28, 28), 1000, 60, 100, 20, "mlp"),
    "W3": Shape((3, 32, 32), 40, 500, 4, 64, "resnet8"),
    "G1": Shape((3, 32, 32), 1000, 50, 50, 10, "cnn"),  # pfl-research's CIFAR-10 benchmark, for a GPU
}
MODELS = {
    "lenet": {"name": "lenet"},
    "mlp": {"name": "mlp", "hidden": [200, 200]},
    "resnet8": {"name": "resnet8", "norm": "group"},
    "cnn": {"name": f"{serve.__file__}:CNN"},
}


def images(shape: tuple[int, int, int], count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Returns uint8 images [count, *shape] and labels: a smooth blob for each class, moved about, on a flat background."""
    channels, height, width = shape
    y = rng.integers(10, size=count)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    x = np.zeros((count, channels, height, width), np.uint8)
    for i, label in enumerate(y):
        a, b = rng.normal(height / 2 + 4 * np.cos(label), 2), rng.normal(width / 2 + 4 * np.sin(label), 2)
        blob = np.exp(-(((rows - a) / (3 + label % 4)) ** 2) - ((columns - b) / (3 + label % 3)) ** 2)
        x[i] = 255 * np.clip(blob * rng.uniform(0.6, 1, (channels, 1, 1)) - 0.05, 0, 1)
    return x, y


def owners(shape: Shape, y: Array, rng: np.random.Generator) -> list[Array]:
    """Returns each client's examples."""
    if not shape.skewed:
        return np.split(rng.permutation(len(y)), shape.clients)
    while True:
        parts: list[list[Array]] = [[] for _ in range(shape.clients)]
        for label in range(10):
            rows = rng.permutation(np.flatnonzero(y == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(shape.clients, 0.5)))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        found = [np.concatenate(part) for part in parts]
        if min(map(len, found)) >= 10:
            return found


def write(name: str, path: Path, rounds: int = 64) -> None:
    """Writes a workload's file, with the cohorts that fedtail draws."""
    shape, rng = SHAPES[name], np.random.default_rng(0)
    x, y = images(shape.image, shape.clients * shape.examples, rng)
    parts = owners(shape, y, rng)
    work = serve.Workload(x, y, parts, np.zeros((1, shape.cohort), int), shape.model, shape.batch_size, 0.01, 0.9)
    federation = Federation(experiment_of(name, "loop"), data_of(work))
    cohorts: list[list[int]] = []
    for federation.round in range(rounds):
        cohorts.append(federation.draw(Phase()))
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(path, **work._replace(cohorts=np.array(cohorts))._asdict() | {
        "owners": [], "members": np.concatenate(parts), "offsets": offsets})  # fmt: skip


def experiment_of(name: str, engine: str = "auto", algorithm: str = "fedavg", **changes: Any) -> Experiment:
    """Returns the workload as fedtail's experiment; evaluation waits for a last round that is never reached."""
    shape = SHAPES[name]
    optimizer = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    return config.from_dict(Experiment, {
        "rounds": 10**6, "algorithm": {"name": algorithm, "optimizer": optimizer}, "model": MODELS[shape.model],
        "local": {"epochs": 1, "batch_size": shape.batch_size}, "participation": {"clients": shape.cohort},
        "evaluation": {"every": 10**6, "local": False}, "engine": {"name": engine}, "device": serve.DEVICE, **changes,
    })  # fmt: skip


def data_of(work: serve.Workload, server: int = 0) -> FederatedData:
    """Returns a workload's data as fedtail has them; `server` examples are lent to the server too."""
    columns = {key: torch.from_numpy(value).to(serve.DEVICE) for key, value in (("x", work.x), ("y", work.y))}
    test = {key: value[:100] for key, value in columns.items()}
    nobody = [np.zeros(0, np.int64) for _ in work.owners]
    half = (0.5,) * work.x.shape[1]
    return FederatedData(columns, work.owners, test, nobody, 10, half, half, server=np.arange(server))


def rounds_of(experiment: Experiment, work: serve.Workload, folder: Path) -> Iterator[RoundResult]:
    """Returns the rounds of a run that keeps its metrics and checkpoints in a folder."""
    return start(Federation(experiment, data_of(work)), folder)
