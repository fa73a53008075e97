"""MOON: features of the local model are drawn to the broadcast model's and pushed from its own of the last time.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021 (arXiv 2103.16257). h: features of the local model, h^t: of
the broadcast one, h': of the client's own model when it took part last, the latter two frozen.

    client   L = loss + mu mean_i -log( e^{cos(h, h^t) / tau} / (e^{cos(h, h^t) / tau} + e^{cos(h, h') / tau}) )
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

A client that takes part for the first time has h' = h^t: the term is log 2 and its gradient 0.

Differences from the paper: the features are those that reach the classifier, without a projection head on them; the other two
models are in evaluation mode. Differences from public code: some defines the temperature and does not apply it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.heads import feature_size, features, head_names, logits
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Task, Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class MOON(Algorithm):
    """FedAvg with a contrast of the local features to the broadcast model's and to the client's own last ones."""

    loss: Loss = CrossEntropy()
    """What a client minimises beside the contrast (fedtail list losses); the paper has cross-entropy."""
    mu: float = 5.0
    """Weight of the contrast, >= 0; the paper tries .1, 1, 5 and 10; 0 is FedAvg."""
    tau: float = 0.5
    """Temperature, > 0; .5 is the paper's."""

    def __post_init__(self) -> None:
        if not (0 <= self.mu < math.inf and 0 < self.tau < math.inf):
            raise ConfigError(f"MOON.mu must be in [0, inf) and tau in (0, inf), got {self.mu} and {self.tau}.")

    def constants(self, task: Task, rng: np.random.Generator) -> Tree:
        """None; refuses a model without features."""
        feature_size(task, "MOON")
        return ()

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """The broadcast model in the place of an own one."""
        return message

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on both terms."""
        near, far = (features(ctx.task, model, batch.x) for model in (message, client))

        def objective(v: Variables, extra: Tree) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            z = logits(ctx.task, {name: v.params[name] for name in head_names(ctx.task, "MOON")}, h)
            margin = F.cosine_similarity(h, near, dim=-1) - F.cosine_similarity(h, far, dim=-1)
            contrast = batch.mean(-F.logsigmoid(margin / self.tau))
            risk = self.loss(ctx, message, z, batch) + self.mu * contrast
            return risk, (new, extra, {"contrast": contrast.detach()})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Local
    ) -> tuple[Variables, Variables]:
        """Sends the change; keeps the model."""
        return delta(message, local.variables), local.variables

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
