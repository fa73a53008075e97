"""Readers of the files that data sets come in: IDX, CIFAR binary, .npz and folders of images. Nothing here unpickles.

Every reader returns `Split`s with images as uint8 [N, C, H, W] and labels as int64 [N], and answers a damaged file with
a `DataError` that names the file, what was expected and what was got.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedtail.data.dataset import Split, channels_first, stratified_split
from fedtail.errors import ConfigError, DataError, did_you_mean

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The four files of MNIST and of the sets that follow it, without `.gz`."""

CIFAR_FILES = {
    10: (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    100: ("train.bin", "test.bin"),
}
"""Files of the CIFAR binary versions, by number of classes; the last one is the test split."""

CIFAR_FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
"""Folder inside the official archive, by number of classes."""

CIFAR_ARCHIVES = {10: "cifar-10-binary.tar.gz", 100: "cifar-100-binary.tar.gz"}
"""Name of the official archive, by number of classes."""

NPZ_COLUMNS = ("x_train", "y_train", "user_train", "x_test", "y_test", "user_test", "x", "y", "user")
"""Names of arrays that `read_npz` looks for."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what pillow raises
_READ_AGAIN = "Obtain the file anew."
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, mend: str = _READ_AGAIN) -> npt.NDArray[np.uint8]:
    """Reads one IDX file of unsigned bytes, plain or gzip (told apart by content, not by name).

    Args:
        path: the file.
        mend: what the reader should do about a damaged file; the end of the error message.

    Returns:
        uint8 array with the sizes that the header states: [N, H, W] for images, [N] for labels.

    Raises:
        DataError: the file cannot be read, is no IDX file of bytes, or is not as long as its header says.
    """
    raw = _read_bytes(path, mend)
    note = ""
    if raw.startswith(_GZIP_MAGIC):
        raw, whole = _gunzip(path, raw, mend)
        note = "" if whole else " of an incomplete gzip stream"
    rank = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    if not 1 <= rank <= 4 or len(raw) < 4 + 4 * rank:
        raise DataError(
            f"{path}: got the bytes {raw[:4].hex(' ')}{note} at its start, expected an IDX header of unsigned bytes "
            f"(00 00 08 and the number of dimensions). {mend}"
        )
    start = 4 + 4 * rank
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", rank, 4))
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected or note:
        raise DataError(
            f"{path}: got {len(raw)} bytes{note}, expected {expected} by its header ({list(shape)}). {mend}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()  # a copy can be written to


def idx_files(folder: Path, mend: str = _READ_AGAIN) -> dict[str, Path]:
    """Finds the four IDX files of a set in a folder, plain or gzip.

    Names with a dot before `idx` are accepted as well (`train-images.idx3-ubyte`).

    Returns:
        The file to read for each official name; the name ends in `.gz` where the file's does.

    Raises:
        DataError: a file is missing; names what the folder holds.
    """
    found: dict[str, Path] = {}
    for name in IDX_NAMES:
        candidates = [stem + end for end in ("", ".gz") for stem in (name, name.replace("-idx", ".idx"))]
        path = next((folder / candidate for candidate in candidates if (folder / candidate).is_file()), None)
        if path is None:
            raise _missing(folder, f"{name} or {name}.gz", mend)
        found[name + (".gz" if path.suffix == ".gz" else "")] = path
    return found


def read_idx_folder(folder: Path, mend: str = _READ_AGAIN) -> tuple[Split, Split]:
    """Reads the training and the test split of MNIST or a set in its format.

    Raises:
        DataError: as `read_idx` and `idx_files`, or images and labels do not fit together.
    """
    paths = list(idx_files(folder, mend).values())
    arrays = [read_idx(path, mend) for path in paths]
    for path, array, rank in zip(paths, arrays, (3, 1, 3, 1), strict=True):
        if array.ndim != rank:
            raise DataError(f"{path}: got {array.ndim} dimensions, expected {rank}. {mend}")
    return (
        _split(f"{paths[0]} and {paths[1].name}", arrays[0][:, None], arrays[1].astype(np.int64)),
        _split(f"{paths[2]} and {paths[3].name}", arrays[2][:, None], arrays[3].astype(np.int64)),
    )


def cifar_files(path: Path, classes: Literal[10, 100], mend: str = _READ_AGAIN) -> dict[str, Path]:
    """Finds the files of a CIFAR binary version.

    Args:
        path: the official archive, or a folder that holds it, the .bin files, or the archive's own folder of them.
        classes: 10 or 100.
        mend: the end of the error message.

    Returns:
        The file to read for each official name: the .bin files, or the archive alone.

    Raises:
        DataError: the files are not there; names what the folder holds.
    """
    if path.is_file():
        return {CIFAR_ARCHIVES[classes]: path}
    for folder in (path, path / CIFAR_FOLDERS[classes]):
        found = {name: folder / name for name in CIFAR_FILES[classes] if (folder / name).is_file()}
        if len(found) == len(CIFAR_FILES[classes]):
            return found
    archive = path / CIFAR_ARCHIVES[classes]
    if archive.is_file():
        return {archive.name: archive}
    names = ", ".join(CIFAR_FILES[classes])
    raise _missing(path, f"the binary version, {names} or {archive.name} (the Python version is not read)", mend)


def read_cifar(path: Path, classes: Literal[10, 100], mend: str = _READ_AGAIN) -> tuple[Split, Split]:
    """Reads CIFAR-10 or CIFAR-100 in its binary version.

    A record is the label (CIFAR-100: the coarse, then the fine label; the fine one is used) and 3,072 bytes: the red
    plane, then green, then blue, each 32 rows of 32.

    Args:
        path: as in `cifar_files`.
        classes: 10 or 100.
        mend: the end of the error message.

    Raises:
        DataError: files are missing, damaged, or not a whole number of records long.
    """
    files = cifar_files(path, classes, mend)
    names = CIFAR_FILES[classes]
    if set(files) == set(names):
        raw = {name: _read_bytes(files[name], mend) for name in names}
    else:
        path = files[CIFAR_ARCHIVES[classes]]
        raw = _read_archive(path, names, mend)
    label_bytes = 1 if classes == 10 else 2
    width = label_bytes + 3072
    for name in names:
        if not raw[name] or len(raw[name]) % width:
            official = width * (50_000 if name == "train.bin" else 10_000)
            raise DataError(
                f"{files.get(name, path)}: {name}: got {len(raw[name])} bytes, expected records of {width} bytes "
                f"(the official file has {official}). {mend}"
            )

    def split(part: Iterable[str]) -> Split:
        tables = [np.frombuffer(raw[name], np.uint8).reshape(-1, width) for name in part]
        x = np.concatenate([table[:, label_bytes:] for table in tables]).reshape(-1, 3, 32, 32)
        return _split(str(path), x, np.concatenate([table[:, label_bytes - 1] for table in tables]).astype(np.int64))

    return split(names[:-1]), split(names[-1:])


def _read_archive(path: Path, names: Iterable[str], mend: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if name in names else None
                if file is not None:
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{path} ({_size(path)} bytes): the archive is truncated or damaged ({error}). {mend}"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path}: no {missing[0]} in the archive. Expected {', '.join(names)}. {mend}")
    return found


def read_npz(
    path: Path, columns: Mapping[str, str] | None = None, test_share: float = 0.2, seed: int = 0
) -> tuple[Split, Split]:
    """Reads a data set from the arrays of one .npz file.

    The arrays are `x_train`, `y_train`, `x_test`, `y_test` and, for a natural partition, `user_train` and `user_test`.
    Where the file holds `x` and `y` (and `user`) instead, a stratified share of the rows becomes the test split.

    x with 3 or 4 dimensions is images and must be uint8 (0..255): [N, H, W], [N, H, W, C] where the last dimension is
    1 or 3, else [N, C, H, W]. x with 2 dimensions is tabular and becomes float32. y is whole numbers from 0, [N] or
    [N, 1].

    Args:
        path: the file.
        columns: name in the file of an array that is called otherwise, for example {"x_train": "train_images"}.
        test_share: share of the rows of `x` that is held out, in (0, 1); unused where the file has a test split.
        seed: seed of that choice: the split is a function of the labels, `test_share` and `seed` (`stratified_split`).

    Raises:
        ConfigError: `columns` names an unknown role, or `test_share` is out of range.
        DataError: the file cannot be read, an array is missing (lists those found), or is of the wrong type or length.
    """
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(NPZ_COLUMNS))
    if unknown:
        raise ConfigError(f"columns: {unknown[0]!r} is none of {', '.join(NPZ_COLUMNS)}.")
    names = {role: columns.get(role, role) for role in NPZ_COLUMNS}
    arrays, found = _npz_arrays(path, names)
    single = "x_train" not in arrays and "x" in arrays
    roles = ("x", "y") if single else ("x_train", "y_train", "x_test", "y_test")
    _check_columns(path, [names[role] for role in (*roles, *columns)], found)
    if single:
        whole = _npz_split(path, arrays, names, "")
        rows = stratified_split(whole.y, round(test_share * len(whole)), np.random.default_rng(seed))
        train, test = (Split(whole.x[r], whole.y[r], None if whole.user is None else whole.user[r]) for r in rows)
        return train, test
    return _npz_split(path, arrays, names, "_train"), _npz_split(path, arrays, names, "_test")


def _npz_arrays(path: Path, names: Mapping[str, str]) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """The arrays of a file by role, and all names in it."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:  # np.load alone would take .npy files as well
            found = [name.removesuffix(".npy") for name in archive.namelist()]
        with np.load(path, allow_pickle=False) as archive:
            return {role: archive[name] for role, name in names.items() if name in found}, found
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} ({_size(path)} bytes): no readable .npz file of plain arrays ({error}). Write it with np.savez; "
            "arrays of Python objects (pickles) are never opened."
        ) from error


