"""Runs sorted into methods, and the numbers of a record that tables and pictures show."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any, NamedTuple

from fedtail import config
from fedtail.algorithm import Algorithm
from fedtail.course import course, targets
from fedtail.errors import ConfigError
from fedtail.runs import RunRecord

IGNORED = ("seed", "engine", "checkpoint_every", "evaluation.every")
"""Dotted keys that do not change the numbers of the last round, or (the seed) are averaged over."""
ABSENT = "absent"
"""Stands for the value of a key that a configuration does not have."""


class Column(NamedTuple):
    """A number of a run: of its last evaluated round, or (section "course") of its way there."""

    key: str  # where it stands in a record: section.name
    title: str  # in a table
    words: str  # in full
    lower: bool | None = False  # the lowest is the best; None: neither end is
    scale: float = 100.0  # what it is printed in: 100 = percent of a share
    digits: int = 1  # after the decimal point


class Section(NamedTuple):
    """Columns that were measured on the same test set."""

    name: str  # of the record's entry
    title: str
    columns: tuple[Column, ...]


def _section(name: str, title: str, **columns: tuple[Any, ...]) -> Section:
    return Section(name, title, tuple(Column(f"{name}.{key}", *texts) for key, texts in columns.items()))


_LOCAL = {
    "mean": ("mean", "mean local accuracy"),
    "std": ("spread", "spread of local accuracy", True),
    "worst_decile": ("worst decile", "accuracy of the worst decile"),
}
SECTIONS = (
    _section(
        "test", "Global model, global test set",
        accuracy=("overall", "overall accuracy"), balanced_accuracy=("balanced", "balanced accuracy"),
        head=("head", "head accuracy"), medium=("medium", "medium accuracy"), tail=("tail", "tail accuracy"),
        macro_f1=("macro-F1", "macro-F1"),
    ),
    _section(
        "before", "Global model before the server's own steps, global test set",
        accuracy=("overall", "overall accuracy"), balanced_accuracy=("balanced", "balanced accuracy"),
        head=("head", "head accuracy"), medium=("medium", "medium accuracy"), tail=("tail", "tail accuracy"),
    ),
    _section("local", "Global model, local test sets", **_LOCAL),
    _section("tuned", "Tuned models, local test sets", **_LOCAL),
    _section("personal", "Personal models, local test sets", **_LOCAL),
    _section("newcomers", "Global model, newcomers", **_LOCAL),
    _section("newcomers_tuned", "Tuned models, newcomers", **_LOCAL),
    Section("local_models", "Error asymmetry and update bias, global test set", (
        Column("test.mean_abs_log_ea", "EA", "mean abs log EA", True, 1.0, 2),
        Column("local_models.mean_abs_log_ea_after", "local EA", "mean abs log EA after local training", True, 1.0, 2),
        Column("local_models.accuracy_before", "before", "accuracy before local training", None),
        Column("local_models.accuracy_after", "after", "accuracy after local training"),
        Column("local_models.macro_f1_after", "macro-F1 after", "macro-F1 after local training"),
        *(Column(f"local_models.{group}_{when}", f"{group} {when}", f"recall of {group} classes {when} local training",
                 None if when == "before" else False)
          for group in ("frequent", "rare", "missing") for when in ("before", "after")),
    )),
)  # fmt: skip
"""The tables, each of one test set."""


TRAFFIC = _section(
    "traffic", "Traffic of the whole run, in MB",
    down=("down", "bytes sent to clients", True, 1e-6, 2), up=("up", "bytes sent by clients", True, 1e-6, 2),
)  # fmt: skip
"""Shown when it is asked for."""
CAPTIONS = {
    "mean_abs_log_ea": "EA: mean over classes of abs(log EA), where EA is the misses of a class over its false alarms, as "
                       "probabilities; 0 is balance. Read it beside the accuracy: a model that never learned has little.",
    "mean_abs_log_ea_after": "Local: the last cohort's own models before and after local training, in percent, each client the "
                             "same weight; frequent: classes of which the client has at least the mean of its classes, "
                             "missing: of which it has no example, rare: the others.",
    "drift_relative": "Drift: distance of the client updates to their mean over the mean's norm, and their cosine to it; "
                      "mean of the last 20 rounds.",
    "spread": "Spread over rounds: sample standard deviation of the overall accuracy over the evaluated ones of the "
              "last 20 rounds, in percentage points.",
    "rounds_to_": "Rounds to a target: the first evaluated round with this overall accuracy in percent; \"-\" where not "
                  "every seed reached it, and for a run that starts from another one.",
}  # fmt: skip
"""What stands under a table about columns whose names are, or (last) begin like, these."""


def course_section(runs: Sequence[RunRecord]) -> Section:
    """Returns the table on the way to the last round, with the runs' own targets.

    Spread and rounds to a target depend on which rounds were evaluated: they are left out where that is not the same.
    """
    reached = {f"rounds_to_{t:g}": (f"rounds to {100 * t:g}", f"rounds to {100 * t:g} % overall accuracy", True, 1.0)
               for t in targets(runs)}  # fmt: skip
    way = _section(
        "course", "Drift, stability and convergence",
        drift_relative=("relative drift", "distance of the updates to their mean, over its norm", None, 1.0, 2),
        drift_cosine=("cosine", "cosine of the updates to their mean", None, 1.0, 2),
        spread=("spread over rounds", "spread of the overall accuracy over the last 20 rounds", True, 100.0, 2), **reached,
    )  # fmt: skip
    alike = len({run.config["evaluation"]["every"] for run in runs}) == 1
    return way if alike else way._replace(columns=way.columns[:2])


@dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in the seed alone."""

    label: str
    runs: tuple[RunRecord, ...]  # ascending seed

    @property
    def seeds(self) -> tuple[int, ...]:
        """The runs' seeds."""
        return tuple(run.config["seed"] for run in self.runs)

    @cached_property
    def numbers(self) -> tuple[dict[str, Any], ...]:
        """Each run's numbers by section: the last evaluated round's record, "before", "course" and "traffic"."""
        before = [run.last.get("readings", {}).get("before", {}).get("test", {}) for run in self.runs]
        sent = [run.records[-1].get("bytes", {}) for run in self.runs]  # an older run did not count
        traffic = [{"down": b.get("cumulative_down"), "up": b.get("cumulative_up")} for b in sent]
        return tuple(
            {**run.last, **({"before": known} if known else {}), "course": course(run), "traffic": t}
            for run, known, t in zip(self.runs, before, traffic, strict=True)
        )

    def values(self, key: str) -> dict[int, float | None]:
        """Returns a column's number by seed, from the last evaluated round; None where there is none."""
        section, _, name = key.partition(".")
        return {seed: known.get(section, {}).get(name) for seed, known in zip(self.seeds, self.numbers, strict=True)}


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a nested table's values with their dotted keys; lists are values."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested table by dotted keys; lists are values.

    Example:
        >>> flatten({"data": {"name": "digits"}, "seed": 0})
        {'data.name': 'digits', 'seed': 0}
    """
    return dict(leaves(table, prefix))


def under(key: str, prefixes: Iterable[str]) -> bool:
    """Says whether a dotted key is one of the prefixes or lies below one.

    Example:
        >>> under("data.longtail.factor", ["data.longtail"]), under("data.longtails", ["data.longtail"])
        (True, False)
    """
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def own(key: str) -> bool:
    """Says whether a key is one of the algorithm's own hyper-parameters, in which methods may differ."""
    return under(key, ["algorithm"]) and not under(key, ["algorithm.optimizer"])


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted keys in which flat tables differ, in their order there."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [k for k in keys if any(t.get(k, ABSENT) != tables[0].get(k, ABSENT) for t in tables)]


