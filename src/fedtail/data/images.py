"""Large sets of images: lists that name the files, which stay on disk and are decoded when they are used.

ImageNet-LT: Z. Liu, Z. Miao, X. Zhan, J. Wang, B. Gong, S. X. Yu, Large-Scale Long-Tailed Recognition in an Open World,
CVPR 2019, arXiv:1904.05160. Lines `PATH LABEL`, paths relative to the folder that holds ImageNet's `train` and `val`.

iNaturalist by users: T.-M. H. Hsu, H. Qi, M. Brown, Federated Visual Classification with Real-World Data Distribution,
ECCV 2020, arXiv:2003.08082. CSV with user_id, image_id and class, beside the images of iNaturalist 2017.

Tiny-ImageNet: Stanford's course CS231n. Images of 64 x 64 pixels in a folder for each of 200 classes; its validation split, of
which a list says the classes, is the test split here, for the labels of its own were never published.

Difference from the papers' pipelines: the largest square in the middle of an image, scaled to S x S, is used for training
as for testing; they cut at random places and scales, for which there is only `data.augmentation` here.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedtail.data.dataset import Split
from fedtail.data.formats import _UNDECODABLE, _corrupt, _eight_bit, _missing
from fedtail.errors import ConfigError, DataError, did_you_mean

SIZE = 224
"""Height and width of the images of the two large sets unless another one is asked for."""

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's channels: those of a large set's own pixels would take a pass over all files."""

IMAGENET_LT_LISTS = ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt")
"""The official lists: training and test; the third one, ImageNet_LT_val.txt, is not read."""

INATURALIST_LISTS = ("federated_train_user_120k.csv", "test.csv")
"""The official lists of iNaturalist-User-120k: training with users, and test."""

TINY_IMAGENET_SIZE = 64
"""Height and width of Tiny-ImageNet's images."""

TINY_IMAGENET_LISTS = ("wnids.txt", "val/val_annotations.txt")
"""Tiny-ImageNet's lists: the names of its classes, in the order of which they are numbered, and the validation split."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files, in the place of the array uint8 [N, 3, S, S] that they are when decoded."""

    folder: Path
    """What the names are relative to."""
    names: npt.NDArray[np.str_]
    """Path of each image, [N]."""
    size: int = SIZE
    """Height and width S after decoding, >= 1."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the decoded images."""
        return len(self.names), 3, self.size, self.size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> "ImageFiles":
        """Returns the images of these rows, not decoded."""
        return replace(self, names=self.names[rows])

    def decode(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one image: RGB, the largest square in its middle, scaled to S x S (bicubic); uint8 [3, S, S].

        Raises:
            DataError: the file cannot be read as an image, or has more than 8 bits a channel.
        """
        path = self.folder / name
        try:
            with Image.open(path) as image:
                _eight_bit(image.mode, path)
                image.draft("RGB", (self.size, self.size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is enough
                rgb = image.convert("RGB")
        except _UNDECODABLE as error:
            raise _corrupt(path, error) from error
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        middle = rgb.crop((left, top, left + side, top + side))
        square = middle.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def resized(split: Split, size: int) -> Split:
    """Returns a split whose image files are decoded at another height and width.

    Raises:
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"size must be >= 1 pixel, got {size}.")
    return replace(split, x=replace(split.x, size=size)) if isinstance(split.x, ImageFiles) else split


def imagenet_lt_files(folder: Path, mend: str = "") -> dict[str, Path]:
    """Finds the two lists of ImageNet-LT in the folder of ImageNet's `train` and `val`.

    Raises:
        DataError: a list is missing; names what the folder holds.
    """
    return _lists(folder, IMAGENET_LT_LISTS, mend)


def read_imagenet_lt(folder: Path, mend: str = "") -> tuple[Split, Split]:
    """Reads the training and the test list of ImageNet-LT; no image is opened.

    Raises:
        DataError: a list or an image is missing, or a line is not `PATH LABEL`.
    """
    lists = imagenet_lt_files(folder, mend)
    splits: list[Split] = []
    for name in IMAGENET_LT_LISTS:
        names: list[str] = []
        labels: list[int] = []
        for number, line in enumerate(_lines(lists[name], mend), 1):
            path, _, label = line.strip().rpartition(" ")
            if line.strip():
                names.append(path or label)
                labels.append(_label(label if path else "", lists[name], number, f"PATH LABEL, got {line.strip()!r}"))
        splits.append(_split(folder, lists[name], names, labels))
    return splits[0], splits[1]


def inaturalist_files(folder: Path, mend: str = "") -> dict[str, Path]:
    """Finds the two lists of iNaturalist-User-120k.

    Raises:
        DataError: a list is missing; names what the folder holds.
    """
    return _lists(folder, INATURALIST_LISTS, mend)


