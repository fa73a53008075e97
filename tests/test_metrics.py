import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtail.data.longtail import Exponential
from fedtail.errors import ConfigError
from fedtail.metrics import (
    GROUP_RULES,
    OLTR,
    Cumulative,
    Explicit,
    ShotGroups,
    Thirds,
    client_spread,
    from_confusion,
)

NO_GROUPS = ShotGroups((), (), ())


# ---- shot groups, protocol section 3 and 7.1 item 5


def _sizes(groups):
    return tuple(len(group) for group in groups)


@pytest.mark.parametrize(
    ("classes", "size", "factor", "expected"),
    [
        (10, 5000, 10, (5, 4, 1)),
        (10, 5000, 50, (4, 3, 3)),
        (10, 5000, 100, (3, 3, 4)),
        (100, 500, 10, (49, 35, 16)),
        (100, 500, 50, (34, 34, 32)),
        (100, 500, 100, (30, 31, 39)),
    ],
)
def test_cumulative_groups_of_training_counts(classes, size, factor, expected):
    counts = Exponential(factor=factor).counts(np.full(classes, size))
    groups = Cumulative(of="train").split(counts)
    assert _sizes(groups) == expected
    assert sum(groups, ()) == tuple(range(classes))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([100], ((0,), (), ())),
        ([80, 15, 5], ((0,), (1,), (2,))),
        ([97, 2, 1], ((0,), (), (1, 2))),  # one class crosses both thresholds
        ([70, 24, 6], ((0, 1), (2,), ())),  # only the last class reaches 95 %
        ([75, 20, 5], ((0,), (1,), (2,))),  # exactly 75 and 95 %
        ([5, 80, 15], ((1,), (2,), (0,))),
        ([1, 1, 1, 1], ((0, 1, 2), (3,), ())),  # ties keep the order of the ids
        ([0, 9, 0], ((1,), (), (0, 2))),
        ([0, 0], ((), (), ())),
    ],
)
def test_cumulative_edge_cases(counts, expected):
    assert Cumulative().split(np.array(counts)) == ShotGroups(*expected)


def test_other_thresholds():
    assert Cumulative(head=0.5, medium=0.5).split(np.array([2, 1, 1])) == ShotGroups((0,), (), (1, 2))


def test_oltr_thresholds_are_strict():
    groups = OLTR().split(np.array([101, 100, 20, 19, 0]))
    assert groups == ShotGroups((0,), (1, 2), (3, 4))


def test_thirds():
    assert Thirds().split(np.array([1, 9, 5, 5, 7, 2])) == ShotGroups((1, 4), (2, 3), (5, 0))
    assert _sizes(Thirds().split(np.arange(10))) == (4, 3, 3)


def test_explicit_groups_ignore_the_counts():
    rule = Explicit(head=(0, 1), medium=(2, 3, 4, 5), tail=(6, 7, 8, 9))  # Fed-GraB's 2/4/4
    assert _sizes(rule.split(np.zeros(10, np.int64))) == (2, 4, 4)


