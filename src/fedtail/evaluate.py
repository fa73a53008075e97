"""Judging a model: predictions become confusion counts, and every reported number comes from sums of those."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Client, Context, Phase, Round
from fedtail.data.federated import FederatedData
from fedtail.data.members import Members
from fedtail.engines.base import Engine, Scores, Sink, blame
from fedtail.engines.local_models import soft_confusion
from fedtail.errors import ConfigError, TrainingError
from fedtail.metrics import (
    Cumulative,
    Floats,
    GroupRule,
    ShotGroups,
    asymmetry_scores,
    client_scores,
    from_confusion,
    spread,
)
from fedtail.personalise import PIECE, Finetune
from fedtail.task import Worker
from fedtail.trees import Tree

Split = Literal["all", "test", "validation", "train"]
Counts = np.ndarray[Any, Any]  # int64


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When and how a model is judged."""

    every: int = 1
    """Rounds between two evaluations; the last round is always evaluated."""
    groups: GroupRule = Cumulative()
    """What head, medium and tail mean."""
    local: bool = True
    """Judge on each client's matched local test set too."""
    drift: bool = False
    """Also measure how far the clients' updates lie from their mean; costs a few passes over each update."""
    local_models: int = 0
    """Rounds between two in which each client's own model is judged too, before and after local training, on the global
    test set (costs two passes over it a client); 0 = never."""
    double_softmax: bool = False
    """Error asymmetry from softmax(softmax(z)), as FedGA's code computes it by mistake: to compare with its plots alone."""
    targets: tuple[float, ...] = ()
    """Overall accuracies in (0, 1] whose first round `compare` reports; fixed before the run, as part of it."""
    batch_size: int = 500
    """Images in an evaluation batch."""
    label_mask: Literal["none", "train", "test"] = "none"
    """Classes that a prediction on a client's local test set may name: all, those of its training data, or of that set."""
    finetune: Finetune = Finetune()
    """Whether the model is also judged after tuning on each client's own data."""
    keep: Literal["last", "best"] = "last"
    """"best" also keeps the checkpoint with the highest balanced accuracy on the validation split."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1:
            raise ConfigError(f"evaluation: every and batch_size must be >= 1, got {self.every} and {self.batch_size}.")
        if self.local_models < 0:
            raise ConfigError(f"evaluation.local_models must be >= 0, got {self.local_models}.")
        if not all(0 < target <= 1 for target in self.targets):
            raise ConfigError(f"evaluation.targets must be accuracies in (0, 1], got {list(self.targets)}.")
        if self.finetune.epochs and not self.local:
            raise ConfigError("evaluation.finetune is judged on the local test sets: set evaluation.local = true.")


def shot_groups(rule: GroupRule, data: FederatedData) -> ShotGroups:
    """Returns head, medium and tail of a federation under a rule, from the counts that the rule names."""
    return rule.split(data.test_counts().sum(0) if rule.counts_of == "local_test" else data.class_totals())


def local_groups(rule: GroupRule, data: FederatedData) -> list[ShotGroups]:
    """Returns each client's groups: of its own local test counts where the rule is about those, else everyone's."""
    if rule.counts_of == "local_test":
        return [rule.split(row) for row in data.test_counts()]
    return [shot_groups(rule, data)] * data.clients


def readings(algorithm: Algorithm) -> dict[str, Algorithm]:
    """Returns all ways to predict that are judged, the method's own first, as ""."""
    return {"": algorithm, **algorithm.readings()}


