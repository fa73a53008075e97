"""FedLC: FedAvg with logits calibrated by the client's class counts, so that rare classes keep a margin.

Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022
(arXiv 2209.00189). n_c: class counts of the client.

    client   L = cross-entropy of z_c - tau n_c^(-1/4); a class with n_c = 0 is excluded from the softmax
             gradient on logit c   p_c e^(-tau n_c^(-1/4)) / sum_j p_j e^(-tau n_j^(-1/4)) - [c = y]
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

Prediction takes the plain logits. A client of one class has gradient 0 exactly: with one class a client nothing is learned.

Differences from the paper: the true class stays in the softmax's denominator; without it the gradient on the true logit is
-1 for ever and the logits grow without bound. Differences from public code: missing classes are excluded by a mask; some
floors their counts, which with a small tau hardly excludes them.
"""

from dataclasses import dataclass

from torch import Tensor

from fedtail import losses
from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedLC(Algorithm):
    """FedAvg on the loss `fedlc`."""

    tau: float = 1.0
    """Strength of the calibration, >= 0; public code has .1 and 1; 0 excludes missing classes and does no more."""

    def __post_init__(self) -> None:
        losses.FedLC(tau=self.tau)

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on calibrated logits."""
        return sgd_step(ctx, local, empirical_risk(losses.FedLC(tau=self.tau), ctx, message, batch), self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
