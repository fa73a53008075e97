"""Pictures of runs and partitions, each a matplotlib Figure of one column's width (8.6 cm).

Lines are means over seeds, bands go from the lowest to the highest seed. Examples are coloured by viridis, balances by the
diverging map PuOr, methods as `fedtail.drawing` says. `save` writes a figure as PNG or SVG.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtail.drawing import (
    COLOURS,
    FEW,
    Floats,
    Ints,
    band,
    by_frequency,
    integers,
    legend,
    legend_height,
    look,
    name_classes,
    new_figure,
    over_seeds,
    plain_logarithmic,
    save,
    spearman,
    styled,
    wrapped,
)
from fedtail.errors import ConfigError
from fedtail.methods import SECTIONS, Method, group
from fedtail.metrics import ShotGroups
from fedtail.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["balance", "classes", "clients", "curves", "partition", "prior", "save"]

SHADES = {"head": "#DEDEDE", "medium": "#EEEEEE", "tail": "#FAFAFA"}
WINDOW = 9  # neighbouring classes that a line averages where there are many


@styled
def partition(counts: Ints) -> "Figure":
    """Draws who holds what: a cell for each class and client, coloured by its examples, and the sums beside it.

    Above each client stands its size, right of each class its examples on all clients and the number of its holders: in
    the last rows, who holds the tail.

    Args:
        counts: n_kc, int64 [clients, classes].
    """
    from matplotlib.colors import LogNorm

    clients, classes = counts.shape
    totals = counts.sum(0)
    order = by_frequency(totals)
    figure = new_figure(3.4 if classes <= 10 else 4.5)
    grid = figure.add_gridspec(2, 3, width_ratios=[4, 1.1, 1.1], height_ratios=[1, 5])
    cells = figure.add_subplot(grid[1, 0])
    bars, held = (figure.add_subplot(grid[1, place], sharey=cells) for place in (1, 2))
    sizes = figure.add_subplot(grid[0, 0], sharex=cells)
    top = max(2, counts.max(initial=0))
    image = cells.imshow(np.ma.masked_equal(counts.T[order], 0), norm=LogNorm(1, top), cmap="viridis_r", aspect="auto",
                         interpolation="nearest")  # fmt: skip
    cells.set_xlabel("Client")
    integers(cells.xaxis)
    name_classes(cells.yaxis, order, "top")
    sizes.bar(range(clients), counts.sum(1), width=0.8 if clients <= FEW else 1, color="#666666")
    sizes.tick_params(bottom=False, labelbottom=False)
    sizes.set_ylabel("Size")
    sizes.set_yticks([0, int(counts.sum(1).max(initial=1))])
    _class_sums(bars, totals[order], "Examples")
    _class_sums(held, (counts > 0).sum(0)[order], "Holders")
    ticks, plain = plain_logarithmic(1, top)
    bar = figure.colorbar(
        image, ax=[cells, bars, held], location="bottom", aspect=40, pad=0.02, ticks=ticks, format=plain
    )
    bar.minorticks_off()
    bar.set_label("Examples of the class on the client (white: none)")
    figure.suptitle(f"Who holds what: {totals.sum()} examples, {clients} clients, {classes} classes")
    return figure


def _class_sums(axes: "Axes", values: Ints, title: str) -> None:
    """Draws a bar a class, with its number where classes are few."""
    few = len(values) <= FEW
    axes.barh(range(len(values)), values, height=0.8 if few else 1, color="#666666")
    axes.tick_params(left=False, labelleft=False)
    axes.set_xlabel(title)
    axes.set_xlim(0, (2.1 if few else 1.1) * max(1, values.max(initial=0)))
    if few:
        for row, value in enumerate(values):
            axes.annotate(f"{value}", (value, row), (2, 0), textcoords="offset points", va="center", fontsize=6.5)
        axes.set_xticks([0], [" "])
        axes.tick_params(bottom=False)
    else:
        axes.set_xticks([0, int(values.max(initial=1))])


@styled
def classes(runs: Sequence[RunRecord]) -> "Figure":
    """Draws the long-tail picture: the recall of each class against its training count, one line a method.

    Where there are more than 20 classes, dots are classes and lines the mean of nine neighbours in frequency. The shades
    are the shot groups of the first run.

    Args:
        runs: several seeds and methods; the last evaluated round of each is drawn.

    Raises:
        ConfigError: the runs' numbers of classes differ.
    """
    methods = group(runs)
    if len(sizes := {run.counts.shape[1] for run in runs}) > 1:
        raise ConfigError(f"the runs have {sorted(sizes)} classes. Draw those with equal classes together.")
    figure = new_figure(2.5 + legend_height([method.label for method in methods]))
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_ylim(-2, 103)
    places: list[Floats] = []
    for number, method in enumerate(methods):
        order, x = _places(method.runs)
        recall = np.array([run.last["test"]["per_class_recall"] for run in method.runs], np.float64)[:, order]
        style = look(number)
        if len(order) > FEW:
            axes.plot(x, 100 * recall.mean(0), ".", color=style["color"], markersize=2, alpha=0.5)
            recall, style = _smooth(recall), {**style, "marker": ""}
        band(axes, x, 100 * recall, style, method.label)
        places.append(x)
    _frequency_axis(axes, np.concatenate(places))
    axes.set_ylabel("Recall, global test set (%)")
    order, x = _places(runs[:1])
    _shade(axes, x, [_group_of(runs[0].groups, c) for c in order.tolist()])
    lines = "" if len(order) <= FEW else f" (line: {WINDOW} neighbours' mean)"
    axes.set_title(f"Recall by class frequency{lines}")
    legend(figure, [axes], over_seeds(methods))
    return figure


def _places(runs: Sequence[RunRecord]) -> tuple[Ints, Floats]:
    """Returns the classes that have test examples, most frequent first, and their mean training counts.

    A class without training examples has no place on a logarithmic axis: it gets 0.5.
    """
    totals = np.mean([run.counts.sum(0) for run in runs], axis=0)
    judged = np.array([recall is not None for recall in runs[0].last["test"]["per_class_recall"]])
    order = by_frequency(totals)
    order = order[judged[order]]
    return order, np.maximum(totals[order], 0.5)


def _frequency_axis(axes: "Axes", x: Floats) -> None:
    """Makes room for the counts x, most frequent left, and labels them."""
    low, high = float(x.min()), float(x.max())
    axes.set_xlim(1.15 * high, low / 1.15)
    ticks, plain = plain_logarithmic(low, high)
    axes.xaxis.set(major_locator=ticks, major_formatter=plain)
    axes.minorticks_off()
    axes.set_xlabel("Training examples of the class" + (" (none: drawn at 0.5)" if low == 0.5 else ""))


def _smooth(values: Floats) -> Floats:
    """Returns the mean over neighbouring classes, [seeds, classes]; fewer neighbours at the ends."""
    half = WINDOW // 2
    windows = [values[:, max(0, i - half) : i + half + 1] for i in range(values.shape[1])]
    return np.stack([window.mean(1) for window in windows], 1)


def _group_of(groups: ShotGroups, number: int) -> str:
    return next((name for name, members in groups._asdict().items() if number in members), "")


def _shade(axes: "Axes", x: Floats, names: Sequence[str]) -> None:
    """Shades runs of neighbouring classes of one shot group and names each group over its widest stretch."""
    edges = [axes.get_xlim()[0], *np.sqrt(x[1:] * x[:-1]), axes.get_xlim()[1]]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    width = np.log(edges[0] / edges[-1])
    widest: dict[str, tuple[float, float]] = {}
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        name, left, right = names[start], edges[start], edges[end]
        if name:
            axes.axvspan(left, right, color=SHADES[name], zorder=0, linewidth=0)
            widest[name] = max(widest.get(name, (0.0, 0.0)), (np.log(left / right) / width, np.sqrt(left * right)))
    places = [widest[name][1] for name in widest]
    close = any(abs(np.log(a / b)) < 0.2 * width for a, b in itertools.pairwise(places))
    labels = [f"{name}\n" if close and name == "medium" else name for name in widest]
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, labels)
    top.minorticks_off()
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


TITLES = {column.key: (section.title, column.words, column.scale) for section in SECTIONS for column in section.columns}


@styled
def curves(runs: Sequence[RunRecord], metrics: Sequence[str] = ("test.accuracy", "test.tail")) -> "Figure":
    """Draws metrics over rounds, one panel each, one line a method.

    Args:
        runs: several seeds and methods; of each method the rounds that all its seeds have are drawn.
        metrics: places in a record, for example "test.head", "local.worst_decile", "train.loss"; at least one. The accuracy
            of a shot group without classes is left out.

    Raises:
        ConfigError: no run has the metric as a number, or all of them are left out.
    """
    methods = group(runs)
    metrics = [metric for metric in metrics if not _empty(runs, metric)] or metrics
    figure = new_figure(0.4 + 1.5 * len(metrics) + legend_height([method.label for method in methods]))
    panels, before = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0], ""
    for axes, metric in zip(panels, metrics, strict=True):
        where, name, scale = TITLES.get(metric, ("", metric, 1.0))
        for number, method in enumerate(methods):
            rounds, values = _series(method, metric)
            style = look(number) if len(rounds) <= 15 else {**look(number), "marker": ""}
            band(axes, rounds, scale * values, style, method.label)
        if not axes.lines or not any(len(line.get_xdata()) for line in axes.lines):  # type: ignore[arg-type]
            raise ConfigError(f"no run records {metric!r}; known are {', '.join(_known(runs))}.")
        if axes is panels[0] or where != before:
            axes.set_title(where)
        before = where
        axes.set_ylabel(f"{name[0].upper()}{name[1:]}{' (%)' if scale == 100 else ''}" if where else name)
        axes.grid(axis="y")
    panels[-1].set_xlabel("Round")
    integers(panels[-1].xaxis)
    legend(figure, [panels[0]], over_seeds(methods))
    return figure


def _number(record: dict[str, Any], metric: str) -> float:
    section, _, name = metric.partition(".")
    value = record.get(section, {}).get(name) if isinstance(record.get(section), dict) else None
    return float(value) if isinstance(value, int | float) else np.nan


def _empty(runs: Sequence[RunRecord], metric: str) -> bool:
    """Says whether a metric was always recorded as missing: that of a shot group without classes."""
    section, _, name = metric.partition(".")
    found = [record[section] for run in runs for record in run.records if isinstance(record.get(section), dict)]
    return any(name in table for table in found) and all(table.get(name) is None for table in found)


def _series(method: Method, metric: str) -> tuple[Floats, Floats]:
    """Returns the rounds done, (n,), and a metric's values, [seeds, n], where every seed has it."""
    found = [{r["round"] + 1: v for r in run.records if not np.isnan(v := _number(r, metric))} for run in method.runs]
    rounds = sorted(set.intersection(*(set(one) for one in found)))
    return np.array(rounds, np.float64), np.array([[one[r] for r in rounds] for one in found], np.float64)


