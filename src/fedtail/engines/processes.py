"""Clients side by side in processes: for steps so short that threads wait for Python's lock. Bit-identical to the loop engine.

The workers are forked: they share the data's memory and know the setting. Tensors travel through memory that was shared before
the fork: the message is laid down once a round for all, kept client states and results in blocks of each worker's own. A worker
has its next client at hand while its last result is added up, hence two blocks for each.
"""

import math
import mmap
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Client, Round
from fedtail.data.plan import Plan
from fedtail.engines.base import Engine, Result, Setting, Sink
from fedtail.engines.loop import run_client
from fedtail.engines.parallel import ParallelEngine
from fedtail.errors import ConfigError, FedtailError, TrainingError
from fedtail.trees import Tree

TREES = ("update", "state", "metrics", "judged")  # of a result: what holds tensors
WATCH = 1.0  # seconds after which an idle worker looks whether its parent still lives
AHEAD = 1 << 15  # bytes of a client's plan that may wait in a pipe: sending it never blocks, hence no deadlock
ALIGN = 64  # bytes, as torch aligns its own memory: other alignments may change bits


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Block:
    """Memory that a worker shares with its parent. Pages that are never written cost nothing."""

    def __init__(self, size: int):
        self._memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)

    def fits(self, tree: Tree) -> bool:
        """Says whether a tree has room."""
        return trees.num_bytes(tree) + ALIGN * len(trees.leaves(tree)) <= len(self._memory)

    def put(self, tree: Tree) -> Any:
        """Lays a tree down over what was there; returns it with places for tensors; what has no room stays an array."""
        offset = 0

        def lay(tensor: Tensor) -> Any:
            nonlocal offset
            place = Place(offset, tuple(tensor.shape), tensor.dtype)
            size = tensor.numel() * tensor.element_size()
            if offset + size > len(self._memory):
                return tensor.detach().numpy()
            self._at(place).copy_(tensor.detach())
            offset += math.ceil(size / ALIGN) * ALIGN
            return place

        return trees.tree_map(lay, tree)

    def get(self, tree: Any, copy: bool = True) -> Tree:
        """Returns the tensors of what `put` returned: copies, or views that hold until the next `put`."""
        if isinstance(tree, Place):
            return self._at(tree).clone() if copy else self._at(tree)
        if isinstance(tree, dict | tuple):
            return trees.rebuild(tree, [self.get(child, copy) for _, child in trees.items(tree)])
        return torch.from_numpy(tree).clone()

    def _at(self, place: Place) -> Tensor:
        size = math.prod(place.shape) * place.dtype.itemsize
        return self._memory[place.offset : place.offset + size].view(place.dtype).view(place.shape)


class _Hand(NamedTuple):
    """A worker as the parent sees it."""

    process: ForkProcess
    pipe: Connection
    blocks: tuple[Block, Block]  # by turns
    queue: deque[tuple[int, int]]  # (client, block) of those that it was given and has not answered for


