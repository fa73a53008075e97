"""A column of images that are decoded when they are used, in the place of a uint8 tensor that holds all of them."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtail.data.images import ImageFiles
from fedtail.errors import DataError

Array = np.ndarray[Any, Any]


class Decoder:
    """Decodes image files on threads of its own and remembers the last used ones; for any number of calling threads.

    Args:
        cache_bytes: most bytes of decoded images to remember, >= 0; the least recently used are forgotten first.
        threads: that decode; 0 = as many as there are cores.
    """

    def __init__(self, cache_bytes: int, threads: int = 0):
        self.cache_bytes = cache_bytes
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads or own, "fedtail-decode")  # its threads start with the first image
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str, int], Array] = OrderedDict()
        self._bytes = 0

    def images(self, files: ImageFiles, rows: Array) -> Tensor:
        """Returns the images of these rows, uint8 [n, 3, S, S]; a row that stands there twice is decoded once.

        Raises:
            DataError: a file cannot be read as an image.
        """
        keys = [(str(files.folder), name, files.size) for name in files.names[rows].tolist()]
        found: dict[tuple[str, str, int], Array] = {}
        with self._lock:
            for key in keys:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    found[key] = self._cache[key]
        rest = [key for key in dict.fromkeys(keys) if key not in found]
        for key, image in zip(rest, self._pool.map(lambda key: files.decode(key[1]), rest), strict=True):
            found[key] = image
            self._keep(key, image)
        out = np.empty((len(keys), *files.shape[1:]), np.uint8)
        for place, key in enumerate(keys):
            out[place] = found[key]
        return torch.from_numpy(out)

    def _keep(self, key: tuple[str, str, int], image: Array) -> None:
        with self._lock:
            if image.nbytes > self.cache_bytes or key in self._cache:
                return
            self._cache[key] = image
            self._bytes += image.nbytes
            while self._bytes > self.cache_bytes:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes


class LazyImages:
    """Images in files behind the part of a tensor's interface that a column needs: shape, dtype, len and index_select.

    Args:
        files: the images, in the column's order.
        decoder: what decodes them; columns may share it.
        device: where decoded images go.
    """

    dtype = torch.uint8

    def __init__(self, files: ImageFiles, decoder: Decoder, device: str = "cpu"):
        self.files, self.decoder, self.device = files, decoder, torch.device(device)
        self.shape = torch.Size(files.shape)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all images if they were decoded at once."""
        return self.shape.numel()

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the images of these rows, uint8 [n, 3, S, S], on the column's device.

        Args:
            dim: 0, the only dimension that rows are taken from.
            index: (n,) int64.
        """
        if dim != 0:
            raise ValueError(f"LazyImages.index_select: dim must be 0, got {dim}.")
        return self.decoder.images(self.files, index.numpy(force=True)).to(self.device)


class PartColumn:
    """A column that has values for some rows alone, behind the part of a tensor's interface that a column needs.

    Args:
        values: [n, ...], on the device of the data.
        rows: which rows they are, (n,) int64.
        total: number of rows of the whole column.
        name: the column's, for messages.
    """

    def __init__(self, values: Tensor, rows: Tensor, total: int, name: str):
        self.values, self.name = values, name
        self.shape, self.dtype, self.device = torch.Size((total, *values.shape[1:])), values.dtype, values.device
        self._place = torch.full((total,), -1, dtype=torch.int64, device=values.device)
        self._place[rows.to(values.device)] = torch.arange(len(rows), device=values.device)

    def __len__(self) -> int:
        """Number of rows, with values or without."""
        return len(self._place)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the values of these rows, [n, ...].

        Args:
            dim: 0.
            index: (n,) int64.

        Raises:
            DataError: a row has none.
        """
        place = self._place.index_select(dim, index)
        if len(place) and int(place.min()) < 0:
            raise DataError(f"data: the column {self.name!r} has no value for row {int(index[place.argmin()])}.")
        return self.values.index_select(dim, place)


Column = Tensor | LazyImages


def column(x: Array | ImageFiles, decoder: Decoder, device: str) -> Column:
    """Returns what a federation keeps of examples: a tensor of an array, a `LazyImages` of files."""
    return LazyImages(x, decoder, device) if isinstance(x, ImageFiles) else torch.from_numpy(x).to(device)


def memory(columns: Sequence[Column]) -> int:
    """Returns the most bytes that columns take in memory; those that are decoded from files share one cache."""
    lazy = [c for c in columns if isinstance(c, LazyImages)]
    held = sum(c.nbytes for c in columns if not isinstance(c, LazyImages))
    return held + min(sum(c.nbytes for c in lazy), max((c.decoder.cache_bytes for c in lazy), default=0))
