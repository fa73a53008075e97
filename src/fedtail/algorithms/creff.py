"""CReFF: the server retrains the classifier on balanced features whose gradients match those of the clients' data.

Shang, Lu, Huang and Wang, "Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with
Federated Features", IJCAI 2022 (arXiv 2204.13399).

w is FedAvg's model, V, b the re-trained classifier, h the features of w in evaluation mode, p = softmax(V h + b). A round:
    client   G_kc = (1/n_kc) sum_{y_i = c} (p_i - e_c) (h_i, 1)^T   for each class c that it holds     (e_c: unit vector)
    server   G_c = mean of G_kc over its holders;   S_c = (1/m) sum_j (p_cj - e_c) (F_cj, 1)^T,   F_cj: m learnable features
             F, kept over rounds, takes `match_steps` steps on sum_{c held} sum_r (1 - cos(S_c[r], G_c[r])), r: rows of V, and b
             V, b <- a new linear layer after `retrain_steps` steps on all (F_cj, c);   then FedAvg's round for w, its own head

Differences from the authors' code: G_kc is over all examples of a class in one pass (theirs: the mean of 10 draws of up to
32 images, randomly augmented), un-augmented as V is judged; retraining steps are on all features (see `retrain_lr`); the new
layer has the same random values in each round (theirs: new ones). As theirs: 1e-6 in the cosine's denominator; a class
without a holder keeps its features, and the layer is trained on them: in the first rounds these are noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase, as_tensor
from fedtail.errors import ConfigError
from fedtail.heads import feature_size, features, fit_head, fresh_head, logits, minimise, with_head
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.losses import CrossEntropy, Loss, one_hot
from fedtail.optim import Params
from fedtail.task import Task, Variables
from fedtail.trees import Tree


class Server(NamedTuple):
    """Server state, and the message when without its features."""

    model: Variables
    head: Params  # V
    features: Any  # F, [classes, m, d]; () in a message


class Gradients(NamedTuple):
    """What a client sends in the first phase."""

    rows: Tensor  # [classes, classes, d + 1] G_kc, zero for classes that it does not hold
    held: Tensor  # (classes,) 1 for classes that it holds


def synthetic_gradients(h: Tensor, z: Tensor) -> Tensor:
    """Returns S [classes, classes, d + 1] of each class's features [classes, m, d] with logits [classes, m, classes]."""
    error = torch.softmax(z, -1) - torch.eye(len(h), dtype=h.dtype, device=h.device)[:, None]
    return torch.einsum("cmr,cmd->crd", error, F.pad(h, (0, 1), value=1.0)) / h.shape[1]


def distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """Returns sum_r (1 - cos(S_c[r], G_c[r])), (classes,), of two [classes, classes, d + 1]."""
    pairs = [(synthetic[..., :-1], real[..., :-1]), (synthetic[..., -1:].mT, real[..., -1:].mT)]  # of V; b, a row
    norms = [torch.linalg.vector_norm(s, dim=-1) * torch.linalg.vector_norm(g, dim=-1) + 1e-6 for s, g in pairs]
    return torch.cat([1 - (s * g).sum(-1) / n for (s, g), n in zip(pairs, norms, strict=True)], -1).sum(-1)


