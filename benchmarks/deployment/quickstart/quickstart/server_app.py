"""ServerApp: Flower's FedAvg; the time at the end of each round goes to a file."""

import itertools
import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    times: list[float] = []

    def ended(number: int, arrays: ArrayRecord) -> None:
        times.append(time.perf_counter())

    config = context.run_config
    FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3).start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["learning-rate"]}), evaluate_fn=ended,
    )  # fmt: skip
    rounds = [b - a for a, b in itertools.pairwise(times)]
    Path(config["times"]).write_text(json.dumps(rounds))
