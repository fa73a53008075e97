"""Reader of SVHN, whose official files are MATLAB's: `X` [32, 32, 3, N] of bytes and `y` [N, 1] with 10 for the digit 0.

Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng, Reading Digits in Natural Images with Unsupervised Feature
Learning, NIPS Workshop on Deep Learning and Unsupervised Feature Learning, 2011. SciPy reads the format.
"""

import importlib
from pathlib import Path

import numpy as np

from fedtail.data.dataset import Split
from fedtail.data.formats import _missing, _size
from fedtail.errors import DataError

SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
"""The official files of cropped digits: training and test; the third one, extra_32x32.mat, is not read."""


def svhn_files(folder: Path, mend: str = "") -> dict[str, Path]:
    """Finds the two files of cropped digits in a folder.

    Raises:
        DataError: a file is missing; names what the folder holds.
    """
    for name in SVHN_FILES:
        if not (folder / name).is_file():
            raise _missing(folder, name, mend)
    return {name: folder / name for name in SVHN_FILES}


def read_svhn(folder: Path, mend: str = "") -> tuple[Split, Split]:
    """Reads the training and the test split; the class of an image is its digit.

    Raises:
        DataError: SciPy is not installed, or a file is missing, damaged or not of this form.
    """
    train, test = (_read(path, mend) for path in svhn_files(folder, mend).values())
    return train, test


def _read(path: Path, mend: str) -> Split:
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError as error:
        raise DataError(
            f'{path}: MATLAB files need the package scipy ({error}). Run pip install "fedtail[data]".'
        ) from error
    try:
        found = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # SciPy raises whatever the bytes lead it to
        raise DataError(f"{path} ({_size(path)} bytes): no readable MATLAB file ({error}). {mend}".rstrip()) from error
    x, y = (np.asarray(found.get(name, ())) for name in ("X", "y"))
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or y.shape != (x.shape[3], 1):
        raise DataError(f"{path}: got X {x.dtype} {list(x.shape)} and y {list(y.shape)}, expected uint8 [32, 32, 3, N] and "
                        f"[N, 1]. {mend}".rstrip())  # fmt: skip
    wrong = ~np.isin(y, np.arange(1, 11))
    if wrong.any():
        raise DataError(f"{path}: got the label {y[wrong][0]}, expected 1 to 10 (10 is the digit 0). {mend}".rstrip())
    return Split(np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y[:, 0].astype(np.int64) % 10)
