"""Image data of the Hugging Face Hub by name, with the user of every example: "hf:OWNER/NAME?user=COLUMN".

The package `datasets` (the extra `data`) fetches and caches them. After the question mark, joined by &, stand options:

    image     column of the images; by default the only one of that type
    label     column of the classes; by default the only one of type ClassLabel
    user      column of whose example it is, for the partition `natural`; by default there are no users
    train     split to train on, default "train"
    test      split to evaluate on; by default "test", or where there is none a stratified fifth, always the same one
    config    subset of the data set, where it has several
    revision  commit or tag of the data set; fix it where results are to be repeated
"""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from fedtail.data.dataset import Dataset, Split, assemble, stratified_split
from fedtail.data.formats import _eight_bit
from fedtail.errors import ConfigError, DataError, did_you_mean

PREFIX = "hf:"
BICUBIC = 3  # Pillow's number of it
TEST_SHARE = 0.2  # held out where there is no test split, as from an .npz file


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a name asks for; empty: the default (see the module)."""

    path: str
    """OWNER/NAME on the Hub."""
    image: str = ""
    """Column of the images."""
    label: str = ""
    """Column of the classes."""
    user: str = ""
    """Column of the users."""
    train: str = "train"
    """Split to train on."""
    test: str = ""
    """Split to evaluate on."""
    config: str = ""
    """Subset of the data set."""
    revision: str = ""
    """Commit or tag."""


def parse(name: str) -> Source:
    """Reads "hf:OWNER/NAME?option=value&...".

    Raises:
        ConfigError: no such form, or an unknown option.

    Example:
        >>> parse("hf:flwrlabs/femnist?user=writer_id").user
        'writer_id'
    """
    path, _, query = name.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = [field.name for field in fields(Source) if field.name != "path"]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ConfigError(f"data.name: {name}: unknown option {option!r}{hint} Known are {', '.join(known)}.")
    if not name.startswith(PREFIX) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ConfigError(f'data.name: got {name!r}, expected "hf:OWNER/NAME" or "hf:OWNER/NAME?user=COLUMN".')
    return Source(path=path, **options)


def require(name: str) -> Any:
    """Returns the package `datasets`, which data of this name need.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"data.name {name!r}: data of the Hugging Face Hub need the package datasets ({error}). "
            'Run pip install "fedtail[data]".'
        ) from error


def load(name: str, folder: str | Path | None = None, size: int | None = None) -> Dataset:
    """Fetches a data set of the Hub, or takes it from the cache, and converts it.

    Args:
        name: "hf:OWNER/NAME?option=value&...", see the module.
        folder: the cache; None: that of the package (the environment variable HF_HOME).
        size: height and width to resize the images to; None: they are of equal size.

    Raises:
        ConfigError: the name is not of this form.
        DataError: the package is missing, the data cannot be had, or they are no labelled images of one size.
    """
    source = parse(name)
    package = require(name)
    try:
        found = package.load_dataset(
            source.path, source.config or None, revision=source.revision or None, cache_dir=folder and str(folder)
        )
    except Exception as error:  # the package, the Hub and its storage each raise errors of their own
        why = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"data.name {name!r}: datasets.load_dataset says: {why or type(error).__name__}. Check the name, its config and "
            "the network; in the cache it is found without one."
        ) from error
    return convert(name, source, found, package, size)


def convert(name: str, source: Source, found: Mapping[str, Any], package: Any, size: int | None = None) -> Dataset:
    """Makes fedtail's data set of the splits that `datasets.load_dataset` returns.

    Args:
        name: what to call it.
        source: columns and splits.
        found: `datasets.Dataset` by the name of the split.
        package: the module `datasets`, for the types of its columns.
        size: as in `load`.

    Raises:
        DataError: a split or a column is missing, or not what it should be.
    """
    chosen = [source.train, *([source.test] if source.test else ["test"] if "test" in found else [])]
    for part in chosen:
        if part not in found:
            raise DataError(
                f"{name}: there is no split {part!r}; found {', '.join(found)}. Name one: ?train=NAME&test=NAME."
            )
    columns = found[source.train].features
    image = source.image or _only(name, "image", columns, package.Image)
    label = source.label or _only(name, "label", columns, package.ClassLabel)
    parts = [_read(f"{name}: {source.train}", found[source.train], [image, label, *filter(None, [source.user])], size)]
    for part in chosen[1:]:  # users of test examples need not be known
        user = [source.user] if source.user in found[part].features else []
        parts.append(_read(f"{name}: {part}", found[part], [image, label, *user], size))
    y, names = _classes(name, [part[1] for part in parts], getattr(columns[label], "names", None))
    splits = [Split(x, labels, user) for (x, _, user), labels in zip(parts, y, strict=True)]
    if len(splits) == 1:
        splits = _hold_out(splits[0])
    info = found[source.train].info
    where = f"huggingface.co/datasets/{source.path}" + (f", revision {source.revision}" if source.revision else "")
    train, test = splits
    return replace(assemble(name, train, test, names), licence=info.license or "not stated", source=where)


