"""Plans: what a client will do is a pure function of (seed, round, phase, client, local work)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtail.algorithm import as_tensor
from fedtail.data.plan import LocalWork, make_plan
from fedtail.errors import ConfigError
from fedtail.task import Draw

WANTED = {
    "noise": Draw("normal", (4, 2), per_example=True),
    "gate": Draw("uniform", (3,)),
    "mask": Draw("bernoulli", (4,), per_example=True, p=0.25),
    "corner": Draw("integers", (4, 2), per_example=True, high=9),
}


OWNED = np.arange(10, 21)
WORK = LocalWork(epochs=2, batch_size=4)


def plan(owned=OWNED, work=WORK, seed=3, round=5, trained=0, client=7, draws=WANTED, **more):
    return make_plan(seed, round, trained, client, owned, work, draws, **more)


def same(a, b):
    return (
        np.array_equal(a.order, b.order) and np.array_equal(a.lengths, b.lengths) and a.draws.keys() == b.draws.keys()
        and all(np.array_equal(a.draws[k], b.draws[k]) for k in a.draws)
    )  # fmt: skip


def batches(found):
    return np.split(found.order, np.cumsum(found.lengths)[:-1])


works = st.builds(
    lambda epochs, steps, batch, low: LocalWork(epochs=epochs, steps=steps, batch_size=batch, min_batch=min(low, batch)),
    st.integers(1, 4), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6),
)  # fmt: skip


@given(works, st.integers(0, 23))
def test_lengths(work, examples):
    """Written down batch by batch: full ones, then what is left if it is large enough; epochs, or a number of steps."""
    epoch, left = [], examples
    while left:
        size = min(left, work.batch_size)
        left -= size
        if size >= work.min_batch:
            epoch.append(size)
    if not epoch:
        expected = []
    elif work.steps:
        expected = [epoch[i % len(epoch)] for i in range(work.steps)]
    else:
        expected = epoch * work.epochs
    found = work.lengths(examples)
    assert found.tolist() == expected
    assert found.dtype == np.int64
    whole = [work.batch_size] * (examples // work.batch_size) + [examples % work.batch_size] * (
        examples % work.batch_size > 0
    )
    assert work.lengths(examples, training=False).tolist() == whole


@given(works, st.integers(0, 23), st.integers(0, 50))
@settings(max_examples=60)
def test_each_epoch_is_a_permutation(work, examples, seed):
    owned = np.arange(100, 100 + examples)
    found = plan(owned, work, seed, draws={})
    assert found.lengths.tolist() == work.lengths(examples).tolist()
    assert len(found.order) == found.lengths.sum()
    rest = examples % work.batch_size
    used = examples - (rest if rest < work.min_batch else 0)
    for start in range(0, len(found.order), max(used, 1)):
        epoch = found.order[start : start + used]
        assert len(set(epoch.tolist())) == len(epoch)
        assert set(epoch.tolist()) <= set(owned.tolist())


def test_epochs_and_the_short_last_batch():
    found = plan()
    assert found.lengths.tolist() == [4, 4, 3, 4, 4, 3]
    first, second = found.order[:11], found.order[11:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10, 21))
    assert first.tolist() != second.tolist()
    assert found.draws["noise"].shape == (6, 4, 2)  # full size; the engine cuts it to a short batch
    assert found.draws["gate"].shape == (6, 3)


def test_steps_stop_within_an_epoch():
    found = plan(work=LocalWork(steps=4, epochs=9, batch_size=4))
    assert found.lengths.tolist() == [4, 4, 3, 4]
    assert len(found.order) == 15
    assert sorted(found.order[:11].tolist()) == list(range(10, 21))


def test_small_batches_are_left_out():
    found = plan(np.arange(9), LocalWork(epochs=2, batch_size=4, min_batch=2))
    assert found.lengths.tolist() == [4, 4, 4, 4]
    assert len(plan(np.arange(1), LocalWork(batch_size=4, min_batch=2)).lengths) == 0
    # another example is left out in each epoch, so none is lost for good
    left_out = {
        (
            set(range(9))
            - set(plan(np.arange(9), LocalWork(epochs=1, batch_size=4, min_batch=2), round=r).order.tolist())
        ).pop()
        for r in range(40)
    }
    assert len(left_out) > 4


def test_an_evaluating_phase_goes_through_the_data_in_order():
    owned = np.array([5, 3, 9, 1, 7])
    found = plan(owned, LocalWork(epochs=3, batch_size=2, min_batch=2), training=False)
    assert [b.tolist() for b in batches(found)] == [[5, 3], [9, 1], [7]]
    assert found.draws == {}


def test_nobody_without_data_has_a_step():
    found = plan(np.zeros(0, np.int64))
    assert len(found.order) == len(found.lengths) == 0
    assert all(len(v) == 0 for v in found.draws.values())


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(0, 2), st.integers(0, 9))
@settings(max_examples=25)
def test_pure(seed, round, trained, client):
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    owned = np.arange(10, 21)
    first = plan(owned, seed=seed, round=round, trained=trained, client=client)
    np.random.seed(2)
    assert same(first, plan(owned, seed=seed, round=round, trained=trained, client=client))
    assert owned.tolist() == list(range(10, 21))
    np.random.seed(1)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("change", [{"seed": 4}, {"round": 6}, {"trained": 1}, {"client": 8}], ids=str)
def test_every_coordinate_matters(change):
    first, other = plan(), plan(**change)
    assert first.order.tolist() != other.order.tolist()
    for name in WANTED:
        assert not np.array_equal(first.draws[name], other.draws[name]), name


def test_a_draw_depends_on_its_name_alone():
    """Whoever else draws, and what the batches are, changes nothing; a second name gets other numbers."""
    alone = plan(draws={"gate": WANTED["gate"]})
    np.testing.assert_array_equal(alone.draws["gate"], plan().draws["gate"])
    np.testing.assert_array_equal(alone.order, plan().order)
    other = plan(draws={"gate2": WANTED["gate"]})
    assert not np.array_equal(alone.draws["gate"], other.draws["gate2"])
    longer = plan(work=LocalWork(epochs=5, batch_size=4), draws={"gate": WANTED["gate"]})
    np.testing.assert_array_equal(longer.draws["gate"][:6], alone.draws["gate"])  # so far as both go


def test_draws_have_their_distributions():
    rng = np.random.default_rng(0)
    uniform = Draw("uniform", (100,)).sample(rng, 200)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 20000) ** 0.5
    normal = Draw("normal", (100,)).sample(rng, 200)
    assert abs(normal.mean()) < 5 / 20000**0.5
    assert abs(normal.std() - 1) < 5 / 40000**0.5
    mask = Draw("bernoulli", (100,), p=0.2).sample(rng, 200)
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert abs(mask.mean() - 0.2) < 5 * (0.16 / 20000) ** 0.5
    assert Draw("bernoulli", (50,), p=1.0).sample(rng, 1).all()
    assert not Draw("bernoulli", (50,), p=0.0).sample(rng, 1).any()
    integers = Draw("integers", (100,), high=3).sample(rng, 200)
    assert set(np.unique(integers)) == {0, 1, 2}
    assert integers.dtype == np.int64


class Largest:
    """A generator that always draws the largest number below 1."""

    def random(self, size=None, dtype=np.float64):
        return np.full(size, np.nextafter(dtype(1), dtype(0)), dtype)


def test_a_uniform_draw_stays_below_one_in_float32():
    """Fed-GraB's rank 0 is bypassed with probability 1 only if no draw is rounded up to 1."""
    values = Draw("uniform", (3,)).sample(Largest(), 2)
    draw = as_tensor(values, torch.float32, torch.device("cpu"))
    assert draw.dtype == torch.float32
    assert bool((draw > 0.999).all())
    assert bool((draw < 1).all())


def test_integer_draws_stay_integers():
    corners = as_tensor(np.array([[1, 2]]), torch.float32, torch.device("cpu"))
    assert corners.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "local: epochs and batch_size must be >= 1 and steps >= 0, got 0, 10, 0."),
        ({"batch_size": 0}, "local: epochs and batch_size must be >= 1 and steps >= 0, got 5, 0, 0."),
        ({"steps": -1}, "local: epochs and batch_size must be >= 1 and steps >= 0, got 5, 10, -1."),
        ({"min_batch": 11}, "local.min_batch must be in [1, batch_size = 10], got 11."),
        ({"min_batch": 0}, "local.min_batch must be in [1, batch_size = 10], got 0."),
    ],
)
def test_impossible_work(options, message):
    with pytest.raises(ConfigError) as found:
        LocalWork(**options)
    assert str(found.value) == message
