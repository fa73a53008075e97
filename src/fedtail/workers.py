"""Trains a sweep's runs, each in a process of its own, several at a time.

A run's process writes into OUTPUT/.sweep/NAME.log and holds the lock on that file as long as it lives: also when the sweep
was killed and left it behind. A sweep that is started again waits for it instead of starting a second one.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from fedtail import config, report, sweep, tables, terminal
from fedtail.engines import EngineOptions
from fedtail.errors import FedtailError
from fedtail.files import write_atomic, write_error
from fedtail.sweep import Run, State, Sweep

GRACE = 30.0
"""Seconds that a run has to stop after an interrupt before it is killed; it loses nothing by that but the time."""


class Failure(NamedTuple):
    """A run that did not come to its end."""

    name: str
    reason: str


class Clock(NamedTuple):
    """What a run's timings.jsonl says."""

    rounds: int  # done so far
    seconds: float  # spent in `logged` rounds
    logged: int


class _Worker(NamedTuple):
    """A run under way."""

    process: "subprocess.Popen[bytes]"
    run: Run
    log: Path
    size: int  # of the log before this attempt
    begun: float


def main(file: Path, *, seeds: Sequence[int] = (), jobs: int | None = None, output: Path | None = None, match: str = "*",
         dry_run: bool = False) -> None:  # fmt: skip
    """Trains what a sweep's file describes and is not done yet, and prints its tables.

    Args:
        file: see `fedtail.sweep.load`, also for the next four.
        seeds: instead of the file's.
        jobs: instead of the file's.
        output: instead of the file's.
        match: a pattern for rows.
        dry_run: only list the runs and how far they are.

    Raises:
        FedtailError: the sweep is wrong, or its data cannot be had; nothing was trained.
        SystemExit: 1 if a run failed, 130 if interrupted.
    """
    plan = sweep.load(file, seeds=seeds, jobs=jobs, output=output, match=match)
    states = sweep.states(plan)
    if dry_run:
        for run in plan.runs:
            print(f"{states[run.name]:9}{run.folder}" + (f"  (starts from {run.needs})" if run.start else ""))
        return
    _obtain([run for run in plan.runs if states[run.name] != "done"])
    pool = _Pool(plan, states)
    try:
        pool.work()
    except KeyboardInterrupt:
        done = f"{len(pool.done)} of {len(plan.runs)} runs are done"
        print(f"\nstopped: {done}. The same command continues.", file=sys.stderr)
        _print_failures(pool)
        raise SystemExit(130) from None
    _print_tables(plan, pool.done)
    if pool.failed:
        _print_failures(pool)
        raise SystemExit(1)


def _obtain(todo: Sequence[Run]) -> None:
    """Gets the known data sets once, before several processes want them at the same time."""
    from fedtail.data import catalog, fetch, hub

    for name in dict.fromkeys(run.experiment.data.name for run in todo):
        if name.startswith(hub.PREFIX):
            hub.require(name)
    wanted = [run.experiment.data for run in todo if not run.experiment.data.folder]
    names = dict.fromkeys(name for data in wanted for name in (data.name, data.server_from))
    for name in names:
        if name in catalog.REGISTRY:
            with terminal.download_progress() as progress:
                fetch.get(name, log=lambda _: None, progress=progress)


def _print_tables(plan: Sweep, done: set[str]) -> None:
    for title, members in sweep.tables(plan, done):
        if title:
            print(f"\n==== {title}\n")
        if scored := [run for run in members if not run.experiment.algorithm.generative]:
            try:
                comparison = report.compare([run.folder for run in scored], sweep.allowed(scored))
                print(tables.to_text(comparison))
            except FedtailError as error:  # rows too different for a table, a damaged run; the others stand
                print(f"no table: {error}", file=sys.stderr)
            print(f"\n{sweep.command(scored)}")
        for run in members:
            if run.experiment.algorithm.generative:  # images, not scores
                print(f"fedtail quality {run.folder}")


def _print_failures(pool: "_Pool") -> None:
    if pool.failed:
        print(f"\n{len(pool.failed)} of {len(pool.plan.runs)} runs failed:", file=sys.stderr)
    for failure in pool.failed.values():
        print(f"  {failure.name}: {failure.reason}", file=sys.stderr)


