"""Data in a deployment: what an app says of them, what a site has, and what the server knows of its sites.

A site's own data are an .npz file with x_train, y_train, x_test and y_test (or x and y: then all rows train), a folder
train/CLASS/NAME.png and test/CLASS/NAME.png (or CLASS/NAME.png), or "hf:OWNER/NAME"; classes bear the experiment's names. They
must be of the experiment's shape and type, and are scaled by the experiment's mean and deviation, not by their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fedtail import config, teaching
from fedtail.config import Data, Experiment
from fedtail.data import formats, hub
from fedtail.data.catalog import load
from fedtail.data.dataset import Dataset, Split, channels_first
from fedtail.data.federated import FederatedData
from fedtail.data.lazy import Decoder, column
from fedtail.data.partition import validation_split
from fedtail.errors import ConfigError, DataError
from fedtail.federation import hold_out, suited
from fedtail.seeds import Stream, generator

Array = np.ndarray[Any, Any]


class Form(NamedTuple):
    """What all data of a federation have in common; an app's data.toml."""

    shape: tuple[int, ...]  # of an example: (C, H, W) of uint8 images, (F,) of float32 features
    classes: tuple[str, ...]  # names, in the order of the labels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "Form":
        """Returns the form of a data set."""
        return cls(tuple(dataset.input_shape), dataset.class_names, dataset.mean, dataset.std)

    @classmethod
    def read(cls, folder: Path) -> "Form":
        """Reads an app's."""
        table = config.read_toml(folder / "data.toml")
        return cls(*(tuple(table[name]) for name in cls._fields))


def load_server(data: Data) -> Dataset:
    """Returns the experiment's data set, whose test split the server judges on."""
    return load(data.name, data.folder or None, size=data.image_size or None)


def read_site(name: str, form: Form) -> tuple[Split, Split | None]:
    """Reads a site's own data, to train on and perhaps to test on, and holds them against the experiment's form.

    Args:
        name: an .npz file, a folder of images, or "hf:OWNER/NAME" (see data.hub).
        form: the experiment's.

    Raises:
        DataError: they cannot be read, or are of another shape, type or number of classes; says which.
    """
    path = Path(name)
    train, test = (
        _hub(name, form) if name.startswith(hub.PREFIX) else _folder(path, form) if path.is_dir() else _file(path)
    )
    for split in (train, test) if test is not None else (train,):
        _check(name, split, form)
    return train, test


def _check(name: str, split: Split, form: Form) -> None:
    shape, kind = tuple(split.x.shape[1:]), np.uint8 if len(form.shape) == 3 else np.float32
    if shape != form.shape or split.x.dtype != kind:
        raise DataError(f"{name}: an example is {split.x.dtype} {list(shape)}, the experiment's are {np.dtype(kind)} "
                        f"{list(form.shape)}. Convert the data; they are not resized here.")  # fmt: skip
    low, high = int(split.y.min()), int(split.y.max())
    if low < 0 or high >= len(form.classes):
        raise DataError(f"{name}: labels run from {low} to {high}, the experiment has {len(form.classes)} classes: 0 "
                        f"({form.classes[0]}) to {len(form.classes) - 1} ({form.classes[-1]}). Renumber them.")  # fmt: skip


def _file(path: Path) -> tuple[Split, Split | None]:
    if path.suffix != ".npz" or not path.is_file():
        raise DataError(
            f'{path}: there is no such .npz file or folder of images; a data set of the Hub is "hf:OWNER/NAME".'
        )
    names = {role: role for role in formats.NPZ_COLUMNS}
    arrays, found = formats._npz_arrays(path, names)
    part = "_train" if "x_train" in arrays else ""
    formats._check_columns(path, ["x" + part, "y" + part], found)
    test = formats._npz_split(path, arrays, names, "_test") if {"x_test", "y_test"} <= arrays.keys() else None
    return formats._npz_split(path, arrays, names, part), test


def _folder(path: Path, form: Form) -> tuple[Split, Split | None]:
    if not (path / "train").is_dir():
        return _images(path, form), None
    return _images(path / "train", form), _images(path / "test", form) if (path / "test").is_dir() else None


def _images(path: Path, form: Form) -> Split:
    files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in formats.IMAGE_SUFFIXES)
    if not files or len(form.shape) != 3:
        raise DataError(f"{path}: expected images as {path}/CLASS/NAME.png (or .jpg).")
    labels = np.array([_number(p.parent.name, path, form) for p in files], np.int64)
    _, size = formats._image_kind(files, None)
    x = np.stack([formats._decode(p, "L" if form.shape[0] == 1 else "RGB", size) for p in files])
    return Split(channels_first(x), labels)


def _hub(name: str, form: Form) -> tuple[Split, Split | None]:
    found = hub.load(name)
    numbers = np.array([_number(each, name, form) for each in found.class_names], np.int64)
    return Split(found.train.array, numbers[found.train.y]), Split(found.test.array, numbers[found.test.y])


def _number(name: str, where: object, form: Form) -> int:
    if name not in form.classes:
        raise DataError(f"{where}: the experiment has no class {name!r}; its classes are {', '.join(form.classes)}. Rename "
                        "or remove it.")  # fmt: skip
    return form.classes.index(name)


