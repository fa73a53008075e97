"""Tables of the two-stage lightweight CNN that `fedtail compare` does not print, from finished runs; Markdown.

    python experiments/lightweight_tables.py              # of experiments/results; --results for another folder

Accuracy   after the last round, beside the paper's, and the rounds that each part took (lightweight_central).
Parts      highest validation accuracy of each branch and of each part after the surgery: what a part adds.
Turned     accuracy on test images as they are and on copies rotated, zoomed and shifted by the laws of stage 1, the same
           copies for every network (lightweight_ablations: dual-ensemble, whole, lenet5).
Speed      rounds (epochs) until a validation accuracy is reached, from the surgery on and with stage 1 counted, against the
           same network from random weights (lightweight_ablations: whole, all-at-once, scratch-sgd, scratch-nadam).

What is not there yet is left out, so the script may be run while the experiments are under way. Numbers are mean ± sample
standard deviation over seeds.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedtail
from fedtail import config, federation
from fedtail.affine import Affine
from fedtail.seeds import Stream, generator

PAPER = {"mnist": 0.99, "fashion-mnist": 0.89, "cifar10": 0.65}
TARGETS = (0.80, 0.84, 0.86, 0.88, 0.89)
BATCH = 500


def finished(folder: Path, row: str) -> list[fedtail.RunRecord]:
    """Returns a row's finished runs, by seed."""
    found = [fedtail.read(path) for path in sorted(folder.glob(f"{row}-seed*")) if (path / "metrics.jsonl").is_file()]
    return [run for run in found if len(run.records) == run.config["rounds"]]


def percent(values: Sequence[float]) -> str:
    """Returns mean ± standard deviation in per cent."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, if it has rows."""
    if rows:
        print(f"\n{title}\n")
        for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows):
            print("| " + " | ".join(row) + " |")


def parts(run: fedtail.RunRecord) -> dict[int, list[Mapping[str, Any]]]:
    """Returns the diagnostics of the rounds that trained, by part."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for record in run.records:
        if "loss" in record["train"]:
            found.setdefault(record["diagnostics"]["part"], []).append(record["diagnostics"])
    return found


def accuracies(folder: Path) -> None:
    """Prints the last round's accuracies and what each part did."""
    rows, steps = list[list[str]](), list[list[str]]()
    for name, said in PAPER.items():
        if runs := finished(folder, name):
            each = [parts(run) for run in runs]
            took = ["/".join(str(len(rounds)) for rounds in known.values()) for known in each]
            rows.append([name, percent([run.records[-1]["test"]["accuracy"] for run in runs]), f"{100 * said:.0f}",
                         ", ".join(took)])  # fmt: skip
            branches = [percent([known[0][-1]["highest"][j] for known in each]) for j in (0, 1)]
            later = [percent([known[p][-1]["highest"][0] for known in each]) for p in sorted(each[0]) if p]
            steps.append([name, *branches, *later])
    table("Accuracy on test, percent", ["data", "here", "paper", "rounds of each part, by seed"], rows)
    table("Highest validation accuracy, percent",
          ["data", "branch 1", "branch 2", *(f"{k} groups" for k in (1, 2, 3, 4)), "all"], steps)  # fmt: skip


def copies(x: Tensor) -> Tensor:
    """Returns one augmented copy of each image, in [0, 1]."""
    draw = torch.from_numpy(generator(0, Stream.PROBLEM).random((len(x), 6)))
    augment, images = Affine(), x.float() / 255
    return torch.cat([augment(images[i : i + BATCH], draw[i : i + BATCH]) for i in range(0, len(x), BATCH)])


def accuracy(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Returns the share of examples whose largest output is their label's."""
    with torch.no_grad():
        found = torch.cat([network(x[i : i + BATCH]).argmax(1) for i in range(0, len(x), BATCH)])
    return float((found == y).double().mean())


def turned(folder: Path) -> None:
    """Prints the accuracies on images as they are and on augmented ones."""
    found: dict[str, list[tuple[float, float]]] = {}
    images: tuple[Tensor, Tensor, Tensor] | None = None
    for row, name in (("dual-ensemble", ""), ("whole", "unified"), ("branch-alone", "branch from scratch"),
                      ("lenet5", "LeNet-5")):  # fmt: skip
        for run in finished(folder, row):
            if images is None:
                test = config.load(run.folder)
                data = federation.federate(test.data, 0).test
                images = data["x"].float() / 255, copies(data["x"]), data["y"]
            network: nn.Module = fedtail.load(run.folder).network
            members = {name: network} if name else {"branch 1": network.branch1, "branch 2": network.branch2,
                                                    "mean of both": network}  # fmt: skip
            for each, module in members.items():
                scores = accuracy(module, images[0], images[2]), accuracy(module, images[1], images[2])  # type: ignore[arg-type]
                found.setdefault(each, []).append(scores)
    rows = [[name, *(percent(column) for column in zip(*scores, strict=True))] for name, scores in found.items()]
    table("Accuracy on test images, percent", ["network", "as they are", "augmented"], rows)


def reached(run: fedtail.RunRecord, target: float) -> tuple[int, int] | None:
    """Returns the rounds until a validation accuracy after the surgery reaches a target: from it on, and from the start."""
    known = parts(run)
    before = len(known.get(0, []))
    later = [d["validation"][0] for part in sorted(known) if part for d in known[part]]
    first = next((n for n, value in enumerate(later, 1) if value >= target), None)
    return None if first is None else (first, first + before)


def speed(folder: Path) -> None:
    """Prints the rounds to each target."""
    rows = list[list[str]]()
    for name in ("whole", "all-at-once", "scratch-sgd", "scratch-nadam"):
        runs = finished(folder, name)
        cells: list[str] = []
        for target in TARGETS:
            found = [reached(run, target) for run in runs]
            cells.append(", ".join("-" if n is None else f"{n[0]} ({n[1]})" for n in found))
        if runs:
            rows.append([name, *cells])
    table("Rounds to a validation accuracy from the surgery on (from the start), by seed",
          ["row", *(f"{100 * t:.0f} %" for t in TARGETS)], rows)  # fmt: skip


def main() -> None:
    """Prints every table whose runs are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args().results
    accuracies(folder / "lightweight_central")
    turned(folder / "lightweight_ablations")
    speed(folder / "lightweight_ablations")


if __name__ == "__main__":
    main()