def _npz_split(path: Path, arrays: Mapping[str, npt.NDArray[Any]], names: Mapping[str, str], part: str) -> Split:
    x, y, user = arrays["x" + part], arrays["y" + part], arrays.get("user" + part)
    name_x, name_y = names["x" + part], names["y" + part]
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(f"{path}: {name_y}: got {y.dtype} {list(y.shape)}, expected class numbers 0, 1, 2, ... [N].")
    if x.ndim == 2 and x.dtype.kind in "biuf":
        with np.errstate(over="ignore"):  # Split reports what does not fit into float32 as not finite
            x = x.astype(np.float32)
    elif x.ndim in (3, 4) and x.dtype == np.uint8:
        x = channels_first(x, f"{path}: {name_x}")
    else:
        raise DataError(
            f"{path}: {name_x}: got {x.dtype} {list(x.shape)}, expected uint8 images [N, H, W], [N, H, W, C] or "
            "[N, C, H, W], or numbers [N, F]. Images on the scale 0..1: (x * 255).round().astype(np.uint8)."
        )
    if user is not None and user.dtype.kind in "iu":
        user = user.astype(np.int64)
    return _split(f"{path}: {name_x}, {name_y}", x, y.astype(np.int64), user)


def _check_columns(path: Path, required: Iterable[str], found: list[str]) -> None:
    for name in required:
        if name not in found:
            raise DataError(
                f"{path}: no array {name!r}{did_you_mean(name, found)} Found: {', '.join(found) or 'none'}. Needed are "
                "x_train, y_train, x_test and y_test, or x and y; rename them in the file."
            )


