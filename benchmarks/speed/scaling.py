"""How a round's time and memory grow: `python benchmarks/speed/scaling.py` (about two minutes on two cores).

Cohorts of 1 to 256 clients, populations of 10^3 to 10^6 with a cohort of 100, models from LeNet to ResNet-18. Each setting
runs in a process of its own, on engine `parallel`: all memory is in that process. Writes benchmarks/results/scaling.json and
scaling.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from machine import describe  # noqa: E402

COHORTS = [{"cohort": n, "population": 1000, "model": "lenet"} for n in (1, 4, 16, 64, 256)]
POPULATIONS = [{"cohort": 100, "population": n, "model": "lenet"} for n in (10**3, 10**4, 10**5, 10**6)]
MODELS = [
    {"cohort": 4, "population": 100, "model": name} for name in ("lenet", "mlp", "resnet8", "resnet20", "resnet18")
]
IMAGES = 60_000


def status(field: str) -> float:
    """Returns a figure of this process in MiB, as Linux counts it: VmRSS (memory in use) or VmHWM (its peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def setting(cohort: int, population: int, model: str) -> dict[str, Any]:
    """Measures one setting in this process: 20 images a client, drawn from 60,000, one epoch of batch 10."""
    import torch
    from workloads import images

    from fedtail import config
    from fedtail.config import Experiment
    from fedtail.data.federated import FederatedData
    from fedtail.data.members import Members
    from fedtail.experiment import Federation, start

    rng = np.random.default_rng(0)
    shape = (3, 32, 32) if model.startswith("resnet") else (1, 28, 28)
    x, y = images(shape, min(IMAGES, 20 * population), rng)
    columns = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    begun = time.perf_counter()
    order = rng.permutation(20 * population) % len(y)
    members = Members(order.astype(np.int32), np.arange(0, 20 * population + 1, 20))
    partition = time.perf_counter() - begun
    none = Members(np.zeros(0, np.int32), np.zeros(population + 1, np.int64))
    test = {key: value[:100] for key, value in columns.items()}
    data = FederatedData(columns, members, test, none, 10, (0.5,) * shape[0], (0.5,) * shape[0])
    experiment = config.from_dict(Experiment, {
        "rounds": 10**6, "model": {"name": model}, "local": {"epochs": 1, "batch_size": 10},
        "participation": {"clients": cohort}, "evaluation": {"every": 10**6, "local": False},
        "engine": {"name": "parallel"},
    })  # fmt: skip
    before = status("VmHWM")
    begun = time.perf_counter()
    federation = Federation(experiment, data)
    with tempfile.TemporaryDirectory() as folder:
        rounds = start(federation, Path(folder) / "run")
        stored = time.perf_counter() - begun
        peak = status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        ready = status("VmRSS")
        next(rounds)
        seconds: list[float] = []
        while len(seconds) < 5 or (sum(seconds) < 2 and len(seconds) < 30):
            begun = time.perf_counter()
            next(rounds)
            seconds.append(time.perf_counter() - begun)
        rounds_own, peak = status("VmHWM") - ready, max(peak, status("VmHWM"))
        rounds.close()  # type: ignore[attr-defined]
    return {"partition_seconds": partition, "setup_and_store_seconds": stored,
            "round_seconds": seconds, "memory_mib": peak, "before_mib": before,
            "rounds_mib": rounds_own}  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(setting(**json.loads(args.one))))
        return
    found: dict[str, Any] = {"machine": describe(), "tables": {}}
    lines = [f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}", ""]
    for title, settings in (("cohort", COHORTS), ("population", POPULATIONS), ("model", MODELS)):
        lines += [f"### {title}", "", f"| {title} | s / round (range) | set up and store, s | peak memory, MiB "
                  "| of it the rounds' own, MiB |", "|---|---|---|---|---|"]  # fmt: skip
        rows = found["tables"][title] = []
        for each in settings:
            words = [sys.executable, __file__, "--one", json.dumps(each)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            rows.append({**each, **got})
            s = got["round_seconds"]
            stored = got["partition_seconds"] + got["setup_and_store_seconds"]
            lines.append(f"| {each[title]} | {np.median(s):.3f} ({min(s):.3f} to {max(s):.3f}) "
                         f"| {stored:.1f} | {got['memory_mib']:,.0f} | {got['rounds_mib']:,.0f} |")  # fmt: skip
            print(lines[-1], flush=True)
        lines.append("")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "scaling.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
