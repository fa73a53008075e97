"""Tables of runs: who is compared with whom, what forbids it, and the numbers of the last round over seeds.

Everything comes from run folders (`fedtail.runs.read`); nothing is trained or evaluated again. `group` sorts runs into
methods, `compare` does so only if nothing but the algorithm and the seed differs, and the renderers print a comparison.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedtail import config
from fedtail.algorithm import Algorithm
from fedtail.errors import ConfigError
from fedtail.models.specs import did_you_mean
from fedtail.runs import RunRecord, read

IGNORED = ("seed", "engine", "checkpoint_every", "evaluation.every")
"""Dotted keys that do not change the numbers of the last round, or (the seed) are averaged over."""
ABSENT = "absent"  # stands for the value of a key that a run's configuration does not have


class Column(NamedTuple):
    """A column of a table."""

    key: str  # where it stands in a record: section.name
    title: str


class Section(NamedTuple):
    """A table: columns that were measured on the same test set."""

    name: str  # of the record's entry
    title: str
    columns: tuple[Column, ...]


def _section(name: str, title: str, **titles: str) -> Section:
    return Section(name, title, tuple(Column(f"{name}.{key}", text) for key, text in titles.items()))


SECTIONS = (
    _section("test", "Global model, global test set", accuracy="overall", balanced_accuracy="balanced", head="head",
             medium="medium", tail="tail", macro_f1="macro-F1"),
    _section("local", "Global model, local test sets", mean="local mean", std="local spread",
             worst_decile="worst decile"),
    _section("personal", "Personal models, local test sets", mean="personal mean", std="personal spread",
             worst_decile="worst decile"),
)  # fmt: skip


class Summary(NamedTuple):
    """A number over seeds."""

    mean: float | None  # None: no seed has it
    std: float | None  # sample standard deviation (divided by n - 1); None: fewer than two seeds
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Summary":
        """Summarises one value a seed; None is left out."""
        known = np.array([v for v in values if v is not None], np.float64)
        spread = float(known.std(ddof=1)) if len(known) > 1 else None
        return cls(float(known.mean()) if len(known) else None, spread, len(known))

    def text(self, n: int, sign: str = "") -> str:
        """Returns for example "57.5 ± 0.9" in percent; the number of seeds is added where it is not n, "-" is no value.

        Args:
            n: seeds that the whole row has.
            sign: "+" writes the sign of positive numbers too.
        """
        if self.mean is None:
            return "-"
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{round(100 * self.mean, 1) + 0.0:{sign}.1f}{spread}" + ("" if self.n == n else f" (n={self.n})")


class Method(NamedTuple):
    """Runs that differ in the seed alone."""

    label: str
    runs: tuple[RunRecord, ...]  # ascending seed

    @property
    def seeds(self) -> tuple[int, ...]:
        """The runs' seeds."""
        return tuple(run.config["seed"] for run in self.runs)

    def values(self, key: str) -> dict[int, float | None]:
        """Returns a column's number by seed, from the last evaluated round."""
        section, _, name = key.partition(".")
        return {seed: run.last.get(section, {}).get(name) for seed, run in zip(self.seeds, self.runs, strict=True)}


