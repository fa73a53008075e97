"""Sweeps: every row of a table with every seed, described by one TOML file (docs/sweeps.md).

This module reads the file into runs and says how far each of them is; `fedtail.workers` trains them.
"""

import dataclasses
import fnmatch
import itertools
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedtail import config, runs
from fedtail.config import Experiment
from fedtail.errors import ConfigError, did_you_mean
from fedtail.files import write_error
from fedtail.methods import ABSENT, differing, flatten, leaves, show, under

State = Literal["done", "partial", "missing"]
DEFAULT = config.merged(config.to_dict(Experiment()), {"engine": {"name": "loop"}})
"""What no layer says; the engine is `loop`, since the runs share the cores."""
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
"""What a row may be called: it becomes a part of a folder's name."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A sweep's file as it is written."""

    row: tuple[dict[str, Any], ...]
    """Experiments, each laid over `base`; beside an experiment's options a `name` and, if wanted, a `start`."""
    base: dict[str, Any] = field(default_factory=dict)
    """What all rows have in common: an experiment's table."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted option -> values; every row is run with every combination."""
    seeds: tuple[int, ...] = (0,)
    """One run each."""
    jobs: int = 0
    """Runs at a time; 0 = one per core."""
    output: str = ""
    """The folder of the run folders; empty: runs/ and the file's stem."""

    def __post_init__(self) -> None:
        if not self.row or not self.seeds or min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"row and seeds must not be empty, and the seeds be different integers >= 0; got "
                              f"{len(self.row)} rows and the seeds {list(self.seeds)}.")  # fmt: skip
        if self.jobs < 0:
            raise ConfigError(f"jobs must be >= 0, got {self.jobs}.")
        keys = [key for key, _ in leaves(self.grid)]
        if double := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"grid: {double[0]!r} stands there twice, with dots and as a table. Remove one of them.")
        for key, values in flatten(self.grid).items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid: {key!r} must be a list of values, got {values!r}.")
        for place, table in (("base", self.base), ("grid", flatten(self.grid))):
            if taken := {"seed", "start"}.intersection(table) - ({"start"} if place == "base" else set()):
                raise ConfigError(f"{place}: {taken.pop()!r} has no place there. Seeds are listed in the top-level `seeds`; "
                                  "a row names the row that it starts from.")  # fmt: skip
        try:
            _laid({}, self.base)
        except ConfigError as error:
            raise ConfigError(f"base: {error}") from error


@dataclass(frozen=True)
class Run:
    """One row with one seed in one cell of the grid."""

    row: str
    cell: tuple[tuple[str, str], ...]  # (dotted key, what folder names and messages show)
    experiment: Experiment
    output: Path
    start: str = ""  # the row that it starts from

    @property
    def method(self) -> str:
        """The folder's name without the seed."""
        return "-".join((self.row, *(text for _, text in self.cell)))

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.method}-seed{self.experiment.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output / self.name

    @property
    def needs(self) -> str:
        """The name of the run that has to be finished first; empty: none."""
        return dataclasses.replace(self, row=self.start).name if self.start else ""

    @property
    def table(self) -> str:
        """Says which table the run belongs to: cells that differ in an algorithm's options alone share one."""
        return ", ".join(text for key, text in self.cell if not under(key, ["algorithm"]))


@dataclass(frozen=True)
class Sweep:
    """A sweep, read and checked."""

    file: Path
    output: Path
    jobs: int
    runs: tuple[Run, ...]  # in the order in which they are begun: by seed, then as written


def is_sweep(file: Path) -> bool:
    """Says whether a file is a sweep: TOML with its keys at the top."""
    try:
        return file.is_file() and bool(config.SWEEP & config.read_toml(file).keys())
    except ConfigError:
        return False


def load(file: Path, *, seeds: Sequence[int] = (), jobs: int | None = None, output: Path | None = None,
         match: str = "*") -> Sweep:  # fmt: skip
    """Reads a sweep and checks it completely.

    Args:
        file: the TOML file.
        seeds: instead of the file's.
        jobs: instead of the file's.
        output: instead of the file's.
        match: only the rows whose names match this pattern, and those that they start from.

    Raises:
        ConfigError: an unknown key, a wrong value, two rows of one name, a start that is no row; the message says in which
            row.
    """
    try:
        layout: Layout = config.from_dict(Layout, config.read_toml(file))
        changes: dict[str, Any] = {"seeds": tuple(seeds) or layout.seeds, "jobs": layout.jobs if jobs is None else jobs}
        layout = dataclasses.replace(layout, **changes)
        folder = output or Path(layout.output or Path("runs") / file.stem)
        starts = _starts(layout.row)
        wanted = _chosen(starts, match)
        found = [run for row in layout.row if row["name"] in wanted for run in _runs(row, layout, folder)]
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    names = [run.name for run in found]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{file}: two runs would have the folder {folder / double[0]}. Give the rows other names, or write "
                          "the values of the grid so that they differ in six digits.")  # fmt: skip
    return Sweep(
        file, folder, layout.jobs, tuple(sorted(found, key=lambda run: layout.seeds.index(run.experiment.seed)))
    )


