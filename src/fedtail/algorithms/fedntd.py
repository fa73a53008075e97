"""FedNTD: the local model keeps what the broadcast model says about the wrong classes (not-true distillation).

Lee, Jeong, Shin, Bae and Yun, "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning", NeurIPS
2022 (arXiv 2106.03097). z: logits of the local model, z^t: of the broadcast one, both without the true class y.

    client   L = loss + beta tau^2 mean_i KL( softmax_{c != y}(z^t / tau) || softmax_{c != y}(z / tau) )
             the second term's gradient on logit c != y   beta tau (q_c - q^t_c);  on the true logit 0
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

At w = w^t the distillation has gradient 0. With two classes there is one wrong class, and nothing to distil.

Differences from the authors' code: the teacher is in evaluation mode (theirs sets no mode on its copy); the class's default
tau there is 3, the configuration that is shipped has 1, which is the default here. Differences from the paper: `loss`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import EXCLUDED, CrossEntropy, Loss, one_hot
from fedtail.task import Variables
from fedtail.trees import Tree


def not_true_divergence(teacher: Tensor, z: Tensor, y: Tensor, tau: float) -> Tensor:
    """Returns KL(teacher || student) over the wrong classes at temperature tau, (batch,), of logits [batch, classes]."""
    true = one_hot(y, z.shape[-1], torch.bool)
    log_t, log_s = (torch.where(true, EXCLUDED, each / tau).log_softmax(-1) for each in (teacher, z))
    return (log_t.exp() * (log_t - log_s)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class FedNTD(Algorithm):
    """FedAvg with distillation of the wrong classes from the broadcast model."""

    loss: Loss = CrossEntropy()
    """What a client minimises beside the distillation (fedtail list losses); the paper has cross-entropy."""
    beta: float = 1.0
    """Weight of the distillation, >= 0; 1 is the authors'; 0 is FedAvg."""
    tau: float = 1.0
    """Temperature, > 0; the authors' code has 1 and 3."""

    def __post_init__(self) -> None:
        if not (0 <= self.beta < math.inf and 0 < self.tau < math.inf):
            raise ConfigError(f"FedNTD.beta must be in [0, inf) and tau in (0, inf), got {self.beta} and {self.tau}.")

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on both terms."""
        teacher = ctx.task.apply(message, batch.x, train=False)[0]

        def objective(v: Variables, extra: Tree) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            divergence = batch.mean(not_true_divergence(teacher, z, batch.y, self.tau))
            risk = self.loss(ctx, message, z, batch) + self.beta * self.tau**2 * divergence
            return risk, (v, extra, {"divergence": divergence.detach()})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