class Row(NamedTuple):
    """A printed row."""

    label: str
    n: int
    cells: tuple[str, ...]
    difference: bool


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; the first is the baseline of the differences."""

    methods: tuple[Method, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know beside the numbers: allowed differences, engines, versions, hyper-parameters."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """The tables for which at least one run has numbers."""
        lasts = [run.last for method in self.methods for run in method.runs]
        return tuple(s for s in SECTIONS if any(s.name in last for last in lasts))

    def summary(self, method: Method, key: str) -> Summary:
        """Returns a column's mean and spread over a method's seeds, as shares in [0, 1]."""
        return Summary.of(list(method.values(key).values()))

    def paired(self, method: Method, key: str) -> list[float]:
        """Returns method - baseline, one number for each seed for which both have the column."""
        base, own = self.methods[0].values(key), method.values(key)
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        return [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]

    def difference(self, method: Method, key: str) -> Summary:
        """Returns the mean and spread of `paired`."""
        return Summary.of(self.paired(method, key))

    def rows(self, section: Section) -> list[Row]:
        """Returns a table's rows: the methods, then the others' differences to the first."""
        rows: list[Row] = []
        for m in self.methods:
            cells = tuple(self.summary(m, c.key).text(len(m.runs)) for c in section.columns)
            rows.append(Row(m.label, len(m.runs), cells, False))
        base = self.methods[0]
        for m in self.methods[1:]:
            common = len(set(base.seeds) & set(m.seeds))
            cells = tuple(self.difference(m, c.key).text(common, "+") for c in section.columns)
            rows.append(Row(f"{m.label} - {base.label}", common, cells, True))
        return rows

    def caption(self, section: Section) -> str:
        """Returns what stands under a table: test set, rule of the shot groups, round, seeds, how to read differences."""
        runs = [run for method in self.methods for run in method.runs if section.name in run.last]
        sets = _distinct(run.last[section.name]["test_set"] for run in runs)
        rules = _distinct(run.last[section.name]["groups"] for run in runs)
        rounds = _distinct(str(run.last["round"] + 1) for run in runs)
        text = (f"Test set: {'; '.join(sets)}. Shot groups: {'; '.join(rules)}. Numbers of the last round "
                f"({', '.join(rounds)}), in percent, mean ± sample standard deviation over n seeds.")  # fmt: skip
        if len(self.methods) > 1:
            text += " Differences: in percentage points, paired over the common seeds."
        return text


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested table by dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def under(key: str, prefixes: Iterable[str]) -> bool:
    """Says whether a dotted key is one of the prefixes or lies below one.

    Example:
        >>> under("data.longtail.factor", ["data.longtail"]), under("data.longtails", ["data.longtail"])
        (True, False)
    """
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _own(key: str) -> bool:
    """Says whether a key is one of the algorithm's own hyper-parameters, in which methods may differ."""
    return under(key, ["algorithm"]) and not under(key, ["algorithm.optimizer"])


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted keys in which flat tables differ, in their order there."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [k for k in keys if any(t.get(k, ABSENT) != tables[0].get(k, ABSENT) for t in tables)]


def group(runs: Sequence[RunRecord]) -> tuple[Method, ...]:
    """Sorts runs into methods: same configuration but for the seed and what does not change the numbers.

    A label is the algorithm's name; where runs of one algorithm differ, their hyper-parameters that differ and are not
    the default; where runs differ elsewhere, those keys too.

    Raises:
        ConfigError: two runs of one method have the same seed.
    """
    found: dict[str, list[RunRecord]] = {}
    tables: dict[str, dict[str, Any]] = {}
    for run in runs:
        table = {k: v for k, v in flatten(run.config).items() if not under(k, IGNORED)}
        identity = json.dumps(table, sort_keys=True)
        found.setdefault(identity, []).append(run)
        tables[identity] = table
    shared = [k for k in differing(list(tables.values())) if not _own(k)]
    names = _short(t["algorithm.name"] for t in tables.values())
    methods: list[Method] = []
    for identity, members in found.items():
        table = tables[identity]
        siblings = [t for t in tables.values() if t["algorithm.name"] == table["algorithm.name"]]
        default = defaults(table["algorithm.name"])
        own = [k for k in differing(siblings) if _own(k) and table.get(k, ABSENT) != default.get(k)]
        parts = [f"{k.removeprefix('algorithm.')}={_show(table.get(k, ABSENT))}" for k in [*own, *shared]]
        name = names[table["algorithm.name"]]
        label = f"{name} ({', '.join(parts)})" if parts else name
        methods.append(Method(label, tuple(sorted(members, key=lambda run: run.config["seed"]))))
        _no_repeats(methods[-1])
    return tuple(methods)


