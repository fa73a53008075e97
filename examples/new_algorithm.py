"""A new method in one file: softmax balanced with each client's own class counts, compared with FedAvg.

Ren, Yu, Sheng, Ma, Zhao, Yi and Li, "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.

    loss   -log softmax(z + log n_k)_y      n_kc: client k's examples of class c; a class that it lacks is left out

Difference from the paper: the counts are the client's own, so that nothing but a model leaves it.

python examples/new_algorithm.py

In TOML, without registering it anywhere:  algorithm = { name = "new_algorithm.py:BalancedSoftmax" }
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import fedtail
from fedtail import Batch, Context, Local, Variables
from fedtail.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(fedtail.Algorithm):
    """FedAvg with local logits shifted by the logarithm of the client's class counts."""

    strength: float = 1.0
    """Exponent of the counts, >= 0; 0 gives FedAvg on clients that hold every class."""

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigError(f"BalancedSoftmax.strength must be in [0, inf), got {self.strength}.")

    def local_init(self, ctx: Context, message: Variables, client: Any) -> Local:
        """Starts from the broadcast model with a fresh optimizer."""
        return fedtail.start(self.optimizer, message)

    def local_step(self, ctx: Context, message: Variables, client: Any, local: Local, batch: Batch) -> Any:
        """One SGD step; `batch.mean` knows which examples are padding, so the method runs in every engine."""
        shift = self.strength * ctx.here.counts.log()  # a class that is not there: -inf, it takes no part

        def objective(v: Variables, extra: Any) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            return batch.mean(F.cross_entropy(z + shift, batch.y, reduction="none")), (v, extra, {})

        return fedtail.sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Any, local: Local) -> tuple[Variables, Any]:
        """Sends the change of the model."""
        return fedtail.delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return fedtail.descend(server, mean)


def main() -> None:
    """Runs both methods on the same split with the same work."""
    for method in (fedtail.FedAvg(), BalancedSoftmax()):
        *_, last = fedtail.run(fedtail.Experiment(rounds=8, algorithm=method))
        test = last.record["test"]
        print(
            f"{type(method).__name__:16} head {test['head']:.3f}   medium {test['medium']:.3f}   tail {test['tail']:.3f}"
        )


if __name__ == "__main__":
    main()
