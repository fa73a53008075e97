"""Judges the runs of an EFFGAN sweep, prints a table over seeds, and draws FID against bytes and the sample grids.

    python experiments/effgan_analysis.py experiments/results/effgan_fashion_mnist

Features of the small classifier judge 10,000 images of every reading; those of the ImageNet encoder (extra teachers), which
are a hundred times as slow, 2,000 of the ensemble and of FedGAN's mean. What is judged is kept in each run folder
(quality-FEATURE-COUNT.json), so that the script can be stopped and run again; from the kept files it prints and draws anew
all but the grids, which want the checkpoints.
"""

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fedtail import assessment, config, generation, runs
from fedtail.algorithms.effgan import EFFGAN
from fedtail.algorithms.mdgan import MDGAN
from fedtail.files import write_atomic

NAMES = {
    "model": "EFFGAN",
    "averaged": "FedGAN",
    "recalibrated": "FedGAN, statistics anew",
    "common": "start of the fine-tuning",
}
COLUMNS = ("fid", "kid", "precision", "recall", "density", "coverage", "modes", "mode_kl", "confidence", "purity")


def main():
    """Judges, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--features", nargs="+", default=["classifier:10000", "efflite0:2000"], metavar="FEATURE:COUNT")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    found = sorted(p.parent for p in options.folder.glob("*/config.toml"))
    found = [run for run in found if runs.rounds_done(run) == config.load(run).rounds]
    features = [(name, int(count)) for name, _, count in (text.partition(":") for text in options.features)]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:  # the slow part
        list(pool.map(judge, *zip(*((run, *feature) for run in found for feature in features), strict=True)))
    for feature, count in features:
        rows = [row for run in found for row in judged(run, feature, count)]
        print(f"\n## {feature}, {count} images: {', '.join(sorted({row['feature'] for row in rows}))}\n")
        table(rows)
        picture(rows, options.folder / f"fid-bytes-{feature}.png")
        if feature == "classifier":
            experts(found, count)
    grids(found, options.folder)


def judge(run, feature, count):
    """Judges a run, at most once; returns where the result is."""
    kept = run / f"quality-{feature}-{count}.json"
    if not kept.is_file():
        torch.set_num_threads(1)
        full = feature == "classifier"
        found = assessment.assess(run, feature, count, full=full, only=() if full else ("averaged",))
        write_atomic(kept, json.dumps({**found, "sizes": sizes(run)}))
    return kept


def sizes(run):
    """Parameters of a run's generator and discriminator, and values of an image."""
    task = generation.load(run).task
    found = {p: sum(v.numel() for k, v in task.initial.params.items() if k.startswith(p)) for p in ("gen", "dis")}
    return {**found, "pixels": int(np.prod(task.input_shape))}


def judged(run, feature, count):
    """The readings of a run as rows."""
    found, whole, records = json.loads(judge(run, feature, count).read_text()), config.load(run), runs.read(run)
    setting, drift = run.name.rpartition("-seed")[0], records.records[-1]["diagnostics"].get("drift")
    for name, scores in found["readings"].items():
        if (method := method_of(whole, name)) is None:
            continue
        sent = bytes_sent(found["sizes"], len(records.counts), whole, name)
        yield {"setting": setting, "method": method, "seed": whole.seed, "feature": found["feature"], "floor": found["floor"],
               "megabytes": sent / 1e6, "drift": drift,
               "memory": found.get("memory", {}).get("ratio") if name == "model" else None,
               "use": found.get("use", {}).get("accuracy") if name == "model" else None, **scores}  # fmt: skip


def method_of(whole, reading):
    """Returns the method that a reading of a run is; None where it is nobody's."""
    if not isinstance(whole.algorithm, EFFGAN):
        return type(whole.algorithm).__name__
    if whole.rounds > 1:
        return NAMES[reading]
    return "alone" if reading == "model" else None  # no method takes the mean of clients that never met, or their start


def bytes_sent(size, clients, whole, reading):
    """Bytes of parameters and images that travel in all, both directions, full participation."""
    if isinstance(whole.algorithm, MDGAN):
        swaps = whole.rounds // whole.algorithm.swap_every if whole.algorithm.swap_every else 0
        return 4 * clients * (whole.rounds * 3 * whole.local.batch_size * size["pixels"] + swaps * size["dis"])
    if clients == 1:
        return 0
    every = 2 * whole.rounds * clients * (size["gen"] + size["dis"])
    if reading == "common":
        return 4 * every * (whole.rounds - 1) // whole.rounds
    last = clients * size["dis"] if isinstance(whole.algorithm, EFFGAN) and reading == "model" else 0
    return 4 * (every - last)


