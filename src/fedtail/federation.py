"""From an experiment to what an engine needs: the federated data and the task."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtail.algorithm import Algorithm, ServerWork
from fedtail.config import Data, Experiment, name_of
from fedtail.data import legacy
from fedtail.data.catalog import load
from fedtail.data.dataset import Dataset
from fedtail.data.federated import Array, FederatedData, prepare
from fedtail.data.lazy import Decoder, column
from fedtail.data.members import Members
from fedtail.data.partition import describe_partition, local_test_counts, local_tests, validation_split
from fedtail.data.plan import LocalWork
from fedtail.errors import ConfigError
from fedtail.models.gan import is_pair
from fedtail.seeds import Stream, generator
from fedtail.task import Execution, Task, Variables, build_task


def federate(options: Data, seed: int, device: str = "cpu", probe: int = 0) -> FederatedData:
    """Loads, holds out, cuts and splits the data: a pure function of the options and the seed.

    Args:
        options: which data.
        seed: the experiment's.
        device: where the columns go.
        probe: images of each class that are kept for a teacher's head.

    Raises:
        DataError: the data set is missing or damaged.
        PartitionError: the cut or the partition is infeasible.
    """
    dataset = load(options.name, options.folder or None, size=options.image_size or None)
    classes, labels = dataset.num_classes, dataset.train.y
    pool = np.arange(len(labels))
    held: list[np.ndarray] = []
    within = 0 if options.server_from else options.server
    for stream, per_class in (
        (Stream.VALIDATION, options.validation),
        (Stream.SERVER_DATA, within),
        (Stream.PROBE, probe),
    ):
        keep, out = validation_split(labels[pool], classes, per_class, generator(seed, stream))
        held.append(pool[out])
        pool = pool[keep]
    chosen = pool[options.longtail.cut(labels[pool], classes, generator(seed, Stream.LONGTAIL))]
    users = None if dataset.train.user is None else dataset.train.user[chosen]
    owners = options.partition.split(labels[chosen], classes, generator(seed, Stream.PARTITION), users)
    counts = Members.of(owners).class_counts(labels[chosen], classes)
    local = _local_tests(options, seed, labels[chosen], counts, dataset.test.y)
    owners, own_validation = hold_out(owners, options.client_validation, seed)
    rows = np.concatenate([chosen, *held])  # only these are kept in memory
    x, y = _with_others(dataset.train.x[rows], labels[rows], options, seed, classes)
    ends = np.cumsum([len(chosen), *map(len, held)])
    server = np.arange(ends[3], len(y)) if options.server_from else np.arange(ends[1], ends[2])
    decoder = Decoder(options.cache_mib << 20, options.decode_threads)
    return FederatedData(
        {"x": column(x, decoder, device), "y": torch.from_numpy(y).to(device)},
        owners,
        {"x": column(dataset.test.x, decoder, device), "y": torch.from_numpy(dataset.test.y).to(device)},
        local, classes, *((dataset.mean, dataset.std) if options.normalise else ((), ())), options.augmentation,
        np.arange(ends[0], ends[1]), server, _sources(dataset, options, len(chosen)), own_validation,
        probe=np.arange(ends[2], ends[3]), class_names=dataset.class_names,
    )  # fmt: skip


def _with_others(x: Any, y: Array, options: Data, seed: int, classes: int) -> tuple[Any, Array]:
    """Adds the images of `data.server_from`, without labels: their y is -1."""
    if not options.server_from:
        return x, y
    other = load(options.server_from, options.folder or None, size=options.image_size or None).train
    wanted = options.server * classes
    if not isinstance(x, np.ndarray) or not isinstance(other.x, np.ndarray):
        raise ConfigError("data.server_from: images that are decoded when they are used cannot be mixed with others.")
    if (other.x.dtype, other.x.shape[1:]) != (x.dtype, x.shape[1:]):
        raise ConfigError(f"data.server_from = {options.server_from!r} holds {other.x.dtype} {list(other.x.shape[1:])} an "
                          f"example, {options.name} {x.dtype} {list(x.shape[1:])}. Name a set of the same shape.")  # fmt: skip
    if len(other.y) < wanted:
        raise ConfigError(f"data.server = {options.server} wants {wanted} images of {options.server_from}, which has "
                          f"{len(other.y)}. Lower it.")  # fmt: skip
    rows = np.sort(generator(seed, Stream.SERVER_DATA).choice(len(other.y), wanted, replace=False))
    return np.concatenate([x, other.x[rows]]), np.concatenate([y, np.full(wanted, -1, y.dtype)])


def hold_out(owners: Sequence[Array], share: float, seed: int) -> tuple[Sequence[Array], list[Array]]:
    """Splits each client's rows at random; returns what it trains on and what it validates on (nothing at all: [])."""
    if not share:
        return owners, []
    kept, held = list[Array](), list[Array]()
    for client, rows in enumerate(owners):
        order = generator(seed, Stream.CLIENT_VALIDATION, client).permutation(len(rows))
        size = int(share * len(rows) + 1e-6)  # 60,000 / 6 comes out as 9,999.99...
        held.append(rows[np.sort(order[:size])])
        kept.append(rows[np.sort(order[size:])])
    return kept, held


def _local_tests(options: Data, seed: int, labels: Array, counts: Array, test_labels: Array) -> list[Array]:
    """Draws each client's local test set; counts are n_kc, int64 [clients, C]."""
    examples, classes = len(test_labels), counts.shape[1]
    stream = options.partition.legacy_stream(labels, classes)
    if stream is not None:  # the authors' code draws on with the split's generator
        return legacy.local_tests(local_test_counts(counts, examples, np.full(classes, examples)), test_labels, stream)
    pool = np.bincount(test_labels, minlength=classes)
    return local_tests(local_test_counts(counts, examples, pool), test_labels, generator(seed, Stream.LOCAL_TEST))