@pytest.mark.parametrize(
    ("rule", "classes", "message"),
    [
        (Explicit(head=(0,), tail=(1,)), 3, r"classes 0\.\.2; not in a group: \[2\], not in the data: none"),
        (Explicit(head=(0, 1), tail=(7,)), 2, r"not in a group: none, not in the data: \[7\]"),
    ],
)
def test_explicit_groups_must_hold_every_class(rule, classes, message):
    with pytest.raises(ConfigError, match=message):
        rule.split(np.ones(classes, np.int64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Explicit(head=(0, 1), tail=(1,)), "class 1 stands twice"),
        (lambda: Explicit(head=(0, -1)), "class -1 does not exist"),
        (lambda: Cumulative(head=0.9, medium=0.8), r"Cumulative\.head"),
        (lambda: Cumulative(head=0), r"Cumulative\.head"),
        (lambda: Cumulative(medium=1.1), r"Cumulative\.medium"),
        (lambda: OLTR(many=10, few=20), r"OLTR\.few"),
    ],
)
def test_impossible_rules(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "counts_of", "words"),
    [
        (Cumulative(), "local_test", "cumulative 75/95 % of the summed local test counts"),
        (Cumulative(head=0.6, of="train"), "train", "cumulative 60/95 % of the training counts"),
        (OLTR(), "train", "more than 100 / 20 to 100 / fewer than 20 training examples"),
        (Thirds(), "train", "thirds of the classes by training counts"),
        (Thirds(of="local_test"), "local_test", "thirds of the classes by summed local test counts"),
        (Explicit(head=(0, 1), tail=(2,)), "train", "explicit, 2/0/1 classes"),
    ],
)
def test_rules_say_what_they_do(rule, counts_of, words):
    assert rule.counts_of == counts_of
    assert rule.describe() == words
    assert type(rule) in GROUP_RULES.values()


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_groups_are_disjoint_cover_and_descend(counts):
    for rule in (Cumulative(), OLTR(), Thirds()):
        groups = rule.split(np.array(counts))
        if groups == NO_GROUPS:
            assert not any(counts)
            continue
        assert sorted(sum(groups, ())) == list(range(len(counts)))
        order = [counts[c] for group in groups for c in (sorted(group, key=lambda c: -counts[c]))]
        assert order == sorted(counts, reverse=True)


# ---- one confusion matrix


def test_metrics_by_hand():
    # True class 0: 3 right, 1 as class 1. Class 1: 1 right, 1 as class 0. Class 2: never true, never predicted.
    metrics = from_confusion(np.array([[3, 1, 0], [1, 1, 0], [0, 0, 0]]), ShotGroups((0,), (1,), (2,)))
    assert metrics == {
        "accuracy": pytest.approx(4 / 6),
        "balanced_accuracy": pytest.approx((3 / 4 + 1 / 2) / 2),
        "macro_f1": pytest.approx((6 / 8 + 2 / 4) / 2),
        "per_class_recall": [0.75, 0.5, None],
        "head": 0.75,
        "medium": 0.5,
        "tail": None,
    }
    json.dumps(metrics)


def test_groups_weigh_examples_not_classes():
    confusion = np.array([[8, 2, 0], [0, 1, 1], [0, 0, 4]])
    metrics = from_confusion(confusion, ShotGroups((0, 1), (), (2,)))
    assert metrics["head"] == pytest.approx(9 / 12)
    assert metrics["medium"] is None
    assert metrics["tail"] == 1.0


def test_nothing_tested_has_no_value():
    metrics = from_confusion(np.zeros((2, 2), np.int64), ShotGroups((0,), (), (1,)))
    assert metrics.pop("per_class_recall") == [None, None]
    assert set(metrics.values()) == {None}


