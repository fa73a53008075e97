"""Where a round's time goes: `python benchmarks/speed/where.py` (a minute on two cores).

FedAvg on W1, W2a, W2b as a user has it: a run folder, metrics and a checkpoint after each round. First the round as a whole
with the engine of "auto": what is not the cohort's training is the server's part. Then one client's training in the loop
engine. Parts are timed from outside; those within others are indented. Writes benchmarks/results/where.json and where.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import serve  # noqa: E402
from machine import describe  # noqa: E402
from workloads import experiment_of, rounds_of, write  # noqa: E402

import fedtail.algorithms.fedavg as fedavg  # noqa: E402
import fedtail.engines.loop as loop  # noqa: E402
import fedtail.experiment as experiment  # noqa: E402
from fedtail.data.federated import FederatedData  # noqa: E402
from fedtail.engines.base import Setting, Sink  # noqa: E402
from fedtail.task import Worker  # noqa: E402

SPENT: dict[str, float] = defaultdict(float)


def watch(owner: Any, name: str, label: str) -> None:
    """Replaces a function by one that adds its time up."""
    inner = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            SPENT[label] += time.perf_counter() - begun

    setattr(owner, name, timed)


def measure(name: str, engine: str, rounds: int, folder: Path) -> dict[str, float]:
    """Returns the seconds of each part, all rounds together; "" is the whole."""
    file = folder / f"{name}.npz"
    if not file.exists():
        write(name, file)
    steps = rounds_of(experiment_of(name, engine), serve.load(file), folder / f"{name}-{engine}")
    next(steps)
    SPENT.clear()
    begun = time.perf_counter()
    for _ in range(rounds):
        next(steps)
    SPENT[""] = time.perf_counter() - begun
    steps.close()  # type: ignore[attr-defined]
    return dict(SPENT)


def table(title: str, spent: dict[str, float], labels: list[str], count: int, unit: str) -> list[str]:
    """Returns the rows of one table in Markdown."""
    whole = spent[""]
    lines = [f"### {title}", "", f"| part | ms a {unit} | share |", "|---|---|---|"]
    for label in labels:
        shown = label.replace("  ", "&nbsp;&nbsp;&nbsp;")
        lines.append(f"| {shown} | {spent[label] / count * 1e3:.2f} | {spent[label] / whole:.1%} |")
    return [*lines, f"| **all** | {whole / count * 1e3:.2f} | |", ""]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2a", "W2b"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    watch(experiment.Federation, "draw", "drawing the cohort")
    watch(Setting, "plans", "plans: batches and draws")
    watch(Sink, "mean", "the mean")
    watch(fedavg.FedAvg, "server_update", "server_update")
    watch(experiment.runs, "log_metrics", "writing metrics")
    watch(experiment, "save_checkpoint", "writing the checkpoint")
    server = [*dict.fromkeys(("drawing the cohort", "plans: batches and draws", "the mean", "server_update",
                              "writing metrics", "writing the checkpoint"))]  # fmt: skip
    for owner, method, label in (
        (loop, "run_client", "one client's training"), (fedavg.FedAvg, "local_step", "  local_step, all steps"),
        (Worker, "apply", "    forward"), (torch.autograd, "grad", "    backward"), (Worker, "update", "    optimizer"),
        (FederatedData, "gather", "  gathering batches"), (loop, "check_result", "  checking the result"),
        (fedavg, "delta", "  the update"), (Worker, "own", "  copying the message"), (Sink, "add", "adding it to the sum"),
    ):  # fmt: skip
        watch(owner, method, label)
    client = ["one client's training", "  local_step, all steps", "    forward", "    backward", "    optimizer",
              "  gathering batches", "  checking the result", "  the update", "  copying the message",
              "adding it to the sum"]  # fmt: skip
    found: dict[str, Any] = {"machine": describe(), "rounds": args.rounds, "workloads": {}}
    lines = [f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}", ""]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.workloads:
            for engine in ("auto", "loop"):
                spent = found["workloads"][f"{name} {engine}"] = measure(name, engine, args.rounds, Path(folder))
                if engine == "auto":
                    spent["server's part"] = sum(spent[label] for label in server)
                    lines += table(f"{name}, a round", spent, [*server, "server's part"], args.rounds, "round")
                else:
                    cohort = serve.load(Path(folder) / f"{name}.npz").cohorts.shape[1]
                    lines += table(f"{name}, a client", spent, client, args.rounds * cohort, "client")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "where.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "where.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
