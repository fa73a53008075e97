"""FedProx: FedAvg with a proximal term that holds the local models near the broadcast one.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020
(arXiv 1812.06127), Algorithm 2.

    client   h_k(w; w^t) = F_k(w) + mu/2 ||w - w^t||^2        eq. (2), minimised by E epochs of mini-batch SGD
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

Differences from the paper: clients are drawn uniformly and weighted by n_k (the paper draws with probability p_k and
takes the plain mean); every client does the same local work (no gamma-inexactness). From widespread code: the norm is
squared, as in eq. (2); parameters only, no buffers.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, squared_distance, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """FedAvg with a proximal term that holds the local model near the broadcast one."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    mu: float = 0.01
    """Weight of the proximal term, >= 0; 0 gives FedAvg."""

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ConfigError(f"FedProx.mu must be in [0, inf), got {self.mu}.")

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on h_k(w; w^t)."""

        def objective(v: Variables, extra: Tree) -> Any:
            risk, new = self.loss.risk(ctx, message, v, batch)
            return risk + self.mu / 2 * squared_distance(v.params, message.params), (new, extra, {})  # eq. (2)

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
