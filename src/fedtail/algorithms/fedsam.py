"""FedSAM: each local step takes the gradient where the loss is worst within a small ball (sharpness-aware minimisation).

Caldarola, Caputo and Ciccone, "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022 (arXiv
2203.11834); Qu, Li, Duan, Liu, Tang and Lu, "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022
(arXiv 2206.02618); the step is that of Foret, Kleiner, Mobahi and Neyshabur, ICLR 2021 (arXiv 2010.01412).

    step     g = grad F(w);   w <- w - eta grad F(w + rho g / ||g||)        both on the same mini-batch
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k

||g|| is the norm over all parameters; 1e-12 is added to it. A step costs two gradients.

Differences from the papers: momentum is the optimizer's (`optimizer.momentum`), no adaptive form (ASAM), no averaging of the
server's models over rounds. Buffers (BatchNorm statistics) are those of the first of the two passes, at w itself.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import Params, PerKey
from fedtail.task import Variables
from fedtail.trees import Tree


@dataclass(frozen=True, kw_only=True)
class FedSAM(Algorithm):
    """FedAvg with sharpness-aware local steps."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    rho: float = 0.05
    """Radius of the ball, >= 0; .05 in public code; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise ConfigError(f"FedSAM.rho must be in [0, inf), got {self.rho}.")

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step with the gradient at the perturbed model."""

        def risk(params: Params) -> tuple[Tensor, Params]:
            value, new = self.loss.risk(ctx, message, Variables(params, local.variables.buffers), batch)
            return value, new.buffers

        value, buffers, grads = ctx.task.value_and_grad(risk, local.variables.params)
        length = PerKey().norm(grads) + 1e-12
        ascent = {k: g * (self.rho / length) for k, g in grads.items()}

        def objective(v: Variables, extra: Tree) -> Any:
            worst, _ = risk({k: p + ascent[k] for k, p in v.params.items()})
            return worst, (Variables(v.params, buffers), extra, {"sharpness": worst.detach() - value})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Variables, Tree]:
        """Sends the change."""
        return delta(message, local.variables), client

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)
