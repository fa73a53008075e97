import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtail.data.dirichlet import proportional_counts
from fedtail.data.longtail import Exponential
from fedtail.data.partition import (
    IID,
    PARTITIONS,
    ClassSpecific,
    DirichletMultinomial,
    DirichletProportional,
    Natural,
    Shards,
)
from fedtail.data.statistics import count_matrix, describe
from fedtail.errors import ConfigError, PartitionError

BALANCED = np.tile(np.arange(10), 600)  # 600 examples a class
LONGTAIL = np.repeat(np.arange(10), Exponential(factor=100).counts(np.full(10, 5000)))


def _rng(seed=0):
    return np.random.default_rng(seed)


def _counts(partition, labels, classes=10, seed=0, users=None):
    return count_matrix(labels, partition.split(labels, classes, _rng(seed), users), classes)


def _assert_cover(parts, examples):
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


# ---- what holds for every partition (protocol 7.1 item 2, label-skew 10.1 item 13)

partitions = st.one_of(
    st.builds(IID, clients=st.integers(1, 12)),
    st.builds(DirichletMultinomial, clients=st.integers(1, 12), alpha=st.floats(1e-6, 1e6)),
    st.builds(
        DirichletMultinomial, clients=st.integers(1, 12), alpha=st.floats(0.05, 1e3), legacy_seed=st.integers(0, 9999)
    ),
    st.builds(
        DirichletProportional,
        clients=st.integers(1, 12),
        alpha=st.floats(1e-6, 1e6),
        min_size=st.just(0),
        cap=st.booleans(),
    ),
    st.builds(Shards, clients=st.integers(1, 12), shards_per_client=st.integers(1, 3)),
    st.builds(ClassSpecific, clients=st.sampled_from([4, 8, 12]), classes_per_client=st.sampled_from([1, 2, 4])),
    st.builds(Natural),
)


@settings(deadline=None)
@given(partitions, st.lists(st.integers(12, 40), min_size=4, max_size=4), st.integers(0, 2**32))
def test_every_example_is_on_exactly_one_client_and_the_seed_decides(partition, sizes, seed):
    labels = _rng(seed).permutation(np.repeat(np.arange(4), sizes))
    users = _rng(seed + 1).integers(0, 5, len(labels))
    parts = partition.split(labels, 4, _rng(seed), users)
    _assert_cover(parts, len(labels))
    if not isinstance(partition, Natural):
        assert len(parts) == partition.clients
    counts = count_matrix(labels, parts, 4)
    assert counts.sum(axis=0).tolist() == sizes
    assert counts.sum() == len(labels)
    again = partition.split(labels, 4, _rng(seed), users)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    "partition",
    [
        IID(),
        DirichletMultinomial(),
        DirichletProportional(),
        Shards(),
        ClassSpecific(clients=20),
    ],
)
def test_another_generator_gives_another_partition(partition):
    parts, others = (partition.split(BALANCED, 10, _rng(seed)) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(parts, others, strict=True))


@pytest.mark.parametrize(
    "partition", [IID(), DirichletMultinomial(), DirichletProportional(), Shards(), ClassSpecific(clients=100)]
)
def test_examples_of_a_class_are_shuffled(partition):
    labels = np.repeat(np.arange(10), 600)
    parts = partition.split(labels, 10, _rng())
    runs = [np.diff(part[labels[part] == 0]) for part in parts]
    assert any((run > 1).any() for run in runs)  # not consecutive in the order of the data


def test_class_specific_deals_classes_at_random():
    held = [np.argmax(_counts(ClassSpecific(clients=10), BALANCED, seed=seed), axis=1).tolist() for seed in range(3)]
    assert held[0] != held[1] != held[2] != held[0]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([DirichletMultinomial, DirichletProportional]), st.integers(0, 2**32))
