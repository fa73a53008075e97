"""FedProto: clients keep their whole models and share only what their classes look like, one mean feature a class.

Tan, Long, Liu, Zhou, Lu, Jiang and Zhang, "FedProto: Federated Prototype Learning across Heterogeneous Clients",
AAAI 2022 (arXiv 2105.00243), Algorithm 1.

    train    L = CE + lam * mean_c ||mean h of c in the batch - C_c||^2    over the batch's classes c that have a C_c
    report   s_kc = sum of h over client k's examples of class c, n_kc their number     a pass with the trained model
    server   C_c <- sum_k s_kc / sum_k n_kc    over the cohort; a class that nobody there holds keeps its C_c
    models   personal: argmin_c ||h - C_c|| with the client's own backbone, or (`prediction`) the client's classifier

No parameter travels. All models start from the same values. There is no generic model: what is asked of one is answered
by the initial network, untrained (or as `start` gave it), so its scores say nothing. The nearest prototype is a linear
layer, with logits 2 C_c h - ||C_c||^2, so that a personal model exports as a plain network.

Differences from the paper: the distance is squared, as in the authors' code, and averaged over classes, not summed; its
formula of C_c divides by the number of clients once more. From the authors' code: the distance is of a class's mean
(theirs: of each example, averaged over the entries of h); h is taken after training, in evaluation mode (theirs: on the
way, in the last epoch); clients count by n_kc (theirs: equally); all classes with a prototype can be predicted (theirs:
those that the client holds, as evaluation.label_mask = "train" does for any method).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase
from fedtail.errors import ConfigError
from fedtail.heads import feature_size, features, head_names, logits, with_head
from fedtail.local import Local, sgd_step, start
from fedtail.losses import EXCLUDED, CrossEntropy, Loss, one_hot
from fedtail.task import Task, Variables
from fedtail.trees import Tree


class Prototypes(NamedTuple):
    """Server state and message."""

    means: Tensor  # C, [classes, d]
    known: Tensor  # (classes,), 1 where there is a prototype, else 0


class Sums(NamedTuple):
    """Update of the phase "prototypes"."""

    features: Tensor  # s_k, [classes, d]
    counts: Tensor  # n_k, (classes,)


def class_sums(ctx: Context, h: Tensor, batch: Batch) -> Sums:
    """Returns a batch's features [batch, d] summed by class, and the numbers of examples."""
    y = one_hot(batch.y, ctx.task.num_classes, h.dtype)
    y = y if batch.mask is None else y * batch.mask[:, None]
    return Sums(y.mT @ h, y.sum(0))


@dataclass(frozen=True, kw_only=True)
class FedProto(Algorithm):
    """Personal models whose features of a class are drawn to the mean over clients; nothing else is shared."""

    loss: Loss = CrossEntropy()
    """What a client minimises beside the distance to the prototypes (fedtail list losses)."""
    lam: float = 1.0
    """Weight of that distance, >= 0; 0 trains each client alone. 1 in the authors' code (.1 on CIFAR-10)."""
    prediction: Literal["prototype", "classifier"] = "prototype"
    """What a personal model predicts with: the nearest prototype (paper), or its own classifier."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ConfigError(f"FedProto.lam must be in [0, inf), got {self.lam}.")

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training, then one pass of the same clients over their data."""
        return Phase(), Phase("prototypes", local=False)

    def constants(self, task: Task, rng: np.random.Generator) -> Tree:
        """None; refuses a model without features, or without the bias that a nearest prototype needs."""
        feature_size(task, "FedProto")
        if self.prediction == "prototype" and len(head_names(task, "FedProto")) < 2:
            raise ConfigError('FedProto.prediction = "prototype" needs a classifier with a bias. Set "classifier".')
        return ()

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Prototypes:
        """No prototypes."""
        means = torch.zeros_like(ctx.task.initial.params[f"{ctx.task.classifier}.weight"])
        return Prototypes(means, torch.zeros_like(means[:, 0]))

    def init_client(self, ctx: Context, message: Prototypes, rng: np.random.Generator) -> Variables:
        """The initial network."""
        return ctx.task.initial

    def local_init(self, ctx: Context, message: Prototypes, client: Variables) -> Local | Sums:
        """Goes on from the client's own model, or starts from empty sums."""
        if ctx.round.phase.local:
            return start(self.optimizer, client)
        return Sums(torch.zeros_like(message.means), torch.zeros_like(message.known))

    def local_step(
        self, ctx: Context, message: Prototypes, client: Variables, local: Any, batch: Batch
    ) -> tuple[Local | Sums, Metrics]:
        """One step on both terms, or a batch's part of the sums."""
        if not ctx.round.phase.local:
            return trees.tree_map(torch.add, local, class_sums(ctx, features(ctx.task, client, batch.x), batch)), {}

        def objective(v: Variables, extra: Tree) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            sums, n = class_sums(ctx, h, batch)
            gaps = (sums / n.clamp(min=1)[:, None] - message.means).square().sum(1)
            present = (n > 0) * message.known
            distance = (present * gaps).sum() / present.sum().clamp(min=1)
            risk = self.loss(ctx, client, logits(ctx.task, v.params, h), batch)
            return risk + self.lam * distance, (new, extra, {"distance": distance})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Prototypes, client: Variables, local: Any) -> tuple[Tree, Variables]:
        """Keeps the model; sends the sums, after training only the class counts (an update is never empty)."""
        return ({"counts": ctx.here.counts}, local.variables) if ctx.round.phase.local else (local, client)

    def weight(self, ctx: Context) -> Tensor:
        """1: the sums hold the numbers of examples."""
        return torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Prototypes, mean: Any, total: Tensor) -> Prototypes:
        """Divides the sums by the counts, where there are any."""
        if ctx.round.phase.local:
            return server
        held = mean.counts > 0
        means = mean.features / torch.where(held, mean.counts, 1.0)[:, None]
        return Prototypes(torch.where(held[:, None], means, server.means), torch.where(held, 1.0, server.known))

    def variables(self, ctx: Context, message: Prototypes, client: Variables | None) -> Variables:
        """The initial network, or the client's own with the nearest prototype, or its classifier, as its last layer."""
        if client is None or self.prediction == "classifier":
            return ctx.task.initial if client is None else client
        weight, bias = head_names(ctx.task, "FedProto")
        offset = torch.where(message.known > 0, -message.means.square().sum(1), EXCLUDED)
        return with_head(client, {weight: 2 * message.means, bias: offset})

    def readings(self) -> Mapping[str, Algorithm]:
        """Beside the nearest prototype, the clients' own classifiers are judged too."""
        return {"classifier": replace(self, prediction="classifier")} if self.prediction == "prototype" else {}
