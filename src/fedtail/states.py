"""What clients keep between their rounds: in memory up to a limit, beyond it on the disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtail import trees
from fedtail.trees import Tree


class ClientStates(MutableMapping[int, Tree]):
    """Client index -> kept state, on the CPU; all states have one form.

    What was written longest ago goes to the disk first ($TMPDIR, removed with this object). Reading changes nothing, so that
    threads may read side by side.

    Args:
        limit: bytes to hold in memory; the state that was written last stays there in any case.
    """

    def __init__(self, limit: int = 1 << 32):
        self._limit, self._size = limit, 0
        self._kept: dict[int, dict[str, Tensor]] = {}  # leaves by name, in the order of writing
        self._spilled: set[int] = set()
        self._folder: Path | None = None
        self.form: Tree = ()
        """A state without values: what all states look like."""

    @classmethod
    def of(cls, states: Mapping[int, Tree]) -> "ClientStates":
        """Returns the same as a dict, or what already is one."""
        if isinstance(states, ClientStates):
            return states
        found = cls(1 << 62)
        found.update(states)
        return found

    def __setitem__(self, client: int, state: Tree) -> None:
        leaves = {name: value.detach().cpu() for name, value in trees.named_leaves(state).items()}
        self.form = trees.tree_map(lambda t: t.new_empty(0), state)
        if client in self._kept:
            self._size -= trees.num_bytes(self._kept.pop(client))
        self._spilled.discard(client)
        self._kept[client] = leaves
        self._size += trees.num_bytes(leaves)
        while self._size > self._limit and len(self._kept) > 1:
            self._spill(next(iter(self._kept)))

    def _spill(self, client: int) -> None:
        leaves = self._kept[client]
        save_file({name: value.clone().contiguous() for name, value in leaves.items()}, self._file(client))
        self._spilled.add(client)
        self._size -= trees.num_bytes(self._kept.pop(client))

    def _file(self, client: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedtail-states-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{client}.safetensors"

    def leaf(self, client: int, name: str) -> Tensor:
        """Returns one leaf of a state, by its name in `trees.named_leaves`."""
        if client in self._kept:
            return self._kept[client][name]
        if client not in self._spilled:
            raise KeyError(client)
        with safe_open(self._file(client), framework="pt") as file:
            # a copy: in the file's own buffer tensors are not aligned, and torch then gives other last bits
            return file.get_tensor(name).clone()

    def __getitem__(self, client: int) -> Tree:
        if client not in self:
            raise KeyError(client)
        names = iter(trees.named_leaves(self.form))
        return trees.tree_map(lambda _: self.leaf(client, next(names)), self.form)

    def __delitem__(self, client: int) -> None:
        raise TypeError("a client's state is replaced, never forgotten")

    def __contains__(self, client: object) -> bool:
        return client in self._kept or client in self._spilled

    def __iter__(self) -> Iterator[int]:
        yield from self._kept
        yield from self._spilled

    def __len__(self) -> int:
        return len(self._kept) + len(self._spilled)

    @property
    def in_memory(self) -> int:
        """Bytes that are held in memory."""
        return self._size