def _sources(dataset: Dataset, options: Data, examples: int) -> tuple[str, ...]:
    return (
        f"{dataset.name} ({dataset.source}; licence: {dataset.licence})",
        f"long tail: {options.longtail!r}, {examples} training examples",
        f"partition: {describe_partition(options.partition)}",
        *([f"server data: images of {options.server_from}, without labels"] if options.server_from else []),
        *([f"validation at clients: {share:g} of their examples"] if (share := options.client_validation) else []),
    )


class Predictor(nn.Module):
    """A trained network with its input scaling: raw images in, logits out.

    Args:
        network: the network, in evaluation mode.
        mean: per channel, on the scale 0..1; empty: inputs are not normalised.
        std: likewise.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.mean, self.std = network, tuple(mean), tuple(std)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [N, classes] for uint8 images (0..255), float images (0..1) or features, [N, ...]."""
        dtype = next(self.network.parameters()).dtype
        return self.network(prepare(x, dtype, self.mean, self.std))


def check_device(name: str) -> None:
    """Raises ConfigError if torch cannot put a tensor on this device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; torch without CUDA; no driver; no such card
        why = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"device {name!r}: torch {torch.__version__} says: {why}. Use device = 'cpu'.") from error


def suited(data: FederatedData, algorithm: Algorithm) -> FederatedData:
    """Returns the data as a method wants them: images of a generative one are scaled to [-1, 1], as generators make them."""
    shape = data.columns["x"].shape
    if not algorithm.generative or len(shape) != 4:
        return data
    return dataclasses.replace(data, mean=(0.5,) * shape[1], std=(0.5,) * shape[1])


def check_data(experiment: Experiment, data: FederatedData) -> None:
    """Raises ConfigError if data at the server, labels of them or validation examples at the clients are needed and missing."""
    algorithm, name = experiment.algorithm, name_of(experiment.algorithm)
    if algorithm.needs_server_data and not len(data.server):
        raise ConfigError(
            f"algorithm {name} needs data at the server: set data.server (images per class), for example 1."
        )
    if algorithm.needs_server_labels and experiment.data.server_from:
        raise ConfigError(f"algorithm {name} needs labels of the server's data, but those of data.server_from = "
                          f'"{experiment.data.server_from}" have none of these classes. Leave server_from out, or set the '
                          "weight of the term that needs them (lam_ce) to 0.")  # fmt: skip
    validates = any(phase.split == "validation" for phase in algorithm.phases(0, experiment.rounds))
    if validates and not Members.of(data.held).sizes.any():
        raise ConfigError(
            f"algorithm {name} validates at the clients: set data.client_validation, for example 0.1666667."
        )


def takers(experiment: Experiment, data: FederatedData) -> tuple[Array, Array]:
    """Returns the clients that hold a batch: those who can take part, and the newcomers, who never do."""
    holders = np.flatnonzero(Members.of(data.owners).sizes >= experiment.local.min_batch)
    if not len(holders):
        raise ConfigError("data.partition and local.min_batch leave no client with a batch. Lower local.min_batch.")
    newcomers = experiment.participation.late(holders, experiment.seed)
    return np.setdiff1d(holders, newcomers, assume_unique=True), newcomers


def whole_batches(work: ServerWork, examples: int) -> LocalWork:
    """Returns the server's work as that of a client with so many examples; a batch of one among larger ones is left out."""
    size = max(min(work.batch_size, examples), 1)
    return LocalWork(epochs=1, steps=max(work.steps, 0), batch_size=size, min_batch=min(2, size))


def make_task(experiment: Experiment, data: FederatedData) -> Task:
    """Builds the network for these data and moves it to the device.

    Raises:
        ConfigError: the network does not fit the data or the method.
    """
    shape = tuple(data.columns["x"].shape[1:])
    execution = Execution(experiment.autocast, experiment.engine.channels_last, experiment.engine.compile)
    task = build_task(
        lambda: experiment.model.build(shape, data.num_classes), data.num_classes, shape, seed=experiment.seed,
        dtype=getattr(torch, experiment.dtype), device=experiment.device, execution=execution,
    )  # fmt: skip
    if experiment.algorithm.generative != is_pair(task.module):
        pair, plain = (
            "a pair of generator and discriminator ('dcgan28', 'dcgan32')",
            "a network that classifies ('mlp')",
        )
        wants = pair if experiment.algorithm.generative else plain
        raise ConfigError(
            f"algorithm {name_of(experiment.algorithm)} needs {wants} in model.name, got {experiment.model}."
        )
    return task


def fitted(task: Task, found: Variables, path: Path, experiment: Experiment) -> Variables:
    """Returns another run's variables as the task's own: its names alone, its types and device.

    Raises:
        ConfigError: a tensor is missing or of another shape.
    """
    pairs = list(zip(task.initial, found, strict=True))
    wrong = [k for own, new in pairs for k, v in own.items() if k not in new or new[k].shape != v.shape]
    if wrong:
        raise ConfigError(f"start: the model of {path} does not fit this experiment's {experiment.model}: "
                          f"{len(wrong)} tensors differ, the first is {wrong[0]}. Use the same model and data.")  # fmt: skip
    return Variables(*({k: new[k].to(v) for k, v in own.items()} for own, new in pairs))
