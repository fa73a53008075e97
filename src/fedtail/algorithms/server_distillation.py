"""Server distillation: FedAvg, after whose mean the server lets the model learn from a frozen foundation model.

Wu, Lin, Willmott, Condessa, Huang, Li and Ganesh, "Leveraging Foundation Models to Improve Lightweight Clients in Federated
Learning", 2023 (arXiv 2311.08479).

    client   w_k <- E epochs of SGD on the cross-entropy of D_k, from w^t
    server   wbar = sum_k n_k w_k / sum_k n_k
             w^{t+1} <- steps on L(w) over the server's images S, from wbar, with a fresh optimizer
    L      = lam_kd T^2 KL(softmax(t / T) || softmax(z / T)) + lam_feat mean(1 - cos(P h, F)) + lam_ce CE(z, y)

t are the teacher's class scores of an image, F its features, z and h the student's, all of the same, un-augmented image.
The teacher stays at the server: what travels is what FedAvg sends. wbar is judged too (reading "before").
steps = 0, or lam_kd = lam_feat = lam_ce = 0, is FedAvg. clients = False is the control "KD only": no client takes part.

Differences from the paper: it states the outline alone (distillation from a foundation model, at the server according to the
patent application US 2025/0103900). Chosen here: the form of the loss; the server's data, a balanced hold-out whose labels
only lam_ce reads; Adam with a cosine over the round's steps and batches of 128 (those of FedDF's code); the student is in
training mode at the server too, so that BatchNorm's statistics are those of balanced data; the mean is by size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase, ServerWork
from fedtail.distillation import PROJECTOR, distil, match, outputs, projector, server_descent
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import Adam, Optimizer
from fedtail.task import Variables
from fedtail.trees import Tree


class Server(NamedTuple):
    """Server state."""

    model: Variables
    before: Variables  # wbar, the model before the server's steps
    projector: dict[str, Tensor]  # P [d, d_s], empty without the feature term
    optimizer: Tree  # of the round's last server step


@dataclass(frozen=True, kw_only=True)
class ServerDistillation(Algorithm):
    """FedAvg, and after each mean steps of the server towards a frozen teacher's outputs."""

    needs_server_data = True

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    lam_kd: float = 1.0
    """Weight of the teacher's class scores, >= 0."""
    lam_feat: float = 0.0
    """Weight of the teacher's features, >= 0; needs a teacher that has features."""
    lam_ce: float = 0.0
    """Weight of the cross-entropy with the labels of the server's images, >= 0; needs labelled ones."""
    temperature: float = 2.0
    """T, > 0; 2 for a linear probe, 1 for zero-shot CLIP. Ours."""
    server_steps: int = -1
    """Steps of the server in a round; -1 = one pass over its images; 0 = none, which is FedAvg."""
    server_images: int = 0
    """Of the server's images, how many of each class it uses, >= 0; 0 = all."""
    server_batch: int = 128
    """Images in a step of the server, >= 1; FedDF's code."""
    server_optimizer: Optimizer = Adam(lr=0.001)
    """What the server steps with, its state fresh every round; FedDF's code."""
    server_cosine: bool = True
    """Whether its learning rate falls along a half cosine within the round; FedDF's code."""
    clients: bool = True
    """False: no client takes part, the same student learns from the teacher alone (the control "KD only")."""

    def __post_init__(self) -> None:
        if min(self.lam_kd, self.lam_feat, self.lam_ce) < 0 or not self.temperature > 0:
            raise ConfigError("ServerDistillation needs lam_kd, lam_feat and lam_ce >= 0 and temperature > 0; got "
                              f"{self.lam_kd}, {self.lam_feat}, {self.lam_ce} and {self.temperature}.")  # fmt: skip
        if self.server_steps < -1 or min(self.server_batch - 1, self.server_images) < 0:
            raise ConfigError("ServerDistillation needs server_steps >= -1, server_batch >= 1 and server_images >= 0; got "
                              f"{self.server_steps}, {self.server_batch} and {self.server_images}.")  # fmt: skip

    @property
    def server_columns(self) -> Sequence[str]:
        """Inputs, labels and the teacher's outputs."""
        return ("x", "y", "teacher", *(["teacher_features"] if self.lam_feat else []))

    @property
    def needs_server_labels(self) -> bool:
        """For lam_ce > 0."""
        return self.lam_ce > 0

    @property
    def server_work(self) -> ServerWork:
        """As the options say; nothing to minimise is nothing to do."""
        steps = self.server_steps if self.lam_kd or self.lam_feat or self.lam_ce else 0
        return ServerWork(self.server_batch, steps, self.server_images)

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """One training phase, or none."""
        return (Phase(),) if self.clients else ()

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Server:
        """The initial model; P uniform within 1 / sqrt(d_s) of zero."""
        model, head = ctx.task.initial, projector(ctx, rng) if self.lam_feat else dict[str, Tensor]()
        return Server(model, model, head, self.server_optimizer.init({**model.params, **head}))

    def broadcast(self, ctx: Context, server: Server) -> Variables:
        """Sends the model alone."""
        return server.model

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the client's loss."""
        return sgd_step(ctx, local, empirical_risk(self.loss, ctx, message, batch), self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Server, mean: Variables, total: Tensor) -> Server:
        """Adds the mean change."""
        model = descend(server.model, mean)
        return server._replace(model=model, before=model)

    def server_step(self, ctx: Context, server: Server, batch: Batch) -> tuple[Server, Metrics]:
        """One step on L."""

        def objective(v: Variables, extra: Tree) -> Any:
            if self.lam_feat:
                z, h, v = outputs(ctx, v, batch)
            else:
                z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
                h = z
            terms = {"kd": self.lam_kd * distil(z, batch.columns["teacher"], self.temperature, batch)}
            if self.lam_feat:
                terms["feat"] = self.lam_feat * match(h, v.params[PROJECTOR], batch.columns["teacher_features"], batch)
            if self.lam_ce:
                terms["ce"] = self.lam_ce * batch.mean(F.cross_entropy(z, batch.y, reduction="none"))
            return sum(terms.values()), (v, extra, terms)

        whole = Variables({**server.model.params, **server.projector}, server.model.buffers)
        local, metrics = server_descent(
            ctx, whole, server.optimizer, objective, self.server_optimizer, self.server_cosine
        )
        params = dict(local.variables.params)
        head = {name: params.pop(name) for name in server.projector}
        return Server(Variables(params, local.variables.buffers), server.before, head, local.optimizer), metrics

    def also_judged(self, ctx: Context, server: Server) -> Mapping[str, Variables]:
        """The model before the server's steps."""
        return {"before": server.before} if self.clients else {}
