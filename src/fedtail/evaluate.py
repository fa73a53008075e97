"""Judging a model: predictions become confusion counts, and every reported number comes from sums of those."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Client, Context, Round
from fedtail.config import Evaluation
from fedtail.data.federated import FederatedData
from fedtail.engines.base import Engine, blame
from fedtail.engines.local_models import soft_confusion
from fedtail.errors import ConfigError
from fedtail.metrics import Floats, GroupRule, ShotGroups, asymmetry_scores, client_spread, from_confusion
from fedtail.task import Worker
from fedtail.trees import Tree

Split = Literal["all", "test", "validation", "train"]
Counts = np.ndarray[Any, Any]  # int64


def shot_groups(rule: GroupRule, data: FederatedData) -> ShotGroups:
    """Returns head, medium and tail of a federation under a rule, from the counts that the rule names."""
    counts = data.test_counts() if rule.counts_of == "local_test" else data.counts()
    return rule.split(counts.sum(0))


def local_groups(rule: GroupRule, data: FederatedData) -> list[ShotGroups] | ShotGroups:
    """Returns each client's groups: of its own local test counts where the rule is about those."""
    if rule.counts_of == "local_test":
        return [rule.split(row) for row in data.test_counts()]
    return shot_groups(rule, data)


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

    def scores(self, split: Split) -> dict[str, Any]:
        """Returns the scores of a split by name; each names its test set and its rule for the shot groups.

        "test" brings "local" (each client's matched part of the test set) and, for methods with personal models,
        "personal" (the same sets, each client's own model). "all" is test, and validation where there is one.
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
            found["train"] = self._rows("training examples of all clients", np.concatenate(list(data.owners)))
        return found

    def _test(self) -> dict[str, Any]:
        algorithm = self.engine.setting.algorithm
        others = {name: self._reading(other) for name, other in algorithm.readings().items()}
        return {**self._reading(algorithm), **({"readings": others} if others else {})}

    def _reading(self, algorithm: Algorithm) -> dict[str, Any]:
        """Returns the scores of one way to predict."""
        data, rule, mask = self.engine.setting.data, self.options.groups, self.options.label_mask
        true = data.test["y"].numpy(force=True)
        labels, soft = self.generic(algorithm, data.test, np.arange(len(true)))
        found = {"test": self._global(f"global test set, {len(true)} examples", true, labels, soft)}
        if not self.options.local:
            return found
        sets = {"local": [labels[rows] for rows in data.local_tests] if mask == "none" else self.each(algorithm, False)}
        if algorithm.personal:
            sets["personal"] = self.each(algorithm, True)
        for name, each in sets.items():
            pairs = zip(data.local_tests, each, strict=True)
            counts = np.stack([confusion(true[rows], p, data.num_classes) for rows, p in pairs])
            found[name] = {"test_set": f"each client's matched part of the test set{MASKS[mask]}",
                           "groups": rule.describe(), **client_spread(counts, local_groups(rule, data))}  # fmt: skip
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

    def each(self, algorithm: Algorithm, personal: bool) -> list[Counts]:
        """Returns labels for every client's local test set, by its own model or the generic one, under the label mask."""
        setting = self.engine.setting
        data, dtype, device = setting.data, setting.task.dtype, setting.task.device
        held = data.counts()
        allowed = {"none": np.ones_like(held), "train": held, "test": data.test_counts()}[self.options.label_mask] > 0

        def one(worker: Worker, number: int) -> Counts:
            rows = torch.from_numpy(data.local_tests[number]).to(device)
            counts = torch.from_numpy(held[number]).to(device, dtype)
            client = Client(torch.tensor(number, device=device), counts.sum(), counts, torch.zeros_like(counts[0]))
            ctx = Context(worker, self.round, self.constants, client if personal else None)
            closed = torch.from_numpy(~allowed[number]).to(device)
            with torch.no_grad(), blame("predict"):
                state = setting.state(ctx, self.message, self.states, number) if personal else None
                inputs = (data.test["x"].index_select(0, part) for part in rows.split(self.options.batch_size))
                scores = (algorithm.predict(ctx, self.message, state, data.prepare(x, dtype)) for x in inputs)
                labels = [z.masked_fill(closed, -torch.inf).argmax(1) for z in scores]
            return torch.cat(labels).numpy(force=True)

        return self.engine.map_batches(one, range(data.clients))
