"""APFL: a personal model is a mix of the generic one and a private one, with a weight that each client learns.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning", 2020 (arXiv 2003.13461), Algorithm 1.

    mix      u = a_k v_k + (1 - a_k) w_k;   g = grad F_k(u)
    batch    v_k <- v_k - eta a_k g                              (a_k g = grad_v F_k(u))
             a_k <- clip(a_k - eta <g, v_k - w_k>, 0, 1)         `adaptive`: at a round's first batch, or at every one
             w_k <- w_k - eta grad F_k(w_k)                      all three from the values before the batch
    server   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k
    models   generic w^t; personal a_k v_k + (1 - a_k) w^t, with the w^t of the day

v_k starts as the w^t of the client's first round, a_k at `mix`. Both stay with the client, and so do the mix's batch
statistics. eta is the learning rate of `optimizer`, with which v_k and w_k step, each with a state of its own.

At a round's first batch w_k is w^t, so that a_k weighs the private against the generic model. Later w_k has been
trained on the client's data too, and faster than v_k: moved at every batch, a_k tends to 0, where v_k learns no more.

Differences from the paper: clients are drawn uniformly and weighted by n_k; v_k and w_k may step with momentum, a_k
does not. From the authors' code, which moves a_k once a round as well: no pull of a_k towards 0 (theirs adds .02 a_k to
the gradient); its gradient is the one at the mix (theirs: a mix of both models'); v_k's is taken before w_k steps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.optim import SGD, Adam, Params
from fedtail.task import Variables


class Own(NamedTuple):
    """Client state."""

    model: Variables  # v_k, with the buffers of the mix
    mix: Tensor  # a_k, ()


class Pair(NamedTuple):
    """A client's two models within one round, each with an optimizer state of its own."""

    shared: Local  # w_k
    own: Local  # v_k; extra: a_k, and 1 before the first batch, then 0


def blend(own: Params, shared: Params, mix: Tensor) -> Params:
    """Returns mix * own + (1 - mix) * shared."""
    return {k: mix * v + (1 - mix) * shared[k] for k, v in own.items()}


@dataclass(frozen=True, kw_only=True)
class APFL(Algorithm):
    """Personal models mix the generic model with a private one; how much, each client learns."""

    loss: Loss = CrossEntropy()
    """What is minimised, at w_k and at the mix (fedtail list losses)."""
    mix: float = 0.5
    """Share a_k of the private model at first, in [0, 1]; fixed at 0 the personal models are the generic. Ours."""
    adaptive: Literal["round", "batch", "never"] = "round"
    """When a_k moves: at the first batch of a round, as in the authors' code; at every batch; never."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"APFL.mix must be in [0, 1], got {self.mix}.")
        if self.adaptive != "never" and not isinstance(self.optimizer, SGD | Adam):  # a_k needs one learning rate
            raise ConfigError(f'APFL.optimizer must be sgd or adam, or adaptive = "never", got {self.optimizer}.')

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Own:
        """v_k = w^t, a_k = mix."""
        return Own(message, torch.tensor(self.mix, dtype=ctx.task.dtype, device=ctx.task.device))

    def local_init(self, ctx: Context, message: Variables, client: Own) -> Pair:
        """Starts from the broadcast model and from the client's own."""
        progress = (client.mix, torch.ones_like(client.mix))
        return Pair(start(self.optimizer, message), start(self.optimizer, client.model, progress))

    def local_step(
        self, ctx: Context, message: Variables, client: Own, local: Pair, batch: Batch
    ) -> tuple[Pair, Metrics]:
        """One step of the private model and of the mix's weight, then one of the shared model."""
        own, found = self._step_own(ctx, message, local, batch)
        risk = empirical_risk(self.loss, ctx, message, batch)
        shared, metrics = sgd_step(ctx, local.shared, risk, self.optimizer)
        return Pair(shared, own), {**metrics, **found}

    def _step_own(self, ctx: Context, message: Variables, local: Pair, batch: Batch) -> tuple[Local, Metrics]:
        (v, buffers), (mix, first), w = local.own.variables, local.own.extra, local.shared.variables.params

        def risk(params: Params) -> Any:
            value, new = self.loss.risk(ctx, message, Variables(params, buffers), batch)
            return value, new.buffers

        value, buffers, grads = ctx.task.value_and_grad(risk, blend(v, w, mix))
        new = mix
        if self.adaptive != "never":
            assert isinstance(self.optimizer, SGD | Adam)
            slope = torch.stack([(g * (v[k] - w[k])).sum() for k, g in grads.items()]).sum()
            moved = (mix - self.optimizer.lr * ctx.round.lr_scale * slope).clamp(0, 1)
            new = moved if self.adaptive == "batch" else torch.where(first > 0, moved, mix)
        grads = {k: mix * g for k, g in grads.items()}
        v, state = ctx.task.update(self.optimizer, grads, local.own.optimizer, v, ctx.round.lr_scale)
        return Local(Variables(v, buffers), state, (new, torch.zeros_like(first))), {"loss_personal": value, "mix": new}

    def local_final(self, ctx: Context, message: Variables, client: Own, local: Pair) -> tuple[Variables, Own]:
        """Sends the change of w_k; keeps v_k and a_k."""
        return delta(message, local.shared.variables), Own(local.own.variables, local.own.extra[0])

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Own | None) -> Variables:
        """w^t, or its mix with v_k."""
        if client is None:
            return message
        return Variables(blend(client.model.params, message.params, client.mix), client.model.buffers)
