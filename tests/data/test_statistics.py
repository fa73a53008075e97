import numpy as np
import pytest

from fedtail.data.partition import PARTITIONS, DirichletMultinomial, describe_partition
from fedtail.data.statistics import describe


def test_statistics_by_hand():
    # Three clients: (3, 1), empty, (0, 4); the union has (3, 5).
    stats = describe(np.array([[3, 1], [0, 0], [0, 4]]))
    assert stats["sizes"] == {"min": 0, "median": 4.0, "max": 4}
    assert (stats["clients"], stats["classes"], stats["examples"], stats["empty_clients"]) == (3, 2, 8, 1)
    assert stats["imbalance"]["union"] == pytest.approx(5 / 3)
    assert stats["imbalance"]["clients"] == {"min": 1.0, "median": 2.0, "max": 3.0}
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert stats["label_entropy"] == pytest.approx(entropy / 2)
    assert stats["classes_per_client"] == {"min": 1, "median": 1.5, "max": 2, "mean": 1.5}
    assert stats["holders_per_class"] == [1, 2]
    # Shares (.75, .25) and (0, 1) against (.375, .625): distances .375 and .375.
    assert stats["skew"] == pytest.approx(0.375)


def test_statistics_of_nothing():
    stats = describe(np.zeros((2, 3), np.int64))
    assert stats["empty_clients"] == 2
    assert stats["skew"] is None
    assert stats["imbalance"]["union"] is None


def test_description_names_rule_and_settings():
    line = describe_partition(DirichletMultinomial(clients=3))
    assert line.startswith("dirichlet_multinomial (clients=3, alpha=0.5, min_size=0, legacy_seed=None): Each example")
    assert set(PARTITIONS) == {
        "iid",
        "dirichlet_multinomial",
        "dirichlet_proportional",
        "shards",
        "class_specific",
        "natural",
    }