def confusion(true: Counts, predicted: Counts, classes: int) -> Counts:
    """Returns counts [classes, classes]: row = true class, column = predicted class."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


MASKS = {
    "none": "",
    "train": ", among the classes of the client's training data",
    "test": ", among the classes of that part",
}
"""What a label mask adds to the name of a local test set."""


@dataclass(frozen=True)
class Judge:
    """One model (a message and the clients' states), judged on whatever the engine runs on."""

    engine: Engine
    round: Round
    constants: Tree
    message: Tree
    states: Mapping[int, Tree]
    options: Evaluation
    newcomers: Counts  # clients that never take part, (number,); they are judged apart
    beside: Mapping[str, Tree] = field(default_factory=dict[str, Tree])  # other messages that are judged too

    def scores(self, split: Split) -> dict[str, Any]:
        """Returns the scores of a split by name; each names its test set and its rule for the shot groups.

        "test" brings "local" (each client's matched part of the test set), "newcomers" (the same for those) and, for methods
        with personal models, "personal" (each client's own model). "all" is test, and validation where there is one.
        """
        data = self.engine.setting.data
        if split == "validation" and not len(data.validation):
            raise ConfigError("this experiment has no validation split: set data.validation (images per class).")
        found: dict[str, Any] = {}
        if split in ("all", "test"):
            found.update(self._test())
        if split in ("all", "validation") and len(data.validation):
            found["validation"] = self._rows("validation split", data.validation)
        if split == "train":
            held = [rows for k, rows in enumerate(data.owners) if k not in self.newcomers]
            found["train"] = self._rows("training examples of all clients", np.concatenate(held))
        return found

    def _test(self) -> dict[str, Any]:
        theirs, data = None, self.engine.setting.data
        if self.options.local:
            groups = local_groups(self.options.groups, data)
            theirs = self.engine.client_scores(self.round, self.message, self.states, groups)
        algorithm, others = self.engine.setting.algorithm, dict[str, Any]()
        for i, (name, way) in enumerate(readings(algorithm).items()):
            others[name] = self._reading(way, None if theirs is None else [each[i] for each in theirs])
        for name, other in self.beside.items():  # of the server's, which clients do not know
            others[name] = replace(self, message=other)._reading(algorithm, None if theirs is None else [])
        return {**others.pop(""), **({"readings": others} if others else {})}

    def _reading(self, algorithm: Algorithm, theirs: Sequence[Mapping[str, Scores]] | None) -> dict[str, Any]:
        """Returns the scores of one way to predict; `theirs`: what the clients found by themselves."""
        data = self.engine.setting.data
        everyone = range(data.clients)
        true = data.test["y"].numpy(force=True)
        labels, soft = self.generic(algorithm, data.test, np.arange(len(true)))
        found = {"test": self._global(f"global test set, {len(true)} examples", true, labels, soft)}
        if not self.options.local:
            return found
        if theirs is not None:
            kinds = (("local", "newcomers"), ("personal", "")) if algorithm.personal else (("local", "newcomers"),)
            for kind, apart in kinds if theirs else ():
                found |= self._spread(kind, [each[kind] for each in theirs], apart)
            return found
        each = (
            [labels[rows] for rows in data.local_tests]
            if self.options.label_mask == "none"
            else self.each(algorithm, False, everyone)
        )
        found |= self._spread("local", self.own_scores(each), "newcomers")
        if algorithm.personal:
            found |= self._spread("personal", self.own_scores(self.each(algorithm, True, everyone)))
        return found

    def tuned(self) -> dict[str, Any]:
        """Lets every client that is judged tune the message, a piece of them at a time; returns the scores of what comes out.

        The engine's algorithm is a `Tuning`. Batches are those of the round behind the last one, which no training has. A
        client without a batch keeps the message's model.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        data, work = self.engine.setting.data, self.engine.setting.work
        able = (work.count(Members.of(data.owners).sizes) > 0) & (Members.of(data.local_tests).sizes > 0)
        some, rest = np.flatnonzero(able), np.flatnonzero(~able).tolist()
        labels = dict(zip(rest, self.each(self.engine.setting.algorithm, False, rest), strict=True))
        for piece in np.array_split(some, max(-(-len(some) // PIECE), 1)):
            labels.update(zip(piece.tolist(), self._piece(piece.tolist()), strict=True))
        return self._spread("tuned", self.own_scores([labels[k] for k in range(data.clients)]), "newcomers_tuned")

    def _piece(self, clients: Sequence[int]) -> list[Counts]:
        """Tunes the message on these clients and returns their labels; the tuned models live no longer than this call."""
        setting = self.engine.setting
        here = self.round._replace(index=self.round.rounds, phase=Phase("finetune"), lr_scale=1.0, counts=None)
        plans = setting.plans(here, 0, clients)
        sink = Sink(list(plans))
        try:
            self.engine.cohort(here, 0, self.message, {}, plans, sink)
        except TrainingError as error:
            raise TrainingError(f"In evaluation.finetune, which has its own lr: {error}") from error
        return replace(self, states=sink.states).each(setting.algorithm, True, clients)

    def own_scores(self, labels: Sequence[Counts]) -> list[Scores]:
        """Returns every client's scores by these labels of its local test set."""
        data = self.engine.setting.data
        true, groups = data.test["y"].numpy(force=True), local_groups(self.options.groups, data)
        return [
            client_scores(confusion(true[rows], found, data.num_classes), group)
            for rows, found, group in zip(data.local_tests, labels, groups, strict=True)
        ]

    def _spread(self, name: str, scores: Sequence[Scores], apart: str = "") -> dict[str, Any]:
        """Returns how the clients fare on their local test sets, and, as `apart`, how the newcomers do."""
        data, rule = self.engine.setting.data, self.options.groups
        found: dict[str, Any] = {}
        new = set(self.newcomers.tolist())
        for key, late, whose in ((name, False, "client"), (apart, True, "newcomer")):
            who = [k for k in range(data.clients) if (k in new) == late]
            if key and who:
                found[key] = {"test_set": f"each {whose}'s {data.local_tests_are}{MASKS[self.options.label_mask]}",
                              "groups": rule.describe(), **spread([scores[k] for k in who])}  # fmt: skip
        return found

    def _rows(self, what: str, rows: Counts) -> dict[str, Any]:
        columns = self.engine.setting.data.columns
        true = columns["y"][torch.from_numpy(rows)].numpy(force=True)
        return self._global(
            f"{what}, {len(rows)} examples", true, *self.generic(self.engine.setting.algorithm, columns, rows)
        )

    def _global(self, what: str, true: Counts, labels: Counts, soft: Floats) -> dict[str, Any]:
        data, rule = self.engine.setting.data, self.options.groups
        counts = confusion(true, labels, data.num_classes)
        scores = from_confusion(counts, shot_groups(rule, data))
        return {"test_set": what, "groups": rule.describe(), **scores, **asymmetry_scores(soft, counts.sum(1))}

    def generic(self, algorithm: Algorithm, columns: Mapping[str, Any], rows: Counts) -> tuple[Counts, Floats]:
        """Judges the generic model on rows (n,) of raw columns.

        Returns:
            (predicted labels, int64 (n,); soft confusion, float64 [classes, classes], see `soft_confusion`).
        """
        setting = self.engine.setting

        def one(worker: Worker, part: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), blame("predict"):
                ctx = Context(worker, self.round, self.constants, None)
                inputs = setting.data.prepare(columns["x"].index_select(0, part), setting.task.dtype)
                z = algorithm.predict(ctx, self.message, None, inputs)
                y = columns["y"].index_select(0, part)
                return z.argmax(1), soft_confusion(z, y, self.options.double_softmax)

        parts = torch.from_numpy(rows).to(setting.task.device).split(self.options.batch_size)
        labels, soft = zip(*self.engine.map_batches(one, parts), strict=True)
        return torch.cat(labels).numpy(force=True), torch.stack(soft).sum(0).numpy(force=True)

    def each(self, algorithm: Algorithm, personal: bool, clients: Sequence[int]) -> list[Counts]:
        """Returns labels for clients' local test sets, by their own models or the generic one, under the label mask."""
        setting = self.engine.setting
        data, dtype, device = setting.data, setting.task.dtype, setting.task.device
        true = data.test["y"].numpy(force=True)

        def one(worker: Worker, number: int) -> Counts:
            rows = torch.from_numpy(data.local_tests[number]).to(device)
            held = data.counts_of([number])[0]
            tested = np.bincount(true[data.local_tests[number]], minlength=data.num_classes)
            allowed = {"none": np.ones_like(held), "train": held, "test": tested}[self.options.label_mask] > 0
            counts = torch.from_numpy(held).to(device, dtype)
            client = Client(torch.tensor(number, device=device), counts.sum(), counts, torch.zeros_like(counts[0]))
            ctx = Context(worker, self.round, self.constants, client if personal else None)
            closed = torch.from_numpy(~allowed).to(device)
            with torch.no_grad(), blame("predict"):
                state = setting.state(ctx, self.message, self.states, number) if personal else None
                inputs = (data.test["x"].index_select(0, part) for part in rows.split(self.options.batch_size))
                scores = (algorithm.predict(ctx, self.message, state, data.prepare(x, dtype)) for x in inputs)
                labels = [z.masked_fill(closed, -torch.inf).argmax(1) for z in scores]
            return torch.cat(labels).numpy(force=True)

        return self.engine.map_batches(one, clients)
