"""What private heads cost: `python benchmarks/speed/private_states.py` (about a minute on two cores).

FedLoGe with 1,000 clients, 100 of them in each of 40 rounds, on LeNet and on a network with 4,096 features, whose heads are
large; client states in memory without limit, and with engine.states_mib = 1. Each setting runs in a process of its own, so
that its peak memory is its own. Writes benchmarks/results/private_states.json and private_states.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from machine import describe  # noqa: E402

CLIENTS, COHORT, ROUNDS, EXAMPLES = 1000, 100, 40, 20
MODELS = {
    "lenet": ((1, 28, 28), {"name": "lenet"}),
    "wide": ((1, 8, 8), {"name": "mlp", "hidden": [4096]}),
}
LIMITS = {"none": 1 << 20, "1": 1}  # MiB; a TiB is no limit here


def setting(model: str, limit: str) -> dict[str, Any]:
    """Measures one setting in this process: a step of 20 images a client and round; in the end everyone's model is judged."""
    import torch
    from workloads import images

    from fedtail import config
    from fedtail.config import Experiment
    from fedtail.data.federated import FederatedData
    from fedtail.data.members import Members
    from fedtail.experiment import Federation, start

    shape, network = MODELS[model]
    x, y = images(shape, CLIENTS * EXAMPLES, np.random.default_rng(0))
    columns = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    members = Members(np.arange(len(y)), np.arange(0, len(y) + 1, EXAMPLES))
    tests = Members(np.arange(CLIENTS * 5) % 1000, np.arange(0, CLIENTS * 5 + 1, 5))
    test = {key: value[:1000] for key, value in columns.items()}
    data = FederatedData(columns, members, test, tests, 10, (0.5,), (0.5,))
    experiment = config.from_dict(Experiment, {
        "rounds": ROUNDS, "model": network, "local": {"epochs": 1, "batch_size": EXAMPLES}, "checkpoint_every": ROUNDS,
        "algorithm": {"name": "fedloge", "etf_steps": 0, "optimizer": {"name": "sgd", "lr": 0.01}},
        "participation": {"clients": COHORT}, "evaluation": {"every": ROUNDS},
        "engine": {"name": "parallel", "states_mib": LIMITS[limit]},  # threads: all memory is this process's
    })  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # where states go that find no place in memory
        federation = Federation(experiment, data)
        seconds = [result.seconds for result in start(federation, Path(folder) / "run")]
        spilled = [file.stat().st_size for file in Path(folder).glob("fedtail-states-*/*")]
        checkpoint = (Path(folder) / "run" / "checkpoint.safetensors").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"clients_with_a_state": len(federation.states), "states_in_memory_bytes": federation.states.in_memory,
            "spilled_bytes": sum(spilled), "spilled_files": len(spilled), "checkpoint_bytes": checkpoint,
            "round_seconds": seconds[1:-1], "last_round_seconds": seconds[-1],
            "memory_mib": peak / 1024, "before_mib": before / 1024}  # fmt: skip


def row(cells: Sequence[str]) -> str:
    """Returns a line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(setting(*args.one)))
        return
    found: dict[str, Any] = {"machine": describe(), "rows": []}
    what = f"FedLoGe, {CLIENTS:,} clients, {COHORT} a round, {ROUNDS} rounds; the last one also judges everyone's model"
    heads = ("model", "engine.states_mib", "peak memory, MiB (before the run)", "states in memory, MiB",
             "on the disk, MiB (files)", "checkpoint, MiB", "s / round (range)", "last round, s")  # fmt: skip
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}; {what}",
        "",
        row(heads),
        row(["---"] * len(heads)),
    ]
    for model in MODELS:
        for limit in LIMITS:
            words = [sys.executable, __file__, "--one", model, limit]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            found["rows"].append({"model": model, "states_mib": limit, **got})
            memory, disk, checkpoint = (
                f"{got[f'{name}_bytes'] / 2**20:,.1f}" for name in ("states_in_memory", "spilled", "checkpoint")
            )
            s = got["round_seconds"]
            peak = f"{got['memory_mib']:,.0f} ({got['before_mib']:,.0f})"
            seconds = f"{np.median(s):.3f} ({min(s):.3f} to {max(s):.3f})"
            disk += f" ({got['spilled_files']})"
            lines.append(
                row([model, limit, peak, memory, disk, checkpoint, seconds, f"{got['last_round_seconds']:.1f}"])
            )
            print(lines[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "private_states.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "private_states.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