def _only(name: str, option: str, columns: Mapping[str, Any], kind: type) -> str:
    """Returns the only column of a type."""
    of_kind = [column for column, feature in columns.items() if isinstance(feature, kind)]
    if len(of_kind) != 1:
        listing = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in columns.items())
        raise DataError(
            f"{name}: {len(of_kind)} columns are of type {kind.__name__}; found {listing}. Name one: ?{option}=COLUMN."
        )
    return of_kind[0]


def _read(where: str, rows: Any, columns: Sequence[str], size: int | None) -> tuple[Any, list[Any], Any]:
    """Returns images [N, C, H, W], labels as they stand there, and users of one split."""
    for column in columns:
        if column not in rows.features:
            raise DataError(f"{where}: there is no column {column!r}; found {', '.join(rows.features)}.")
    image, label, *user = columns
    x = _pixels(where, image, (row[image] for row in rows.select_columns([image])), len(rows), size)
    values = {column: [row[column] for row in rows.select_columns([column])] for column in columns[1:]}
    for column, listed in values.items():
        if None in listed:
            raise DataError(
                f"{where}: row {listed.index(None)} has no value in column {column!r}. Drop such rows first."
            )
    if not all(isinstance(value, int | str) for value in values[label]):
        raise DataError(f"{where}: column {label!r} holds no classes: numbers or names are expected, one an example.")
    if not user:
        return x, values[label], None
    named = np.array(values[user[0]])
    return x, values[label], named.astype(np.int64) if named.dtype.kind in "iub" else named.astype(np.str_)


def _pixels(where: str, column: str, images: Iterable[Any], rows: int, size: int | None) -> Any:
    """Returns uint8 [N, C, H, W]: grey if all images are, else RGB."""
    x: Any = np.zeros((0, 1, 0, 0), np.uint8)
    for place, image in enumerate(images):
        if not hasattr(image, "convert"):  # a decoded image is one of Pillow's
            raise DataError(f"{where}: column {column!r} holds {type(image).__name__} in row {place}, expected images.")
        mode = _eight_bit(image.mode, f"{where}: column {column!r}, row {place}")
        image = image.convert("L" if mode in ("1", "L") else "RGB")
        image = image if size is None else image.resize((size, size), BICUBIC)
        pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        if not place:
            x = np.zeros((rows, *pixels.shape), np.uint8)
        if pixels.shape[1:] != x.shape[2:]:
            raise DataError(
                f"{where}: images differ in height x width: {x.shape[2]} x {x.shape[3]} and, in row {place}, "
                f"{pixels.shape[1]} x {pixels.shape[2]}. Give data.image_size to resize them to."
            )
        if len(pixels) > x.shape[1]:
            x = np.repeat(x, 3, axis=1)
        x[place] = pixels
    return x


def _classes(name: str, parts: Sequence[list[Any]], known: Sequence[str] | None) -> tuple[list[Any], tuple[str, ...]]:
    """Returns labels 0..C-1 of each split, and the names of the classes: `known`, else the values in ascending order."""
    if known is not None:
        for part in parts:
            if part and min(part) < 0:
                raise DataError(
                    f"{name}: row {part.index(min(part))} has no label ({min(part)}). Use a labelled split."
                )
        return [np.array(part, np.int64) for part in parts], tuple(known)
    values, inverse = np.unique(np.concatenate([np.array(part) for part in parts]), return_inverse=True)
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(inverse.astype(np.int64), cuts), tuple(str(value) for value in values)


def _hold_out(whole: Split) -> list[Split]:
    """Cuts one split into training and test examples, as an .npz file without a test split is cut."""
    rows = stratified_split(whole.y, max(1, round(TEST_SHARE * len(whole))), np.random.default_rng(0))
    return [Split(whole.x[i], whole.y[i], None if whole.user is None else whole.user[i]) for i in rows]
