"""What a person sees while a run goes on: its cost beforehand, live progress, the scores at the end."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedtail import config, trees
from fedtail.data.members import Members
from fedtail.experiment import Federation, RoundResult


def method(experiment: config.Experiment) -> str:
    """Returns the algorithm's name, fit for a folder."""
    return str(config.name_of(experiment.algorithm)).rpartition(":")[2].lower()


def free_folder(path: Path) -> Path:
    """Returns the path, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def print_cost(federation: Federation) -> None:
    """Prints what a run will do, before it does it."""
    experiment, data = federation.experiment, federation.data
    work = experiment.local
    sizes = Members.of(data.owners).sizes
    steps = int(work.count(sizes[federation.holders]).sum())
    share = federation.cohort_size / len(federation.holders)
    size = trees.num_bytes(federation.task.initial)
    newcomers = f"{len(federation.newcomers)} of them newcomers, " if len(federation.newcomers) else ""
    print(f"{data.sources[0].partition(' (')[0]}: {sizes.sum():,} training examples on {data.clients} clients, "
          f"{newcomers}{federation.cohort_size} a round; {experiment.rounds} rounds of about {steps * share:,.0f} local steps; "
          f"model of {size / 1e6:.2f} MB; engine {experiment.engine.name} ({federation.reason})")  # fmt: skip


def _percent(value: float | None) -> str:
    return "   -" if value is None else f"{100 * value:4.1f}"


def _line(scores: dict[str, Any] | None, loss: float | None) -> str:
    if scores is None:
        return "" if loss is None else f"loss {loss:.3f}"
    parts = [f"{name} {_percent(scores.get(key))}" for name, key in
             (("overall", "accuracy"), ("head", "head"), ("medium", "medium"), ("tail", "tail"))]  # fmt: skip
    return "  ".join(parts) + ("" if loss is None else f"  loss {loss:.3f}")


def follow(rounds: Iterator[RoundResult], federation: Federation, folder: Path) -> None:
    """Takes all rounds with a live bar (a line an evaluation where there is no terminal), then prints the scores."""
    experiment = federation.experiment
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[scores]}"))  # fmt: skip
    result: RoundResult | None = None
    scores: dict[str, Any] | None = None
    done = federation.round
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{method(experiment)} seed {experiment.seed}", total=experiment.rounds,
                                completed=federation.round, scores="")  # fmt: skip
            for result in rounds:
                done = result.index + 1
                scores = result.record.get("test", scores)
                line = _line(scores, result.record.get("train", {}).get("loss"))
                bar.update(task, completed=done, scores=line)
                if not console.is_terminal and "test" in result.record:
                    print(f"round {done}/{result.rounds}  {line}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        kept = done - done % experiment.checkpoint_every
        print(f"\nstopped after {done} of {experiment.rounds} rounds, {kept} are saved. Continue with: "
              f"fedtail resume {shlex.quote(str(folder))}", file=sys.stderr)  # fmt: skip
        raise SystemExit(130) from None
    if result is not None:
        print(scores_table(result.record))
        print(f"run folder: {folder}")


def scores_table(scores: dict[str, Any]) -> str:
    """Returns the scores among a record's entries as text: a block for each test set, which it names together with its rule."""
    console = Console(width=100)
    with console.capture() as capture:
        for name, values in scores.items():
            if not isinstance(values, dict) or "groups" not in values:  # no score, or a method's other readings
                continue
            table = Table(title=f"{name}: {values['test_set']}\nshot groups: {values['groups']}", title_justify="left")
            shown = {k: v for k, v in values.items() if isinstance(v, float) or v is None or k == "clients"}
            for key in shown:
                table.add_column(key, justify="right")
            table.add_row(*(str(v) if isinstance(v, int) else f"{v:.2f}" if k == "mean_abs_log_ea" and v is not None
                            else _percent(v).strip() for k, v in shown.items()))  # fmt: skip
            console.print(table)
    return capture.get().rstrip()


@contextlib.contextmanager
def download_progress() -> Generator[Callable[[str, int, int | None], None]]:
    """Gives a callback (file, bytes done, bytes in all or None) that shows a bar."""
    with Progress(console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def update(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total)
            bar.update(tasks[file], completed=done, total=total)

        yield update


@contextlib.contextmanager
def live_lines(every: float = 60.0) -> Generator[tuple[Callable[[str], None], Callable[[Sequence[str]], None]]]:
    """Gives two functions for a long job's progress: one prints a line, one shows lines below all of these.

    Args:
        every: where there is no terminal, the lines of the second are printed once in this many seconds.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        printed = time.monotonic()

        def show(lines: Sequence[str]) -> None:
            nonlocal printed
            if time.monotonic() - printed >= every:
                printed = time.monotonic()
                print("\n".join(lines), file=sys.stderr, flush=True)

        yield lambda line: print(line, file=sys.stderr, flush=True), show
        return
    with Live(console=console, transient=True) as live:
        yield lambda line: console.print(Text(line)), lambda lines: live.update(Text("\n".join(lines)))
