"""Fine-tuning: the generic model, trained on by each client on its own data, to be judged beside it, whatever the method.

    w_k = w after E epochs of plain SGD on the mean cross-entropy of client k's training examples, from the generic model w

It is written as an algorithm without a server, so that every engine runs it; a client's state is what it has tuned. Nothing
of the run itself depends on it: batches and draws are those of a round behind the last one, which no training uses.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.engines.base import Setting
from fedtail.errors import ConfigError
from fedtail.heads import head_names
from fedtail.local import Local, sgd_step, start
from fedtail.losses import mean_cross_entropy
from fedtail.optim import SGD
from fedtail.task import Task, Variables, Worker
from fedtail.trees import Tree

PIECE = 32
"""Clients whose tuned models exist at the same time."""


@dataclass(frozen=True, kw_only=True)
class Tuning(Algorithm):
    """Plain SGD on the cross-entropy from the message (the network's variables); what comes of it stays at the client."""

    part: Literal["all", "head"] = "all"
    """What is tuned, see `Finetune.part`."""

    personal: ClassVar[bool] = True

    def names(self, task: Task | Worker, model: Variables) -> list[str]:
        """Returns the names of the parameters that are tuned.

        Raises:
            ConfigError: it is the head, and the model has none.
        """
        return list(model.params) if self.part == "all" else head_names(task, 'evaluation.finetune.part = "head"')

    def local_init(self, ctx: Context, message: Variables, client: Tree) -> Local:
        """Starts from the generic model."""
        return start(self.optimizer, message, (), self.names(ctx.task, message))

    def local_step(
        self, ctx: Context, message: Variables, client: Tree, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step; a frozen backbone is in evaluation mode, so that its BatchNorm statistics stay and nothing is dropped."""

        def objective(variables: Variables, extra: Tree) -> tuple[Tensor, tuple[Variables, Tree, Metrics]]:
            z, variables = ctx.task.apply(variables, batch.x, train=self.part == "all", draws=batch.draws)
            return mean_cross_entropy(z, batch), (variables, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer, trainable=self.names(ctx.task, message))

    def local_final(self, ctx: Context, message: Variables, client: Tree, local: Local) -> tuple[Tree, Variables]:
        """Sends nothing; keeps what was tuned, and the buffers."""
        params, buffers = local.variables
        return (), Variables({name: params[name] for name in self.names(ctx.task, message)}, buffers)

    def server_update(self, ctx: Context, server: Any, mean: Tree, total: Tensor) -> Any:
        """There is nothing to do."""
        return server

    def variables(self, ctx: Context, message: Variables, client: Tree | None) -> Variables:
        """Returns the client's tuned model; the generic one for a client that could not train."""
        return Variables({**message.params, **client.params}, client.buffers) if client else message


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Whether the generic model is also judged after each client has tuned it on its own data, at the end of the run."""

    epochs: int = 0
    """Passes over the client's training data, in batches as in `local`; 0 = no tuning. One is usual for a head."""
    part: Literal["all", "head"] = "all"
    """"head" tunes the classifier alone, on a frozen backbone in evaluation mode."""
    lr: float = 0.03
    """Learning rate of plain SGD, > 0, whatever the method's optimizer and schedule; .03 is the long-tail protocol's."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 0 < self.lr < math.inf:
            raise ConfigError(
                f"evaluation.finetune: epochs must be >= 0 and lr in (0, inf), got {self.epochs} and {self.lr}."
            )

    def check(self, task: Task) -> None:
        """Raises ConfigError if the head is to be tuned and the model has none."""
        if self.epochs:
            Tuning(part=self.part).names(task, task.initial)

    def setting(self, run: Setting) -> Setting:
        """Returns a run's setting with tuning in the place of the method: so many epochs, in batches as in training."""
        algorithm = Tuning(optimizer=SGD(lr=self.lr, momentum=0.0), part=self.part)
        return replace(run, algorithm=algorithm, work=replace(run.work, epochs=self.epochs, steps=0), constants=())
