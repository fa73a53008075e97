"""FedETF: body and projection are trained against a fixed simplex, on features of unit length and a balanced loss.

Zexi Li, Xinyi Shang, Rui He, Tao Lin and Chao Wu, "No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning
with Synthetic and Fixed Classifier", ICCV 2023 (arXiv 2303.10058).

    V = sqrt(C / (C - 1)) Q (I - 11^T / C)    d' x C, Q with orthonormal columns: unit vectors v_c, cosines -1 / (C - 1); fixed
    h = P f_theta(x) / |P f_theta(x)|         P: d' x d, the projection;   z_c = s h . v_c,   s: the temperature
    client   theta, P, s <- E epochs of SGD on the mean of -log( n_ky exp(z_y) / sum_c n_kc exp(z_c) ), absent classes left out
    server   theta, P, s <- means by numbers of examples;   V is made from the seed and never travels
    after    the last round every client tunes on its own data (phase "tune"): the first round(tune_share tau_k) of its tau_k
             steps train theta, P, s as before; then V_k and P take turns on the mean cross-entropy of z, all else fixed
    predict  generic: z;   personal: z with what the client has tuned, before that the generic model

Tuning has the experiment's local work and the optimizer's learning rate without the schedule, since it comes after training. A
part that waits for its turn keeps its optimizer's state; a clip acts on each part by itself then.

Differences from the authors' code: the projection has no bias, so that the plain head s V^T P, which is exported, gives the
same labels; absent classes drop out of the loss (code: counted as one example); tuning's parts share the local work and the
learning rate (code: E epochs, then 20 times 3 epochs of V_k at .1 and 3 of P at .05).
Differences from FedLoGe's code for it: the paper's loss, and any number of classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase, as_tensor
from fedtail.errors import ConfigError
from fedtail.etf import simplex
from fedtail.heads import feature_size, head_names, with_head
from fedtail.local import Local, delta, descend, overlay, parted, parts_step, sgd_step, split, start
from fedtail.losses import BalancedSoftmax, Loss, mean_cross_entropy
from fedtail.task import Task, Variables
from fedtail.trees import Tree

PROJECTION, TEMPERATURE, CLASSIFIER = "fedetf.projection", "fedetf.temperature", "fedetf.classifier"


@dataclass(frozen=True, kw_only=True)
class FedETF(Algorithm):
    """A fixed simplex in the place of the classifier; then each client tunes its features and the simplex."""

    loss: Loss = BalancedSoftmax()
    """What a client minimises on s h . v_c (fedtail list losses); the default is the paper's, gamma = 1 included."""
    dimension: int = 0
    """d', the length of projected features: at least the number of classes; 0 = just that, as in the authors' code."""
    temperature: float = 1.0
    """What s starts from, > 0; the authors' code has 1, and 10 for its plain CNN."""
    tune_share: float = 0.5
    """Share of the tuning steps that train the features, in [0, 1]; V_k and P take turns in the others. Our choice."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.dimension >= 0 and self.temperature > 0 and 0 <= self.tune_share <= 1):
            got = f"{self.dimension}, {self.temperature}, {self.tune_share}"
            raise ConfigError(f"FedETF needs dimension >= 0, temperature > 0 and tune_share in [0, 1]; got {got}.")

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training; after the last round everyone tunes."""
        return (Phase(), Phase("tune", cohort="all")) if index + 1 == rounds else (Phase(),)

    def constants(self, task: Task, rng: np.random.Generator) -> Tensor:
        """V^T [classes, d']."""
        feature_size(task, "FedETF")
        size = self.dimension or task.num_classes
        if size < task.num_classes:
            raise ConfigError(f"FedETF.dimension must be 0 or >= {task.num_classes}, the classes' number; got {size}.")
        return simplex(task.num_classes, size, rng).T.contiguous().to(task.device, task.dtype)

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Variables:
        """The initial body, a projection with PyTorch's initial values for a linear layer, and the temperature."""
        names, rows = head_names(ctx.task, "FedETF"), ctx.constants
        body, bound = split(ctx.task.initial, names)[1], ctx.task.initial.params[names[0]].shape[1] ** -0.5
        uniform = rng.uniform(-bound, bound, (rows.shape[1], ctx.task.initial.params[names[0]].shape[1]))
        own = {PROJECTION: as_tensor(uniform, rows.dtype, rows.device), TEMPERATURE: rows.new_tensor(self.temperature)}
        return Variables({**body.params, **own}, body.buffers)

    def _logits(self, ctx: Context, v: Variables, x: Tensor, **mode: Any) -> tuple[Tensor, Variables]:
        f, new = ctx.task.apply(v, x, part="features", **mode)
        h = F.normalize(F.linear(f, v.params[PROJECTION]), dim=1)
        return v.params[TEMPERATURE] * F.linear(h, v.params[CLASSIFIER]), new

    def _whole(self, ctx: Context, message: Variables, client: Tree | None) -> Variables:
        return overlay(ctx.task.initial, Variables({CLASSIFIER: ctx.constants}, {}), message, client)

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the message and V; tuning at step 0."""
        model = self._whole(ctx, message, None)
        if ctx.round.phase.name != "tune":
            return start(self.optimizer, model, trainable=message.params)
        optimizer = parted(self.optimizer, ("", PROJECTION, CLASSIFIER))
        return start(optimizer, model, torch.zeros_like(ctx.here.steps), [*message.params, CLASSIFIER])

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step."""
        generic = self.variables(ctx, message, None)

        def objective(v: Variables, extra: Tree) -> Any:
            z, new = self._logits(ctx, v, batch.x, draws=batch.draws)
            return self.loss(ctx, generic, z, batch), (new, extra, {})

        if ctx.round.phase.name != "tune":
            return sgd_step(ctx, local, objective, self.optimizer, trainable=message.params)
        late = local.extra - torch.round(self.tune_share * ctx.here.steps)  # negative: the features' turn
        features, projection = late < 0, torch.remainder(late, 2) > 0.5

        def tuning(v: Variables, step: Tree) -> Any:
            z, new = self._logits(ctx, v, batch.x, draws=batch.draws)
            risk = torch.where(features, self.loss(ctx, generic, z, batch), mean_cross_entropy(z, batch))
            buffers = {k: torch.where(features, b, v.buffers[k]) for k, b in new.buffers.items()}
            return risk, (Variables(new.params, buffers), step + 1, {})

        active = {"": features, PROJECTION: features | projection, CLASSIFIER: ~(features | projection)}
        ctx = ctx._replace(round=ctx.round._replace(lr_scale=1.0))
        return parts_step(ctx, local, tuning, self.optimizer, active, [*message.params, CLASSIFIER])

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Tree, Tree]:
        """Sends the change; after tuning sends nothing and keeps what was tuned."""
        if ctx.round.phase.name != "tune":
            return delta(message, local.variables), client
        tuned = split(local.variables, head_names(ctx.task, "FedETF"))[1]
        return {"nothing": torch.zeros_like(ctx.here.examples)}, tuned

    def server_update(self, ctx: Context, server: Variables, mean: Any, total: Tensor) -> Variables:
        """Adds the mean change; tuning changes nothing here."""
        return server if ctx.round.phase.name == "tune" else descend(server, mean)

    def predict(self, ctx: Context, message: Variables, client: Tree | None, x: Tensor) -> Tensor:
        """Returns the logits s h . v_c, of the client's own tensors where it has tuned."""
        return self._logits(ctx, self._whole(ctx, message, client), x, train=False)[0]

    def variables(self, ctx: Context, message: Variables, client: Tree | None) -> Variables:
        """The network with the head s V^T P and no bias: other logits by a factor for each input, so the same labels."""
        found = self._whole(ctx, message, client)
        rows = found.params[TEMPERATURE] * found.params[CLASSIFIER] @ found.params[PROJECTION]
        weight, *bias = head_names(ctx.task, "FedETF")
        plain = split(found, [*ctx.task.initial.params, *ctx.task.initial.buffers])[0]
        return with_head(plain, {weight: rows, **{name: torch.zeros_like(found.params[name]) for name in bias}})

    def diagnostics(self, ctx: Context, server: Variables) -> Metrics:
        """The temperature s, ()."""
        return {"temperature": server.params[TEMPERATURE]}
