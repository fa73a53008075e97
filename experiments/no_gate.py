"""Why Fed-GraB's balancer loses the tail of Fashion-MNIST-LT when no gate holds it back: what it does to gradients.

    python experiments/no_gate.py            # about 6 minutes on one core; prints a table, writes results/no_gate.json

For every class: by which factor the balancer scales the positive gradients that occur (sum of scaled over sum of plain),
and the negative ones; then the recall. A single client (centralised training) has no missing classes, so what is seen
there is the loop itself; five clients of equal mix come next.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtail import SGD, Batch, Data, EngineOptions, Evaluation, Experiment, FedAvg, FedGraB, LocalWork, run
from fedtail.algorithms.fedgrab import Controller
from fedtail.data.longtail import Exponential
from fedtail.data.partition import DirichletMultinomial
from fedtail.losses import one_hot
from fedtail.models.specs import LeNet
from fedtail.runs import environment


@dataclass(frozen=True, kw_only=True)
class Observed(FedGraB):
    """Fed-GraB that also reports the gradients it would have had without the balancer."""

    def balance(self, state: Controller, bypass: Tensor, draw: Tensor, z: Tensor, batch: Batch) -> Any:
        """As Fed-GraB, with two more metrics, each (classes,)."""
        surrogate, new, metrics = super().balance(state, bypass, draw, z, batch)
        y = one_hot(batch.y, z.shape[-1], z.dtype)
        size = (torch.sigmoid(z.detach()) - y).abs() / batch.size
        return (
            surrogate,
            new,
            {**metrics, "plain_positive": batch.sum(y * size), "plain_negative": batch.sum((1 - y) * size)},
        )


def measure(clients: int, gate: str, rounds: int = 10) -> dict[str, Any]:
    """Trains one setting and returns recalls and factors by class."""
    optimizer = SGD(lr=0.03, momentum=0.5, clip=5.0)
    algorithm = FedAvg(optimizer=optimizer) if gate == "fedavg" else Observed(optimizer=optimizer, gate=gate)  # type: ignore[arg-type]
    experiment = Experiment(
        rounds=rounds,
        algorithm=algorithm,
        data=Data(
            name="fashion-mnist",
            longtail=Exponential(factor=100.0),
            partition=DirichletMultinomial(clients=clients, alpha=100.0),
        ),
        model=LeNet(),
        local=LocalWork(epochs=1, batch_size=32),
        evaluation=Evaluation(every=rounds),
        engine=EngineOptions(name="loop"),
    )
    sums: dict[str, Tensor] = {}
    for result in run(experiment):
        for name, value in result.record["train"].items():
            if isinstance(value, list):
                sums[name] = sums.get(name, torch.zeros(10)) + torch.tensor(value)
    test = result.record["test"]
    found = {"clients": clients, "method": gate, "recall": test["per_class_recall"], "tail": test["tail"]}
    if sums:
        found["positive_factor"] = (sums["positive_gradient"] / sums["plain_positive"]).tolist()
        found["negative_factor"] = (sums["negative_gradient"] / sums["plain_negative"]).tolist()
        found["plain_negative_over_positive"] = (sums["plain_negative"] / sums["plain_positive"]).tolist()
    return found


if __name__ == "__main__":
    rows = [measure(clients, gate) for clients in (1, 5) for gate in ("fedavg", "none", "rank")]
    for row in rows:
        print(f"{row['clients']} client(s), {row['method']}: tail {100 * row['tail']:.1f} %")
        for name in ("recall", "positive_factor", "negative_factor", "plain_negative_over_positive"):
            if name in row:
                print(f"  {name:30}" + " ".join(f"{v:7.3f}" for v in row[name]))
    (Path(__file__).parent / "results" / "no_gate.json").write_text(
        json.dumps({"rows": rows, "environment": environment(sys.argv)}, indent=1)
    )