@dataclass(frozen=True, kw_only=True)
class CReFF(Algorithm):
    """FedAvg, and a classifier that the server retrains on features fitted to the clients' gradients by class."""

    loss: Loss = CrossEntropy()
    """What a client minimises in training (fedtail list losses)."""
    features_per_class: int = 100
    """Learnable features a class, >= 1 (m); 100 in the authors' code."""
    match_lr: float = 0.1
    """Learning rate of the features, > 0; .1 in the authors' code."""
    match_steps: int = 100
    """Steps of the features in a round, >= 1; 100 in the authors' code."""
    retrain_lr: float = 0.3
    """Learning rate of the classifier, > 0; .01 in the authors' code, for 10 classes the same sum of rates."""
    retrain_steps: int = 300
    """Steps of the classifier in a round, >= 1; the authors' 300 epochs of batches of 32 cost 30 times as much."""

    def __post_init__(self) -> None:
        for name in ("features_per_class", "match_lr", "match_steps", "retrain_lr", "retrain_steps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"CReFF.{name} must be > 0, got {getattr(self, name)}.")

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """The gradients, then training, both of the round's cohort."""
        return Phase("gradients", local=False), Phase()

    def constants(self, task: Task, rng: np.random.Generator) -> Params:
        """The classifier's initial values."""
        feature_size(task, "CReFF")
        return fresh_head(task, rng, "CReFF")

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Server:
        """The initial model, an untrained classifier, standard normal features."""
        classes, size = ctx.constants[f"{ctx.task.classifier}.weight"].shape
        normal = rng.standard_normal((classes, self.features_per_class, size))
        return Server(ctx.task.initial, ctx.constants, as_tensor(normal, ctx.task.dtype, ctx.task.device))

    def broadcast(self, ctx: Context, server: Server) -> Server:
        """Both models."""
        return server._replace(features=())

    def local_init(self, ctx: Context, message: Server, client: Tree) -> Local | Tensor:
        """Starts from the broadcast model, or from empty sums [classes, classes, d + 1]."""
        if ctx.round.phase.local:
            return start(self.optimizer, message.model)
        weight = message.head[f"{ctx.task.classifier}.weight"]
        return weight.new_zeros(len(weight), len(weight), weight.shape[1] + 1)

    def local_step(self, ctx: Context, message: Server, client: Tree, local: Any, batch: Batch) -> tuple[Any, Metrics]:
        """One SGD step, or a batch's part of the sums."""
        if ctx.round.phase.local:
            return sgd_step(ctx, local, empirical_risk(self.loss, ctx, message.model, batch), self.optimizer)
        h = features(ctx.task, message.model, batch.x)
        y = one_hot(batch.y, ctx.task.num_classes, h.dtype)
        error = torch.softmax(logits(ctx.task, message.head, h), -1) - y
        y = y if batch.mask is None else y * batch.mask[:, None]
        return local + torch.einsum("bc,br,bd->crd", y, error, F.pad(h, (0, 1), value=1.0)), {}  # (h, 1)

    def local_final(self, ctx: Context, message: Server, client: Tree, local: Any) -> tuple[Tree, Tree]:
        """Sends the change, or the mean gradients of the classes that it holds."""
        if ctx.round.phase.local:
            return delta(message.model, local.variables), client
        counts = ctx.here.counts
        return Gradients(local / counts.clamp(min=1)[:, None, None], (counts > 0).to(local.dtype)), client

    def weight(self, ctx: Context) -> Tensor:
        """The number of examples; 1 for the gradients."""
        return ctx.here.examples if ctx.round.phase.local else torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Server, mean: Any, total: Tensor) -> Server:
        """Adds the mean change, or fits the features and retrains the classifier."""
        if ctx.round.phase.local:
            return server._replace(model=descend(server.model, mean))
        held = (mean.held > 0).to(mean.held.dtype)
        real = mean.rows / torch.where(mean.held > 0, mean.held, 1.0)[:, None, None]  # the mean over holders

        def mismatch(p: Params) -> Tensor:
            return (distance(synthetic_gradients(p["h"], logits(ctx.task, server.head, p["h"])), real) * held).sum()

        h = minimise(ctx.task, mismatch, {"h": server.features}, self.match_lr, self.match_steps)["h"]
        head = fit_head(ctx.task, ctx.constants, h, torch.ones_like(held), self.retrain_lr, self.retrain_steps)
        return server._replace(head=head, features=h)

    def variables(self, ctx: Context, message: Server, client: Any) -> Variables:
        """FedAvg's backbone under the re-trained classifier."""
        return with_head(message.model, message.head)
