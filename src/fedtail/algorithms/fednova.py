"""FedNova: every client's change is divided by its effective number of steps, so that longer training counts no more.

Wang, Liu, Liang, Joshi and Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020 (arXiv 2007.07481).

    client   tau_k steps of SGD on F_k(w) + mu/2 ||w - w^t||^2;    d_k = (w^t - w_k) / a_k
    a_k      momentum rho:  (tau_k - rho (1 - rho^tau_k) / (1 - rho)) / (1 - rho), which is tau_k for rho = 0
             proximal mu:   (1 - (1 - eta mu)^tau_k) / (eta mu), from a <- (1 - eta mu) a + 1 at each step
    server   w^{t+1} = w^t - tau_eff sum_k p_k d_k,    p_k = n_k / sum n_k
             tau_eff = sum_k p_k a_k without, sum_k p_k tau_k with a proximal term

Differences from the paper: buffers are averaged plainly (rescaled running variances could become negative). From public
code: clients are weighted by n_k everywhere, as in the paper; momentum together with a proximal term is refused, where
code adds both increments, because that sum is the a_k of no update rule.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, effective_steps, sgd_step, squared_distance, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import SGD
from fedtail.task import Variables
from fedtail.trees import Tree


class Normalized(NamedTuple):
    """Update: the change of the parameters divided by a_k (buffers as they are), and what tau_eff is the mean of."""

    model: Variables
    steps: Tensor  # ()


@dataclass(frozen=True, kw_only=True)
class FedNova(Algorithm):
    """Averages changes per effective local step, then steps by the mean effective number of steps."""

    loss: Loss = CrossEntropy()
    """What a client minimises (fedtail list losses)."""
    mu: float = 0.0
    """Weight of a proximal term, in [0, 1 / optimizer.lr), only without momentum; 0 is the paper's plain form."""

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, SGD) or self.optimizer.nesterov:  # a_k is known for no other
            raise ConfigError(f"FedNova.optimizer must be sgd without nesterov, got {self.optimizer}.")
        if not 0 <= self.mu * self.optimizer.lr < 1:  # from 1 on, a step jumps over the broadcast model
            limit = 1 / self.optimizer.lr
            raise ConfigError(f"FedNova.mu must be in [0, 1 / optimizer.lr) = [0, {limit:g}), got {self.mu}.")
        if self.mu and self.optimizer.momentum:
            raise ConfigError(f"FedNova.mu = {self.mu} needs optimizer.momentum = 0, got {self.optimizer.momentum}: "
                              "effective steps are not defined for both together.")  # fmt: skip

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the broadcast model."""
        return start(self.optimizer, message)

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the loss, with the proximal term if there is one."""

        def objective(v: Variables, extra: Tree) -> Any:
            risk, new = self.loss.risk(ctx, message, v, batch)
            if self.mu:
                risk = risk + self.mu / 2 * squared_distance(v.params, message.params)
            return risk, (new, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def effective_steps(self, ctx: Context) -> Tensor:
        """Returns a_k, shape (): by how much a gradient that stays the same would have moved the model, over eta."""
        assert isinstance(self.optimizer, SGD)
        tau, rho = ctx.here.steps, self.optimizer.momentum
        pull = self.optimizer.lr * ctx.round.lr_scale * self.mu  # eta mu
        if pull:  # the closed form, written so that it does not cancel for a small pull
            return -torch.expm1(tau * math.log1p(-pull)) / pull
        return effective_steps(tau, rho)

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Normalized, Tree]:
        """Sends the change per effective step, and the steps."""
        effective = self.effective_steps(ctx)
        change = delta(message, local.variables)
        normalized = change._replace(params={k: v / effective for k, v in change.params.items()})
        return Normalized(normalized, ctx.here.steps if self.mu else effective), client

    def server_update(self, ctx: Context, server: Variables, mean: Normalized, total: Tensor) -> Variables:
        """Adds the mean change per effective step, times tau_eff."""
        params = {k: v + mean.steps * mean.model.params[k] for k, v in server.params.items()}
        return Variables(params, dict(mean.model.buffers))