class _Pool:
    """The runs of a sweep and who works on them."""

    def __init__(self, plan: Sweep, states: dict[str, State]):
        self.plan = plan
        self.jobs = plan.jobs or EngineOptions().cores()
        self.done = {name for name, state in states.items() if state == "done"}
        self.failed: dict[str, Failure] = {}
        self.todo = [run for run in plan.runs if run.name not in self.done]
        self.working: list[_Worker] = []
        self.begun = time.monotonic()
        self.clocks = {run.name: clock(run.folder) for run in plan.runs}
        self.overheads: list[float] = []  # seconds beside the rounds that each finished process took: mostly its start

    def work(self) -> None:
        """Goes on until every run is done or failed; an interrupt (Ctrl-C, SIGTERM) stops the runs first."""
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
        try:
            with terminal.live_lines() as (say, show):
                say(f"{len(self.plan.runs)} runs, {len(self.done)} of them done, {self.jobs} at a time, "
                    f"in {self.plan.output}")  # fmt: skip
                while self.todo or self.working:
                    for line in [*self._reap(), *self._begin()]:
                        say(line)
                    show(self._lines())
                    time.sleep(0.2)
        except BaseException:
            _stop([worker.process for worker in self.working])
            raise
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, before)

    def _reap(self) -> list[str]:
        """Takes the processes that ended off the list; returns what to say about them."""
        said: list[str] = []
        for worker in [w for w in self.working if w.process.poll() is not None]:
            self.working.remove(worker)
            name, wall = worker.run.name, time.monotonic() - worker.begun
            took = _duration(wall)
            self.clocks[name] = clock(worker.run.folder)
            if worker.process.returncode == 0:
                self.done.add(name)
                self.overheads.append(max(wall - self.clocks[name].seconds, 0.0))
                said.append(f"{name}: done after {took}; {self._summary()}")
            else:
                self._fail(name, f"{_last_line(worker)} (log: {worker.log})")
                said.append(f"{name}: FAILED after {took}: {self.failed[name].reason}")
        return said

    def _begin(self) -> list[str]:
        """Starts what may start; returns what to say about it."""
        said: list[str] = []
        for run in list(self.todo):
            if run.needs in self.failed:
                self.todo.remove(run)
                self._fail(run.name, f"was not begun: it starts from {run.needs}, which failed")
            elif len(self.working) < self.jobs and (not run.needs or run.needs in self.done):
                said += self._begin_one(run)
        return said

    def _begin_one(self, run: Run) -> list[str]:
        place = run.output / ".sweep"
        log = place / f"{run.name}.log"
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_atomic(place / ".gitignore", "*\n")
            file = open(log, "ab")  # noqa: SIM115 (closed below; the child keeps its own)
        except OSError as error:
            raise write_error(log, error) from error
        with file:
            if not _locked(file):  # a process of a sweep that was killed, or of another sweep: wait for it
                return []
            self.todo.remove(run)
            try:
                state = sweep.state(run)
                if state == "missing":
                    sweep.clear(run)
            except FedtailError as error:  # another process was there since we looked
                self._fail(run.name, str(error))
                return [f"{run.name}: FAILED: {error}"]
            if state == "done":
                self.done.add(run.name)
                return [f"{run.name}: done elsewhere; {self._summary()}"]
            if state == "missing":
                write_atomic(place / f"{run.name}.toml", config.dumps(run.experiment))
            words = ["resume"] if state == "partial" else ["run", str(place / f"{run.name}.toml"), "--output"]
            process = subprocess.Popen(
                [sys.executable, "-m", "fedtail", *words, str(run.folder)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
            # A session of its own: Ctrl-C reaches us alone, and each child gets one interrupt, from us.
            self.working.append(_Worker(process, run, log, file.tell(), time.monotonic()))
        return [f"{run.name}: {'continues' if state == 'partial' else 'begins'}"]

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = Failure(name, reason)

    def _lines(self) -> list[str]:
        """Returns the live lines: one a run under way, and one for the whole."""
        lines: list[str] = []
        for worker in self.working:
            name = worker.run.name
            self.clocks[name] = clock(worker.run.folder)
            lines.append(f"{name}: round {self.clocks[name].rounds} of {worker.run.experiment.rounds}, "
                         f"{_duration(time.monotonic() - worker.begun)}")  # fmt: skip
        if self.todo and not self.working:
            lines.append("waiting for runs that another process works on")
        return [*lines, self._summary()]

    def _summary(self) -> str:
        left = self.remaining()
        ended = len(self.done) + len(self.failed)
        return (f"{ended} of {len(self.plan.runs)} runs, {_duration(time.monotonic() - self.begun)} elapsed, "
                + ("time left unknown" if left is None else f"about {_duration(left)} left"))  # fmt: skip

    def remaining(self) -> float | None:
        """Returns an estimate of the seconds to the end; None while no round was timed.

        Rounds go by their row. A row of which nothing was timed yet takes as long as the mean whole run of the others,
        not as their mean round: rows of one sweep share a budget, and some cut it into many short rounds.
        """
        rows: dict[str, tuple[float, int]] = {}
        whole: list[float] = []
        for run in self.plan.runs:
            known, (seconds, logged) = self.clocks[run.name], rows.get(run.row, (0.0, 0))
            rows[run.row] = seconds + known.seconds, logged + known.logged
            if known.logged:
                whole.append(run.experiment.rounds * known.seconds / known.logged)
        if not whole:
            return None
        left: list[float] = []
        for run in (*self.todo, *(worker.run for worker in self.working)):
            (seconds, logged), rounds = rows[run.row], run.experiment.rounds
            one = seconds / logged if logged else statistics.mean(whole) / rounds
            left.append((rounds - self.clocks[run.name].rounds) * one)
        overhead = len(self.todo) * sum(self.overheads) / max(len(self.overheads), 1)
        return max((sum(left) + overhead) / self.jobs, *left) if left else 0.0


def clock(folder: Path) -> Clock:
    """Reads a run's timings; a run that has none gets zeros."""
    try:
        text = (folder / "timings.jsonl").read_text()
        known: list[dict[str, Any]] = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    except (OSError, ValueError):  # a damaged file costs no more than the estimate
        return Clock(0, 0.0, 0)
    return Clock(known[-1]["round"] + 1 if known else 0, sum(line["seconds"] for line in known), len(known))


def _locked(file: IO[bytes]) -> bool:
    """Takes the lock of a log file; it goes over to the process that inherits the file. False: somebody has it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _last_line(worker: _Worker) -> str:
    """Returns the last line that a failed run wrote: its error."""
    lines = [
        line for line in worker.log.read_bytes()[worker.size :].decode(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1].strip().removeprefix("fedtail: ") if lines else f"ended with status {worker.process.returncode}"


def _stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Interrupts the runs and waits for them; a second Ctrl-C kills them."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE
        for process in processes:
            process.wait(max(until - time.monotonic(), 0.1))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in processes:
            process.kill()
            process.wait()


def _duration(seconds: float) -> str:
    """Returns hours:minutes:seconds.

    Example:
        >>> _duration(3725.2)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
