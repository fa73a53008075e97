"""Checkpoints: the state between two rounds as one safetensors file, written and read client by client.

The file holds `server/...`, `clients/...` (each kept leaf stacked over clients) and `client_ids`; its metadata the structure of
both trees, the experiment's fingerprint and a SHA-256 of everything. No class is imported and nothing is unpickled.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtail import trees
from fedtail.errors import CheckpointError
from fedtail.files import write_atomic
from fedtail.states import ClientStates
from fedtail.trees import Tree
from fedtail.userfile import user_module

FORMAT = 1
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CLIENTS = "clients"


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    server: Tree
    clients: Mapping[int, Tree]
    meta: dict[str, Any]  # rounds done, stage, bytes of metrics, the experiment's fingerprint, best score


class Entry(NamedTuple):
    """One tensor of the file, which need not be in memory as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]  # its rows, in order

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())

    def bytes(self) -> Iterator[memoryview]:
        """Yields its bytes."""
        for part in self.parts():
            flat = part.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def describe(tree: Tree) -> Any:
    """Returns a tree's structure as plain values: tensors as "*", NamedTuples with the name of their class."""
    if isinstance(tree, Tensor):
        return "*"
    if isinstance(tree, dict):
        return {"dict": {k: describe(v) for k, v in cast("dict[str, Tree]", tree).items()}}
    kind = f"{_module_name(type(tree))}:{type(tree).__qualname__}" if hasattr(tree, "_fields") else "tuple"
    return {kind: {name: describe(v) for name, v in trees.items(tree)}}


def _module_name(cls: type) -> str:
    """Returns a class's module; for the script that is run, the name under which a later process imports its file."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return user_module(Path(main)) if cls.__module__ == "__main__" and main else cls.__module__


def rebuild(structure: Any, leaves: Mapping[str, Tensor], prefix: str) -> Tree:
    """Returns the tree of a structure. Classes are looked up among modules already imported, never imported by name."""
    if structure == "*":
        return leaves[prefix]
    [(kind, parts)] = structure.items()
    children = {name: rebuild(part, leaves, f"{prefix}/{name}") for name, part in parts.items()}
    if kind == "dict":
        return children
    if kind == "tuple":
        return tuple(children.values())
    module, _, name = kind.partition(":")
    known = sys.modules.get(module, sys.modules["__main__"])  # the script that is run, or a module that is imported
    cls: Any = getattr(known, name, None)
    if not (isinstance(cls, type) and issubclass(cls, tuple) and _module_name(cls) == module):
        raise CheckpointError(f"the checkpoint holds a {kind}, which this experiment's algorithm does not define.")
    if set(children) != set(cls._fields):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"the checkpoint holds a {kind} with the fields {', '.join(children)}; now it has {', '.join(cls._fields)}. "  # type: ignore[attr-defined]
            "Restore the algorithm's file as it was when the run began, or start the run anew in another folder."
        )
    return cls(**children)


def save_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Writes a checkpoint atomically; equal snapshots give equal bytes."""
    states = ClientStates.of(snapshot.clients)
    entries = _entries(snapshot.server, states)
    meta = {"format": FORMAT, **snapshot.meta, "server": describe(snapshot.server), "clients": describe(states.form)}
    meta["sha256"] = _digest(meta, entries)
    # One entry of metadata only, and tensors in the order of safetensors' own writer: the widest first, then by name.
    ordered = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"fedtail": json.dumps(meta)}}
    end = 0
    for name in ordered:
        entry = entries[name]
        header[name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def content() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in ordered:
            yield from entries[name].bytes()

    write_atomic(path, content())


def _entries(server: Tree, states: ClientStates) -> dict[str, Entry]:
    ids = sorted(states)

    def whole(value: Tensor) -> Entry:
        return Entry(value.dtype, tuple(value.shape), lambda: iter([value]))

    def stacked(name: str, leaf: Tensor) -> Entry:
        return Entry(leaf.dtype, (len(ids), *leaf.shape), lambda: (states.leaf(i, name) for i in ids))

    found = {name: whole(leaf) for name, leaf in trees.named_leaves(server, "server").items()}
    if ids:
        first = trees.named_leaves(states[ids[0]])
        found |= {f"{CLIENTS}/{name}" if name else CLIENTS: stacked(name, leaf) for name, leaf in first.items()}
    return {**found, "client_ids": whole(torch.tensor(ids, dtype=torch.int64))}


def _digest(meta: dict[str, Any], entries: Mapping[str, Entry]) -> str:
    """Returns the SHA-256 of all that a checkpoint says: safetensors itself would not notice a changed byte."""
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}".encode())
        for part in entry.bytes():
            digest.update(part)
    return digest.hexdigest()


def read_meta(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, unchecked: rounds done, stage, best score.

    Raises:
        CheckpointError: not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["fedtail"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of fedtail's ({error}).") from error


def load_checkpoint(path: Path, fingerprint: str | None = None, device: str = "cpu", limit: int = 1 << 32) -> Snapshot:
    """Reads a checkpoint.

    Args:
        path: the file.
        fingerprint: of the experiment that it must belong to; None: any.
        device: where the server's tensors go; client states stay on the CPU.
        limit: bytes of client states to hold in memory, see `ClientStates`.

    Raises:
        CheckpointError: missing, damaged, or of another experiment.
    """
    if not path.is_file():
        best = 'Only runs with evaluation.keep = "best" have one, from their first evaluated round on.'
        remedy = best if path.stem == "best" else "Start the run with `fedtail run`."
        raise CheckpointError(f"there is no checkpoint {path}. {remedy}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _read(file, path, fingerprint, device, limit)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged or not fedtail's ({error}). Restore it from a copy, or start the run anew "
            "in another folder."
        ) from error


def _read(file: Any, path: Path, fingerprint: str | None, device: str, limit: int) -> Snapshot:
    meta = json.loads(file.metadata()["fedtail"])
    entries = {name: _stored(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if meta.pop("sha256", None) not in (None, _digest(meta, entries)):
        raise ValueError("its contents do not have the SHA-256 that was written with them")
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta['format']}, this fedtail reads {FORMAT}. Use a matching version."
        )
    if fingerprint is not None and meta["experiment"] != fingerprint:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another experiment than {path.parent / 'config.toml'}: the configuration "
            "was changed after the run began. Restore it, or start a new run with the changed one."
        )
    # Copies: in the file's own buffer tensors are not aligned, and torch then gives other last bits.
    server = {n: file.get_tensor(n).clone().to(device) for n in entries if n.partition("/")[0] == "server"}
    states = ClientStates(limit)
    stacked = {n: file.get_slice(n) for n in entries if n.partition("/")[0] == CLIENTS}
    for row, number in enumerate(cast("list[int]", file.get_tensor("client_ids").tolist())):
        leaves = {name: part[row : row + 1].squeeze(0).clone() for name, part in stacked.items()}
        states[number] = rebuild(meta["clients"], leaves, CLIENTS)
    return Snapshot(rebuild(meta["server"], server, "server"), states, meta)


def _stored(file: Any, name: str) -> Entry:
    """Returns a tensor of a file: clients' row by row, others as a whole."""
    view = file.get_slice(name)
    shape = tuple(view.get_shape())
    probe = file.get_tensor(name) if not shape or name.partition("/")[0] != CLIENTS else view[0:1]
    if probe.shape == shape:
        return Entry(probe.dtype, shape, lambda: iter([probe]))
    return Entry(probe.dtype, shape, lambda: (view[row : row + 1] for row in range(shape[0])))
