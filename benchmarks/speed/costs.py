"""What each algorithm costs beside FedAvg on workload W1: `python benchmarks/speed/costs.py` (about ten minutes on two cores).

All algorithms play in turns in one process, with the engine that "auto" chooses and metrics kept; a ratio is taken within one
turn. Writes benchmarks/results/costs.json and costs.md.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import serve  # noqa: E402
from machine import describe  # noqa: E402
from workloads import data_of, experiment_of, write  # noqa: E402

from fedtail.algorithms import ALGORITHMS  # noqa: E402
from fedtail.experiment import Federation  # noqa: E402

# crt, ccvr and post_hoc train no backbone of their own: they begin with another run's model.
LEFT_OUT = ("crt", "ccvr", "post_hoc")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W1")
    parser.add_argument("--algorithms", nargs="+", default=[name for name in ALGORITHMS if name not in LEFT_OUT])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / f"{args.workload}.npz"
        write(args.workload, file)
        data = data_of(serve.load(file), server=10)
        running: dict[str, Federation] = {}
        for name in ["fedavg", *(n for n in args.algorithms if n != "fedavg")]:
            federation = Federation(experiment_of(args.workload, algorithm=name), data)
            running[name] = stack.enter_context(contextlib.closing(federation))
            federation.advance(federation.step())  # to warm up
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(args.repeats):
            for name, federation in running.items():
                start = time.perf_counter()
                federation.advance(federation.step())
                seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {"machine": describe(), "workload": args.workload, "seconds": seconds}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "costs.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = ["| algorithm | times FedAvg (range) |", "|---|---|"]
    for name, each in seconds.items():
        ratio = np.divide(each, seconds["fedavg"])
        rows.append(f"| {name} | {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |")
    text = (
        f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}, workload {args.workload}\n\n"
        + "\n".join(rows)
        + "\n"
    )
    (args.output / "costs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
