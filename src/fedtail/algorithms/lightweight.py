"""Two-stage lightweight CNN: two branches, their transplant under one head, and unfreezing from the head down.

Isong, "Building Efficient Lightweight CNN Models", 2025 (arXiv 2501.15547). The model is `unified`: branches f_1, f_2, and
over both  p = softmax(B dropout(relu(A [relu(f_1(x)); relu(f_2(x))] + a)) + b).

    stage 1    F = CE(f_1(x), y) + CE(f_2(aug(x)), y), by `optimizer`; the best round of each branch is kept by itself, and
               the stage ends when either accuracy has not gained `min_delta` for `patience` rounds
    surgery    both branches as they were in their best rounds; A, a, B, b are new; a Dense classifier becomes a convolution
    stage 2    `loss` on the images as they are; groups of layers, from the output: B, b / A, a / classifiers / ...
               paper       the topmost group for unfreeze_rounds[0] rounds, then the topmost two, ...     by `optimizer`
               notebook    all but the topmost, for sum(unfreeze_rounds) rounds or until `patience` ends it
               then        everything, for final_rounds rounds or until `final_patience` ends it          by `final`

Each part begins from the best round of the one before it, with a new optimizer. The federation: a round is FedAvg of what the
part trains, and nothing else is sent; then the cohort counts, each client on the share of its own data that it keeps out of
training (`data.client_validation`), how many it gets right. Centralised training is the federation of one client with
`moments = "averaged"`. After the last part nothing trains: with a round more than all parts have, the last round judges the
model that is kept.

Differences from the paper, which is centralised: the federation is ours; a validation split is drawn at random, not the
first 10,000 images; shuffling is complete. From the author's notebook: unfreezing goes from the head back, as the text says
(`schedule = "notebook"` is what ran: the reverse, in two phases); both classifiers are transplanted (`heads = "first"`);
parts of `unfreeze_rounds` and their lengths are our reading. `refit = "kfold-continue"` is the notebook's continuation: six
folds over all data, one after another on one model, so that every image that validates was trained on before, and
validation accuracies are too high. It is off; for an honest spread over splits, run several seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail import stopping
from fedtail.affine import Affine
from fedtail.algorithm import Algorithm, Batch, Context, Metrics, Phase
from fedtail.errors import ConfigError
from fedtail.local import Local, empirical_risk, overlay, sgd_step, start
from fedtail.losses import CrossEntropy, Loss, mean_cross_entropy
from fedtail.models.branches import Dual
from fedtail.optim import SGD, Nadam, Optimizer
from fedtail.stopping import Watch
from fedtail.task import Draw, Task, Variables
from fedtail.transplant import dual_task, transplant
from fedtail.trees import Tree

FOLDS, FOLD_ROUNDS, FOLD_PATIENCE = 6, 10, 3  # the notebook's


class Server(NamedTuple):
    """Server state; the message when without its last two fields."""

    model: Variables
    moments: Tree  # the optimizer's state, () unless averaged
    best: Any  # Variables, as of the part's best round; () in a message
    watch: Any  # a Watch of the part's validation accuracies; () in a message


class Trained(NamedTuple):
    """What a client sends after training."""

    model: Variables  # the parameters that the part trains, and all buffers
    moments: Tree


class Verdict(NamedTuple):
    """What a client sends after validation."""

    right: Tensor  # (branches,) or (1,) examples predicted right
    examples: Tensor  # ()


class Part(NamedTuple):
    """A stretch of the training with one set of trainable groups."""

    groups: slice  # of those from input to output
    rounds: int
    patience: int  # 0: only the number of rounds ends it
    optimizer: Optimizer
    fold: int = -1  # of the continuation


@dataclass(frozen=True, kw_only=True)
class Lightweight(Algorithm):
    """Two branches trained side by side, joined under one head, and unfrozen from the head down."""

    optimizer: Optimizer = Nadam()
    """What a client steps with in stage 1 and while unfreezing; Nadam is the paper's."""
    final: Optimizer = SGD(lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4, decoupled=True)
    """What it steps with once everything is trained; the paper's SGD."""
    loss: Loss = CrossEntropy()
    """What a client minimises in stage 2 (fedtail list losses); stage 1 has the cross-entropy."""
    augment: Affine = Affine()
    """The copies that the second branch is trained on."""
    schedule: Literal["paper", "notebook"] = "paper"
    """How groups are unfrozen."""
    heads: Literal["both", "first"] = "both"
    """Which branches' classifiers are transplanted; the other starts anew."""
    refit: Literal["none", "kfold-continue"] = "none"
    """Continue on six folds of all data, at most 10 rounds each, patience 3; validates on what was trained on."""
    moments: Literal["fresh", "averaged"] = "fresh"
    """Start a round's optimizer anew, or from the mean of the clients' states, which are sent too."""
    dual_rounds: int = 20
    """Most rounds of stage 1, >= 0; 20 epochs in the paper; 0: stage 2 from random weights, for comparison."""
    unfreeze_rounds: tuple[int, ...] = (2, 3, 3, 2)
    """Rounds of the parts before everything is trained, each >= 1; together 10 epochs in the paper."""
    final_rounds: int = 50
    """Most rounds in which everything is trained, >= 0; 50 epochs in the paper."""
    patience: int = 5
    """Rounds without an improvement that end stage 1, and the notebook's first part, >= 1; the paper's."""
    final_patience: int = 10
    """The same for the part that trains everything, >= 1; the paper's."""
    min_delta: float = 0.001
    """What a validation accuracy must gain by more than to be an improvement, >= 0; the paper's."""
    ignored: int = 3
    """First rounds of stage 1 that `patience` does not see, >= 0; the paper's."""

    needs_branches = True

    def __post_init__(self) -> None:
        for name, least in (("dual_rounds", 0), ("final_rounds", 0), ("patience", 1), ("final_patience", 1),
                            ("min_delta", 0), ("ignored", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ConfigError(f"Lightweight.{name} must be in [{least}, inf), got {getattr(self, name)}.")
        if not all(rounds >= 1 for rounds in self.unfreeze_rounds):
            raise ConfigError(f"Lightweight.unfreeze_rounds must hold numbers in [1, inf), got {self.unfreeze_rounds}.")
        if not (self.dual_rounds or self.unfreeze_rounds or self.final_rounds):
            raise ConfigError(
                "Lightweight trains nothing with dual_rounds = 0, unfreeze_rounds = [] and final_rounds = 0."
            )

    def parts(self) -> list[Part]:
        """Returns the parts in their order; the first is stage 1, which `dual_rounds = 0` passes over."""
        every, short = slice(None), sum(self.unfreeze_rounds)
        ladder = [Part(slice(-k - 1, None), n, 0, self.optimizer) for k, n in enumerate(self.unfreeze_rounds)]
        notebook = [Part(slice(-1), short, self.patience, self.optimizer)] if short else []
        folds = FOLDS if self.refit == "kfold-continue" else 0
        return [
            Part(every, self.dual_rounds, self.patience, self.optimizer),
            *(ladder if self.schedule == "paper" else notebook),
            *([Part(every, self.final_rounds, self.final_patience, self.final)] if self.final_rounds else []),
            *(Part(every, FOLD_ROUNDS, FOLD_PATIENCE, self.final, fold) for fold in range(folds)),
            Part(slice(0), 0, 0, self.final),
        ]

    def _number(self, stage: int) -> int:
        """Returns the part of a stage: each part has two, one for its first round and one for the others."""
        return stage // 2 + (self.dual_rounds == 0)

    def _part(self, ctx: Context) -> Part:
        return self.parts()[self._number(ctx.round.stage)]

    def trainable(self, ctx: Context) -> list[str]:
        """Returns the names of the parameters that train now."""
        return [name for group in ctx.task.stages[self._part(ctx).groups] for name in group]

    def stage_task(self, task: Task, stage: int) -> Task:
        """The two branches, then the unified network, if anything trains it."""
        return task if self._number(stage) and len(self.parts()) > 2 else dual_task(task, "lightweight")

    def stage_data(self, data: Any, stage: int) -> Any:
        """The same, or a fold."""
        fold = self.parts()[self._number(stage)].fold
        return data if fold < 0 else data.fold(fold, FOLDS)

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Training, then validation of the new model by the same clients."""
        return Phase(), Phase("validate", local=False, split="validation")

    def constants(self, task: Task, rng: np.random.Generator) -> Variables:
        """The unified network's initial values."""
        return task.initial

    def draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """What the augmentation wants, in stage 1 and for images."""
        return self.augment.draws(batch_size) if isinstance(task.module, Dual) and len(task.input_shape) == 3 else {}

    def _begin(self, ctx: Context, model: Variables, number: int) -> Server:
        return Server(model, (), model, stopping.begin(number, ctx.task.device))

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Server:
        """Two untrained branches, or with no stage 1 the untrained unified network."""
        return self._begin(ctx, ctx.task.initial, 1 if self._number(0) else 2)

    def broadcast(self, ctx: Context, server: Server) -> Server:
        """The model, and the optimizer's state if it goes on."""
        return server._replace(best=(), watch=())

    def sent(self, ctx: Context, message: Server) -> Tree:
        """What the part trains; all of the model when it is new, and to a cohort that is not everyone."""
        names, stage = self.trainable(ctx), ctx.round.stage
        moved = Variables({k: message.model.params[k] for k in names}, message.model.buffers) if names else ()
        if not ctx.round.phase.local or not names:
            return moved
        new = (stage % 2 == 0 and self._number(stage) < 2) or ctx.round.cohort < ctx.round.holders
        known = stage % 2 == 1 and not new  # from the validation of the round before
        return (message.model if new else () if known else moved), message.moments

    def local_init(self, ctx: Context, message: Server, client: Tree) -> Local | Verdict:
        """Starts from the broadcast model, or with nothing counted."""
        if not ctx.round.phase.local:
            zero = torch.zeros((), dtype=ctx.task.dtype, device=ctx.task.device)
            return Verdict(zero.repeat(1 if self._number(ctx.round.stage) else 2), zero)
        local = start(self._part(ctx).optimizer, message.model, trainable=self.trainable(ctx))
        return local if message.moments == () else local._replace(optimizer=message.moments)

    def local_step(self, ctx: Context, message: Server, client: Tree, local: Any, batch: Batch) -> tuple[Any, Metrics]:
        """One step of what the part trains, or the count of a batch."""
        names, dual = self.trainable(ctx), not self._number(ctx.round.stage)
        if not names:
            return local, {}
        if not ctx.round.phase.local:
            outputs = ("branch1", "branch2") if dual else ("forward",)
            labels = [ctx.task.apply(message.model, batch.x, part=p, train=False)[0].argmax(-1) for p in outputs]
            right = torch.stack([batch.sum((found == batch.y).to(ctx.task.dtype)) for found in labels])
            return Verdict(local.right + right, local.examples + batch.size), {}

        def both(v: Variables, extra: Tree) -> Any:
            copies = self.augment(batch.x, batch.draws["affine"]) if "affine" in batch.draws else batch.x
            z1, v = ctx.task.apply(v, batch.x, part="branch1", draws=batch.draws)
            z2, v = ctx.task.apply(v, copies, part="branch2", draws=batch.draws)
            return mean_cross_entropy(z1, batch) + mean_cross_entropy(z2, batch), (v, extra, {})

        objective = both if dual else empirical_risk(self.loss, ctx, message.model, batch)
        return sgd_step(ctx, local, objective, self._part(ctx).optimizer, trainable=names)

    def local_final(self, ctx: Context, message: Server, client: Tree, local: Any) -> tuple[Tree, Tree]:
        """Sends what was trained (its values, so that a single client's are kept to the bit), or the counts."""
        if not ctx.round.phase.local:
            return (local if self.trainable(ctx) else ()), client
        params = {k: local.variables.params[k] for k in self.trainable(ctx)}
        moments = local.optimizer if self.moments == "averaged" and params else ()
        return Trained(Variables(params, local.variables.buffers), moments), client

    def weight(self, ctx: Context) -> Tensor:
        """The number of examples in training; counts are summed as they are."""
        return ctx.here.examples if ctx.round.phase.local else torch.ones_like(ctx.here.examples)

    def server_update(self, ctx: Context, server: Server, mean: Any, total: Tensor) -> Server:
        """Takes over the mean of what was trained, or judges it and keeps it where it is the best so far."""
        if not self.trainable(ctx):
            return server
        if ctx.round.phase.local:
            return server._replace(model=overlay(server.model, mean.model), moments=mean.moments)
        dual = not self._number(ctx.round.stage)
        right, count = ((v.double() * total.double()).round() for v in mean)  # weights are 1: sums of whole numbers
        watch, highest, improved = stopping.judge(
            server.watch, right / count, self.min_delta, self.ignored if dual else 0
        )

        def better(name: str) -> Tensor:
            return highest[int(name.startswith("branch2."))] if dual else improved[0]

        pairs = zip(server.model, server.best, strict=True)
        best = Variables(*({k: torch.where(better(k), v, old[k]) for k, v in new.items()} for new, old in pairs))
        return server._replace(best=best, watch=watch)

    def diagnostics(self, ctx: Context, server: Server) -> Metrics:
        """The part, its rounds so far, the validation accuracies and how long they have not improved."""
        watch: Watch = server.watch
        return {"part": torch.tensor(self._number(ctx.round.stage)), "rounds": watch.rounds, "validation": watch.last,
                "best": watch.best, "highest": watch.top, "wait": watch.wait}  # fmt: skip

    def advance(self, ctx: Context, server: Server, metrics: Mapping[str, Any]) -> tuple[int, Server]:
        """Goes on with the part, or to the next one from the best model; after stage 1 comes the surgery."""
        stage = ctx.round.stage // 2 * 2
        number, seen, parts = self._number(stage), metrics["diagnostics"], self.parts()
        part = parts[number]
        ends = seen["rounds"] >= part.rounds or (part.patience and max(seen["wait"]) >= part.patience)
        if not ends or number + 1 == len(parts):
            return stage + 1, server
        model = server.best
        if number == 0 and len(parts) > 2:
            model = transplant(ctx.task, model, ctx.constants, self.heads)
        if number + 2 == len(parts):  # nothing trains any more
            return stage + 2, server._replace(model=model, moments=())
        return stage + 2, self._begin(ctx, model, 1)
