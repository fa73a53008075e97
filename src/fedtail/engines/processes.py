"""Clients side by side in processes: for steps so short that threads wait for Python's lock. Bit-identical to the loop engine.

The workers are forked: they share the data's memory and know the setting. What travels is the message, once a round to each
worker, kept client states, and results, all as NumPy arrays.
"""

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, cast

import numpy as np
import torch

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


def pack(tree: Tree) -> Any:
    """Returns the tree with arrays for tensors, fit to be sent."""
    return trees.tree_map(lambda t: t.detach().cpu().numpy(), tree)


def unpack(tree: Any) -> Tree:
    """Returns the tensors of a packed tree; copied, because an array's memory is not aligned as torch's is."""
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree).clone()
    return trees.rebuild(tree, [unpack(child) for _, child in trees.items(tree)])


def serve(setting: Setting, donate: bool, pipe: Connection, parent: int) -> None:
    """Runs clients as they are asked for, until told to stop or the parent is gone.

    It is told ("round", round, counts, message) once, then ("client", index, its plan, its kept state or None) for each.
    """
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
            bare, counts, message = rest
            round, message = bare._replace(counts=None if counts is None else unpack(counts)), unpack(message)
            continue
        number, plan, state = rest
        try:
            client = Client(*(value[0] for value in setting.clients({number: plan})))
            states = {} if state is None else {number: unpack(state)}
            result = run_client(setting, worker, round, client, message, states, plan)
            pipe.send(result._replace(**{name: pack(getattr(result, name)) for name in TREES}))
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
        self._pool: list[tuple[ForkProcess, Connection]] = []
        self._threads = ParallelEngine(setting, workers, donate)

    def open(self) -> None:
        """Forks the workers at the first use."""
        if self._pool:
            return
        super().open()
        context = multiprocessing.get_context("fork")
        for _ in range(self._workers):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(self.setting, self._donate, theirs, os.getpid()), daemon=True, name="fedtail"
            )
            with (
                warnings.catch_warnings()
            ):  # Python 3.12 warns if any other thread lives: the workers use none of theirs
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._pool.append((process, cast("Connection", mine)))

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Hands out the longest clients first; the sink adds in ascending index."""
        self.open()
        todo = deque(sorted(plans, key=lambda number: -len(plans[number].order)))
        busy: dict[Connection, int] = {}

        def give(pipe: Connection) -> None:
            if todo:
                number = busy[pipe] = todo.popleft()
                state = pack(states[number]) if number in states else None
                self._send(pipe, "client", number, plans[number], state)

        try:
            counts, packed = None if round.counts is None else pack(round.counts), pack(message)
            for _, pipe in self._pool:
                self._send(pipe, "round", round._replace(counts=None), counts, packed)
                give(pipe)
            while busy:
                for pipe in wait([*busy]):
                    sink.add(self._result(pipe, busy.pop(pipe), round))  # type: ignore[arg-type]
                    give(pipe)  # type: ignore[arg-type]
        except BaseException:
            self._end()  # workers may be in the middle of a client
            raise

    def _send(self, pipe: Connection, *what: Any) -> None:
        try:
            pipe.send(what)
        except OSError as error:
            raise _gone("A worker process") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"What the clients need cannot be sent to another process: {error}. Define the NamedTuples of messages and "
                'states at the top of a module, or use engine.name = "parallel".'
            ) from error

    def _result(self, pipe: Connection, number: int, round: Round) -> Result:
        """Returns a worker's answer."""
        try:
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise _gone(f"The process that trained client {number} in round {round.index}") from error
        if isinstance(answer, FedtailError):
            raise answer
        return answer._replace(**{name: unpack(getattr(answer, name)) for name in TREES})

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs them in threads: a function does not travel."""
        return self._threads.map_batches(function, items)

    def _end(self) -> None:
        for process, pipe in self._pool:
            process.terminate()
            process.join()
            pipe.close()
        self._pool = []

    def close(self) -> None:
        """Ends the processes and threads."""
        for _, pipe in self._pool:
            try:
                pipe.send(("stop",))
            except OSError:
                continue
        for process, _ in self._pool:
            process.join(5)
        self._end()
        self._threads.close()
        super().close()