def test_large_alpha_tends_to_iid_and_small_alpha_away_from_it(kind, seed):
    skews = [
        describe(_counts(kind(clients=10, alpha=alpha, min_size=0), BALANCED, seed=seed))["skew"]
        for alpha in (1e6, 0.5, 0.05)
    ]
    iid = describe(_counts(IID(clients=10), BALANCED, seed=seed))["skew"]
    assert skews[0] < iid + 0.02 < skews[1] < skews[2]


# ---- iid


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in IID(clients=7).split(BALANCED[:100], 10, _rng())]
    assert sorted(sizes) == [14] * 5 + [15] * 2


# ---- dirichlet_multinomial, protocol 2.3, 7.1 item 3, 7.2

# protocol section 4: data, factor, alpha, K, seed | sizes of clients 0..4 | min, upper median (None = not printed), max
REFERENCE = {
    "a": ((10, 5000, 50, 0.5, 40, 3407), [226, 200, 143, 400, 329], (66, 239, 995)),
    "b": ((10, 5000, 100, 0.5, 40, 3407), [215, 141, 207, 171, 243], (90, 215, 1106)),
    "c": ((10, 5000, 50, 1.0, 40, 3407), [265, 279, 338, 591, 172], (146, 328, 720)),
    "d": ((10, 5000, 100, 1.0, 40, 3407), [257, 284, 401, 688, 137], (96, 282, 730)),
    "e": ((100, 500, 50, 0.5, 20, 3407), [557, 682, 644, 784, 649], (437, 626, 1030)),
    "f": ((100, 500, 100, 0.5, 20, 3407), [573, 766, 469, 733, 726], (320, 535, 766)),
    "g": ((100, 500, 50, 1.0, 20, 3407), [570, 712, 662, 720, 618], (477, 646, 817)),
    "h": ((100, 500, 100, 1.0, 20, 3407), [496, 625, 562, 489, 532], (377, 549, 692)),
    "seed 1, alpha .5": ((10, 5000, 100, 0.5, 40, 1), [868, 483, 153, 117, 206], (68, None, 868)),
    "seed 1, alpha 1": ((10, 5000, 100, 1.0, 40, 1), [613, 534, 128, 281, 282], (104, None, 613)),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_legacy_partition_has_the_reference_sizes(name):
    (classes, size, factor, alpha, clients, seed), first, (smallest, median, largest) = REFERENCE[name]
    labels = np.repeat(np.arange(classes), Exponential(factor=factor).counts(np.full(classes, size)))
    partition = DirichletMultinomial(clients=clients, alpha=alpha, legacy_seed=seed)
    sizes = [len(part) for part in partition.split(labels, classes, _rng())]
    assert sizes[:5] == first
    assert (min(sizes), max(sizes)) == (smallest, largest)
    assert median is None or sorted(sizes)[clients // 2] == median


def test_legacy_partition_gives_each_example_its_own_drawn_client():
    # The sequence of protocol 2.3 on the global generator, example by example, on labels that are not sorted.
    labels = _rng(5).permutation(np.repeat(np.arange(3), [30, 20, 10]))
    state = np.random.get_state()
    try:
        np.random.seed(3407)
        np.random.binomial(1, 1, size=(4, 3))
        expected = [[] for _ in range(4)]
        for c in range(3):
            p = np.random.dirichlet(np.repeat(0.5, 4))
            index = np.where(labels == c)[0]
            for i, k in zip(index, np.random.choice(4, len(index), p=p), strict=True):
                expected[k].append(i)
    finally:
        np.random.set_state(state)
    parts = DirichletMultinomial(clients=4, alpha=0.5, legacy_seed=3407).split(labels, 3, _rng())
    assert [part.tolist() for part in parts] == [sorted(part) for part in expected]


@pytest.mark.parametrize("seed", [0, 3407])
@pytest.mark.parametrize("legacy", [True, False])
def test_large_alpha_stays_within_five_binomial_deviations(seed, legacy):
    # protocol 7.2 item 1
    partition = DirichletMultinomial(clients=40, alpha=1e6, legacy_seed=seed if legacy else None)
    counts = _counts(partition, LONGTAIL, seed=seed)
    mean = counts.sum(axis=0) / 40
    deviation = np.sqrt(mean * (1 - 1 / 40))
    large = mean >= 20
    assert large.sum() == 4  # 5000, 2997, 1796 and 1077 of 40 clients; the next class has 645 < 800
    assert (np.abs(counts - mean)[:, large] <= 5 * deviation[large]).all()


@pytest.mark.parametrize(
    ("classes", "size", "clients", "factor", "alpha", "expected"),
    [
        (10, 5000, 40, 50, 0.5, 8.1),
        (10, 5000, 40, 100, 0.5, 7.6),
        (10, 5000, 40, 50, 1.0, 9.1),
        (10, 5000, 40, 100, 1.0, 8.6),
        (100, 500, 20, 50, 0.5, 63),
        (100, 500, 20, 100, 0.5, 57),
        (100, 500, 20, 50, 1.0, 73),
        (100, 500, 20, 100, 1.0, 66),
    ],
)
def test_mean_number_of_classes_per_client(classes, size, clients, factor, alpha, expected):
    # protocol 7.2 item 2: 100 partitions, 3 %
    labels = np.repeat(np.arange(classes), Exponential(factor=factor).counts(np.full(classes, size)))
    partition = DirichletMultinomial(clients=clients, alpha=alpha)
    held = [(_counts(partition, labels, classes, seed) > 0).sum(axis=1).mean() for seed in range(100)]
    assert np.mean(held) == pytest.approx(expected, rel=0.03)


def test_multinomial_draws_again_until_min_size():
    loose = DirichletMultinomial(clients=20, alpha=0.1)
    assert _counts(loose, BALANCED).sum(axis=1).min() < 30
    assert _counts(DirichletMultinomial(clients=20, alpha=0.1, min_size=30), BALANCED).sum(axis=1).min() >= 30


# ---- dirichlet_proportional, label-skew 7.2 and 10.2


def test_proportional_cuts_at_the_floor_of_the_cumulative_share():
    q = _rng(3).dirichlet(np.full(4, 0.5), size=2)
    counts = proportional_counts(np.array([101, 57]), 4, 0.5, False, _rng(3))
    for c, n in enumerate((101, 57)):
        cuts = [0, *np.floor(np.cumsum(q[c]) * n).astype(int)[:-1], n]
        assert counts[:, c].tolist() == np.diff(cuts).tolist()


def test_proportional_share_of_empty_clients():
    # label-skew 10.2: K = 20, alpha .01, 50 draws: .20 +- .04
    partition = DirichletProportional(clients=20, alpha=0.01, min_size=0)
    labels = np.repeat(np.arange(10), 6000)
    empty = [np.mean([len(part) == 0 for part in partition.split(labels, 10, _rng(s))]) for s in range(50)]
    assert np.mean(empty) == pytest.approx(0.20, abs=0.04)


def test_proportional_probability_of_min_size():
    # label-skew 10.2: K = 20, alpha .05, 200 draws, 5000 per class, P(min_size >= 10) = .50 +- .12
    draws = [proportional_counts(np.full(10, 5000), 20, 0.05, False, _rng(seed)) for seed in range(200)]
    assert np.mean([draw.sum(axis=1).min() >= 10 for draw in draws]) == pytest.approx(0.50, abs=0.12)


@pytest.mark.parametrize(
    ("clients", "alpha", "smallest", "median", "largest", "classes"),
    [(10, 0.5, 2679, 5734, 10168, 9.8), (20, 1.0, 1512, 2909, 4948, 10), (100, 0.5, 142, 560, 1473, 9.3)],
)
def test_proportional_sizes(clients, alpha, smallest, median, largest, classes):
    # label-skew 7.2, means over draws: 6000 per class; 10 % for the extremes of 100 draws
    draws = [proportional_counts(np.full(10, 6000), clients, alpha, False, _rng(seed)) for seed in range(100)]
    sizes = np.sort([draw.sum(axis=1) for draw in draws], axis=1)
    assert sizes[:, 0].mean() == pytest.approx(smallest, rel=0.1)
    assert np.median(sizes, axis=1).mean() == pytest.approx(median, rel=0.05)
    assert sizes[:, -1].mean() == pytest.approx(largest, rel=0.1)
    assert np.mean([(draw > 0).sum(axis=1).mean() for draw in draws]) == pytest.approx(classes, rel=0.03)


def test_proportional_min_size_is_reached():
    sizes = _counts(DirichletProportional(clients=20, alpha=0.1, min_size=10), BALANCED).sum(axis=1)
    assert sizes.min() >= 10


def test_cap_gives_nothing_more_to_full_clients():
    counts = proportional_counts(np.full(10, 600), 20, 0.1, True, _rng(0))
    held = np.cumsum(counts, axis=1)
    full = held[:, :-1] >= 6000 / 20
    assert full.any()
    # The last client is left out: it takes the example that the floor may leave at the end of a class.
    assert (counts[:-1, 1:][full[:-1]] == 0).all()
    assert counts.sum(axis=0).tolist() == [600] * 10
    capped, free = (
        np.mean([proportional_counts(np.full(10, 600), 20, 0.1, cap, _rng(s)).sum(axis=1).max() for s in range(20)])
        for cap in (True, False)
    )
    assert capped < free


# ---- shards, class_specific, natural


def test_shards_hold_at_most_their_number_of_classes_where_the_size_divides():
    counts = _counts(Shards(clients=100, shards_per_client=2), BALANCED)  # shards of 30 divide 600
    assert counts.sum(axis=1).tolist() == [60] * 100
    assert (counts > 0).sum(axis=1).max() == 2
    ragged = _counts(Shards(clients=7, shards_per_client=2), BALANCED)
    assert 2 < (ragged > 0).sum(axis=1).max() <= 4


@pytest.mark.parametrize(("clients", "q"), [(10, 1), (30, 1), (5, 2), (20, 2), (12, 5), (3, 10)])
def test_class_specific_holders_and_sizes(clients, q):
    labels = np.repeat(np.arange(10), np.arange(40, 50))
    counts = _counts(ClassSpecific(clients=clients, classes_per_client=q), labels)
    assert ((counts > 0).sum(axis=1) == q).all()
    assert ((counts > 0).sum(axis=0) == clients * q // 10).all()
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_natural_keeps_users_in_order_and_drops_small_ones():
    labels = np.array([0, 1, 0, 1, 1, 0])
    users = np.array(["b", "a", "b", "c", "a", "b"])
    assert [part.tolist() for part in Natural().split(labels, 2, _rng(), users)] == [[1, 4], [0, 2, 5], [3]]
    assert [part.tolist() for part in Natural(min_size=2).split(labels, 2, _rng(), users)] == [[1, 4], [0, 2, 5]]


# ---- what cannot be made: which value would work


def _proposed(message):
    """The values that an error message proposes: {field: number}."""
    pairs = re.findall(r"(\w+) (?:<=|>=|=) ([\d.e+-]*\d)", message.split(" Use ")[1])
    return {name: float(value) if name == "alpha" else int(value) for name, value in pairs}


@pytest.mark.parametrize(
    ("partition", "what", "fields"),
    [
        (IID(clients=101), "iid cannot give each of 101 clients an example", {"clients": 100}),
        (Shards(clients=30, shards_per_client=4), "into 120", {"clients": 25, "shards_per_client": 3}),
        (ClassSpecific(clients=10, classes_per_client=3), "divide the 10 classes, got 3", {"classes_per_client": 2}),
        (ClassSpecific(clients=11, classes_per_client=2), "multiple of 5", {"clients": 10}),
        (ClassSpecific(clients=2, classes_per_client=2), "multiple of 5", {"clients": 5}),
        (ClassSpecific(clients=110, classes_per_client=1), "an example of class 0, there are 10", {"clients": 100}),
    ],
)
def test_infeasible_settings_and_what_works(partition, what, fields):
    labels = np.repeat(np.arange(10), 10)
    with pytest.raises(PartitionError, match=what) as error:
        partition.split(labels, 10, _rng())
    assert _proposed(str(error.value)) == fields
    for name, value in fields.items():
        settings_ = {**partition.__dict__, name: value}
        _assert_cover(type(partition)(**settings_).split(labels, 10, _rng()), 100)


@pytest.mark.parametrize(
    ("partition", "proposes"),
    [
        (DirichletProportional(clients=40, alpha=0.05, min_size=10), {"clients", "min_size", "alpha"}),
        (
            DirichletProportional(clients=40, alpha=0.05, cap=True, min_size=60, max_tries=50),
            {"clients", "min_size", "alpha"},
        ),
        (DirichletMultinomial(clients=40, alpha=0.05, min_size=20), {"clients", "min_size", "alpha"}),
        (DirichletMultinomial(clients=40, alpha=0.5, min_size=310), {"clients", "min_size"}),  # 310 = floor(12406 / 40)
        (DirichletMultinomial(clients=40, alpha=0.5, min_size=400), {"clients", "min_size"}),
        (DirichletProportional(clients=1, alpha=0.5, min_size=20_000), {"min_size"}),
    ],
)
def test_infeasible_dirichlet_proposes_values_that_work(partition, proposes):
    with pytest.raises(PartitionError) as error:
        partition.split(LONGTAIL, 10, _rng())
    message = str(error.value)
    name = next(name for name, cls in PARTITIONS.items() if type(partition) is cls)
    assert name in message
    assert f"{partition.clients} clients {partition.min_size} examples" in message
    assert f"alpha {partition.alpha:g}" in message
    proposed = _proposed(message)
    assert set(proposed) == proposes
    for field, value in proposed.items():
        changed = type(partition)(**{**partition.__dict__, field: value})
        assert _counts(changed, LONGTAIL, seed=7).sum(axis=1).min() >= changed.min_size


def test_retries_are_bounded_and_counted():
    with pytest.raises(PartitionError, match="in 3 tries"):
        DirichletProportional(clients=100, alpha=0.01, max_tries=3).split(LONGTAIL, 10, _rng())


def test_legacy_draw_that_is_not_finite():
    with pytest.raises(PartitionError, match=r"0/0 at alpha 1e-08\. Leave legacy_seed out"):
        DirichletMultinomial(alpha=1e-8, legacy_seed=1).split(LONGTAIL, 10, _rng())
    _assert_cover(DirichletMultinomial(alpha=1e-8).split(LONGTAIL, 10, _rng()), len(LONGTAIL))


def test_natural_without_users():
    with pytest.raises(PartitionError, match=r"got none\. Use data that come with one"):
        Natural().split(BALANCED, 10, _rng())
    with pytest.raises(PartitionError, match="one of 3 values for 6000 examples"):
        Natural().split(BALANCED, 10, _rng(), np.arange(3))
    with pytest.raises(PartitionError, match=r"no user with 5 examples, the largest has 4\. Use min_size <= 4"):
        Natural(min_size=5).split(BALANCED[:6], 10, _rng(), np.array([0, 0, 0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IID(clients=0), r"IID\.clients must be >= 1, got 0"),
        (lambda: DirichletMultinomial(alpha=0), r"DirichletMultinomial\.alpha must be in \(0, inf\), got 0"),
        (lambda: DirichletProportional(alpha=float("nan")), r"DirichletProportional\.alpha"),
        (lambda: DirichletProportional(max_tries=0), r"DirichletProportional\.max_tries"),
        (lambda: DirichletProportional(min_size=-1), r"DirichletProportional\.min_size"),
        (lambda: DirichletMultinomial(legacy_seed=-1), r"DirichletMultinomial\.legacy_seed"),
        (lambda: DirichletMultinomial(legacy_seed=1, min_size=1), "Leave one of them out"),
        (lambda: Shards(shards_per_client=0), r"Shards\.shards_per_client"),
        (lambda: ClassSpecific(classes_per_client=0), r"ClassSpecific\.classes_per_client"),
        (lambda: Natural(min_size=0), r"Natural\.min_size"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