def _starts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns for every row the row that it starts from ("": none)."""
    starts: dict[str, str] = {}
    for number, row in enumerate(rows):
        name = row.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"row {number + 1}: `name` must be letters, digits and any of . _ + -, got {name!r}.")
        if name in starts:
            raise ConfigError(f"two rows are named {name!r}. Give one of them another name.")
        starts[name] = row.get("start", "")
    for name, start in starts.items():
        if start not in ("", *starts):
            raise ConfigError(f"row {name!r}: start names no row, got {start!r}{did_you_mean(str(start), starts)} "
                              f"Rows are {', '.join(starts)}.")  # fmt: skip
        chain = [name]
        while following := starts[chain[-1]]:
            if following in chain:
                raise ConfigError(f"row {name!r}: start goes in a circle: {' from '.join([*chain, following])}.")
            chain.append(following)
    return starts


def _chosen(starts: Mapping[str, str], match: str) -> set[str]:
    """Returns the rows that match a pattern, with all that they start from."""
    found = {name for name in starts if fnmatch.fnmatchcase(name, match)}
    if not found:
        raise ConfigError(f"no row matches {match!r}{did_you_mean(match, starts)} Rows are {', '.join(starts)}.")
    while more := {starts[name] for name in found} - {*found, ""}:
        found |= more
    return found


def _runs(row: Mapping[str, Any], layout: Layout, output: Path) -> list[Run]:
    """Returns a row's runs, one a cell and seed."""
    table = {key: value for key, value in row.items() if key not in ("name", "start")}
    if "seed" in table:
        raise ConfigError(f"row {row['name']!r}: 'seed' has no place there. Seeds are listed in the top-level `seeds`.")
    grid = flatten(layout.grid)
    found: list[Run] = []
    known: dict[str, dict[str, Any]] = {}  # the cells by the experiments that they make
    for values in itertools.product(*grid.values()):
        choice = dict(zip(grid, values, strict=True))
        cell = tuple((key, _text(key, value)) for key, value in choice.items())
        try:
            experiment = _experiment(layout.base, table, choice)
            other = known.setdefault(config.fingerprint(experiment), choice)
            if other is not choice:
                same = ", ".join(_text(*item) for item in other.items())
                keys = [key for key in choice if other[key] != choice[key]]
                why = f"{' and '.join(keys)} makes no difference to this row" if keys else "their values are equal"
                raise ConfigError(f"this is the same experiment as {same}: {why}. Take one of the two out of the grid.")
        except ConfigError as error:
            where = "".join(f", {text}" for _, text in cell)
            raise ConfigError(f"row {row['name']!r}{where}: {error}") from error
        for seed in layout.seeds:
            run = Run(row["name"], cell, dataclasses.replace(experiment, seed=seed), output, row.get("start", ""))
            if run.start:  # "{seed}" stays as it is, so that the seeds of a method have one configuration
                path = output / f"{dataclasses.replace(run, row=run.start).method}-seed{{seed}}"
                run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, start=path.as_posix()))
            found.append(run)
    return found


def _experiment(base: Mapping[str, Any], row: Mapping[str, Any], cell: Mapping[str, Any]) -> Experiment:
    """Returns a row's experiment in a cell of the grid; of the cell, classes come first, since options belong to them."""

    def late(key: str) -> tuple[bool, int]:
        return not (key.endswith(".name") or isinstance(cell[key], Mapping)), key.removesuffix(".name").count(".")

    laid = _laid(base, row)
    for key in sorted(cell, key=late):
        there = flatten(config.merged(DEFAULT, laid)).get(key)
        if not key.endswith(".name") or there != cell[key]:  # the class that is there keeps its options, as with flags
            laid = _laid(laid, _nested(key, cell[key]))
    return config.from_dict(Experiment, config.merged(DEFAULT, laid))


