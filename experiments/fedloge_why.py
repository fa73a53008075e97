"""Why FedLoGe works: what its frozen sparse classifier does to the features, and which part of it does so.

    python experiments/fedloge_why.py           # half an hour on two quiet cores; writes results/fedloge_why.json after each
                                                # variant, and goes on there when it is started again
    python experiments/fedloge_why.py --draw    # draws docs/images/fedloge-why-*.png from it

Fashion-MNIST-LT as in fashion_mnist_personal.toml, one seed. The variants: FedLoGe (a sparse simplex of sparsity .6 and row
norm .1), other sparsities (0: the dense simplex) and norms; FedAvg (a learned classifier); and between them a classifier whose
rows are held at norm .1 while their directions are learned: the small norm without the frame. Before the first round and
every few rounds the features of test and training set are measured by `fedtail.geometry`, the generic heads by accuracy.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail import (
    Algorithm,
    Batch,
    Context,
    EngineOptions,
    Experiment,
    FedAvg,
    Local,
    Variables,
    config,
    drawing,
    sgd_step,
    sweep,
)
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.evaluate import confusion, shot_groups
from fedtail.experiment import Federation
from fedtail.files import write_atomic
from fedtail.geometry import ClassGeometry, class_geometry, nearest_angles, row_angles
from fedtail.heads import features, head_names, logits
from fedtail.losses import mean_cross_entropy
from fedtail.metrics import ShotGroups, from_confusion
from fedtail.runs import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
GROUPS = ShotGroups._fields
DEFAULT, LEARNED = "sparsity .6, norm .1", "learned (FedAvg)"


@dataclass(frozen=True, kw_only=True)
class Directions(FedAvg):
    """FedAvg whose classifier has no bias and rows of one length: their directions are learned, the scale is not.

    What is kept as its rows' norms are those of the parameters, before they are scaled.
    """

    norm: float = 0.1

    def local_step(
        self, ctx: Context, message: Variables, client: Any, local: Local, batch: Batch
    ) -> tuple[Local, dict[str, Tensor]]:
        """One step on CE(norm * w_c / |w_c| . h, y)."""
        weight = head_names(ctx.task, "Directions")[0]

        def objective(v: Variables, extra: Any) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            z = F.linear(h, self.norm * F.normalize(v.params[weight], dim=1))
            return mean_cross_entropy(z, batch), (new, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)


class Variant(NamedTuple):
    """A method, the classifiers that its model is read with (the first is that of the backbone's loss), and its line."""

    algorithm: Algorithm
    heads: tuple[str, ...]
    line: int


FROZEN = ("fixed", "realigned", "raw")
VARIANTS = {  # in the order in which they are trained
    DEFAULT: Variant(FedLoGe(), FROZEN, 6),
    LEARNED: Variant(FedAvg(), ("raw", "realigned"), 0),
    "learned, norm .1": Variant(Directions(), ("realigned",), 7),
    "dense, norm .1": Variant(FedLoGe(sparsity=0.0), FROZEN, 1),
    "sparsity .3, norm .1": Variant(FedLoGe(sparsity=0.3), FROZEN, 4),
    "sparsity .9, norm .1": Variant(FedLoGe(sparsity=0.9), FROZEN, 2),
    "sparsity .6, norm .3": Variant(FedLoGe(norm=0.3), FROZEN, 3),
    "sparsity .6, norm 1": Variant(FedLoGe(norm=1.0), FROZEN, 5),
}


def setting(args: argparse.Namespace) -> Experiment:
    """Returns what all variants share: the first row of fashion_mnist_personal.toml, but for its algorithm."""
    base = sweep.load(HERE / "fashion_mnist_personal.toml", seeds=[args.seed]).runs[0].experiment
    data = dataclasses.replace(
        base.data,
        longtail=dataclasses.replace(base.data.longtail, num_max=args.largest),  # type: ignore[arg-type]
        partition=dataclasses.replace(base.data.partition, clients=args.clients),  # type: ignore[arg-type]
    )
    return dataclasses.replace(base, rounds=args.rounds, data=data, engine=EngineOptions())


def train(name: str, base: Experiment, every: int) -> dict[str, Any]:
    """Trains one variant; returns its measurements: before the first round, every few rounds and after the last."""
    variant, spent = VARIANTS[name], 0.0
    algorithm = dataclasses.replace(variant.algorithm, optimizer=base.algorithm.optimizer)
    with contextlib.closing(Federation(dataclasses.replace(base, algorithm=algorithm))) as federation:
        found = [measure(federation, variant)]
        while federation.round < base.rounds:
            start = time.perf_counter()
            record = federation.step()
            federation.advance(record)
            spent += time.perf_counter() - start
            if federation.round % every == 0 or federation.round == base.rounds:
                found.append({**measure(federation, variant), "loss": record["train"]["loss"]})
                right = ", ".join(f"{head} {100 * s['all']:.1f} %" for head, s in found[-1]["test"]["accuracy"].items())
                pace = f"{spent / federation.round:.2f} s a round"
                print(f"{name}: round {federation.round}/{base.rounds}, {pace}; {right}", flush=True)
        options = config.to_dict(algorithm)
        return {"algorithm": {**options, "name": Path(options["name"]).name}, "heads": variant.heads,
                "groups": shot_groups(base.evaluation.groups, federation.data)._asdict(),
                "frame": frame(federation), "records": found, "seconds_a_round": round(spent / base.rounds, 3),
                "engine": federation.experiment.engine.name, "environment": environment(sys.argv)}  # fmt: skip


def frame(federation: Federation) -> dict[str, Any] | None:
    """Returns the frozen head's norms and angles by class, its share of zeros, and how many features no row reads."""
    if federation.constants == ():
        return None
    rows = federation.constants["weight"]
    return {"norm": plain(rows.norm(dim=1)), "nearest": plain(nearest_angles(rows)), "features": rows.shape[1],
            "zeros": plain(pruned(rows).float().mean(1)), "unread_features": int(pruned(rows).all(0).sum())}  # fmt: skip


def pruned(rows: Tensor) -> Tensor:
    """Says which entries of a frozen head are zero, [classes, d]: Adam too takes some there, to 1e-30 and the like."""
    return rows.abs() < 1e-6 * rows.abs().max()


@torch.no_grad()
def measure(federation: Federation, variant: Variant) -> dict[str, Any]:
    """Measures the present model: its classifier, and the features of the test and the training set under each head."""
    ctx, data = federation.context(), federation.data
    groups, message = shot_groups(federation.experiment.evaluation.groups, data), federation.message(ctx)
    heads = {name: FedLoGe(generic_head=name).variables(ctx, message, None).params for name in variant.heads}  # type: ignore[arg-type]
    weight = head_names(ctx.task, "FedLoGe")[0]
    rows = {name: head[weight] for name, head in {"classifier": message.params, **heads}.items()}
    held = torch.from_numpy(np.concatenate(data.owners))
    found: dict[str, Any] = {"round": federation.round, "norm": table(rows["classifier"].norm(dim=1), groups),
                             "nearest": table(nearest_angles(rows["classifier"]), groups)}  # fmt: skip
    for split, columns, chosen in (
        ("test", data.test, torch.arange(len(data.test["y"]))),
        ("train", data.columns, held),
    ):
        parts = (data.prepare(columns["x"].index_select(0, part), ctx.task.dtype) for part in chosen.split(500))
        h, y = torch.cat([features(ctx.task, message, x) for x in parts]), columns["y"][chosen]
        found[split] = {"accuracy": {}, **shape(class_geometry(h, y, data.num_classes), rows, groups)}
        for name, head in heads.items():
            counts = confusion(y.numpy(), logits(ctx.task, head, h).argmax(1).numpy(), data.num_classes)
            scores = from_confusion(counts, groups)
            found[split]["accuracy"][name] = {"classes": scores["per_class_recall"], "all": scores["balanced_accuracy"],
                                              **{group: scores[group] for group in GROUPS}}  # fmt: skip
    return found


def shape(found: ClassGeometry, rows: Mapping[str, Tensor], groups: ShotGroups) -> dict[str, Any]:
    """Returns norms of the class means, within-class spread, and angles of the centred means (degrees), by group."""
    spread = {"all": found.spread(), **{name: found.spread(members) for name, members in groups._asdict().items()}}
    result: dict[str, Any] = {
        "spread": dict(zip(spread, plain(torch.tensor([*spread.values()])), strict=True)),
        "within": table(found.within, groups),
        "mean_norm": table(found.means.norm(dim=1), groups),
        "centred_norm": table(found.between.sqrt(), groups),
        "nearest": table(nearest_angles(found.centred), groups),
        "angle_classifier": table(row_angles(found.centred, rows["classifier"]), groups),
    }
    if "fixed" in rows:  # what its zeros leave out: more of the noise than of the signal, if they prune noise
        zero, signal = pruned(rows["fixed"]), found.centred.square()
        result["angle_fixed"] = table(row_angles(found.centred, rows["fixed"]), groups)
        result["pruned_noise"] = table((found.variances * zero).sum(1) / found.within, groups)
        result["pruned_signal"] = table((signal * zero).sum(1) / found.between, groups)
    return result


def table(values: Tensor, groups: ShotGroups) -> dict[str, Any]:
    """Returns values (classes,) by class, and their means over all classes and over the shot groups."""
    parts = {"all": range(len(values)), **groups._asdict()}
    means = torch.stack([values[list(part)].nanmean() for part in parts.values()])
    return {"classes": plain(values), **dict(zip(parts, plain(means), strict=True))}


def plain(values: Tensor) -> list[float | None]:
    """Returns numbers of five digits, None for what is not finite: JSON has no NaN."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def fill(file: Path, settings: dict[str, Any], base: Experiment) -> None:
    """Trains the variants that a file does not hold yet; writes it after each."""
    kept = json.loads(file.read_text()) if file.is_file() else {"settings": settings, "variants": {}}
    if kept["settings"] != settings:
        sys.exit(f"{file} holds other settings: {kept['settings']}. Remove it, or name another with --output.")
    for name in VARIANTS:
        if name in kept["variants"]:
            print(f"{name}: done before", flush=True)
            continue
        kept["variants"][name] = train(name, base, settings["every"])
        write_atomic(file, json.dumps(kept) + "\n")


def report(variants: Mapping[str, Any]) -> None:
    """Prints a row a variant: what the last round's model is on the test set."""

    def percent(value: float | None) -> str:
        return "    -" if value is None else f"{100 * value:5.1f}"

    heading = (
        "accuracy (tail), %: trained head  realigned      raw        "
        "spread: test   tail  train   |mean|   pruned, %: noise signal"
    )
    print(f"{'':22}{heading}")
    for name, found in variants.items():
        last = found["records"][-1]
        heads = [last["test"]["accuracy"].get(head) for head in (found["heads"][0], "realigned", "raw")]
        scores = ["      -      " if h is None else f"{percent(h['all'])} ({percent(h['tail'])})" for h in heads]
        spread = [f"{last[s]['spread'][g]:6.3f}" for s, g in (("test", "all"), ("test", "tail"), ("train", "all"))]
        spread.append(f"{last['test']['centred_norm']['all']:7.1f}")
        left = [percent(last["test"].get(f"pruned_{what}", {}).get("all")) for what in ("noise", "signal")]
        print(f"{name:41}{'  '.join(scores)}   {'  '.join(spread)}   {'  '.join(left)}")


# Pictures -------------------------------------------------------------------------------------------------------------


def course(found: Mapping[str, Any], *path: str, first: int = 0) -> tuple[list[int], list[float]]:
    """Returns the rounds from a record on, and the values at a place in the records; NaN where there is none."""
    records = found["records"][first:]
    values = [functools.reduce(lambda part, key: part[key], path, record) for record in records]
    return [record["round"] for record in records], [math.nan if v is None else v for v in values]


def logarithmic(axes: "Axes") -> None:
    """Makes the vertical axis logarithmic, with plain numbers at it."""
    axes.set_yscale("log")
    locator, formatter = drawing.plain_logarithmic(*axes.get_ylim())
    axes.yaxis.set(major_locator=locator, major_formatter=formatter)
    axes.minorticks_off()


@drawing.styled
def geometry(variants: Mapping[str, Any]) -> "Figure":
    """Draws FedLoGe's and FedAvg's geometry over rounds, a line a shot group: angles, rows' norms, means' norms."""
    panels = (("Mean to its row (°)", ("test", "angle_classifier")), ("Nearest mean (°)", ("test", "nearest")),
              ("Nearest row (°)", ("nearest",)), ("Norm of the row", ("norm",)),
              ("Norm of the mean", ("test", "centred_norm")))  # fmt: skip
    figure = drawing.new_figure(0.8 + 1.15 * len(panels))
    axes = figure.subplots(len(panels), 2, sharex=True, sharey="row")
    for column, (name, title) in enumerate(((DEFAULT, "FedLoGe"), (LEARNED, "FedAvg"))):
        axes[0, column].set_title(title)
        for panel, (label, path) in zip(axes[:, column], panels, strict=True):
            for number, group in enumerate(GROUPS):
                line = {**drawing.look(number), "marker": ""}
                panel.plot(*course(variants[name], *path, group), label=group, **line)
                if label == panels[0][0] and name == DEFAULT:
                    panel.plot(*course(variants[name], "test", "angle_fixed", group), **{**line, "linestyle": ":"})
            panel.grid(axis="y")
            if not column:
                panel.set_ylabel(label)
        axes[-1, column].set_xlabel("Round")
        drawing.integers(axes[-1, column].xaxis)
    for panel in axes[-2:, 0]:
        logarithmic(panel)
    figure.align_ylabels()
    drawing.legend(figure, [axes[0, 0]], "rows of the shared head, dotted: of the frozen head")
    return figure


class Panel(NamedTuple):
    """A panel: what maps a variant to a place in its records, the values' unit, and the words at it."""

    place: Callable[[Mapping[str, Any]], tuple[str, ...]]
    unit: float
    label: str
    title: str = ""


@drawing.styled
def lines(variants: Mapping[str, Any], panels: Sequence[Panel], first: int = 0) -> "Figure":
    """Draws a line a variant over rounds, from a record on."""
    figure = drawing.new_figure(0.6 + 1.45 * len(panels) + drawing.legend_height([*variants]))
    axes = figure.subplots(len(panels), 1, sharex=True)
    for area, panel in zip(axes, panels, strict=True):
        for name, found in variants.items():
            x, y = course(found, *panel.place(found), first=first)
            line = {**drawing.look(VARIANTS[name].line), "marker": ""}
            area.plot(x, np.divide(y, panel.unit), label=name, **line)
        area.set_ylim(bottom=0)
        area.set_title(panel.title)
        area.set_ylabel(panel.label)
        area.grid(axis="y")
    axes[-1].set_xlabel("Round")
    drawing.integers(axes[-1].xaxis)
    figure.align_ylabels()
    drawing.legend(figure, [axes[0]], "one seed; the classifier of the backbone's loss is")
    return figure


def draw(variants: Mapping[str, Any], folder: Path) -> None:
    """Draws the three pictures."""
    title = "Spread within the classes over that between them"
    spread = [
        Panel(lambda _: ("test", "spread", "all"), 1, "Test set", title),
        Panel(lambda _: ("test", "spread", "tail"), 1, "Test set, tail"),
        Panel(lambda _: ("train", "spread", "all"), 1, "Training set"),
    ]
    every, tail = "All classes (%)", "Tail (%)"
    accuracy = [
        Panel(lambda found: ("test", "accuracy", found["heads"][0], "all"), 0.01, every,
              "Test accuracy of the backbone's classifier"),
        Panel(lambda found: ("test", "accuracy", found["heads"][0], "tail"), 0.01, tail),
        Panel(lambda _: ("test", "accuracy", "realigned", "all"), 0.01, every,
              "Test accuracy of the realigned (shared) head"),
        Panel(lambda _: ("test", "accuracy", "realigned", "tail"), 0.01, tail),
    ]  # fmt: skip
    pictures = {"geometry": geometry(variants), "accuracy": lines(variants, accuracy),
                "spread": lines(variants, spread, first=1)}  # untrained features spread far more  # fmt: skip
    for name, figure in pictures.items():
        drawing.save(figure, folder / f"fedloge-why-{name}.png")


def main() -> None:
    """Trains what is missing and prints a table; with --draw only draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="rounds between two measurements")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--largest", type=int, default=3000, help="training examples of the most frequent class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fedloge_why.json")
    parser.add_argument("--draw", action="store_true", help="draw what the output holds")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images", help="where to draw")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.output.read_text())["variants"], args.images)
        return
    base = setting(args)
    settings = json.loads(json.dumps({"every": args.every, "experiment": config.to_dict(base)}))
    fill(args.output, settings, base)
    report(json.loads(args.output.read_text())["variants"])


if __name__ == "__main__":
    main()
