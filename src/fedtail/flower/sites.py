"""Data in a deployment: what an app says of them, what a site has, and what the server knows of its sites.

A site's own data are an .npz file with x and y (all rows train; of x_train, y_train where it has those), or a folder
CLASS/NAME.png whose classes bear the experiment's names. They must be of the experiment's shape and type, and are scaled by the
experiment's mean and deviation, not by their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtail import config
from fedtail.config import Data, Experiment
from fedtail.data import formats
from fedtail.data.catalog import load
from fedtail.data.dataset import Dataset, Split, channels_first
from fedtail.data.federated import FederatedData
from fedtail.data.members import Members
from fedtail.data.partition import validation_split
from fedtail.errors import ConfigError, DataError
from fedtail.federation import federate
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


def read_site(path: Path, form: Form) -> Split:
    """Reads a site's own data and holds them against the experiment's form.

    Raises:
        DataError: they cannot be read, or are of another shape, type or number of classes; says which.
    """
    split = _folder(path, form) if path.is_dir() else _file(path)
    shape, kind = tuple(split.x.shape[1:]), np.uint8 if len(form.shape) == 3 else np.float32
    if shape != form.shape or split.x.dtype != kind:
        raise DataError(f"{path}: an example is {split.x.dtype} {list(shape)}, the experiment's are {np.dtype(kind)} "
                        f"{list(form.shape)}. Convert the data; they are not resized here.")  # fmt: skip
    low, high = int(split.y.min()), int(split.y.max())
    if low < 0 or high >= len(form.classes):
        raise DataError(f"{path}: labels run from {low} to {high}, the experiment has {len(form.classes)} classes: 0 "
                        f"({form.classes[0]}) to {len(form.classes) - 1} ({form.classes[-1]}). Renumber them.")  # fmt: skip
    return split


def _file(path: Path) -> Split:
    if path.suffix != ".npz" or not path.is_file():
        raise DataError(f"{path}: there is no such .npz file or folder of images.")
    names = {role: role for role in formats.NPZ_COLUMNS}
    arrays, found = formats._npz_arrays(path, names)
    part = "_train" if "x_train" in arrays else ""
    formats._check_columns(path, ["x" + part, "y" + part], found)
    return formats._npz_split(path, arrays, names, part)


def _folder(path: Path, form: Form) -> Split:
    files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in formats.IMAGE_SUFFIXES)
    if not files or len(form.shape) != 3:
        raise DataError(f"{path}: expected images as {path}/CLASS/NAME.png (or .jpg).")
    strange = sorted({p.parent.name for p in files} - set(form.classes))
    if strange:
        raise DataError(f"{path / strange[0]}: the experiment has no class {strange[0]!r}; its classes are "
                        f"{', '.join(form.classes)}. Rename or remove the folder.")  # fmt: skip
    _, size = formats._image_kind(files, None)
    x = np.stack([formats._decode(p, "L" if form.shape[0] == 1 else "RGB", size) for p in files])
    return Split(channels_first(x), np.array([form.classes.index(p.parent.name) for p in files], np.int64))


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
        data = federate(experiment.data, experiment.seed, experiment.device)
        if not 0 <= client < data.clients:
            raise ConfigError(f"client must be in [0, {data.clients - 1}], the experiment's clients; got {client}.")
        return data
    if not path or not 0 <= client < sites:
        raise ConfigError(f"a site names its data and its number in [0, {sites - 1}]: --node-config "
                          f"'client={client} data=\"/path/to/file.npz\"'")  # fmt: skip
    split = read_site(Path(path), form)
    none = np.zeros(0, np.int64)
    owners = [np.arange(len(split)) if k == client else none for k in range(sites)]
    columns = {
        "x": torch.from_numpy(split.array).to(experiment.device),
        "y": torch.from_numpy(split.y).to(experiment.device),
    }
    return FederatedData(columns, owners, columns, [none] * sites, len(form.classes), form.mean, form.std,
                         experiment.data.augmentation)  # fmt: skip


class SiteData(FederatedData):
    """What the server knows: its own examples, and of each site the number of examples and perhaps of each class."""

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


def server_data(
    experiment: Experiment, examples: Mapping[int, int], counts: Mapping[int, Sequence[int]]
) -> FederatedData:
    """Returns the server's data in a deployment on sites: the experiment's test split, and its validation and server splits.

    Args:
        experiment: whose data set the server holds.
        examples: number of examples of each site.
        counts: their class counts; empty where they are not shared.
    """
    options, seed = experiment.data, experiment.seed
    dataset = load_server(options)
    pool, labels, held = np.arange(len(dataset.train)), dataset.train.y, list[Array]()
    for stream, per_class in ((Stream.VALIDATION, options.validation), (Stream.SERVER_DATA, options.server)):
        keep, out = validation_split(labels[pool], dataset.num_classes, per_class, generator(seed, stream))
        held.append(pool[out])
        pool = pool[keep]
    rows = np.concatenate(held)
    shared = np.array([counts.get(k, [0] * dataset.num_classes) for k in sorted(examples)], np.int64)
    sizes = [examples[k] for k in sorted(examples)]
    ends = np.cumsum([len(rows), *sizes])  # indices of examples that the server does not have
    x, y = (torch.from_numpy(np.asarray(v)).to(experiment.device) for v in (dataset.train.array[rows], labels[rows]))
    test = {"x": torch.from_numpy(dataset.test.array).to(experiment.device),
            "y": torch.from_numpy(dataset.test.y).to(experiment.device)}  # fmt: skip
    none = np.zeros(0, np.int64)
    return SiteData(
        {"x": x, "y": y, "counts": torch.from_numpy(shared)}, Members(np.arange(ends[0], ends[-1]), ends - ends[0]), test,
        [none] * len(sizes), dataset.num_classes, dataset.mean, dataset.std, options.augmentation,
        np.arange(len(held[0])), np.arange(len(held[0]), len(rows)), (f"{len(sizes)} sites with data of their own",),
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