def _short(names: Iterable[str]) -> dict[str, str]:
    """Returns "Name" for a user's own "folder/file.py:Name", unless two would be the same; other names as they are."""
    short = {name: name.rpartition(".py:")[2] for name in names}
    return {name: one if list(short.values()).count(one) == 1 else name for name, one in short.items()}


def _no_repeats(method: Method) -> None:
    for one, other in zip(method.runs, method.runs[1:], strict=False):
        if one.config["seed"] == other.config["seed"]:
            raise ConfigError(f"{one.folder} and {other.folder} are the same experiment with the same seed "
                              f"{one.config['seed']}. Name only one of them.")  # fmt: skip


def defaults(name: str) -> dict[str, Any]:
    """Returns an algorithm's default hyper-parameters by dotted key; empty if it has none or cannot be imported here."""
    try:
        return flatten(config.to_dict(config.from_dict(Algorithm, {"name": name})), "algorithm.")
    except ConfigError:
        return {}


def compare(folders: Sequence[str | Path], allow: Sequence[str] = ()) -> Comparison:
    """Reads finished runs and compares them.

    Args:
        folders: run folders; the method of the first one is the baseline.
        allow: dotted keys, or the tables that hold them, in which the runs may differ beside algorithm and seed.

    Raises:
        ConfigError: a run is not finished, two are the same, or they differ in what is neither the algorithm's own
            hyper-parameter nor the seed nor allowed.
        CheckpointError: a folder is not a run folder, or is damaged.
    """
    if not folders:
        raise ConfigError(
            "a comparison needs at least one run folder, got none. Name the folders that `fedtail run` made."
        )
    runs = [read(folder) for folder in folders]
    for run in runs:
        done = run.records[-1]["round"] + 1 if run.records else 0
        if done < run.config["rounds"]:
            raise ConfigError(f"{run.folder} has {done} of {run.config['rounds']} rounds; only finished runs are compared. "
                              f"Finish it with `fedtail resume {run.folder}`.")  # fmt: skip
    notes = _allowed(runs, allow)
    _same_partitions(runs)
    methods = group(runs)
    return Comparison(methods, (*notes, *_machine_notes(runs), *_hyper_parameters(methods)))


def _allowed(runs: Sequence[RunRecord], allow: Sequence[str]) -> list[str]:
    """Returns a note for every allowed difference; raises if there is one that is not."""
    tables = [flatten(run.config) for run in runs]
    known = {k for table in tables for k in table}
    known |= {k.rpartition(".")[0] for k in known if "." in k}
    for key in allow:
        if not any(under(k, [key]) for k in known):
            raise ConfigError(f"--allow {key}: the runs have no such option{did_you_mean(key, sorted(known))}")
    different = [k for k in differing(tables) if not _own(k) and not under(k, IGNORED)]
    refused = [k for k in different if not under(k, allow)]
    if refused:
        lines = [f"  {key}: {_values(runs, tables, key)}" for key in refused]
        keys = _distinct("algorithm.optimizer" if under(k, ["algorithm.optimizer"]) else k for k in refused)
        raise ConfigError(
            "these runs differ in more than the algorithm's own hyper-parameters and the seed:\n" + "\n".join(lines)
            + "\nMake runs that are equal in these, or compare them all the same with "
            + " ".join(f"--allow {key}" for key in keys) + "."
        )  # fmt: skip
    return [f"Allowed to differ: {key}, {_values(runs, tables, key)}." for key in different]


def _values(runs: Sequence[RunRecord], tables: Sequence[Mapping[str, Any]], key: str) -> str:
    """Returns every value of a key, each with the first run that has it."""
    first: dict[str, Path] = {}
    for run, table in zip(runs, tables, strict=True):
        first.setdefault(json.dumps(table[key]) if key in table else ABSENT, run.folder)
    return " and ".join(f"{value} ({folder})" for value, folder in first.items())


