import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtail.data.longtail import LONGTAILS, Exponential, NoTail, Step
from fedtail.data.statistics import class_counts
from fedtail.errors import ConfigError, DataError, PartitionError

# long-tail protocol, section 2.2, every row: examples a class, classes, factor, n_c (None = not printed), n_tot
TABLE = [
    (5000, 10, 10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500], 20431),
    (5000, 10, 50, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100], 13996),
    (5000, 10, 100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 12406),
    (500, 100, 10, [500, 488, 477, 466, 455, 445, *[None] * 89, 53, 52, 51, 50], 19573),
    (500, 100, 50, [500, 480, 462, 444, 426, 410, *[None] * 89, 11, 11, 10, 10, 10], 12608),
    (500, 100, 100, [500, 477, 455, 434, 415, 396, *[None] * 89, 6, 5, 5, 5, 5], 10847),
    (6000, 10, 10, [6000, 4645, 3596, 2784, 2156, 1669, 1292, 1000, 774, 600], 24516),
    (6000, 10, 50, [6000, 3884, 2515, 1628, 1054, 682, 442, 286, 185, 120], 16796),
    (6000, 10, 100, [6000, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60], 14886),
]
MNIST = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])  # data_models.md, section 1


@pytest.mark.parametrize(("size", "classes", "factor", "row", "total"), TABLE)
def test_count_table(size, classes, factor, row, total):
    counts = Exponential(factor=factor).counts(np.full(classes, size))
    assert counts.dtype == np.int64
    assert counts.sum() == total
    head = row[: row.index(None)] if None in row else row
    tail = [n for n in row[len(head) :] if n is not None]
    assert counts[: len(head)].tolist() == head
    assert counts[len(counts) - len(tail) :].tolist() == tail


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(2, 12), st.integers(1, 500))
def test_counts_are_the_exact_floor(size, classes, factor):
    # floor(n_max * factor^(-c/(C-1))) is the largest n with n^(C-1) * factor^c <= n_max^(C-1): integers, no rounding.
    factor = min(factor, size)
    counts = Exponential(factor=factor).counts(np.full(classes, size)).tolist()
    for c, n in enumerate(counts):
        limit = size ** (classes - 1)
        assert n ** (classes - 1) * factor**c <= limit < (n + 1) ** (classes - 1) * factor**c


def test_smallest_class_sets_the_size_where_classes_differ():
    counts = Exponential(factor=100).counts(MNIST)
    assert counts[0] == 5421
    assert counts[-1] == 54  # floor(5421 / 100)
    assert Exponential(factor=10, num_max=5600).counts(MNIST)[0] == 5600


def test_single_class_keeps_everything_allowed():
    assert Exponential(factor=100).counts(np.array([7])).tolist() == [7]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, [100, 100, 10, 10, 10]), (0.6, [100, 100, 100, 10, 10]), (0.01, [100, 10, 10, 10, 10])],
)
def test_step_counts(share, expected):
    assert Step(factor=10, head_share=share).counts(np.full(5, 100)).tolist() == expected


def _labels(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("tail", [Exponential(factor=10), Step(factor=10), Exponential(factor=10, legacy_seed=0)])
def test_cut_keeps_the_counts_class_by_class_without_repetition(tail):
    labels = _labels([60, 50, 70, 50])
    kept = tail.cut(labels, 4, np.random.default_rng(1))
    assert kept.dtype == np.int64
    assert len(set(kept.tolist())) == len(kept)
    counts = tail.counts(class_counts(labels, 4))
    assert labels[kept].tolist() == np.repeat(np.arange(4), counts).tolist()


def test_cut_is_a_function_of_the_generator():
    labels = _labels([60, 50, 70, 50])
    first, again, other = (Exponential(factor=10).cut(labels, 4, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_legacy_cut_is_the_authors_procedure(seed):
    labels = _labels([9, 8, 12], seed=3)
    state = np.random.get_state()
    try:  # the procedure of protocol section 2.2, written with the global generator as the authors' code does
        np.random.seed(seed)
        expected = []
        for c, n in enumerate([8, 4, 2]):  # n_max = 8, factor 4
            index = np.where(labels == c)[0]
            np.random.shuffle(index)
            expected += index[:n].tolist()
    finally:
        np.random.set_state(state)
    unused = np.random.default_rng(0)
    before = unused.bit_generator.state
    assert Exponential(factor=4, legacy_seed=seed).cut(labels, 3, unused).tolist() == expected
    assert unused.bit_generator.state == before


def test_legacy_cut_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].tolist()
    Exponential(factor=4, legacy_seed=0).cut(_labels([9, 8]), 2, np.random.default_rng(0))
    assert np.random.get_state()[1].tolist() == before


def test_no_tail_keeps_everything_in_order():
    labels = _labels([3, 0, 4])
    assert NoTail().cut(labels, 3, np.random.default_rng(0)).tolist() == list(range(7))
    assert NoTail().counts(np.array([3, 0, 4])).tolist() == [3, 0, 4]


@pytest.mark.parametrize("tail", [Exponential(factor=51), Step(factor=51)])
def test_too_strong_a_factor_names_class_and_largest_factor(tail):
    with pytest.raises(PartitionError, match=r"leaves class \d without an example .*Use factor <= 50\."):
        tail.counts(np.full(10, 50))
    assert type(tail)(factor=50).counts(np.full(10, 50)).min() == 1  # what the message proposes works


def test_first_class_without_an_example_is_named():
    # floor(4 * 100^(-c/4)) = 4, 1, 0, 0, 0
    with pytest.raises(PartitionError, match="class 2 without"):
        Exponential(factor=100).counts(np.full(5, 4))


def test_too_large_num_max_names_the_largest_that_fits():
    available = np.array([90, 20, 50])
    # Class 1 gets floor(num_max / 3): 29 of 20 there are for num_max 89; at most 62 gives at most 20.
    with pytest.raises(PartitionError, match=r"wants 29 examples of class 1, the data hold 20\. Use num_max <= 62"):
        Exponential(factor=9, num_max=89).counts(available)
    counts = Exponential(factor=9, num_max=62).counts(available)
    assert counts.tolist() == [62, 20, 6]


def test_empty_class_is_named():
    with pytest.raises(PartitionError, match="class 1 has no examples"):
        Exponential(factor=2).counts(np.array([4, 0, 4]))


def test_labels_out_of_range():
    with pytest.raises(DataError, match=r"0\.\.2, got 0\.\.3"):
        Exponential(factor=2).cut(np.array([0, 1, 2, 3]), 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(factor=0.5), r"Exponential\.factor must be in \[1, inf\), got 0\.5"),
        (lambda: Step(factor=float("inf")), r"Step\.factor"),
        (lambda: Exponential(factor=float("nan")), r"Exponential\.factor"),
        (lambda: Exponential(num_max=0), r"Exponential\.num_max"),
        (lambda: Exponential(legacy_seed=-1), r"Exponential\.legacy_seed"),
        (lambda: Step(head_share=1.0), r"Step\.head_share"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_registry():
    assert {name: cls() for name, cls in LONGTAILS.items()} == {
        "none": NoTail(),
        "exponential": Exponential(),
        "step": Step(),
    }