def node_data(experiment: Experiment, form: Form, sites: int, client: int, path: str) -> FederatedData:
    """Returns a node's data: those of its site, or in a rehearsal the experiment's, of which it uses its client's part.

    Raises:
        ConfigError: the client's index or the path is missing or does not fit.
        DataError: see `read_site`.
    """
    if not sites:
        if path:
            raise ConfigError("this app rehearses on the experiment's own partition. Leave `data` out of --node-config, or "
                              "write the app anew with fedtail deploy --sites N.")  # fmt: skip
        data = suited(teaching.furnish(experiment), experiment.algorithm)
        if not 0 <= client < data.clients:
            raise ConfigError(f"client must be in [0, {data.clients - 1}], the experiment's clients; got {client}.")
        return data
    if not path or not 0 <= client < sites:
        raise ConfigError(f"a site names its data and its number in [0, {sites - 1}]: --node-config "
                          f"'client={client} data=\"/path/to/file.npz\"'")  # fmt: skip
    train, test = read_site(path, form)
    none = np.zeros(0, np.int64)
    owners: Sequence[Array] = [np.arange(len(train)) if k == client else none for k in range(sites)]
    owners, held = hold_out(owners, experiment.data.client_validation, experiment.seed)
    tests = [np.arange(len(test)) if test is not None and k == client else none for k in range(sites)]
    scale = (form.mean, form.std) if experiment.data.normalise else ((), ())
    data = FederatedData(_columns(train, experiment.device), owners, _columns(test or train, experiment.device), tests,
                         len(form.classes), *scale, experiment.data.augmentation, held=held)  # fmt: skip
    return suited(data, experiment.algorithm)


def _columns(split: Split, device: str) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(split.array).to(device), "y": torch.from_numpy(split.y).to(device)}


class SiteData(FederatedData):
    """What the server knows: its own examples, and of each site the number of examples and perhaps of each class."""

    local_tests_are: ClassVar[str] = "own test set"

    def counts_of(self, clients: Sequence[int]) -> Array:
        """Returns the class counts of some sites; zeros where they are not shared."""
        return self.counts()[list(clients)]

    def class_totals(self, without: Sequence[int] = ()) -> Array:
        """Returns the class counts of all sites but some."""
        return self.counts().sum(0) - self.counts_of(without).sum(0)

    @property
    def _counts(self) -> tuple[Array, Array]:  # type: ignore[override]
        shared: Array = self.columns["counts"].numpy()
        return shared, np.zeros_like(shared)


class Holdings(NamedTuple):
    """What each site holds, by its number."""

    examples: Sequence[int]  # that it trains on
    held: Sequence[int]  # that it keeps out of its training, for validation
    counts: Mapping[int, Sequence[int]] = {}  # of the former by class, where they are shared

    @classmethod
    def read(cls, run: Path) -> "Holdings":
        """Reads them from the folder of a run that has begun."""
        with open(run / "partition.npz", "rb") as file, np.load(file, allow_pickle=False) as arrays:
            sizes = np.diff(arrays["offsets"]).tolist()
            held = np.diff(arrays["held_offsets"]).tolist() if "held_offsets" in arrays else [0] * len(sizes)
            return cls(sizes, held, dict(enumerate(arrays["counts"].tolist())))


def server_data(experiment: Experiment, holdings: Holdings) -> FederatedData:
    """Returns the server's data in a deployment on sites: the experiment's test split, and its validation and server splits."""
    options, seed = experiment.data, experiment.seed
    dataset = load_server(options)
    pool, labels, kept = np.arange(len(dataset.train)), dataset.train.y, list[Array]()
    for stream, per_class in ((Stream.VALIDATION, options.validation), (Stream.SERVER_DATA, options.server)):
        keep, out = validation_split(labels[pool], dataset.num_classes, per_class, generator(seed, stream))
        kept.append(pool[out])
        pool = pool[keep]
    rows = np.concatenate(kept)
    each = [holdings.counts.get(k, [0] * dataset.num_classes) for k in range(len(holdings.examples))]
    # indices of examples that the server does not have: of each site those that it trains on, then those that it holds out
    ends = len(rows) + np.cumsum([0, *(n for pair in zip(holdings.examples, holdings.held, strict=True) for n in pair)])
    owners, held = ([np.arange(a, b) for a, b in zip(ends[i:-1:2], ends[i + 1 :: 2], strict=True)] for i in (0, 1))
    decoder, device = Decoder(options.cache_mib << 20, options.decode_threads), experiment.device
    own, test = (
        {"x": column(split.x[chosen], decoder, device), "y": torch.from_numpy(split.y[chosen]).to(device)}
        for split, chosen in ((dataset.train, rows), (dataset.test, np.arange(len(dataset.test))))
    )
    return SiteData(
        {**own, "counts": torch.tensor(each, dtype=torch.int64)}, owners, test, [np.zeros(0, np.int64)] * len(owners),
        dataset.num_classes, *((dataset.mean, dataset.std) if options.normalise else ((), ())), options.augmentation,
        np.arange(len(kept[0])), np.arange(len(kept[0]), len(rows)), (f"{len(owners)} sites with data of their own",), held,
    )  # fmt: skip


def check_site(experiment: Experiment, data: FederatedData, client: int) -> Array:
    """Returns a client's class counts, int64 [classes], if it has a batch to train on.

    Raises:
        DataError: it has none.
    """
    held = data.owners[client]
    if not len(experiment.local.lengths(len(held))):
        raise DataError(f"client {client} has {len(held)} examples and thus no batch: the experiment's local.min_batch is "
                        f"{experiment.local.min_batch}.")  # fmt: skip
    return np.bincount(data.columns["y"].numpy(force=True)[held], minlength=data.num_classes)
