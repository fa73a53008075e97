"""How long a long-tail study takes on a GPU: `python benchmarks/speed/long_run.py` (about ten minutes on one).

The setting of the long-tail protocol's CIFAR-10-LT (imbalance 100, Dirichlet .5): ResNet-18, 40 clients, all of them in each of
500 rounds, 5 epochs of batch 8. Some rounds are timed in each precision and the run's length is extrapolated. Beside it stands
the arithmetic limit: three times the forward pass's multiplications and additions, at the speed of a large matrix product in
the same precision on the same device. The images are made up: only their shape matters.

    python benchmarks/speed/long_run.py --device cpu --small      the same on two clients, to see that it works

Writes benchmarks/results/long_run.json and long_run.md (long_run_small with --small).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from machine import describe  # noqa: E402
from workloads import images  # noqa: E402

from fedtail import config  # noqa: E402
from fedtail.config import Experiment  # noqa: E402
from fedtail.data.federated import FederatedData  # noqa: E402
from fedtail.data.longtail import Exponential  # noqa: E402
from fedtail.data.partition import DirichletMultinomial  # noqa: E402
from fedtail.experiment import Federation, start  # noqa: E402

ROUNDS, BATCH = 500, 8
PRECISIONS = ("fp32", "tf32", "bf16")


def data_of(clients: int, largest: int, device: str) -> FederatedData:
    """Returns made-up images with the protocol's class counts, split over clients."""
    rng = np.random.default_rng(0)
    x, y = images((3, 32, 32), 10 * largest * 2, rng)
    rows = Exponential(factor=100, num_max=largest).cut(y, 10, rng)
    parts = DirichletMultinomial(clients=clients, alpha=0.5).split(y[rows], 10, rng, None)
    columns = {"x": torch.from_numpy(x[rows]).to(device), "y": torch.from_numpy(y[rows]).to(device)}
    nobody = [np.zeros(0, np.int64) for _ in range(clients)]
    half = (0.5,) * 3
    return FederatedData(columns, parts, {k: v[:100] for k, v in columns.items()}, nobody, 10, half, half)


def product_speed(device: str, precision: str, size: int) -> float:
    """Returns the multiplications and additions a second of a product of two square matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait(device)
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - begun))
    return best


def wait(device: str) -> None:
    """Returns when the device has done its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(
    precision: str, data: FederatedData, options: dict[str, Any], device: str, rounds: int, size: int
) -> dict[str, Any]:
    """Returns the readings of one precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    experiment = config.from_dict(Experiment, options | {"device": device, "autocast": precision == "bf16"})
    federation = Federation(experiment, data)
    network = federation.task.module
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros((1, 3, 32, 32), device=device))
    examples = int(data.counts().sum()) * options["local"]["epochs"]
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        steps = start(federation, Path(folder) / "run")
        next(steps)
        for _ in range(rounds):
            begun = time.perf_counter()
            next(steps)
            wait(device)
            seconds.append(time.perf_counter() - begun)
        steps.close()  # type: ignore[attr-defined]
    limit = 3 * counter.get_total_flops() * examples / product_speed(device, precision, size)
    return {"engine": federation.experiment.engine.name, "chunk": federation.experiment.engine.chunk,
            "round_seconds": seconds, "limit_seconds": limit}  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--compile", action="store_true", help="the stacked step by torch.compile")
    parser.add_argument(
        "--small", action="store_true", help="2 clients, 100 images of the largest class, 1 epoch, 1 round"
    )
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    clients, largest, size, rounds = (2, 100, 1024, 1) if args.small else (40, 5000, 8192, args.rounds)
    options = {
        "rounds": 10**6, "model": {"name": "resnet18"}, "local": {"epochs": 1 if args.small else 5, "batch_size": BATCH},
        "participation": {"fraction": 1.0}, "evaluation": {"every": 10**6, "local": False},
        "engine": {"name": args.engine, "compile": args.compile},
    }  # fmt: skip
    data = data_of(clients, largest, args.device)
    found: dict[str, Any] = {
        "machine": describe(),
        "clients": clients,
        "images": int(data.counts().sum()),
        "precisions": {},
    }
    rows = [f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}; {clients} clients, {found['images']:,} images, "
            f"device {args.device}", "",
            f"| precision | engine | s / round (range) | {ROUNDS} rounds, h | times the arithmetic limit |",
            "|---|---|---|---|---|"]  # fmt: skip
    for precision in args.precisions:
        got = found["precisions"][precision] = measure(precision, data, options, args.device, rounds, size)
        s = got["round_seconds"]
        rows.append(f"| {precision} | {got['engine']} | {np.median(s):.2f} ({min(s):.2f} to {max(s):.2f}) "
                    f"| {np.median(s) * ROUNDS / 3600:.2f} | {np.median(s) / got['limit_seconds']:.1f} |")  # fmt: skip
        print(rows[-1], flush=True)
    result = args.output / ("long_run_small" if args.small else "long_run")
    args.output.mkdir(parents=True, exist_ok=True)
    result.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    result.with_suffix(".md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
