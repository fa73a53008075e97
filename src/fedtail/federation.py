"""From an experiment to what an engine needs: the federated data and the task."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedtail.config import Data, Experiment, name_of
from fedtail.data import legacy
from fedtail.data.catalog import load
from fedtail.data.dataset import Dataset
from fedtail.data.federated import Array, FederatedData, prepare
from fedtail.data.lazy import Decoder, column
from fedtail.data.members import Members
from fedtail.data.partition import describe_partition, local_test_counts, local_tests, validation_split
from fedtail.errors import ConfigError
from fedtail.seeds import Stream, generator
from fedtail.task import Execution, Task, build_task


def federate(options: Data, seed: int, device: str = "cpu") -> FederatedData:
    """Loads, holds out, cuts and splits the data: a pure function of the options and the seed.

    Raises:
        DataError: the data set is missing or damaged.
        PartitionError: the cut or the partition is infeasible.
    """
    dataset = load(options.name, options.folder or None, size=options.image_size or None)
    classes, labels = dataset.num_classes, dataset.train.y
    pool = np.arange(len(labels))
    held: list[np.ndarray] = []
    for stream, per_class in ((Stream.VALIDATION, options.validation), (Stream.SERVER_DATA, options.server)):
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
    ends = np.cumsum([len(chosen), *map(len, held)])
    decoder = Decoder(options.cache_mib << 20, options.decode_threads)
    return FederatedData(
        {"x": column(dataset.train.x[rows], decoder, device), "y": torch.from_numpy(labels[rows]).to(device)},
        owners,
        {"x": column(dataset.test.x, decoder, device), "y": torch.from_numpy(dataset.test.y).to(device)},
        local, classes, *((dataset.mean, dataset.std) if options.normalise else ((), ())), options.augmentation,
        np.arange(ends[0], ends[1]), np.arange(ends[1], ends[2]), _sources(dataset, options, len(chosen)), own_validation,
    )  # fmt: skip


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
        *(
            [f"validation at clients: {options.client_validation:g} of their examples"]
            if options.client_validation
            else []
        ),
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


def check_data(experiment: Experiment, data: FederatedData) -> None:
    """Raises ConfigError if the algorithm needs data at the server or validation examples at the clients that are not there."""
    algorithm, name = experiment.algorithm, name_of(experiment.algorithm)
    if algorithm.needs_server_data and not len(data.server):
        raise ConfigError(
            f"algorithm {name} needs data at the server: set data.server (images per class), for example 1."
        )
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


def make_task(experiment: Experiment, data: FederatedData) -> Task:
    """Builds the network for these data and moves it to the device.

    Raises:
        ConfigError: the network does not fit the data.
    """
    shape = tuple(data.columns["x"].shape[1:])
    execution = Execution(experiment.autocast, experiment.engine.channels_last, experiment.engine.compile)
    return build_task(
        lambda: experiment.model.build(shape, data.num_classes), data.num_classes, shape, seed=experiment.seed,
        dtype=getattr(torch, experiment.dtype), device=experiment.device, execution=execution,
    )  # fmt: skip