def _laid(below: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Lays a table over another one; an algorithm that it picks keeps the optimizer and the loss of the one below."""
    for key, value in table.items():
        if isinstance(DEFAULT.get(key), Mapping) and not isinstance(value, Mapping):  # a layer above could hide it
            raise ConfigError(f"{key} must be a table, got {value!r}.")
    algorithm = table.get("algorithm", {})
    if isinstance(algorithm.get("name"), str):
        kept = config.shared(below.get("algorithm", {}), algorithm["name"])
        table = {**table, "algorithm": config.merged(kept, algorithm)}
    return config.merged(below, table)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a dotted key's value as a table of tables."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _text(key: str, value: Any) -> str:
    """Returns "factor=10" for a folder's name."""
    parts = key.removesuffix(".name").split(".")
    said = show(value.get("name", dict(value)) if isinstance(value, Mapping) else value)
    return f"{parts[-1]}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', said).strip('_')}"


def state(run: Run) -> State:
    """Says how far a run is; one that failed or was stopped in its first round is "missing".

    Raises:
        ConfigError: its folder holds something else; names the difference.
    """
    if not run.folder.exists() or _is_bare(run.folder):
        return "missing"
    if not (run.folder / "config.toml").is_file():
        raise ConfigError(f"{run.folder} exists and is not a run folder. Move it away, or choose another --output.")
    tables = [flatten(config.to_dict(e)) for e in (config.load(run.folder), run.experiment)]
    if _same_folder(*(table["start"] for table in tables)):
        tables[0]["start"] = tables[1]["start"]
    keys = [key for key in differing(tables) if not under(key, ["engine", "checkpoint_every"])]  # they change no number
    if keys:
        said = "; ".join(
            f"{k} is {' there and '.join(json.dumps(t.get(k, ABSENT)) for t in tables)} here" for k in keys
        )
        raise ConfigError(
            f"{run.folder} holds another experiment: {said}. Restore the sweep's row, or choose another --output."
        )
    return "done" if runs.rounds_done(run.folder) >= run.experiment.rounds else "partial"


def _same_folder(kept: str, now: str) -> bool:
    """Says whether a kept path, relative to wherever that run was begun, can be the same folder as one of now."""
    here = Path(now).resolve()
    return bool(kept and now) and here in (Path(kept).resolve(), Path(*here.parts[: -len(Path(kept).parts)], kept))


def _is_bare(folder: Path) -> bool:
    """Says whether a run folder holds no result, not even of one round."""
    records = folder / "metrics.jsonl"
    begun = not (folder / "config.toml").is_file() or not records.is_file() or records.stat().st_size > 0
    return not begun and not (folder / "best.safetensors").exists() and not runs.rounds_done(folder)


def clear(run: Run) -> None:
    """Removes what a run without a finished round left behind, so that it can begin anew; other folders stay.

    Raises:
        CheckpointError: another process works on it, or it cannot be removed.
    """
    if not run.folder.exists():
        return
    with runs.locked(run.folder):
        if _is_bare(run.folder):
            try:
                # First out of the way: a process that is killed here leaves no half a folder.
                scratch = Path(tempfile.mkdtemp(dir=run.output, prefix=f".{run.name}."))
                run.folder.rename(scratch / run.name)
                shutil.rmtree(scratch)
            except OSError as error:
                raise write_error(run.folder, error) from error


def states(sweep: Sweep) -> dict[str, State]:
    """Returns the state of every run, by its name.

    Raises:
        ConfigError: folders that hold something else, all of them.
    """
    found: dict[str, State] = {}
    wrong: list[str] = []
    for run in sweep.runs:
        try:
            found[run.name] = state(run)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError(f"{sweep.file}: " + "\n".join(wrong))
    return found


def tables(sweep: Sweep, done: set[str]) -> list[tuple[str, list[Run]]]:
    """Returns the finished runs of each table, in the file's order, with the table's title."""
    rows = list(dict.fromkeys((run.row, run.cell) for run in sweep.runs))
    found: dict[str, list[Run]] = {}
    for run in sorted(sweep.runs, key=lambda run: rows.index((run.row, run.cell))):
        if run.name in done:
            found.setdefault(run.table, []).append(run)
    return list(found.items())


def allowed(members: Sequence[Run]) -> list[str]:
    """Returns what a sweep's own table lets its runs differ in: start, rounds, and the grid's optimizer options."""
    keys = ["start", "rounds", *(key for key, _ in members[0].cell if under(key, ["algorithm.optimizer"]))]
    flat = [flatten(config.to_dict(run.experiment)) for run in members]
    return [key for key in keys if any(under(k, [key]) for k in differing(flat))]


def command(members: Sequence[Run]) -> str:
    """Returns the command that prints the table of these runs again; its braces are for the shell to expand."""
    seeds: dict[str, list[str]] = {}
    for run in members:
        seeds.setdefault(run.method, []).append(str(run.experiment.seed))
    folder = shlex.quote(members[0].output.as_posix())
    paths = [f"{folder}/{m}-seed{s[0] if len(s) == 1 else '{' + ','.join(s) + '}'}" for m, s in seeds.items()]
    allow = allowed(members)
    return " ".join(["fedtail compare", *paths, *(["--allow", *allow] if allow else [])])