def read_image_folder(folder: Path, size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads `train/<class>/*.png|jpg|jpeg` and `test/<class>/...`.

    Classes are numbered in the order of their names in `train`; files are read in the order of theirs. If every image
    is grey (one channel, no palette) so are the examples, otherwise all become RGB.

    Args:
        folder: holds `train` and `test`.
        size: height and width to resize every image to (bicubic, aspect ratio not kept); None: they must be equal.

    Returns:
        The training split, the test split and the names of the classes.

    Raises:
        ConfigError: `size` is below 1.
        DataError: a folder is missing or empty, images differ in size, or one cannot be decoded or has more than 8 bits.
    """
    if size is not None and size < 1:
        raise ConfigError(f"size must be >= 1 pixel, got {size}.")
    files: dict[str, list[tuple[Path, str]]] = {}
    for part in ("train", "test"):
        paths = sorted(p for p in (folder / part).glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files[part] = [(path, path.parent.name) for path in paths]
        if not paths:
            raise _missing(folder, f"images as {part}/<class>/NAME.png (or .jpg)", "Arrange them so.")
    names = tuple(sorted({name for _, name in files["train"]}))
    for path, name in files["test"]:
        if name not in names:
            raise DataError(f"{path}: class {name!r} has no images in train (its classes: {', '.join(names)}).")
    mode, shape = _image_kind([path for part in files.values() for path, _ in part], size)

    def split(part: str) -> Split:
        x = np.stack([_decode(path, mode, shape) for path, _ in files[part]])
        return Split(channels_first(x), np.array([names.index(name) for _, name in files[part]], np.int64))

    return split("train"), split("test"), names


def _image_kind(paths: list[Path], size: int | None) -> tuple[str, tuple[int, int]]:
    """The common mode, L or RGB, and the common (width, height); only the headers are read."""
    modes: set[str] = set()
    shapes: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                modes.add(_eight_bit(image.mode, path))
                shapes.setdefault(image.size, path)
        except _UNDECODABLE as error:
            raise _corrupt(path, error) from error
    if size is None and len(shapes) > 1:
        listing = ", ".join(f"{width} x {height} ({path})" for (width, height), path in list(shapes.items())[:3])
        raise DataError(f"images differ in width x height: {listing}. Give a size to resize all of them to.")
    return "L" if modes <= {"1", "L"} else "RGB", next(iter(shapes)) if size is None else (size, size)


def _eight_bit(mode: str, where: str | Path) -> str:
    """Pillow's mode of an image; modes of more than 8 bits are refused: converted, they would be cut off at 255."""
    if mode == "F" or mode.startswith("I"):
        raise DataError(f"{where}: got an image of mode {mode}, expected 8 bits a channel. Convert it to 8 bits, its own "
                        "range scaled to 0..255.")  # fmt: skip
    return mode


def _decode(path: Path, mode: str, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            converted = image.convert(mode)
    except _UNDECODABLE as error:
        raise _corrupt(path, error) from error
    return np.asarray(converted if converted.size == shape else converted.resize(shape, Image.Resampling.BICUBIC))


def _corrupt(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} ({_size(path)} bytes): the image cannot be decoded ({error}). Replace or remove it.")


def _gunzip(path: Path, packed: bytes, mend: str) -> tuple[bytes, bool]:
    """What a gzip file holds, as far as it goes, and whether it is complete."""
    data = bytearray()
    while packed:
        stream = zlib.decompressobj(31)  # 31: gzip header and checksum
        try:
            data += stream.decompress(packed)
        except zlib.error as error:
            raise DataError(f"{path} ({_size(path)} bytes): the gzip stream is damaged ({error}). {mend}") from error
        if not stream.eof:
            return bytes(data), False
        packed = stream.unused_data
    return bytes(data), True


def _read_bytes(path: Path, mend: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {mend}") from error


def _split(where: str, x: npt.NDArray[Any], y: npt.NDArray[Any], user: npt.NDArray[Any] | None = None) -> Split:
    try:
        return Split(x, y, user)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _missing(folder: Path, wanted: str, mend: str) -> DataError:
    if not folder.exists():
        return DataError(f"{folder}: there is no such folder; expected {wanted}. {mend}")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    listing = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
    return DataError(f"{folder}: expected {wanted}; found {listing or 'nothing'}. {mend}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
