"""Judging a model: predictions become confusion counts, and every reported number comes from sums of those."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Client, Context, Round
from fedtail.data.federated import FederatedData
from fedtail.engines.base import Engine
from fedtail.metrics import GroupRule, ShotGroups, client_spread, from_confusion
from fedtail.task import Worker
from fedtail.trees import Tree

Counts = np.ndarray[Any, Any]  # int64


def shot_groups(rule: GroupRule, data: FederatedData) -> ShotGroups:
    """Returns head, medium and tail of a federation under a rule, from the counts that the rule names."""
    counts = data.test_counts() if rule.counts_of == "local_test" else data.counts()
    return rule.split(counts.sum(0))


def local_groups(rule: GroupRule, data: FederatedData) -> list[ShotGroups] | ShotGroups:
    """Returns each client's groups: of its own local test counts where the rule is about those (protocol section 2.8)."""
    if rule.counts_of == "local_test":
        return [rule.split(row) for row in data.test_counts()]
    return shot_groups(rule, data)


def predict_labels(
    engine: Engine, algorithm: Algorithm, round: Round, constants: Tree, message: Tree, x: Tensor, batch: int
) -> Counts:
    """Returns the generic model's labels for raw inputs x, int64 (n,)."""
    data, dtype = engine.setting.data, engine.setting.task.dtype

    def one(worker: Worker, part: Tensor) -> Tensor:
        with torch.no_grad():
            ctx = Context(worker, round, constants, None)
            return algorithm.predict(ctx, message, None, data.prepare(part, dtype)).argmax(1)

    return torch.cat(engine.map_batches(one, x.split(batch))).numpy(force=True)


def predict_personal(
    engine: Engine, algorithm: Algorithm, round: Round, constants: Tree, message: Tree, states: dict[int, Tree], batch: int
) -> list[Counts]:
    """Returns each client's own model's labels for its local test set."""
    setting = engine.setting
    data, dtype, device = setting.data, setting.task.dtype, setting.task.device

    def one(worker: Worker, number: int) -> Counts:
        rows = torch.from_numpy(data.local_tests[number]).to(device)
        counts = torch.from_numpy(setting.counts[number]).to(device, dtype)
        client = Client(torch.tensor(number, device=device), counts.sum(), counts, torch.zeros((), dtype=dtype))
        ctx = Context(worker, round, constants, client)
        with torch.no_grad():
            state = setting.state(ctx, message, states, number)
            parts = [data.prepare(part, dtype) for part in data.test["x"][rows].split(batch)]
            labels = [algorithm.predict(ctx, message, state, part).argmax(1) for part in parts]
        return torch.cat(labels).numpy(force=True) if labels else np.zeros(0, np.int64)

    return engine.map_batches(one, range(data.clients))


def confusion(true: Counts, predicted: Counts, classes: int) -> Counts:
    """Returns counts [classes, classes]: row = true class, column = predicted class."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def judge(
    engine: Engine,
    algorithm: Algorithm,
    round: Round,
    constants: Tree,
    message: Tree,
    states: dict[int, Tree],
    rule: GroupRule,
    groups: ShotGroups,
    local: bool,
    batch: int,
) -> dict[str, Any]:
    """Returns a round's scores: "test", and "local", "personal" and "validation" where they apply.

    Each entry names its test set and its rule for the shot groups.
    """
    data, classes = engine.setting.data, engine.setting.data.num_classes
    true = data.test["y"].numpy(force=True)
    labels = predict_labels(engine, algorithm, round, constants, message, data.test["x"], batch)
    names = {"groups": rule.describe()}
    scores: dict[str, Any] = {
        "test": {"test_set": f"global test set, {len(true)} examples", **names,
                 **from_confusion(confusion(true, labels, classes), groups)}
    }  # fmt: skip

    def spread(found: list[Counts]) -> dict[str, Any]:
        per_client = local_groups(rule, data)
        each = [confusion(true[t], p, classes) for t, p in zip(data.local_tests, found, strict=True)]
        return {"test_set": "each client's matched part of the test set", **names, **client_spread(np.stack(each), per_client)}

    if local:
        scores["local"] = spread([labels[t] for t in data.local_tests])
        if algorithm.personal:
            scores["personal"] = spread(predict_personal(engine, algorithm, round, constants, message, states, batch))
    if len(data.validation):
        rows = torch.from_numpy(data.validation)
        kept = data.columns["y"][rows].numpy(force=True)
        found = predict_labels(engine, algorithm, round, constants, message, data.columns["x"][rows], batch)
        scores["validation"] = {"test_set": f"validation split, {len(kept)} examples", **names,
                                **from_confusion(confusion(kept, found, classes), groups)}  # fmt: skip
    return scores