def table(rows):
    """Prints mean and standard deviation over seeds as Markdown."""
    columns = ("megabytes", "floor", *COLUMNS, "drift", "memory", "use")
    print("| setting | method | seeds |", " | ".join(columns), "|")
    print("|---|---|---:|" + "---:|" * len(columns))
    rows = sorted(rows, key=lambda r: (r["setting"], r["method"]))
    for (setting, method), group in itertools.groupby(rows, key=lambda r: (r["setting"], r["method"])):
        group = list(group)
        cells = [cell([r[c] for r in group if r.get(c) is not None]) for c in columns]
        print(f"| {setting} | {method} | {len(group)} | " + " | ".join(cells) + " |")


def experts(found, count):
    """Prints experts beside their ensemble, from 1,000 images each, and whether they repeat their clients' images."""
    print("\n| setting | seeds | purity, lowest | recall, best expert | ensemble | coverage, best expert | ensemble "
          "| precision, mean of experts | ensemble | nearer than 99 % of held-out images |")  # fmt: skip
    print("|---|---:|" + "---:|" * 8)
    kept = {}
    for run in found:
        members = json.loads(judge(run, "classifier", count).read_text())
        if "experts" in members:
            each = {name: values[:-1] for name, values in members["experts"].items()}
            whole = {name: values[-1] for name, values in members["experts"].items()}
            row = (min(each["purity"]), max(each["recall"]), whole["recall"], max(each["coverage"]), whole["coverage"],
                   np.mean(each["precision"]), whole["precision"], members["memory"]["closer"])  # fmt: skip
            kept.setdefault(run.name.rpartition("-seed")[0], []).append(row)
    for setting, rows in kept.items():
        print(f"| {setting} | {len(rows)} | " + " | ".join(cell(values) for values in zip(*rows, strict=True)) + " |")


def cell(values):
    """Mean and, of several values, their standard deviation."""
    if not values:
        return ""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def picture(rows, path):
    """FID against megabytes, a panel a setting but for its last word (k5-e20: k5), where runs differ in their bytes."""
    sent = {}
    for row in rows:
        sent.setdefault(row["setting"].rpartition("-")[0], set()).add(row["setting"])
    panels = sorted(panel for panel, settings in sent.items() if len(settings) > 1)
    if not panels:
        return
    figure = Figure(figsize=(3.8 * len(panels), 3.2), layout="constrained")
    for place, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method in ("FedGAN", "EFFGAN", "MDGAN", "alone"):
            points = {}
            for row in rows:
                if row["method"] == method and row["setting"].rpartition("-")[0] == panel:
                    points.setdefault((row["megabytes"], row["setting"].rpartition("-")[2]), []).append(row["fid"])
            order = sorted(points)
            place.errorbar([x for x, _ in order], [np.mean(points[key]) for key in order],
                           [np.std(points[key], ddof=len(points[key]) > 1) for key in order], marker="o",
                           markersize=3.5, linewidth=1.2, label=method)  # fmt: skip
            for x, word in order:
                if word.startswith("e"):  # e20: local epochs
                    place.annotate(f" E = {word[1:]}", (x, np.mean(points[x, word])), fontsize=7, va="bottom")
        place.set(xscale="log", xlabel="megabytes sent", ylabel="Frechet distance", ylim=(0, None), title=panel)
        place.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"\n{path}")


def grids(found, folder):
    """Twenty images of each method's generators, from the runs of the first seed: grids-k5.png for the settings k5-...

    Generators are in the checkpoints, which a copy of the results may lack: then nothing is drawn.
    """
    found = [run for run in found if (run / "checkpoint.safetensors").is_file()]
    if not found:
        return
    first, panels = min(config.load(run).seed for run in found), {}
    for run in found:
        whole, setting = config.load(run), run.name.rpartition("-seed")[0]
        if whole.seed != first:
            continue
        for reading, way in assessment.readings(generation.load(run)).items():
            if (method := method_of(whole, reading)) in (None, NAMES["recalibrated"], NAMES["common"]):
                continue
            strip = generation.grid(generation.to_bytes(way.draw(20, shuffle=False).images), 20)
            panels.setdefault(setting.partition("-")[0], []).append((method, -whole.rounds, setting, strip))
    for panel, strips in panels.items():
        figure = Figure(figsize=(8.4, 0.48 * len(strips)), layout="constrained")
        order = sorted(strips, key=lambda strip: strip[:3])
        for place, (method, _, setting, pixels) in zip(
            figure.subplots(len(strips), squeeze=False)[:, 0], order, strict=True
        ):
            place.imshow(pixels, cmap="gray", interpolation="nearest")
            place.set(xticks=[], yticks=[], frame_on=False)
            place.set_ylabel(f"{method}\n{setting}", rotation=0, ha="right", va="center", fontsize=8)
        figure.savefig(folder / f"grids-{panel}.png", dpi=100)
        print(folder / f"grids-{panel}.png")


if __name__ == "__main__":
    main()
