"""FedRS: FedAvg with a restricted softmax, in which the logits of classes that a client lacks are scaled down.

Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data", KDD 2021. n_c: class
counts of the client.

    client   L = cross-entropy of a_c z_c;   hard: a_c = 1 where n_c > 0, else alpha
             soft: a_c = alpha + (1 - alpha) n_c / max_j n_j
             gradient on logit c   a_c (q_c - [c = y]),  q = softmax(a z)
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

Prediction takes the plain logits.

Differences from the authors' code: the hard form is the default (theirs is soft), and the logits include the classifier's
bias (theirs are h W^T). Differences from the paper: none known.
"""

from dataclasses import dataclass

from torch import Tensor

from fedtail import losses
from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedRS(Algorithm):
    """FedAvg on the loss `fedrs`."""

    alpha: float = 0.5
    """Factor on the logits of missing classes, in [0, 1]; 1 is FedAvg."""
    soft: bool = False
    """Factors in proportion to the counts instead of 1 or alpha."""

    def __post_init__(self) -> None:
        self._loss()

    def _loss(self) -> losses.FedRS:
        return losses.FedRS(alpha=self.alpha, soft=self.soft)

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on scaled logits."""
        return sgd_step(ctx, local, empirical_risk(self._loss(), ctx, message, batch), self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
