"""What FedLoGe's heads learn of the class counts, on features that are drawn once and frozen: ten classes, eight clients.

The federation is that of `oracles.toy`: a long-tailed Gaussian mixture (imbalance factor 100, 1,236 examples), Dirichlet
.5. The network has no hidden layer, so that psi and the phi_k alone are trained, by fedtail's own FedLoGe. An independent
program of this toy in NumPy gave, over 20 seeds: psi' gains 8.0 to 18.2 points on psi, on the tail 15.1 to 38.3; the rank
correlation of psi's row norms with the counts is .83 at least from round 5 on. Over 10 seeds: rows of absent classes in
phi_k end at 1.18 or below, of present ones at 1.21 or above; personal models gain 1.3 to 7.9 points on psi.
"""

import contextlib
import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles.toy import CLASSES, CLIENTS, ROUNDS, counts, toy
from scipy.stats import spearmanr
from torch.nn import functional as F

from fedtail import SGD, EngineOptions, Evaluation, Experiment, LocalWork
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.data.federated import FederatedData
from fedtail.experiment import Federation
from fedtail.models.specs import MLP

pytestmark = pytest.mark.slow
SEEDS = range(5)
GROUPS = {"head": slice(0, 3), "tail": slice(6, None), "all": slice(None)}


class Trained(NamedTuple):
    """What a run leaves."""

    norms: np.ndarray  # row norms of psi after each round, [rounds, classes]
    held: np.ndarray  # n_kc, [clients, classes]
    private: np.ndarray  # row norms of phi_k, [clients, classes]
    raw: np.ndarray  # recall of each class by psi, (classes,)
    realigned: np.ndarray  # by psi'
    personal: np.ndarray  # by each client's model, [clients, classes]


@functools.cache
def trained(seed: int) -> Trained:
    """Twenty rounds of five epochs of batch 10."""
    x, y, owners, test_x, test_y = toy(seed)
    columns = [{"x": torch.from_numpy(a).float(), "y": torch.from_numpy(b)} for a, b in ((x, y), (test_x, test_y))]
    data = FederatedData(columns[0], owners, columns[1], [np.arange(0)] * CLIENTS, CLASSES)
    experiment = Experiment(
        seed=seed, rounds=ROUNDS, model=MLP(hidden=()), local=LocalWork(epochs=5, batch_size=10),
        algorithm=FedLoGe(etf_steps=0, optimizer=SGD(lr=0.03, momentum=0.5)),  # the frozen head has nothing to train here
        engine=EngineOptions(name="loop"), evaluation=Evaluation(local=False),
    )  # fmt: skip
    with contextlib.closing(Federation(experiment, data)) as running:
        assert set(running.task.initial.params) == {"head.weight", "head.bias"}  # no backbone
        norms = []
        for _ in range(ROUNDS):
            record = running.step()
            norms.append(record["diagnostics"]["head_norms"])
            running.advance(record)
        scores = running.score()
        private = np.stack([running.states[k]["head.weight"].norm(dim=1).numpy() for k in range(CLIENTS)])
        personal = np.stack([recall(running.variables(k).params, columns[1]) for k in range(CLIENTS)])
    raw, realigned = scores["readings"]["raw"]["test"], scores["test"]
    return Trained(np.array(norms), data.counts(), private, np.array(raw["per_class_recall"]),
                   np.array(realigned["per_class_recall"]), personal)  # fmt: skip


def recall(params, test):
    """The share of each class's 200 test examples that a linear layer finds, (classes,)."""
    hits = F.linear(test["x"], params["head.weight"], params["head.bias"]).argmax(1) == test["y"]
    return hits.view(CLASSES, 200).double().mean(1).numpy()


def test_generic_realignment_moves_accuracy_from_the_head_to_the_tail():
    gains = [trained(seed).realigned - trained(seed).raw for seed in SEEDS]
    means = {group: 100 * np.mean([gain[part] for gain in gains]) for group, part in GROUPS.items()}
    assert means["tail"] > 10
    assert means["all"] > 4
    assert means["head"] < 0


def test_the_row_norms_of_psi_learn_the_order_of_the_class_counts():
    for seed in SEEDS:
        for norms in trained(seed).norms[4:]:
            assert spearmanr(norms, counts()).statistic > 0.8


def test_the_row_norms_of_a_private_head_tell_absent_classes_from_present_ones():
    for seed in SEEDS:
        found = trained(seed)
        assert (found.held == 0).any(axis=1).sum() > CLIENTS // 2
        for norms, held in zip(found.private, found.held, strict=True):
            assert norms[held == 0].max(initial=0) < norms[held > 0].min()


def test_personal_models_are_better_at_home_than_psi():
    """Recall weighted with the client's own class shares, mean over clients."""
    for seed in SEEDS:
        found = trained(seed)
        shares = found.held / found.held.sum(1, keepdims=True)
        own, generic = (shares * found.personal).sum(1).mean(), (shares * found.raw).sum(1).mean()
        assert own > generic
