"""FedROD: a generic head trained as if classes were balanced, and a private one that learns what it must add to that.

Chen and Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022
(arXiv 2107.00778).

    h = f_theta(x), once a batch;   psi: generic head;   phi_k: client k's own;   sg: no gradient
    L = BSM(psi(h), y) + CE(sg psi(h) + phi_k(sg h), y)
        BSM: balanced softmax with the client's class counts, CE on z_c + log n_kc
    theta and psi step by the first term, phi_k by the second
    server   theta, psi <- means by numbers of examples;   phi_k stays with its client
    models   generic psi(h); personal psi(h) + phi_k(h)

Traffic is FedAvg's. phi_k starts at 0, so that the personal model of a client that never took part is the generic one.

Differences from the paper: phi_k is linear (there also one that a shared hypernetwork makes of the client's class
counts), and starts at 0, on which the paper is silent; no further regulariser. A clip of the optimizer acts
on theta, psi and phi_k together. From other public code (the authors' has not appeared): elsewhere one finds a generic
head on the plain cross-entropy (`loss`), and a private one trained on its own logits instead of the sum.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.heads import feature_size, head_names, logits, with_head
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import BalancedSoftmax, Loss, mean_cross_entropy
from fedtail.optim import Params
from fedtail.task import Task, Variables
from fedtail.trees import Tree

OWN = "private."  # before the names of phi_k's parameters, beside the model's in a client's local state


@dataclass(frozen=True, kw_only=True)
class FedROD(Algorithm):
    """A balanced generic head on a shared backbone, and a private one whose logits are added to it."""

    loss: Loss = BalancedSoftmax()
    """What backbone and generic head minimise (fedtail list losses); balanced softmax is the paper's."""

    personal: ClassVar[bool] = True

    def constants(self, task: Task, rng: np.random.Generator) -> Tree:
        """None; refuses a model without features."""
        feature_size(task, "FedROD")
        return ()

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Params:
        """phi_k = 0."""
        return {name: torch.zeros_like(message.params[name]) for name in head_names(ctx.task, "FedROD")}

    def local_init(self, ctx: Context, message: Variables, client: Params) -> Local:
        """Starts from theta, psi and the client's own head."""
        own = {OWN + name: value for name, value in client.items()}
        return start(self.optimizer, Variables({**message.params, **own}, message.buffers))

    def local_step(
        self, ctx: Context, message: Variables, client: Params, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step on both terms; each reaches its own part of the parameters only."""

        def objective(v: Variables, extra: Tree) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            generic = logits(ctx.task, v.params, h)
            private = logits(ctx.task, {k: v.params[OWN + k] for k in client}, h.detach())
            first = self.loss(ctx, message, generic, batch)
            second = mean_cross_entropy(generic.detach() + private, batch)
            return first + second, (new, extra, {"loss_generic": first, "loss_personal": second})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Params, local: Local) -> tuple[Variables, Params]:
        """Sends the change of theta and psi; keeps phi_k."""
        return delta(message, local.variables), {k: local.variables.params[OWN + k] for k in client}

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Params | None) -> Variables:
        """The network with the generic head, or with the sum of both: one linear layer again."""
        if client is None:
            return message
        return with_head(message, {name: message.params[name] + own for name, own in client.items()})
