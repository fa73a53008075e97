"""pFedMe: the generic model descends on the clients' Moreau envelopes, whose minimisers are the personal models.

Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020 (arXiv 2006.08848),
Algorithm 1.

    envelope  M_k(w) = min_v F_k(v) + lam/2 ||v - w||^2,   grad M_k(w) = lam (w - v*(w))
    client    w_k <- w^t, v_k <- w^t;   for each batch
                  v_k <- v_k - eta_v (grad F_k(v_k) + lam (v_k - w_k)),   `inner_steps` times on that batch
                  w_k <- w_k - lr_shared lam (w_k - v_k)
    server    w^{t+1} = w^t + server_lr * sum_k n_k (w_k - w^t) / sum_k n_k
    models    generic w^t; personal v_k, as its client's last round left it

eta_v is the learning rate of `optimizer`, whose state lasts a round; v_k goes on from one batch to the next. With
inner_steps = 1 and lr_shared * lam = 1 the generic model is FedAvg's, for then w_k <- v_k.

Differences from the paper: the mean is weighted by n_k, as in the authors' code (there: plain), and a client outside
of the cohort does no work (there all train, some send). From the authors' code: v_k may step with momentum. The network
runs with v_k alone, so batch statistics are v_k's: they are kept with it, and their mean goes with w.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, squared_distance, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import Params
from fedtail.task import Variables


@dataclass(frozen=True, kw_only=True)
class PFedMe(Algorithm):
    """Personal models solve a proximal problem around the client's copy of the generic one, which follows them."""

    loss: Loss = CrossEntropy()
    """What a personal model minimises beside the proximal term (fedtail list losses)."""
    lam: float = 15.0
    """Weight of the proximal term, > 0; 15 in the authors' code. With SGD, lr * lam must stay below 2."""
    inner_steps: int = 5
    """Steps of the personal model on each batch, >= 1; 5 in the authors' code."""
    lr_shared: float = 0.03
    """Step of w_k along the envelope's gradient, > 0: FedAvg's learning rate; .03 is the long-tail protocol's."""
    server_lr: float = 1.0
    """The paper's beta, > 0: step of the server along the mean change; 1 replaces the model by the mean."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("lam", self.lam), ("lr_shared", self.lr_shared), ("server_lr", self.server_lr)):
            if not 0 < value < math.inf:
                raise ConfigError(f"PFedMe.{name} must be in (0, inf), got {value}.")
        if self.inner_steps < 1:
            raise ConfigError(f"PFedMe.inner_steps must be >= 1, got {self.inner_steps}.")

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """v_k = w^t."""
        return message

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Local:
        """Starts from the broadcast model: v_k is what steps, w_k goes along."""
        return start(self.optimizer, message, message.params)

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """A few steps of v_k, then one of w_k towards it."""

        def objective(v: Variables, extra: Params) -> Any:
            risk, new = self.loss.risk(ctx, message, v, batch)
            return risk + self.lam / 2 * squared_distance(v.params, extra), (new, extra, {})

        metrics: Metrics = {}
        for _ in range(self.inner_steps):
            local, metrics = sgd_step(ctx, local, objective, self.optimizer)
        rate, v = self.lr_shared * ctx.round.lr_scale * self.lam, local.variables.params
        return local._replace(extra={k: w - rate * (w - v[k]) for k, w in local.extra.items()}), metrics

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Local
    ) -> tuple[Variables, Variables]:
        """Sends the change of w_k; keeps v_k."""
        return delta(message, Variables(local.extra, local.variables.buffers)), local.variables

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean, self.server_lr)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """w^t, or v_k."""
        return message if client is None else client
