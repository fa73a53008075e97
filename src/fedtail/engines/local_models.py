"""What local training does to the classes: the cohort's own models on the global test set, before and after, from sums alone.

For client k with counts n_kc a class is *frequent* if n_kc >= n_k / C (its mean share), *rare* if 0 < n_kc < n_k / C,
*missing* if n_kc = 0. Before is the plain network that the client starts from, after the one that its local steps leave.
Forgetting is what the missing classes lose. Every number is a quotient of sums over clients, none larger than [3, C], so a
deployment whose nodes have the test set could send them too.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Client, Round
from fedtail.engines.base import Setting
from fedtail.losses import one_hot
from fedtail.metrics import error_asymmetry
from fedtail.task import Variables, Worker
from fedtail.trees import Tree, items

GROUPS = ("frequent", "rare", "missing")


def soft_confusion(z: Tensor, y: Tensor, twice: bool = False) -> Tensor:
    """Returns the probabilities softmax(z) summed by true class, float64 [classes, classes], row = true class.

    `twice`: softmax(softmax(z)) instead.
    """
    p = z.double().softmax(1)
    return one_hot(y, z.shape[1], torch.float64).T @ (p.softmax(1) if twice else p)


def network_of(local: Tree) -> Variables | None:
    """Returns the first `Variables` in a local state; None if there is none."""
    if isinstance(local, Variables):
        return local
    children = [] if isinstance(local, Tensor) else [child for _, child in items(local)]
    return next((found for child in children if (found := network_of(child)) is not None), None)


class Judged(NamedTuple):
    """Counts of one model's answers on the global test set, all float64."""

    right: Tensor  # right answers by class, (classes,)
    predicted: Tensor  # answers by class, (classes,)
    soft: Tensor  # soft confusion, [classes, classes]

    def macro_f1(self, support: Tensor) -> Tensor:
        """Returns the mean of 2 TP / (2 TP + FP + FN) over the classes in truth or prediction, shape (); see `metrics`."""
        occurring = self.predicted + support
        return (2 * self.right / occurring.clamp(min=1)).sum() / (occurring > 0).sum()


def judge(setting: Setting, worker: Worker, round: Round, local: Tree) -> Judged | None:
    """Judges a local state's plain network on the global test set; None where not wanted, and without a network."""
    variables = network_of(local) if setting.judges(round) else None
    if variables is None:
        return None
    test, classes = setting.data.test, setting.task.num_classes
    right = torch.zeros(classes, dtype=torch.float64, device=setting.task.device)
    predicted, soft = right.clone(), right.new_zeros(classes, classes)
    with torch.no_grad():
        for rows in torch.arange(len(test["y"]), device=setting.task.device).split(setting.batch_size):
            y = test["y"].index_select(0, rows)
            inputs = setting.data.prepare(test["x"].index_select(0, rows), setting.task.dtype)
            z = worker.apply(variables, inputs, train=False)[0]
            answers = one_hot(z.argmax(1), classes, torch.float64)
            right += (one_hot(y, classes, torch.float64) * answers).sum(0)
            predicted += answers.sum(0)
            soft += soft_confusion(z, y, setting.double_softmax)
    return Judged(right, predicted, soft)


def sums(setting: Setting, client: Client, before: Judged | None, after: Judged | None) -> Tree:
    """Returns what one client adds to the sums, from what `judge` gave before and after; () if that is None."""
    if before is None or after is None:
        return ()
    support = torch.bincount(setting.data.test["y"], minlength=setting.task.num_classes)
    ea = error_asymmetry(after.soft.numpy(force=True), support.numpy(force=True))
    log_ea = torch.from_numpy(np.nan_to_num(np.log(ea))).to(support.device)
    own = client.counts.double()
    frequent, held = own * len(own) >= own.sum(), own > 0
    members = torch.stack([frequent, held & ~frequent, ~held]).double() * (support > 0)
    return {"clients": own.new_ones(()), "members": members, "before": members * before.right, "after": members * after.right,
            "macro_f1": torch.stack([before.macro_f1(support), after.macro_f1(support)]),
            "log_ea": members * log_ea, "abs_log_ea": members * log_ea.abs()}  # fmt: skip


def scores(total: Tree, test_labels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Returns the record's entry "local_models" from the sums over clients (docs/metrics.md has every formula)."""
    found = {name: value.numpy(force=True) for name, value in total.items()}
    clients, members = float(found["clients"]), found["members"]
    support = np.bincount(test_labels, minlength=members.shape[1])
    judged, examples = support > 0, members * support

    def mean(above: np.ndarray[Any, Any], below: np.ndarray[Any, Any]) -> float | None:
        return float(above.sum() / below.sum()) if below.sum() else None

    def by_class(above: np.ndarray[Any, Any], below: np.ndarray[Any, Any]) -> list[float | None]:
        return [float(a / b) if b else None for a, b in zip(above, below, strict=True)]

    record: dict[str, Any] = {"test_set": f"global test set, {len(test_labels)} examples", "clients": int(clients)}
    for when, macro_f1 in zip(("before", "after"), found["macro_f1"], strict=True):
        record[f"accuracy_{when}"] = mean(found[when], examples)
        record[f"macro_f1_{when}"] = float(macro_f1 / clients)
        record[f"recall_{when}"] = by_class(found[when].sum(0), examples.sum(0))
        record |= {f"{name}_{when}": mean(*pair) for name, *pair in zip(GROUPS, found[when], examples, strict=True)}
    log_ea = by_class(found["log_ea"].sum(0), clients * judged)
    record["error_asymmetry_after"] = [None if value is None else float(np.exp(value)) for value in log_ea]
    record["mean_abs_log_ea_after"] = mean(found["abs_log_ea"], members)
    record |= {
        f"log_ea_{name}_after": mean(*pair) for name, *pair in zip(GROUPS, found["log_ea"], members, strict=True)
    }
    return record
