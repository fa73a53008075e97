import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtail
from fedtail import trees
from fedtail.errors import ConfigError
from fedtail.schedule import Constant, Cosine, StepDecay


def scales(schedule, rounds):
    return [schedule.scale(index, rounds) for index in range(rounds)]


def test_values():
    """By hand from the docstrings: warm-up (i + 1) / (w + 1), then final + (1 - final) (1 + cos(pi p)) / 2."""
    assert scales(Constant(), 3) == [1, 1, 1]
    assert scales(Cosine(), 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert scales(Cosine(final=0.2, warmup=3), 7) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    )
    assert scales(StepDecay(every=2, factor=0.5), 5) == [1, 1, 0.5, 0.5, 0.25]
    assert scales(StepDecay(every=1, factor=0.9), 3) == pytest.approx([1, 0.9, 0.81])
    assert StepDecay().scale(199, 200) == pytest.approx(0.1)


@settings(deadline=None)
@given(final=st.floats(0, 1), warmup=st.integers(0, 30), rounds=st.integers(1, 40))
def test_cosine_rises_to_one_and_falls_to_final(final, warmup, rounds):
    found = scales(Cosine(final=final, warmup=warmup), rounds)
    assert all(0 <= value <= 1 for value in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[:1] in ([], [1])
    assert min(falling, default=1) >= final - 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(final=1.1), r"final must be in \[0, 1\].*got 1\.1"),
        (lambda: Cosine(final=math.nan), "got nan"),
        (lambda: Cosine(warmup=-1), "warmup >= 0, got 0.0 and -1"),
        (lambda: StepDecay(every=0), "every must be >= 1.*got 0"),
        (lambda: StepDecay(factor=0.0), r"factor in \(0, 1\], got 100 and 0\.0"),
        (lambda: StepDecay(factor=1.5), "got 100 and 1.5"),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("optimizer", [fedtail.SGD(lr=0.25, weight_decay=0.125), fedtail.Adam(lr=0.25)])
def test_a_round_is_trained_with_the_scaled_rate(optimizer):
    """Cosine with one warm-up round starts at 1/2: the first round is that of half the rate (exact in binary)."""
    quick = fedtail.Experiment(rounds=1, local=fedtail.LocalWork(steps=3), engine=fedtail.EngineOptions(name="loop"))

    def first(schedule, lr):
        algorithm = fedtail.FedAvg(optimizer=dataclasses.replace(optimizer, lr=lr))
        [result] = fedtail.run(dataclasses.replace(quick, algorithm=algorithm, schedule=schedule))
        return result

    scaled, half, full = first(Cosine(warmup=1), 0.25), first(Constant(), 0.125), first(Constant(), 0.25)
    assert (scaled.record["lr_scale"], half.record["lr_scale"]) == (0.5, 1.0)
    assert trees.equal(scaled.server, half.server)
    assert not trees.equal(scaled.server, full.server)
