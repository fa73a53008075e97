"""Ditto: FedAvg, and beside it one model a client that is trained on its own data and held near the generic one.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021
(arXiv 2012.04221), Algorithm 1.

    shared   w_k <- E epochs of mini-batch SGD on F_k, from w^t;   w^{t+1} = w^t + sum_k n_k (w_k - w^t) / sum_k n_k
    own      min_v F_k(v) + lam/2 ||v - w^t||^2:   v_k <- v_k - eta (grad F_k(v_k) + lam (v_k - w^t))
    models   generic w^t; personal v_k

Each batch makes one step of w_k and one of v_k. w^t, the model that the round began with, is the anchor throughout. v_k
starts as the w^t of the client's first round and then stays with the client, as do its batch statistics.

Differences from the paper: the local work of v_k is that of w_k, on the same batches; clients are drawn uniformly and
weighted by n_k. From the authors' code: one lam for all clients (theirs can choose it on validation data).
From widespread code: the norm is squared and the anchor is the generic model, as in the paper; elsewhere one finds the
plain norm, and the client's own former model as the anchor, with which nothing global reaches v_k.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, empirical_risk, sgd_step, squared_distance, start
from fedtail.losses import CrossEntropy, Loss
from fedtail.task import Variables
from fedtail.trees import Tree


class Pair(NamedTuple):
    """A client's two models within one round, each with an optimizer state of its own."""

    shared: Local  # w_k
    own: Local  # v_k


@dataclass(frozen=True, kw_only=True)
class Ditto(Algorithm):
    """FedAvg, and a personal model a client that a proximal term holds near the generic one."""

    loss: Loss = CrossEntropy()
    """What both models of a client minimise (fedtail list losses)."""
    lam: float = 0.1
    """Weight of the personal models' proximal term, >= 0; 0 trains them on their own. The paper tries .1, 1 and 2."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ConfigError(f"Ditto.lam must be in [0, inf), got {self.lam}.")

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Variables:
        """v_k = w^t."""
        return message

    def local_init(self, ctx: Context, message: Variables, client: Variables) -> Pair:
        """Starts from the broadcast model and from the client's own."""
        return Pair(start(self.optimizer, message), start(self.optimizer, client))

    def local_step(
        self, ctx: Context, message: Variables, client: Variables, local: Pair, batch: Batch
    ) -> tuple[Pair, Metrics]:
        """One step of either model."""

        def objective(v: Variables, extra: Tree) -> Any:
            risk, new = self.loss.risk(ctx, message, v, batch)
            return risk + self.lam / 2 * squared_distance(v.params, message.params), (new, extra, {})

        risk = empirical_risk(self.loss, ctx, message, batch)
        shared, metrics = sgd_step(ctx, local.shared, risk, self.optimizer)
        own, found = sgd_step(ctx, local.own, objective, self.optimizer)
        return Pair(shared, own), {**metrics, "loss_personal": found["loss"]}

    def local_final(
        self, ctx: Context, message: Variables, client: Variables, local: Pair
    ) -> tuple[Variables, Variables]:
        """Sends the change of w_k; keeps v_k."""
        return delta(message, local.shared.variables), local.own.variables

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Variables | None) -> Variables:
        """w^t, or v_k."""
        return message if client is None else client