@pytest.mark.parametrize(
    ("sizes", "recalls", "expected"),
    [((31, 31, 38), (660, 452, 212), 0.4253), ((27, 25, 48), (667, 415, 192), 0.376)],
)
def test_accuracy_is_the_mean_of_the_groups_weighted_by_classes(sizes, recalls, expected):
    # protocol 7.1 item 6 with 1000 images a class: set e (42.53) and set h (37.6), FedAvg
    hits = np.repeat(recalls, sizes)
    confusion = np.diag(hits) + np.roll(np.diag(1000 - hits), 1, axis=1)
    bounds = np.cumsum((0, *sizes))
    groups = ShotGroups(*(tuple(range(a, b)) for a, b in pairwise(bounds)))
    metrics = from_confusion(confusion, groups)
    assert [metrics[name] for name in ShotGroups._fields] == [r / 1000 for r in recalls]
    weighted = sum(n / 100 * metrics[name] for n, name in zip(sizes, ShotGroups._fields, strict=True))
    assert metrics["accuracy"] == pytest.approx(weighted)
    assert metrics["accuracy"] == pytest.approx(expected, abs=5e-5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_metrics_agree_with_scikit_learn(pairs):
    oracle = pytest.importorskip("sklearn.metrics")
    truth, predicted = np.array(pairs).T
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    metrics = from_confusion(confusion, NO_GROUPS)
    assert metrics["accuracy"] == pytest.approx((truth == predicted).mean())
    assert metrics["macro_f1"] == pytest.approx(oracle.f1_score(truth, predicted, average="macro", zero_division=0))
    held = np.unique(truth)
    recall = oracle.recall_score(truth, predicted, labels=held, average=None, zero_division=0)
    assert [metrics["per_class_recall"][c] for c in held] == pytest.approx(recall.tolist())
    assert metrics["balanced_accuracy"] == pytest.approx(recall.mean())
    if len(held) > 1 and set(predicted) <= set(held):  # otherwise scikit-learn warns
        assert metrics["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, predicted))


# ---- many clients


def _client(right, wrong):
    """A confusion matrix of two classes: right[c] hits and wrong[c] misses of class c."""
    return np.array([[right[0], wrong[0]], [wrong[1], right[1]]])


def test_spread_by_hand():
    confusions = np.stack(
        [_client((4, 0), (0, 0)), _client((1, 1), (1, 1)), _client((0, 0), (0, 0)), _client((0, 1), (3, 0))]
    )
    spread = client_spread(confusions, ShotGroups((0,), (), (1,)))
    assert spread["clients"] == 3  # the third has no test images
    assert spread["mean"] == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert spread["std"] == pytest.approx(np.std([1, 0.5, 0.25], ddof=0))
    assert spread["worst_decile"] == 0.25
    assert spread["head"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert spread["medium"] is None
    assert spread["tail"] == pytest.approx((0.5 + 1) / 2)  # the first client has no image of class 1
    # macro F1: 1 (class 0 alone); 1/2; classes 0 (0) and 1 (2 / (2 + 3)), mean .2
    assert spread["macro_f1"] == pytest.approx((1 + 0.5 + 0.2) / 3)
    weighted = client_spread(confusions, ShotGroups((0,), (), (1,)), np.array([1, 1, 100, 2]))
    assert weighted["macro_f1"] == pytest.approx((1 + 0.5 + 2 * 0.2) / 4)  # own size, and none for the third
    json.dumps(spread)


def test_spread_with_groups_of_each_client():
    # protocol 2.8: a client's groups come from its own row m_k. Client 1's head is class 1.
    confusions = np.stack([_client((8, 1), (1, 0)), _client((1, 5), (0, 4))])
    m = confusions.sum(axis=2)
    assert m.tolist() == [[9, 1], [1, 9]]
    groups = [Cumulative().split(row) for row in m]
    assert groups == [ShotGroups((0,), (1,), ()), ShotGroups((1,), (0,), ())]
    spread = client_spread(confusions, groups)
    assert spread["head"] == pytest.approx((8 / 9 + 5 / 9) / 2)
    assert spread["medium"] == 1.0
    assert spread["tail"] is None
    with pytest.raises(ValueError, match="2 clients, but groups for 1"):
        client_spread(confusions, groups[:1])


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (19, 1), (20, 2), (40, 4)])
def test_worst_decile_is_a_tenth_of_the_clients_and_at_least_one(clients, worst):
    confusions = np.stack([_client((k, 0), (100 - k, 0)) for k in reversed(range(clients))])
    spread = client_spread(confusions, NO_GROUPS)
    assert spread["worst_decile"] == pytest.approx(np.mean(range(worst)) / 100)


def test_spread_of_nobody():
    spread = client_spread(np.zeros((3, 2, 2), np.int64), NO_GROUPS)
    assert spread.pop("clients") == 0
    assert set(spread.values()) == {None}
