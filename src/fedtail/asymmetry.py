"""Pictures of error asymmetry: EA of each class over the rounds, and accuracy against it for many methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtail.drawing import (
    COLOURS,
    FEW,
    Floats,
    by_frequency,
    integers,
    legend,
    legend_height,
    look,
    name_classes,
    new_figure,
    over_seeds,
    styled,
    wrapped,
)
from fedtail.errors import ConfigError
from fedtail.methods import Method, group
from fedtail.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = 44  # letters in a line of a panel's title
FILLS = ("full", "none", "left", "right")  # of marks: in the place of a line's dashes


@styled
def classes(runs: Sequence[RunRecord]) -> "Figure":
    """Draws the error asymmetry of every class of the global model over the rounds, one panel a method.

    Colours are log2 EA, averaged over seeds: blue-violet classes are predicted too rarely (EA > 1), orange ones too often.

    Args:
        runs: several seeds and methods with equal numbers of classes.

    Raises:
        ConfigError: no run records error asymmetry, or the numbers of classes differ.
    """
    if len(sizes := {run.counts.shape[1] for run in runs}) > 1:
        raise ConfigError(f"the runs have {sorted(sizes)} classes. Draw those with equal classes together.")
    methods = group(runs)
    found = [_over_rounds(method) for method in methods]
    if not any(len(rounds) for rounds, _ in found):
        raise ConfigError("no run records error asymmetry: they were made by an older version. Run one anew.")
    order = by_frequency(runs[0].counts.sum(0))
    known = np.abs(np.concatenate([values.ravel() for _, values in found]))
    limit = max(1.0, float(np.nanpercentile(known, 98)))
    figure = new_figure(0.9 + (1.3 if len(order) <= FEW else 1.9) * len(methods))
    panels = figure.subplots(len(methods), 1, squeeze=False)[:, 0]
    for axes, method, (rounds, values) in zip(panels, methods, found, strict=True):
        axes.set_facecolor("#999999")
        cells = (_edges(rounds), np.arange(len(order) + 1) - 0.5, values[:, order].T)
        axes.pcolormesh(*cells, cmap="PuOr", vmin=-limit, vmax=limit)
        axes.invert_yaxis()
        name_classes(axes.yaxis, order, "top")
        integers(axes.xaxis)
        axes.set_title(wrapped(method.label, TITLE))
    figure.supylabel(panels[0].get_ylabel(), fontsize=7.5)  # once for all panels
    for axes in panels:
        axes.set_ylabel("")
    panels[-1].set_xlabel("Round")
    bar = figure.colorbar(panels[0].collections[0], ax=list(panels), location="bottom", aspect=40, extend="both")
    powers = np.unique(np.linspace(-np.floor(limit), np.floor(limit), 5).round()).astype(int).tolist()
    bar.set_ticks(powers, labels=[f"{2**p}" if p >= 0 else f"1/{2**-p}" for p in powers])
    bar.set_label("EA, misses over false alarms (1: balanced; grey: unknown)")
    return figure


def _over_rounds(method: Method) -> tuple[Floats, Floats]:
    """Returns the rounds done that all seeds have, (n,), and log2 EA, mean over seeds, [n, classes]."""
    found = [{r["round"] + 1: r["test"]["error_asymmetry"] for r in run.records if "error_asymmetry" in r.get("test", {})}
             for run in method.runs]  # fmt: skip
    rounds = sorted(set.intersection(*map(set, found)))
    values = np.array([[one[r] for r in rounds] for one in found], np.float64)
    return np.array(rounds, np.float64), np.log2(values).mean(0).reshape(len(rounds), method.runs[0].counts.shape[1])


def _edges(rounds: Floats) -> Floats:
    """Returns where the cells of evaluated rounds begin and end: half way between them."""
    middle = (rounds[1:] + rounds[:-1]) / 2
    step = rounds[1] - rounds[0] if len(rounds) > 1 else 1.0
    return np.array([rounds[0] - step / 2, *middle, rounds[-1] + step / 2]) if len(rounds) else np.zeros(1)


@styled
def tradeoff(runs: Sequence[RunRecord]) -> "Figure":
    """Draws accuracy against mean abs(log EA) of the last evaluated round, a mark a method: good is up and left.

    Two panels where clients' own models were judged: the global model, and these after local training. Marks are means over
    seeds, bars go from the lowest to the highest one.

    Raises:
        ConfigError: no run records error asymmetry.
    """
    methods = group(runs)
    places = [("Global model", "test.mean_abs_log_ea", "test.accuracy"),
              ("Clients' own models", "local_models.mean_abs_log_ea_after", "local_models.accuracy_after")]  # fmt: skip
    places = [place for place in places if any(v is not None for m in methods for v in m.values(place[1]).values())]
    if not places:
        raise ConfigError("no run records error asymmetry: they were made by an older version. Run one anew.")
    figure = new_figure(0.4 + 1.9 * len(places) + legend_height([method.label for method in methods]))
    panels = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for axes, (title, across, upwards) in zip(panels, places, strict=True):
        for number, method in enumerate(methods):
            pairs = [(x, 100 * y) for x, y in zip(method.values(across).values(), method.values(upwards).values(), strict=True)
                     if x is not None and y is not None]  # fmt: skip
            if pairs:
                (x, y), low, high = (f(pairs, axis=0) for f in (np.mean, np.min, np.max))
                style = look(number)
                axes.errorbar(x, y, xerr=[[x - low[0]], [high[0] - x]], yerr=[[y - low[1]], [high[1] - y]], fmt=style["marker"],
                              color=style["color"], fillstyle=FILLS[number // len(COLOURS) % len(FILLS)], elinewidth=0.8,
                              label=method.label)  # fmt: skip
        axes.set_title(title)
        axes.set_ylabel("Accuracy, global test set (%)")
        axes.grid()
        axes.set_axisbelow(True)
    panels[-1].set_xlabel("Mean abs log EA (0: misses equal false alarms)")
    legend(figure, list(panels), over_seeds(methods).replace("line: ", "mark: ").replace("band", "bar"))
    return figure