def settings(table: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns "key=value" for keys of a flat table, without the words algorithm and name; a start as "after METHOD".

    Example:
        >>> settings({"algorithm.mu": 0.1, "start": "runs/fedavg-seed{seed}"}, ["algorithm.mu", "rounds", "start"])
        ['mu=0.1', 'rounds=absent', 'after fedavg']
    """
    said: list[str] = []
    for key in keys:
        value = table.get(key, ABSENT)
        after = key == "start" and isinstance(value, str) and value
        short = key.removeprefix("algorithm.").removesuffix(".name")
        said.append(f"after {PurePath(value).name.removesuffix('-seed{seed}')}" if after else f"{short}={show(value)}")
    return said


def show(value: Any) -> str:
    """Returns a configuration's value as a reader expects it."""
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def distinct(values: Iterable[str]) -> list[str]:
    """Returns the values without repetition, in their order."""
    return list(dict.fromkeys(values))


def defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default hyper-parameters of a flat table's algorithm, by dotted key.

    Where the table picks another class for one of them (a loss), the options of that class have their own defaults. Empty
    if not all have a default.
    """
    name = {"name": table["algorithm.name"]}
    try:
        plain = flatten(config.to_dict(config.from_dict(Algorithm, name)), "algorithm.")
        chosen = {key.split(".")[1]: {"name": value} for key, value in table.items() if key.startswith("algorithm.")
                  and key.endswith(".name") and key.count(".") == 2 and value != plain.get(key)}  # fmt: skip
        own = flatten(config.to_dict(config.from_dict(Algorithm, {**name, **chosen})), "algorithm.")
    except ConfigError:
        return {}
    return {**own, **{key: value for key, value in plain.items() if key.endswith(".name")}}


def shares_counts(table: Mapping[str, Any]) -> bool:
    """Says whether the method of a configuration has clients reveal their class counts; False if it cannot be loaded."""
    try:
        return config.from_dict(Algorithm, table["algorithm"]).shares_counts
    except ConfigError:
        return False


def group(runs: Sequence[RunRecord]) -> tuple[Method, ...]:
    """Sorts runs into methods: same configuration but for the seed and what does not change the numbers.

    A label is the algorithm's name; where runs of one algorithm differ, their hyper-parameters that differ and are not
    the default; where runs differ elsewhere, those keys too.

    Args:
        runs: in the order in which the methods shall stand.

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
    labels = _labels(list(tables.values()))
    methods = [Method(label, tuple(sorted(members, key=lambda run: run.config["seed"])))
               for label, members in zip(labels, found.values(), strict=True)]  # fmt: skip
    for method in methods:
        for one, other in zip(method.runs, method.runs[1:], strict=False):
            if one.config["seed"] == other.config["seed"]:
                raise ConfigError(f"{one.folder} and {other.folder} are the same experiment with the same seed "
                                  f"{one.config['seed']}. Name only one of them.")  # fmt: skip
    return tuple(methods)


def _labels(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a label for each of different flat configurations: the short ones if these tell them apart."""
    short = [_label(table, tables, brief=True) for table in tables]
    return short if len({*short}) == len(tables) else [_label(table, tables, brief=False) for table in tables]


def _label(table: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], brief: bool) -> str:
    """Returns a configuration's label; a brief one leaves out what it does not have, and rounds beside a start."""
    name = table["algorithm.name"]
    names = dict.fromkeys(other["algorithm.name"] for other in tables)
    short = [known.rpartition(".py:")[2] for known in names]  # "Name" for a user's own "folder/file.py:Name"
    mine = name.rpartition(".py:")[2]
    siblings = [other for other in tables if other["algorithm.name"] == name]
    default = defaults(table)
    keys = [k for k in differing(siblings) if own(k) and table.get(k, ABSENT) != default.get(k, ABSENT)]
    elsewhere = [k for k in differing(tables) if not own(k)]
    if brief:
        keys = [k for k in keys if k in table]
        left_out = [*(["rounds"] if "start" in elsewhere else []), *([] if table.get("start") else ["start"])]
        elsewhere = [k for k in elsewhere if k in table and k not in left_out]
    parts = settings(table, [*keys, *elsewhere])
    return (mine if short.count(mine) == 1 else name) + (f" ({', '.join(parts)})" if parts else "")
