"""Client distillation: FedAvg whose clients hold the frozen teacher and learn from it and from their labels.

The other reading of Wu, Lin, Willmott, Condessa, Huang, Li and Ganesh, "Leveraging Foundation Models to Improve Lightweight
Clients in Federated Learning", 2023 (arXiv 2311.08479); the loss is that of Hinton, Vinyals and Dean, "Distilling the
Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    client   CE(z, y) + lam T^2 KL(softmax(t / T) || softmax(z / T))   by E epochs of SGD on D_k, from w^t
    server   w^{t+1} = sum_k n_k w_k / sum_k n_k

t are the teacher's class scores of the client's own, un-augmented images. lam = 0 is FedAvg.

Differences from the paper: an ablation. It contradicts the paper's light clients in computation (every client runs the
teacher once over its data), though not in what travels; the server has no data and makes no steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.distillation import distil
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class ClientDistillation(Algorithm):
    """FedAvg whose clients also learn from a frozen teacher's class scores of their own images."""

    columns: ClassVar[Sequence[str]] = ("x", "y", "teacher")

    loss: Loss = CrossEntropy()
    """What a client minimises beside the distillation (fedtail list losses)."""
    lam: float = 1.0
    """Weight of the distillation, >= 0; 0 is FedAvg. Ours."""
    temperature: float = 2.0
    """T, > 0; 2 for a linear probe, 1 for zero-shot CLIP. Ours."""

    def __post_init__(self) -> None:
        if not (self.lam >= 0 and self.temperature > 0):
            raise ConfigError(
                f"ClientDistillation needs lam >= 0 and temperature > 0, got {self.lam} and {self.temperature}."
            )

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on labels and teacher."""

        def objective(v: Variables, extra: Tree) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            risk = self.loss(ctx, message, z, batch)
            if not self.lam:
                return risk, (v, extra, {})
            kd = self.lam * distil(z, batch.columns["teacher"], self.temperature, batch)
            return risk + kd, (v, extra, {"ce": risk, "kd": kd})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