def _known(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the metrics of a run's last evaluated round."""
    tables = {k: v for k, v in runs[0].last.items() if isinstance(v, dict)}
    return [
        f"{k}.{name}" for k, table in tables.items() for name in table if not np.isnan(_number(tables, f"{k}.{name}"))
    ]


@styled
def prior(run: RunRecord) -> "Figure":
    """Draws the analyser's estimate of the class shares beside the true ones, and how near it was in every round.

    Distance is sum_c |estimate_c - share_c|, in [0, 2]; agreement of the order is Spearman's rank correlation.

    Raises:
        ConfigError: the run's method records no prior.
    """
    found = [(r["round"] + 1, r["diagnostics"]["prior"]) for r in run.records if "prior" in r.get("diagnostics", {})]
    if not found:
        raise _lacks(run, "prior", "an analyser")
    totals = run.counts.sum(0)
    order = by_frequency(totals)
    true = totals[order] / totals.sum()
    rounds, estimates = np.array([r for r, _ in found]), np.array([p for _, p in found], np.float64)[:, order]
    figure = new_figure(3.9)
    shares, course = figure.subplots(2, 1)
    shares.bar(range(len(true)), 100 * true, width=0.8, color="#BBBBBB", label="true share")
    size = 3.5 if len(true) <= FEW else 1.8
    shares.plot(100 * estimates[-1], "o", color=COLOURS[1], markersize=size, label=f"estimate after round {rounds[-1]}")
    name_classes(shares.xaxis, order, "left")
    shares.set_ylabel("Share of the examples (%)")
    shares.set_title(f"Class prior of {_title(run)}: estimated and true")
    marker = "o" if len(rounds) == 1 else ""
    course.plot(
        rounds, np.abs(estimates - true).sum(1), color=COLOURS[0], marker=marker, label="L1 distance (0: equal)"
    )
    agreement = [spearman(estimate, true) for estimate in estimates]
    course.plot(rounds, agreement, "--", color=COLOURS[1], marker=marker, label="Spearman (1: same order)")
    course.set_xlabel("Round")
    course.set_ylabel("Distance, correlation")
    course.set_title("Agreement over the rounds")
    course.grid(axis="y")
    integers(course.xaxis)
    legend(figure, [shares, course])
    return figure


def _title(run: RunRecord) -> str:
    return f"{group([run])[0].label}, seed {run.config['seed']}"


def _lacks(run: RunRecord, what: str, part: str) -> ConfigError:
    name = group([run])[0].label
    return ConfigError(f"{run.folder} ({name}) records no {what}: only methods with {part} do. Name a fedgrab run.")


@styled
def balance(run: RunRecord) -> "Figure":
    """Draws the balance of each class: its positive over its negative gradient, round by round.

    Raises:
        ConfigError: the run's method records no such gradients.
    """
    train = [r["train"] for r in run.records if "positive_gradient" in r.get("train", {})]
    if not train:
        raise _lacks(run, "gradients by class", "a balancer")
    order = by_frequency(run.counts.sum(0))
    positive, negative = (np.array([t[f"{sign}_gradient"] for t in train], np.float64)[:, order].T
                          for sign in ("positive", "negative"))  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(positive / negative)  # [classes, rounds]
    ratio[~np.isfinite(ratio)] = np.nan
    limit = max(1.0, float(np.nanpercentile(np.abs(ratio), 99))) if not np.isnan(ratio).all() else 1.0
    figure = new_figure(2.6 if len(order) <= FEW else 3.4)
    axes = figure.subplots()
    axes.set_facecolor("#999999")
    image = axes.imshow(ratio, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest",
                        extent=(0.5, len(train) + 0.5, len(order) - 0.5, -0.5))  # fmt: skip
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, extend="both")
    powers = np.unique(np.linspace(-np.floor(limit), np.floor(limit), 5).round()).astype(int)
    bar.set_ticks(powers.tolist(), labels=[f"{2**p}" if p >= 0 else f"1/{2**-p}" for p in powers.tolist()])
    bar.set_label("Positive / negative gradient (1: balanced; grey: none)")
    axes.set_xlabel("Round")
    integers(axes.xaxis)
    name_classes(axes.yaxis, order, "top")
    axes.set_title(f"Balance of the gradients by class, {_title(run)}")
    return figure