def serve(
    setting: Setting, donate: bool, pipe: Connection, parent: int, shared: Block, blocks: Sequence[Block]
) -> None:
    """Runs clients as they are asked for, until told to stop or the parent is gone.

    It is told ("round", round, (counts, message)) once, then ("client", index, its plan, its kept state, block) for each.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    torch.set_num_threads(1)
    worker = setting.task.worker("eager", donate)
    round, message = Round(0, *[None] * 4), ()  # type: ignore[arg-type]
    while True:
        while not pipe.poll(WATCH):
            if os.getppid() != parent:
                return
        kind, *rest = pipe.recv()
        if kind == "stop":
            return
        if kind == "round":
            bare, (counts, message) = rest[0], shared.get(rest[1], copy=False)
            round = bare._replace(counts=None if counts == () else counts)
            continue
        number, plan, state, turn = rest
        try:
            client = Client(*(value[0] for value in setting.clients({number: plan})))
            states = {} if state is None else {number: blocks[turn].get(state)}
            result = run_client(setting, worker, round, client, message, states, plan)
            laid = blocks[turn].put({name: getattr(result, name) for name in TREES})
            pipe.send(result._replace(**laid))
        except FedtailError as error:
            pipe.send(error)
        except Exception as error:
            pipe.send(TrainingError(f"Client {number} failed in round {round.index}: {type(error).__name__}: {error}"))


def _gone(who: str) -> TrainingError:
    return TrainingError(f"{who} ended without an answer (killed, often for want of memory). Lower engine.workers; "
                         "`fedtail resume` continues the run.")  # fmt: skip


class ProcessEngine(Engine):
    """A pool of long-lived processes, one intra-op thread each; evaluation runs in threads."""

    name = "processes"

    def __init__(self, setting: Setting, workers: int, donate: bool = True):
        super().__init__(setting)
        if not hasattr(os, "fork") or setting.task.device.type != "cpu":
            raise ConfigError('engine.name = "processes" needs a system that can fork (Linux, macOS) and device = "cpu". '
                              'Use "parallel".')  # fmt: skip
        self._workers, self._donate = workers, donate
        self._pool: list[_Hand] = []
        self._shared: Block | None = None
        self._threads = ParallelEngine(setting, workers, donate)

    def open(self) -> None:
        """Forks the workers at the first use."""
        if self._pool:
            return
        super().open()
        context = multiprocessing.get_context("fork")
        size = max(64 << 20, 16 * trees.num_bytes(self.setting.task.initial))  # of addresses, not of memory
        self._shared = Block(size)
        for _ in range(self._workers):
            mine, theirs = context.Pipe()
            blocks = Block(size), Block(size)
            process = context.Process(
                target=serve, args=(self.setting, self._donate, theirs, os.getpid(), self._shared, blocks), daemon=True,
                name="fedtail",
            )  # fmt: skip
            with (
                warnings.catch_warnings()
            ):  # Python 3.12 warns if any other thread lives: the workers use none of theirs
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._pool.append(_Hand(process, cast("Connection", mine), blocks, deque()))

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Hands out the longest clients first; the sink adds in ascending index."""
        self.open()
        assert self._shared is not None
        todo = deque(sorted(plans, key=lambda number: -len(plans[number].order)))
        try:
            places = self._shared.put(((() if round.counts is None else round.counts), message))
            for hand in self._pool:
                self._send(hand, "round", round._replace(counts=None), places)
                self._give(hand, todo, plans, states)
            while busy := {hand.pipe: hand for hand in self._pool if hand.queue}:
                for pipe in wait([*busy]):
                    hand = busy[pipe]  # type: ignore[index]
                    sink.add(self._result(hand, round, sink))
                    self._give(hand, todo, plans, states)
        except BaseException:
            self._end()  # workers may be in the middle of a client
            raise

    def _give(self, hand: _Hand, todo: deque[int], plans: Mapping[int, Plan], states: Mapping[int, Tree]) -> None:
        """Gives a worker its next client, and one more where its plan and state fit into what never blocks."""
        while todo and len(hand.queue) < 2:
            number = todo[0]
            plan, state = plans[number], states.get(number)
            block = 1 - hand.queue[-1][1] if hand.queue else 0
            light = sum(a.nbytes for a in (plan.order, plan.lengths, *plan.draws.values())) <= AHEAD
            if hand.queue and not (light and (state is None or hand.blocks[block].fits(state))):
                return
            todo.popleft()
            self._send(hand, "client", number, plan, None if state is None else hand.blocks[block].put(state), block)
            hand.queue.append((number, block))

    def _send(self, hand: _Hand, *what: Any) -> None:
        try:
            hand.pipe.send(what)
        except OSError as error:
            raise _gone("A worker process") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"What the clients need cannot be sent to another process: {error}. Define the NamedTuples of messages and "
                'states at the top of a module, or use engine.name = "parallel".'
            ) from error

    def _result(self, hand: _Hand, round: Round, sink: Sink) -> Result:
        """Returns a worker's answer; the update may lie in the block still, where the sink adds it before anything else."""
        number, block = hand.queue[0]
        try:
            answer = hand.pipe.recv()
        except (EOFError, OSError) as error:
            raise _gone(f"The process that trained client {number} in round {round.index}") from error
        if isinstance(answer, FedtailError):
            raise answer
        hand.queue.popleft()
        memory = hand.blocks[block]
        passing = "update" if sink.at_once(number) else None
        return answer._replace(**{name: memory.get(getattr(answer, name), name != passing) for name in TREES})

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs them in threads: a function does not travel."""
        return self._threads.map_batches(function, items)

    def _end(self) -> None:
        for hand in self._pool:
            hand.process.terminate()
            hand.process.join()
            hand.pipe.close()
        self._pool, self._shared = [], None

    def close(self) -> None:
        """Ends the processes and threads."""
        for hand in self._pool:
            try:
                hand.pipe.send(("stop",))
            except OSError:
                continue
        for hand in self._pool:
            hand.process.join(5)
        self._end()
        self._threads.close()
        super().close()