def read_inaturalist(folder: Path, mend: str = "") -> tuple[Split, Split]:
    """Reads the lists of iNaturalist-User-120k and finds the images, `IMAGE_ID.jpg` anywhere below the folder.

    Raises:
        DataError: a list, a column or an image is missing, or a class is no number.
    """
    lists = inaturalist_files(folder, mend)
    columns = (("user_id", "image_id", "class"), ("image_id", "class"))
    tables = [_table(lists[name], needed, mend) for name, needed in zip(INATURALIST_LISTS, columns, strict=True)]
    wanted = {Path(image).stem for table in tables for image in table["image_id"]}
    found: dict[str, str] = {}
    for place, file in _files(folder):
        stem, _, ending = file.rpartition(".")
        if stem in wanted and ending.lower() in ("jpg", "jpeg", "png"):
            found[stem] = os.path.relpath(os.path.join(place, file), folder)
    splits: list[Split] = []
    for name, table in zip(INATURALIST_LISTS, tables, strict=True):
        names = [found.get(Path(image).stem, f"{image}.jpg") for image in table["image_id"]]
        labels = [_label(c, lists[name], i, f"a class number, got {c!r}") for i, c in enumerate(table["class"], 2)]
        splits.append(_split(folder, lists[name], names, labels, table.get("user_id")))
    return splits[0], splits[1]


def tiny_imagenet_files(folder: Path, mend: str = "") -> dict[str, Path]:
    """Finds the lists of Tiny-ImageNet in its folder, tiny-imagenet-200, or in the one above.

    Raises:
        DataError: a list is missing; names what the folder holds.
    """
    inner = folder / "tiny-imagenet-200"
    return _lists(inner if inner.is_dir() else folder, TINY_IMAGENET_LISTS, mend)


def read_tiny_imagenet(folder: Path, mend: str = "") -> tuple[Split, Split]:
    """Reads the lists of Tiny-ImageNet and the names of its training images, train/CLASS/images/*.JPEG; opens no image.

    Raises:
        DataError: a list or an image is missing, or a line of the validation split is not `NAME CLASS ...`.
    """
    lists = tiny_imagenet_files(folder, mend)
    classes, validation = (lists[name] for name in TINY_IMAGENET_LISTS)
    numbers = {name: label for label, name in enumerate(filter(None, map(str.strip, _lines(classes, mend))))}
    train: dict[str, int] = {}
    for name, label in numbers.items():
        place = Path("train", name, "images")
        files = sorted(path.name for path in (classes.parent / place).glob("*.JPEG"))
        if not files:
            raise _missing(classes.parent / place, "images NAME.JPEG", mend)
        train.update({f"{place.as_posix()}/{file}": label for file in files})
    test: dict[str, int] = {}
    for number, line in enumerate(_lines(validation, mend), 1):
        image, name, *_ = [*line.split(), "", ""]
        if image and name not in numbers:
            raise DataError(
                f"{validation}, line {number}: expected NAME CLASS ..., got {line.strip()!r}. {mend}".rstrip()
            )
        if image:
            test[f"val/images/{image}"] = numbers[name]
    splits = (
        _split(classes.parent, path, [*rows], [*rows.values()]) for path, rows in ((classes, train), (validation, test))
    )
    first, second = (resized(split, TINY_IMAGENET_SIZE) for split in splits)
    return first, second


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields (folder, name) of every file below a folder, symbolic links included; each folder is entered once."""
    seen = {os.path.realpath(folder)}
    for place, below, files in os.walk(folder, followlinks=True):
        yield from ((place, file) for file in files)
        entered = {os.path.realpath(os.path.join(place, name)): name for name in below}
        below[:] = [name for real, name in entered.items() if real not in seen]
        seen.update(entered)


def _lists(folder: Path, names: tuple[str, ...], mend: str) -> dict[str, Path]:
    for name in names:
        if not (folder / name).is_file():
            raise _missing(folder, name, mend)
    return {name: folder / name for name in names}


def _lines(path: Path, mend: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). {mend}".rstrip()) from error


def _table(path: Path, columns: tuple[str, ...], mend: str) -> dict[str, list[str]]:
    """The named columns of a CSV file."""
    rows = csv.reader(_lines(path, mend))
    head = next(rows, [])
    for column in columns:
        if column not in head:
            raise DataError(
                f"{path}: no column {column!r}{did_you_mean(column, head)} Found: {', '.join(head) or 'none'}; "
                f"expected {', '.join(columns)}. {mend}".rstrip()
            )
    values = list(_whole_rows(path, rows, len(head)))
    return {column: [row[head.index(column)] for row in values] for column in columns}


def _whole_rows(path: Path, rows: Any, width: int) -> Iterator[list[str]]:
    for number, row in enumerate(rows, 2):
        if row and len(row) != width:
            raise DataError(f"{path}, line {number}: got {len(row)} values, expected {width}.")
        if row:
            yield row


def _label(text: str, path: Path, number: int, expected: str) -> int:
    if not text.isdecimal():
        raise DataError(f"{path}, line {number}: expected {expected}.")
    return int(text)


def _split(folder: Path, source: Path, names: list[str], labels: list[int], users: list[str] | None = None) -> Split:
    """Makes a split and sees that every image is there, by listing folders: faster than asking for each file."""
    if not names:
        raise DataError(f"{source}: the list is empty.")
    listed: dict[str, set[str]] = {}
    missing: list[str] = []
    for name in names:
        place, file = os.path.split(name)
        if place not in listed:
            below = folder / place
            listed[place] = set(os.listdir(below)) if below.is_dir() else set()
        if file not in listed[place]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{source}: {len(missing)} of {len(names)} images are missing, the first is {folder / missing[0]}. "
            "Put the images where the list says, or point data.folder to them."
        )
    user: npt.NDArray[Any] | None = None
    if users is not None:
        user = np.array(users, np.int64 if all(u.isdecimal() and len(u) < 19 for u in users) else np.str_)
    return Split(ImageFiles(folder, np.array(names, np.str_)), np.array(labels, np.int64), user)