JUDGED = {"local": "", "tuned": ", tuned", "personal": ", personal", "newcomers": ", newcomers",
          "newcomers_tuned": ", newcomers, tuned"}  # fmt: skip
"""Entries of a record on local test sets, and what they add to a method's name."""


@styled
def clients(runs: Sequence[RunRecord]) -> "Figure":
    """Draws how the clients fare in the last round: mean accuracy, its spread over clients, and the worst decile.

    Everything is averaged over seeds. Tuned and personal models and newcomers have rows of their own.

    Raises:
        ConfigError: no run was judged on local test sets.
    """
    rows = [(m, name) for m in group(runs) for name in JUDGED if name in m.runs[0].last]
    if not rows:
        raise ConfigError(
            "no run was judged on local test sets. Set evaluation.local = true, or judge with `fedtail evaluate`."
        )
    labels = [wrapped(m.label + JUDGED[name], 24) for m, name in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    figure = new_figure(1.1 + (0.16 + 0.12 * lines) * len(rows))
    axes = figure.subplots()
    for place, (method, name) in enumerate(rows):
        keys = ("mean", "std", "worst_decile")
        found = [[_number(run.last, f"{name}.{key}") for key in keys] for run in method.runs]
        mean, std, worst = 100 * np.nanmean(found, 0)
        first = place == 0
        axes.errorbar(mean, place, xerr=std, fmt="o", capsize=2, color=COLOURS[0],
                      label="mean ± spread over clients" if first else None)  # fmt: skip
        axes.plot(worst, place, "v", color=COLOURS[1], label="mean of the worst decile" if first else None)
    axes.set_yticks(range(len(rows)), labels)
    integers(axes.xaxis)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("Accuracy, local test sets (%)")
    axes.grid(axis="x")
    figure.suptitle("How the clients fare in the last round")
    legend(figure, [axes])
    return figure
