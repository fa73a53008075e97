"""Where the data sets that fedtail knows by name lie on this machine, and `load`.

Files stay in their official formats, in a folder for each set. The contents are compared with known hashes at every
load: that takes well below a second, so nothing about earlier checks needs to be remembered.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from fedtail.data import formats, hub
from fedtail.data.dataset import Dataset, assemble
from fedtail.data.entries import PROTOCOL_NORMALISATION, REGISTRY, Entry, Splits
from fedtail.data.images import resized
from fedtail.errors import ConfigError, DataError, did_you_mean
from fedtail.files import cache_folder


def lookup(name: str) -> Entry:
    """Returns the entry of a name.

    Raises:
        ConfigError: there is none of that name; says which names exist and which is near.
    """
    if name not in REGISTRY:
        raise ConfigError(
            f"data.name: unknown data set {name!r}{did_you_mean(name, REGISTRY)} Known: {', '.join(REGISTRY)}; or the path "
            "of an .npz file or of a folder of images."
        )
    return REGISTRY[name]


def locate(name: str, folder: str | Path | None = None) -> Path:
    """Finds the files of a named set on this machine, without reading them.

    Args:
        name: a name in `REGISTRY`.
        folder: look for NAME, or for the files themselves, in this folder instead of in `cache_folder()`.

    Returns:
        The folder (or file) that holds them: from `folder` or the cache, else where a package has installed them.

    Raises:
        ConfigError: the name is unknown.
        DataError: they are not there; says where it looked and how to obtain them.
    """
    entry = lookup(name)
    places = [cache_folder() / name] if folder is None else [Path(folder) / name, Path(folder)]
    reasons: list[str] = []
    for place in (*places, *([entry.installed] if entry.installed else [])):
        try:
            entry.format.files(place, "")
        except DataError as error:
            reasons.append(str(error).rstrip())
        else:
            return place
    listing = "".join(f"\n  {reason}" for reason in reasons)
    raise DataError(
        f"data set {name!r} is not on this machine:{listing}\n"
        f"Run `fedtail data get {name}`, or `fedtail data add {name} PATH` if you have its files."
    )


def md5(path: Path) -> str:
    """MD5 of a file, as the authors of the CIFAR archives publish it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_checked(entry: Entry, path: Path) -> Splits:
    """Reads a named set and compares it with what is known of it.

    Where the SHA-256 of the contents is known, that decides. Elsewhere (CIFAR-100, SVHN) the MD5 of the official files does,
    and for unpacked ones the number of examples of each class. Of lists of images only the lengths are known.

    Raises:
        DataError: files are missing, damaged, or do not hold what they should.
    """
    splits = entry.format.read(path, entry.remedy)
    for part, split, size in zip(("train", "test"), splits, entry.sizes, strict=True):
        if len(split) != size:
            raise DataError(f"{path}: {part} split: got {len(split)} examples, expected {size}. {entry.remedy}")
    if entry.lazy:
        return splits
    if entry.sha256 is not None and entry.format.hashes is not None:
        found = (*entry.format.hashes(splits[0]), *entry.format.hashes(splits[1]))
        parts = ("training images", "training labels", "test images", "test labels")
        for part, got, expected in zip(parts, found, entry.sha256, strict=True):
            if got != expected:
                raise DataError(
                    f"{path}: the {part} were altered: SHA-256 of the contents is {got}, expected {expected}. "
                    f"{entry.remedy}"
                )
        return splits
    files = entry.format.files(path, entry.remedy)
    known = {download.url.rpartition("/")[2]: download.md5 for download in entry.downloads if download.md5}
    for name in files.keys() & known.keys():
        if (got := md5(files[name])) != known[name]:
            raise DataError(
                f"{files[name]}: the file was altered: MD5 is {got}, expected {known[name]}. {entry.remedy}"
            )
    if files.keys() <= known.keys():
        return splits
    for part, split in zip(("train", "test"), splits, strict=True):
        counts = np.bincount(split.y, minlength=entry.num_classes)
        if len(counts) > entry.num_classes or counts.min() != counts.max():
            raise DataError(
                f"{path}: {part} split: got {counts.min()} to {counts.max()} examples a class in {len(counts)} "
                f"classes, expected {len(split) // entry.num_classes} in each of {entry.num_classes}. {entry.remedy}"
            )
    return splits


def load(
    name: str | Path,
    folder: str | Path | None = None,
    *,
    normalisation: Literal["protocol", "own"] = "protocol",
    size: int | None = None,
    columns: Mapping[str, str] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Loads a data set by name, or from an .npz file or a folder of images.

    Named sets are checked against known hashes at every load. A name wins over a folder of the same name: write
    "./mnist", or pass a Path, for the folder.

    Args:
        name: a name in `REGISTRY`, the path of an .npz file (`formats.read_npz`) or of a folder that holds
            train/<class> and test/<class> (`formats.read_image_folder`), or "hf:OWNER/NAME" (`hub`).
        folder: where to look instead of in `cache_folder()`; relative paths start from it.
        normalisation: "protocol": mean and deviation of `PROTOCOL_NORMALISATION` where it lists the set; "own": always
            those of the set's own training pixels.
        size: height and width of images in a folder (None: they are of equal size) and of those that are decoded when
            they are used (None: 224).
        columns: names of the arrays in an .npz file where they differ from the default ones.
        test_share: share of the examples to hold out from an .npz file without a test split, in (0, 1).
        seed: seed of that choice.

    Raises:
        ConfigError: the name or an option is unknown or does not fit the kind of data.
        DataError: the data are missing, damaged, altered or of the wrong form.

    Example:
        >>> digits = load("digits")
        >>> digits.input_shape, len(digits.train), len(digits.test)
        ((1, 8, 8), 1297, 500)
    """
    if normalisation not in ("protocol", "own"):
        raise ConfigError(f'data.normalisation must be "protocol" or "own", got {normalisation!r}.')
    if isinstance(name, str) and name.startswith(hub.PREFIX) and not columns:
        return hub.load(name, folder, size)
    path = Path(folder or "", name).expanduser()
    named = isinstance(name, str) and name in REGISTRY
    is_npz = path.suffix == ".npz" and not named
    if size is not None and (is_npz or (named and not REGISTRY[str(name)].lazy)):
        raise ConfigError(f"data.image_size: only images in files of their own are resized, got {size} for {name}.")
    if columns and not is_npz:
        raise ConfigError(f"data.columns: only .npz files have named arrays, got columns for {name}.")
    if not named and path.is_dir():
        return assemble(str(path), *formats.read_image_folder(path, size))
    if is_npz and path.is_file():
        return assemble(str(path), *formats.read_npz(path, columns, test_share, seed))
    if is_npz or isinstance(name, Path) or len(Path(name).parts) > 1:
        raise DataError(f"{path}: there is no such file or folder. Check data.name and data.folder.")
    return _load_named(name, folder, normalisation, size)


def _load_named(name: str, folder: str | Path | None, normalisation: str, size: int | None) -> Dataset:
    entry = lookup(name)
    splits = read_checked(entry, locate(name, folder))
    train, test = splits if size is None else (resized(split, size) for split in splits)
    own = (entry.mean, entry.std)
    mean, std = PROTOCOL_NORMALISATION.get(name, own) if normalisation == "protocol" else own
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=entry.num_classes,
        class_names=entry.class_names,
        mean=mean,
        std=std,
        licence=entry.licence,
        source=entry.source,
    )
