"""Clients side by side on the cores of a CPU, one intra-op thread each: bit-identical to the loop engine."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from fedtail.algorithm import Client, Round
from fedtail.data.plan import Plan
from fedtail.engines.base import Engine, Result, Setting, Sink
from fedtail.engines.loop import run_client
from fedtail.task import Worker
from fedtail.trees import Tree

LAST_BREATH = 5.0  # seconds at most; it takes about a millisecond, and none where there is no /proc


class ParallelEngine(Engine):
    """A pool of long-lived threads; each has its own skeleton of the network."""

    name = "parallel"

    def __init__(self, setting: Setting, workers: int, donate: bool = True):
        super().__init__(setting)
        self._donate = donate
        self._own = threading.local()
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._threads: list[int] = []  # as the system numbers them

    def open(self) -> None:
        """Starts the pool at the first use."""
        if self._pool is None:
            super().open()
            self._pool = ThreadPoolExecutor(self._workers, "fedtail", initializer=self._begin)

    def _begin(self) -> None:
        torch.set_num_threads(1)
        self._threads.append(threading.get_native_id())

    def _running(self) -> ThreadPoolExecutor:
        self.open()
        assert self._pool is not None
        return self._pool

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            self._own.worker = self.setting.task.worker("eager", self._donate)
        return self._own.worker

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Starts the longest clients first; the sink adds in ascending index."""
        clients = self.setting.clients(plans)
        lock = threading.Lock()

        def one(position: int, number: int) -> None:
            worker = self._worker()
            client = Client(*(value[position] for value in clients))
            result: Result = run_client(self.setting, worker, round, client, message, states, plans[number])
            with lock:
                sink.add(result)

        order = sorted(enumerate(plans), key=lambda item: -len(plans[item[1]].order))
        pool = self._running()
        futures = [pool.submit(one, *item) for item in order]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs them on the pool; the order of the results is the order of the items."""
        return list(self._running().map(lambda item: function(self._worker(), item), items))

    def close(self) -> None:
        """Ends the threads, and waits until the system has ended them too.

        Python calls a thread ended before its last breath, in which MKL frees what it kept for it. A process forked in that
        moment inherits MKL's lock, taken for ever.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            until = time.monotonic() + LAST_BREATH
            while (
                any(Path(f"/proc/self/task/{thread}").exists() for thread in self._threads) and time.monotonic() < until
            ):
                time.sleep(0.0005)
            self._pool, self._threads = None, []
        super().close()