def _same_partitions(runs: Sequence[RunRecord]) -> None:
    """Raises if runs with the same seed and data options nevertheless hold other data."""
    first: dict[str, RunRecord] = {}
    for run in runs:
        key = json.dumps([run.config["seed"], run.config["data"]], sort_keys=True)
        other = first.setdefault(key, run)
        same = np.array_equal(run.counts, other.counts) and np.array_equal(run.test_counts, other.test_counts)
        if not same:
            raise ConfigError(
                f"{other.folder} and {run.folder} name the same data and seed {run.config['seed']}, but their clients hold "
                "other examples (partition.npz): they come from other files or another version. Run one of them anew."
            )


def _machine_notes(runs: Sequence[RunRecord]) -> list[str]:
    """Returns notes on differences of engine, rhythm of evaluation and versions."""
    notes: list[str] = []
    engines = _distinct(run.config["engine"]["name"] for run in runs)
    if "vmap" in engines and len(engines) > 1:
        notes.append(f"Engines: {', '.join(engines)}; vmap agrees with the others to rounding, not to the bit.")
    every = _distinct(str(run.config["evaluation"]["every"]) for run in runs)
    if len(every) > 1:
        notes.append(f"evaluation.every is {', '.join(every)}; the last round is evaluated in every run.")
    for package in ("fedtail", "torch"):
        versions = _distinct(str(run.environment.get("packages", {}).get(package)) for run in runs)
        if len(versions) > 1:
            notes.append(f"Made with different versions of {package}: {', '.join(versions)}.")
    return notes


def _hyper_parameters(methods: Sequence[Method]) -> list[str]:
    """Returns a note for each method with hyper-parameters that are neither its defaults nor in its label."""
    notes: list[str] = []
    for method in methods:
        table = flatten(method.runs[0].config)
        default = defaults(table["algorithm.name"])
        changed = [k for k in table if _own(k) and k != "algorithm.name" and table[k] != default.get(k, ABSENT)]
        values = [f"{k.removeprefix('algorithm.')}={_show(table[k])}" for k in changed]
        if unsaid := [v for v in values if v not in method.label]:
            notes.append(f"{method.label}: not its defaults are {', '.join(unsaid)}.")
    return notes


def to_text(comparison: Comparison) -> str:
    """Returns the tables for a terminal, without colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    console = Console(file=file, width=200, color_system=None)
    for section in comparison.sections:
        table = Table(title=section.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("method")
        for title in (*(column.title for column in section.columns), "n"):
            table.add_column(title, justify="right")
        rows = comparison.rows(section)
        for row, after in zip(rows, [*rows[1:], None], strict=True):
            last = after is not None and after.difference and not row.difference
            table.add_row(*(Text(cell) for cell in (row.label, *row.cells, str(row.n))), end_section=last)
        console.print(table)
        console.print(Text(comparison.caption(section) + "\n"), width=100)
    for note in comparison.notes:
        console.print(Text(note), width=100)
    return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").splitlines())


def to_markdown(comparison: Comparison) -> str:
    """Returns the tables as Markdown."""
    parts: list[str] = []
    for section in comparison.sections:
        head = ["method", *(column.title for column in section.columns), "n"]
        lines = [_markdown_row(head), "|---|" + "---:|" * (len(head) - 1)]
        lines += [_markdown_row([row.label, *row.cells, str(row.n)]) for row in comparison.rows(section)]
        parts += [f"**{section.title}**", "\n".join(lines), comparison.caption(section)]
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as plain values; numbers are shares in [0, 1], not percent."""
    base = comparison.methods[0]
    columns = [column for section in comparison.sections for column in section.columns]
    return {
        "captions": {section.name: comparison.caption(section) for section in comparison.sections},
        "notes": list(comparison.notes),
        "baseline": base.label,
        "methods": [
            {
                "label": m.label,
                "seeds": list(m.seeds),
                "folders": [str(run.folder) for run in m.runs],
                "columns": {c.key: comparison.summary(m, c.key)._asdict() for c in columns},
                "by_seed": {c.key: {str(seed): v for seed, v in m.values(c.key).items()} for c in columns},
                "difference": {c.key: comparison.difference(m, c.key)._asdict() for c in columns}
                if m != base
                else None,
            }
            for m in comparison.methods
        ],
    }
