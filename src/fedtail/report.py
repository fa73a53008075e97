"""Tables of runs: what may be compared, and the numbers of the last round over seeds.

Everything comes from run folders (`fedtail.runs.read`); nothing is trained or evaluated again. `compare` refuses runs that
differ in more than the algorithm's own hyper-parameters and the seed; the renderers print a comparison.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedtail.errors import ConfigError
from fedtail.methods import (
    ABSENT,
    CAPTIONS,
    IGNORED,
    SECTIONS,
    TRAFFIC,
    Column,
    Method,
    Section,
    course_section,
    defaults,
    differing,
    distinct,
    flatten,
    group,
    own,
    settings,
    shares_counts,
    under,
)
from fedtail.models.specs import did_you_mean
from fedtail.quantiles import t_quantile
from fedtail.runs import RunRecord, read


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

    @property
    def half(self) -> float | None:
        """Half the width of the mean's 95 % t-interval, t_{n-1} std / sqrt(n); None for fewer than two seeds."""
        return None if self.std is None else t_quantile(self.n - 1) * self.std / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95 % t-interval; None for fewer than two seeds."""
        return None if self.mean is None or self.half is None else (self.mean - self.half, self.mean + self.half)

    @property
    def significant(self) -> bool:
        """Says whether the interval excludes 0; never said of fewer than `STARS` seeds."""
        return self.n >= STARS and self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    def text(self, n: int, difference: bool = False, scale: float = 100.0, digits: int = 1) -> str:
        """Returns for example "57.5 ± 0.9"; the number of seeds is added where it is not n, "-" is no value.

        Args:
            n: seeds that the whole row has.
            difference: the number is one: with its sign, half of its interval instead of the spread, and "*" if significant.
            scale: what the number is multiplied with, 100 for percent.
            digits: after the decimal point.
        """
        if self.mean is None:
            return "-"
        width = self.half if difference else self.std
        spread = "" if width is None else f" ± {scale * width:.{digits}f}"
        star = "*" if difference and self.significant else ""
        number = f"{round(scale * self.mean, digits) + 0.0:{'+' if difference else ''}.{digits}f}"
        return f"{number}{spread}{star}" + ("" if self.n == n else f" (n={self.n})")


STARS = 5
"""Seeds below which no difference is called significant."""


class Row(NamedTuple):
    """A printed row."""

    label: str
    n: int
    cells: tuple[str, ...]
    difference: bool
    best: tuple[bool, ...]  # for each cell: the best of its column, or within one spread of it


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; the first is the baseline of the differences."""

    methods: tuple[Method, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know beside the numbers: allowed differences, engines, versions, hyper-parameters."""
    traffic: bool = False
    """Whether the table of bytes is shown."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """The tables for which at least one run has numbers."""
        found = [s for s in SECTIONS if any(s.name in known for m in self.methods for known in m.numbers)]
        way = course_section([run for method in self.methods for run in method.runs])
        measured = tuple(
            c for c in way.columns if any(v is not None for m in self.methods for v in m.values(c.key).values())
        )
        return (*found, *([way._replace(columns=measured)] if measured else []), *([TRAFFIC] if self.traffic else []))

    def summary(self, method: Method, key: str) -> Summary:
        """Returns a column's mean and spread over a method's seeds, in the record's unit (an accuracy in [0, 1])."""
        return _summary(key, list(method.values(key).values()))

    def paired(self, method: Method, key: str) -> list[float | None]:
        """Returns method - baseline, one number for each common seed; None where one of them does not have the column."""
        base, own = self.methods[0].values(key), method.values(key)
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        return [None if mine is None or theirs is None else mine - theirs for mine, theirs in pairs]

    def difference(self, method: Method, key: str) -> Summary:
        """Returns the mean and spread of `paired`."""
        return _summary(key, self.paired(method, key))

    def best(self, column: Column) -> list[bool]:
        """Says for each method whether its mean is the best of a column, or within the best's own spread of it."""
        known = [self.summary(method, column.key) for method in self.methods]
        if column.lower is None:
            return [False for _ in known]
        sign = -1 if column.lower else 1
        top = max((s for s in known if s.mean is not None), key=lambda s: sign * (s.mean or 0.0), default=None)
        if top is None or top.mean is None or len(known) < 2:
            return [False for _ in known]
        return [s.mean is not None and abs(s.mean - top.mean) <= (top.std or 0.0) for s in known]

    def rows(self, section: Section) -> list[Row]:
        """Returns a table's rows: the methods, then the others' differences to the first."""
        best = list(zip(*(self.best(column) for column in section.columns), strict=True))
        rows: list[Row] = []
        for m, marks in zip(self.methods, best, strict=True):
            cells = tuple(self.summary(m, c.key).text(len(m.runs), False, c.scale, c.digits) for c in section.columns)
            rows.append(Row(m.label, len(m.runs), cells, False, marks))
        base = self.methods[0]
        for m in self.methods[1:]:
            common = len(set(base.seeds) & set(m.seeds))
            cells = tuple(self.difference(m, c.key).text(common, True, c.scale, c.digits) for c in section.columns)
            rows.append(Row(f"{m.label} - {base.label}", common, cells, True, (False,) * len(cells)))
        return rows

    def caption(self, section: Section, mark: str = "Bold") -> str:
        """Returns what stands under a table: test set, rule of the shot groups, round, seeds, how to read differences.

        Args:
            section: the table.
            mark: how the best of a column is marked.
        """
        if section.name in ("local_models", "course", "traffic"):
            return self._course_caption(section, mark)
        last = [known for method in self.methods for known in method.numbers if section.name in known]
        sets = distinct(known[section.name]["test_set"] for known in last)
        rules = distinct(known[section.name]["groups"] for known in last)
        rounds = distinct(str(known["round"] + 1) for known in last)
        text = (f"Test set: {'; '.join(sets)}. Shot groups: {'; '.join(rules)}. Numbers of the last round "
                f"({', '.join(rounds)}), in percent, mean ± sample standard deviation over n seeds.")  # fmt: skip
        if len(self.methods) > 1:
            lowest = "".join(f" (lowest {c.title})" for c in section.columns if c.lower)
            text += f" {mark}: the best of its column{lowest}, and what lies within the best's own standard deviation of it."
        return text + self._difference_caption(section, "in percentage points, ")

    def _course_caption(self, section: Section, mark: str) -> str:
        names = [column.key.partition(".")[2] for column in section.columns]
        parts = [text for key, text in CAPTIONS.items()
                 if any(name == key or (key.endswith("_") and name.startswith(key)) for name in names)]  # fmt: skip
        if section.name == "traffic":
            parts.append("Sum over clients and rounds of what messages and updates hold; 1 MB is 10^6 bytes.")
        parts.append("Mean ± sample standard deviation over n seeds.")
        if lowest := ", ".join(column.title for column in section.columns if column.lower and len(self.methods) > 1):
            parts.append(f"{mark}: the lowest {lowest}, and what lies within its own standard deviation of it.")
        return " ".join(parts) + self._difference_caption(section)

    def _difference_caption(self, section: Section, unit: str = "") -> str:
        """Returns how to read the differences; nothing where there are none."""
        if len(self.methods) == 1:
            return ""
        starred = any(self.difference(m, c.key).n >= STARS for m in self.methods[1:] for c in section.columns)
        return (f" Differences: {unit}paired over the common seeds, mean ± half the width of its 95 % t-interval."
                + (" *: the interval excludes 0; not corrected for the number of comparisons." if starred else ""))  # fmt: skip


def _summary(key: str, values: Sequence[float | None]) -> Summary:
    """Summarises a column; rounds to a target have a mean only if every seed reached it, since the rest would look fast."""
    summary = Summary.of(values)
    return Summary(None, None, summary.n) if key.startswith("course.rounds_to_") and None in values else summary


def compare(folders: Sequence[str | Path], allow: Sequence[str] = (), traffic: bool = False) -> Comparison:
    """Reads finished runs and compares them.

    Args:
        folders: run folders; the method of the first one is the baseline.
        allow: dotted keys, or the tables that hold them, in which the runs may differ beside algorithm and seed.
        traffic: whether to show the bytes that were sent.

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
    return Comparison(methods, (*notes, *_machine_notes(runs), *_method_notes(methods)), traffic)


def _allowed(runs: Sequence[RunRecord], allow: Sequence[str]) -> list[str]:
    """Returns a note for every allowed difference; raises if there is one that is not."""
    tables = [flatten(run.config) for run in runs]
    known = {k for table in tables for k in table}
    known |= {k.rpartition(".")[0] for k in known if "." in k}
    for key in allow:
        if not any(under(k, [key]) for k in known):
            raise ConfigError(f"--allow {key}: the runs have no such option{did_you_mean(key, sorted(known))}")
    different = [k for k in differing(tables) if not own(k) and not under(k, IGNORED)]
    refused = [k for k in different if not under(k, allow)]
    if refused:
        lines = [f"  {key}: {_values(runs, tables, key)}" for key in refused]
        keys = distinct("algorithm.optimizer" if under(k, ["algorithm.optimizer"]) else k for k in refused)
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
    engines = distinct(run.config["engine"]["name"] for run in runs)
    if "vmap" in engines and len(engines) > 1:
        notes.append(f"Engines: {', '.join(engines)}; vmap agrees with the others to rounding, not to the bit.")
    every = distinct(str(run.config["evaluation"]["every"]) for run in runs)
    if len(every) > 1:
        notes.append(f"evaluation.every is {', '.join(every)}; the last round is evaluated in every run. The spread over "
                     "rounds and the rounds to a target are left out, since they depend on it.")  # fmt: skip
    for package in ("fedtail", "torch"):
        versions = distinct(str(run.environment.get("packages", {}).get(package)) for run in runs)
        if len(versions) > 1:
            notes.append(f"Made with different versions of {package}: {', '.join(versions)}.")
    commits = distinct(str(run.environment["commit"]) for run in runs if run.environment.get("commit"))
    if len(commits) > 1:
        notes.append(f"Made with different commits of fedtail: {', '.join(c[:10] + c[40:] for c in commits)}.")
    return notes


def _method_notes(methods: Sequence[Method]) -> list[str]:
    """Returns notes on unequal seeds and on hyper-parameters that are neither a method's defaults nor in its label."""
    notes: list[str] = []
    if len({method.seeds for method in methods}) > 1:
        seeds = "; ".join(f"{method.label} {', '.join(map(str, method.seeds))}" for method in methods)
        notes.append(f"The seeds are not the same ({seeds}): rely on the paired differences, not on the means.")
    for method in methods:
        table = flatten(method.runs[0].config)
        default = defaults(table)
        changed = [k for k in table if own(k) and k != "algorithm.name" and table[k] != default.get(k, ABSENT)]
        if unsaid := [v for v in settings(table, changed) if v not in method.label]:
            notes.append(f"{method.label}: not its defaults are {', '.join(unsaid)}.")
        if shares_counts(method.runs[0].config):
            notes.append(f"{method.label}: clients reveal their class counts to the server.")
    return notes


def in_words(comparison: Comparison) -> list[str]:
    """Returns what the numbers say, one sentence or two for each method beside the baseline.

    Whether a group gains or loses is decided by its paired differences: it does where every common seed has the same sign.
    """
    base, *others = comparison.methods
    if not others:
        known = [(text, comparison.summary(base, key)) for key, text in _WORDS]
        parts = [f"{s.text(s.n)} % {text}" for text, s in known if s.mean is not None]
        seeds = "1 seed" if len(base.runs) == 1 else f"{len(base.runs)} seeds"
        return [f"{base.label} gets {', '.join(parts)} ({seeds})."]
    return [_against(comparison, method, base) for method in others]


_WORDS = (
    ("test.tail", "on the tail"),
    ("test.head", "on the head"),
    ("test.accuracy", "overall"),
    ("local.worst_decile", "for the worst decile of clients"),
)
_VERDICTS = {
    (0, 0): "On neither head nor tail do the seeds agree on a difference.",
    (1, 1): "Head and tail both gain.",
    (-1, -1): "Head and tail both lose.",
    (-1, 1): "The head pays for the tail.",
    (1, -1): "The tail pays for the head.",
}


def _against(comparison: Comparison, method: Method, base: Method) -> str:
    common = [seed for seed in method.seeds if seed in base.seeds]
    if not common:
        return f"{method.label} and {base.label} have no seed in common, so there is no paired difference."
    parts: list[str] = []
    for key, text in _WORDS:
        own_values, base_values = method.values(key), base.values(key)
        pairs = [(own_values[seed], base_values[seed]) for seed in common]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            mine, theirs = 100 * np.mean(known, axis=0)
            higher = "" if len(known) == 1 else f", higher in {sum(x > y for x, y in known)} of {len(known)} seeds"
            name = (f"{method.label} gets ", f" of {base.label}") if not parts else ("", "")
            parts.append(f"{text} {name[0]}{mine:.1f} % against {theirs:.1f} %{name[1]} "
                         f"({mine - theirs:+.1f} points{higher})")  # fmt: skip
    said = "; ".join(parts)
    last = "This is a single seed: repeat with others." if len(common) == 1 else _verdict(comparison, method)
    return f"{said[:1].upper()}{said[1:]}. {last}".strip()


def _verdict(comparison: Comparison, method: Method) -> str:
    """Returns who gains and who pays, by the signs on which the seeds agree."""
    signs: dict[str, int] = {}
    for name in ("head", "tail"):
        found = {int(np.sign(d)) for d in comparison.paired(method, f"test.{name}") if d is not None}
        if not found:
            return ""  # the rule makes no such group
        signs[name] = found.pop() if len(found) == 1 else 0
    both = (signs["head"], signs["tail"])
    says = {1: "gains", -1: "loses", 0: "changes in no direction on which the seeds agree"}
    return _VERDICTS.get(both) or f"The head {says[both[0]]}, the tail {says[both[1]]}."
