"""What a teacher says of each image, computed once and kept on disk.

A folder for each teacher and preprocessing (both by their hash), in it files of images (by their hashes) with the outputs.
A call adds a file for the images that no file has, so overlapping sets share what was computed, and two processes at
once spoil nothing.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedtail.data.lazy import Column
from fedtail.files import cache_folder, write_atomic

log = logging.getLogger("fedtail")
VERSION = 1  # of the form of the files
CHUNK = 512  # images that are handled at once

Outputs = dict[str, Tensor]  # each [n, ...]: "logits", "features"


def folder(identity: str, preprocessing: dict[str, Any], kind: tuple[Any, ...]) -> Path:
    """Returns where the outputs of a teacher lie.

    Args:
        identity: what tells the teacher from all others: hash of its weights, name of its architecture.
        preprocessing: what is done to an image before the teacher sees it, as plain values.
        kind: dtype and shape of an image.
    """
    text = json.dumps([VERSION, identity, preprocessing, [str(part) for part in kind]], sort_keys=True)
    return cache_folder() / "teachers" / hashlib.sha256(text.encode()).hexdigest()[:24]


def digests(x: Column, rows: Tensor) -> list[bytes]:
    """Returns the SHA-256 of each image's bytes."""
    found: list[bytes] = []
    for part in rows.split(CHUNK):
        for image in x.index_select(0, part).numpy(force=True):
            found.append(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest())
    return found


def outputs(place: Path, x: Column, rows: Tensor, compute: Callable[[Tensor], Outputs]) -> Outputs:
    """Returns the outputs for rows of a column, in their order; asks the teacher for those alone that are not kept.

    Args:
        place: see `folder`.
        x: raw images [N, ...].
        rows: (n,) int64.
        compute: raw images [m, ...] to outputs, each [m, ...].
    """
    wanted = digests(x, rows)
    known = _read(place, set(wanted))
    todo = {digest: i for i, digest in enumerate(wanted) if digest not in known}
    if todo:
        log.info("the teacher is asked about %d images; what it says is kept in %s", len(todo), place)
        index = rows[torch.tensor(list(todo.values()), device=rows.device)]
        new = list(todo)
        for first, part in zip(range(0, len(new), CHUNK), index.split(CHUNK), strict=True):
            fresh = {name: value.float().cpu() for name, value in compute(x.index_select(0, part)).items()}
            some = new[first : first + CHUNK]
            _write(place, some, fresh)  # as it goes: who is stopped keeps what was computed
            known.update({digest: {k: v[i] for k, v in fresh.items()} for i, digest in enumerate(some)})
    if not wanted:
        return {}
    return {name: torch.stack([known[digest][name] for digest in wanted]) for name in known[wanted[0]]}


def _read(place: Path, wanted: set[bytes]) -> dict[bytes, Outputs]:
    found: dict[bytes, Outputs] = {}
    for file in sorted(place.glob("*.safetensors")) if place.is_dir() else ():
        try:
            with safe_open(file, framework="pt") as names:
                here = [row.tobytes() for row in names.get_tensor("digests").numpy()]
            if wanted.isdisjoint(here):
                continue
            kept = load_file(file)
        except (OSError, SafetensorError):  # damaged: it is made again
            continue
        values = {name: value for name, value in kept.items() if name != "digests"}
        found.update({d: {k: v[i] for k, v in values.items()} for i, d in enumerate(here) if d in wanted})
    return found


def _write(place: Path, known: list[bytes], values: Outputs) -> None:
    place.mkdir(parents=True, exist_ok=True)
    array = torch.from_numpy(np.frombuffer(b"".join(known), np.uint8).reshape(len(known), 32).copy())
    name = hashlib.sha256(b"".join(known)).hexdigest()[:24]
    write_atomic(
        place / f"{name}.safetensors", save({"digests": array, **{k: v.contiguous() for k, v in values.items()}})
    )
