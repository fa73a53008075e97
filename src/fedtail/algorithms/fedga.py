"""FedGA: local training whose gradients push a class down as hard as they pull it up, by calibrated labels.

Xiao, Zuo and Wang, "FedGA: Federated Learning with Gradient Alignment for Error Asymmetry Mitigation", AAAI 2025 (arXiv
2412.16582). n_c: class counts of the mini-batch, p = softmax(z), m = sum_c n_c p_c.

    client   official   L = mean_i ( -log p_y + strength m / n_y )
             gradient on logit c   p_c (1 + strength (n_c - m) / n_y) - [c = y]
             exact      gradient   p_c (1 + strength (n_c / n_y - 1)) - [c = y]       of no scalar loss
    server   w^{t+1} = w^t + mean_k (w_k - w^t)                                       every client the same weight

Why: with cross-entropy the pull on class c is n_c (1 - pi_cc) and the push sum_j n_j pi_jc (pi_jc: mean probability of c on
examples of class j), so at rest misses over false alarms of c are as its share is small. With the push by an example of
class y multiplied by n_c / n_y both have the factor n_c, and misses equal false alarms. Nothing else of FedAvg changes.

Differences from the authors' code: the loss in closed form, with the gradient of their calibrated label p_c (1 - n_c / n_y)
+ [c = y] under soft-label cross-entropy, but a value that can be read; `exact`, `counts = "client"`, `strength` and
`weights = "size"` are additions. Theirs clips the gradient's norm at 5 for every method: `optimizer.clip`.
Differences from the paper: its printed equations were not compared; "official" is what the authors' code trains with.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedtail import losses
from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import mean_cross_entropy
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedGA(Algorithm):
    """FedAvg on the loss `fedga`, with the plain mean over clients."""

    form: Literal["official", "exact"] = "official"
    """The closed-form loss, or the nominal aligned gradient, which is worse than FedAvg under strong skew."""
    counts: Literal["batch", "client"] = "batch"
    """Whose class counts: the batch's, as in the authors' code, or the client's."""
    strength: float = 1.0
    """Weight of the alignment, >= 0; 1 is the paper's; 0 is FedAvg."""
    weights: Literal["uniform", "size"] = "uniform"
    """A client's weight in the mean: 1, as in the authors' code, or its number of examples."""

    def __post_init__(self) -> None:
        self._loss()

    def _loss(self) -> losses.FedGA:
        return losses.FedGA(form=self.form, counts=self.counts, strength=self.strength)

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step; the plain cross-entropy is logged beside the loss."""

        def objective(v: Variables, extra: Tree) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            metrics = {"cross_entropy": mean_cross_entropy(z.detach(), batch)}
            return self._loss()(ctx, message, z, batch), (v, extra, metrics)

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def weight(self, ctx: Context) -> Tensor:
        """1, or the number of examples."""
        return ctx.here.examples if self.weights == "size" else torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
