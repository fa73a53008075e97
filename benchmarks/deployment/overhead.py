"""What a deployed round costs beside Flower's own FedAvg: `python benchmarks/deployment/overhead.py` (about ten minutes).

One SuperLink and three SuperNodes on loopback run both apps in turns: fedtail's FedAvg on sites, and the FedAvg of Flower's
PyTorch quickstart (the folder beside this file). Same network, same 1,000 images of 3 x 32 x 32 a node, one epoch of SGD in
batches of 32, no evaluation. Needs Flower. Writes benchmarks/results/deployment.json and deployment.md.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path += [str(HERE.parents[1] / "tests"), str(HERE.parent / "speed")]

from flower_processes import Processes, wait_for  # noqa: E402
from machine import describe  # noqa: E402

from fedtail.runs import rounds_done  # noqa: E402

NODES, EXAMPLES = 3, 1000
EXPERIMENT = """
rounds = {rounds}
checkpoint_every = 1
algorithm = {{ name = "fedavg" }}
model = {{ name = "lenet" }}
data = {{ name = "{data}" }}
local = {{ epochs = 1, batch_size = 32 }}
[evaluation]
every = {rounds}
local = false
groups = {{ name = "explicit", head = [0, 1, 2], medium = [3, 4, 5], tail = [6, 7, 8, 9] }}
"""


def write_data(folder: Path) -> Path:
    """Writes the nodes' files and the experiment's; returns the latter."""
    rng = np.random.default_rng(0)
    for name, size in (("site0", EXAMPLES), ("site1", EXAMPLES), ("site2", EXAMPLES), ("all", 500)):
        y = np.arange(size) % 10
        x = rng.integers(0, 200, (size, 3, 32, 32), dtype=np.uint8) + (5 * y).astype(np.uint8)[:, None, None, None]
        np.savez(folder / f"{name}.npz", x=x, y=y)
    return folder / "all.npz"


def play(federation: Processes, folder: Path, turn: int, rounds: int) -> tuple[list[float], list[float]]:
    """Runs both apps once; returns the seconds of each round, fedtail's and Flower's, without the first."""
    run = federation.app / "runs" / f"turn{turn}"
    federation.run(f"run='{run}'")
    wait_for("fedtail's last round", lambda: (run / "config.toml").is_file() and rounds_done(run) == rounds, 600)
    ours = [json.loads(line)["seconds"] for line in (run / "timings.jsonl").read_text().splitlines()]
    times = folder / f"quickstart{turn}.json"
    federation.flwr("run", folder / "quickstart", "fedtail", "-c", f"times='{times}' num-server-rounds={rounds}")
    wait_for("the quickstart's last round", times.is_file, 600)
    return ours[1:-1], json.loads(times.read_text())[1:]  # fedtail's last round is evaluated


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experiment = folder / "experiment.toml"
        experiment.write_text(EXPERIMENT.format(rounds=args.rounds, data=write_data(folder)))
        shutil.copytree(HERE / "quickstart", folder / "quickstart")
        found: dict[str, list[list[float]]] = {"fedtail": [], "flower": []}
        with Processes(folder, experiment, "--sites", str(NODES)) as federation:
            federation.superlink()
            for client in range(NODES):
                federation.supernode(client, f'data="{folder / f"site{client}.npz"}"')
            for turn in range(args.turns):
                for who, seconds in zip(found, play(federation, folder, turn, args.rounds), strict=True):
                    found[who].append(seconds)
    write(found)


def write(found: dict[str, list[list[float]]]) -> None:
    """Writes the figures and the table."""
    machine, output = describe(), HERE.parent / "results"
    (output / "deployment.json").write_text(json.dumps({"machine": machine, "seconds": found}, indent=1) + "\n")
    rows = [
        f"{machine['text']}; {NODES} nodes on one machine",
        "",
        "| | seconds a round, median | lowest to highest |",
        "|---|---|---|",
    ]
    flat = {who: sorted(s for turn in turns for s in turn) for who, turns in found.items()}
    for who, title in (("fedtail", "fedtail's FedAvg"), ("flower", "FedAvg of Flower's quickstart")):
        rows.append(f"| {title} | {statistics.median(flat[who]):.1f} | {flat[who][0]:.1f} to {flat[who][-1]:.1f} |")
    more = statistics.median(flat["fedtail"]) - statistics.median(flat["flower"])
    rows.append(f"| difference | {more:+.1f} | |")
    (output / "deployment.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
