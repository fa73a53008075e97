"""Who holds what, in two arrays: the same as a list of index arrays, for a million clients in seconds."""

import numpy as np
import pytest

from fedtail.data import members
from fedtail.data.base import lists
from fedtail.data.members import Members
from fedtail.data.plan import LocalWork


def test_it_reads_like_the_list_that_it_was_made_of():
    parts = [np.array([4, 0]), np.zeros(0, np.int64), np.array([2])]
    found = Members.of(parts)
    assert [p.tolist() for p in found] == [[4, 0], [], [2]] == [p.tolist() for p in found[:]]
    assert found[np.int64(-1)].tolist() == [2]
    assert found.sizes.tolist() == [2, 0, 1]
    assert all(part.dtype == np.int64 for part in found)
    assert Members.of(found) is found
    with pytest.raises(IndexError, match="client 3 of 3"):
        found[3]


def test_what_one_client_does_with_its_indices_reaches_nobody_else():
    found = lists(np.array([0, 1, 0]), 2)
    found[0][:] = 9
    assert found[0].tolist() == [0, 2]


def test_examples_of_nobody_are_left_out():
    assert [p.tolist() for p in lists(np.array([2, 1, 0, 2, 1]), 2)] == [[2], [1, 4]]
    assert [p.tolist() for p in Members.of([])] == []


def test_class_counts_are_those_of_a_loop_over_clients(monkeypatch):
    monkeypatch.setattr(members, "CHUNK", 7)  # several chunks, and a client that is larger than one
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    found = lists(rng.integers(12, size=60) % 11 * (rng.random(60) < 0.7), 12)
    wanted = [[int((labels[part] == c).sum()) for c in range(3)] for part in found]
    assert max(map(sum, wanted)) > 7
    assert min(map(sum, wanted)) == 0
    assert found.class_counts(labels, 3).tolist() == wanted
    assert found.class_counts(labels, 3, [11, 2]).tolist() == [wanted[11], wanted[2]]


@pytest.mark.parametrize(("steps", "min_batch"), [(0, 1), (0, 3), (5, 1), (5, 3)])
def test_the_number_of_steps_is_the_number_of_batches(steps, min_batch):
    work = LocalWork(epochs=3, steps=steps, batch_size=4, min_batch=min_batch)
    sizes = np.arange(14)
    assert work.count(sizes).tolist() == [len(work.lengths(int(n))) for n in sizes]


def test_a_million_clients_are_two_arrays():
    rng = np.random.default_rng(0)
    clients = 10**6
    found = lists(rng.permutation(2 * clients) % clients, clients)
    assert found.sizes.tolist() == [2] * clients
    assert found.members.nbytes + found.offsets.nbytes < 17e6
    assert found.class_counts(np.arange(2 * clients) % 5, 5, [999_999]).sum() == 2
