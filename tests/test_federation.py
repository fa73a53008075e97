"""From the options and the seed to who holds what. The made-up data carry their row number, so that rows can be traced."""

import dataclasses

import numpy as np
import pytest
import torch

from fedtail.config import Data
from fedtail.data.longtail import Exponential, NoTail, Step
from fedtail.data.partition import (
    IID,
    DirichletMultinomial,
    DirichletProportional,
    Natural,
    Shards,
    local_tests,
    validation_split,
)
from fedtail.errors import DataError, PartitionError
from fedtail.federation import federate
from fedtail.seeds import Stream, generator

CLASSES, TRAIN, TEST = 4, 400, 80


@pytest.fixture
def data(tmp_path):
    """Options: x holds (row, user), the class is random; 4 classes, 7 users, an exponential tail of factor 4."""
    rng = np.random.default_rng(0)
    rows = np.arange(TRAIN + TEST)
    y, user = rng.integers(0, CLASSES, len(rows)), rng.integers(0, 7, len(rows))
    x = np.stack([rows, user], 1).astype(np.float32)
    np.savez(
        tmp_path / "rows.npz", x_train=x[:TRAIN], y_train=y[:TRAIN], user_train=user[:TRAIN],
        x_test=x[TRAIN:], y_test=y[TRAIN:],
    )  # fmt: skip
    return Data(
        name="rows.npz",
        folder=str(tmp_path),
        longtail=Exponential(factor=4.0),
        partition=DirichletMultinomial(clients=6, alpha=0.5),
        validation=3,
        server=5,
    )


def rows(federated, index=None):
    """The row numbers that x carries."""
    x = federated.columns["x"] if index is None else federated.columns["x"][torch.from_numpy(index)]
    return x[:, 0].long().tolist()


def same(first, second):
    return (
        all(torch.equal(first.columns[k], second.columns[k]) for k in ("x", "y"))
        and all(torch.equal(first.test[k], second.test[k]) for k in ("x", "y"))
        and len(first.owners) == len(second.owners)
        and all(map(np.array_equal, first.owners, second.owners))
        and all(map(np.array_equal, first.local_tests, second.local_tests))
        and np.array_equal(first.validation, second.validation)
        and np.array_equal(first.server, second.server)
    )


def test_pure_function_of_options_and_seed(data):
    np.random.seed(1)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = federate(data, 3)
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.random.seed(2)
    assert same(first, federate(data, 3))
    other = federate(data, 4)
    assert sorted(rows(first)) != sorted(rows(other))
    assert not all(map(np.array_equal, first.owners, other.owners))


@pytest.mark.parametrize(
    "partition",
    [
        IID(clients=6),
        DirichletMultinomial(clients=6, alpha=5.0),
        DirichletMultinomial(clients=9, alpha=0.5),
        Shards(clients=5),
    ],
)
def test_the_partition_does_not_change_the_cut(data, partition):
    """Every step draws from its own stream: what one rule consumes does not shift another."""
    first, other = federate(data, 0), federate(dataclasses.replace(data, partition=partition), 0)
    assert rows(first) == rows(other)  # cut, validation and server rows
    assert [len(o) for o in first.owners] != [len(o) for o in other.owners]


def test_the_cut_does_not_change_what_is_held_out(data):
    first, other = federate(data, 0), federate(dataclasses.replace(data, longtail=Step(factor=3.0)), 0)
    for name in ("validation", "server"):
        assert rows(first, getattr(first, name)) == rows(other, getattr(other, name))


def test_the_server_s_share_does_not_change_the_validation_split(data):
    first, other = federate(data, 0), federate(dataclasses.replace(data, server=0), 0)
    assert rows(first, first.validation) == rows(other, other.validation)
    assert not len(other.server)


def test_every_step_draws_from_the_stream_of_its_name(data):
    """Streams are part of the format of a run: the parts, put together by hand, give the same federation."""
    archive = np.load(f"{data.folder}/rows.npz")
    labels, pool, held = archive["y_train"], np.arange(TRAIN), []
    for stream, per_class in ((Stream.VALIDATION, 3), (Stream.SERVER_DATA, 5)):
        keep, out = validation_split(labels[pool], CLASSES, per_class, generator(6, stream))
        held.append(pool[out])
        pool = pool[keep]
    chosen = pool[data.longtail.cut(labels[pool], CLASSES, generator(6, Stream.LONGTAIL))]
    owners = data.partition.split(labels[chosen], CLASSES, generator(6, Stream.PARTITION))
    found = federate(data, 6)
    assert rows(found, found.validation) == held[0].tolist()
    assert rows(found, found.server) == held[1].tolist()
    assert [rows(found, owned) for owned in found.owners] == [chosen[owned].tolist() for owned in owners]
    local = local_tests(found.test_counts(), archive["y_test"], generator(6, Stream.LOCAL_TEST))
    assert all(map(np.array_equal, found.local_tests, local))


def test_options_that_draw_nothing(data):
    assert same(federate(data, 0), federate(dataclasses.replace(data, augmentation="flip"), 0))


def test_hold_outs_are_balanced_and_disjoint_from_the_clients(data):
    found = federate(data, 0)
    y = found.columns["y"].numpy()
    for held, per_class in ((found.validation, 3), (found.server, 5)):
        assert np.bincount(y[held], minlength=CLASSES).tolist() == [per_class] * CLASSES
    everything = np.concatenate([*found.owners, found.validation, found.server])
    # Every kept row has exactly one holder; nothing else is kept in memory.
    assert sorted(everything.tolist()) == list(range(len(found.columns["x"])))
    traced = rows(found)
    assert len(set(traced)) == len(traced)
    assert max(traced) < TRAIN  # no test example
    assert all((np.diff(owned) > 0).all() for owned in found.owners)


def test_the_union_has_the_long_tail(data):
    """n_c = floor(n_max 4^(-c/3)), n_max the smallest class after 3 + 5 of each class are held out (protocol section 3)."""
    labels = np.load(f"{data.folder}/rows.npz")["y_train"]
    largest = np.bincount(labels).min() - 8
    counts = federate(data, 0).counts()
    assert counts.shape == (6, CLASSES)
    assert counts.sum(0).tolist() == [int(largest * 4 ** (-c / 3) + 1e-9) for c in range(CLASSES)]


def test_labels_stay_with_their_examples(data):
    labels = np.load(f"{data.folder}/rows.npz")["y_train"]
    found = federate(data, 2)
    assert labels[rows(found)].tolist() == found.columns["y"].tolist()


def test_local_tests_follow_the_protocol(data):
    """m_kc = min(floor(N_test n_kc / n_tot), test examples of class c), drawn without replacement (section 2.4)."""
    found = federate(data, 0)
    counts, y = found.counts(), found.test["y"].numpy()
    wanted = np.minimum(counts * TEST // counts.sum(), np.bincount(y, minlength=CLASSES))
    assert found.test_counts().tolist() == wanted.tolist()
    assert wanted.sum() > 20  # there is something to test
    for local in found.local_tests:
        assert len(set(local.tolist())) == len(local)


def test_natural_clients_are_the_users(data):
    found = federate(dataclasses.replace(data, longtail=NoTail(), partition=Natural(min_size=1)), 0)
    users = [set(found.columns["x"][torch.from_numpy(owned)][:, 1].long().tolist()) for owned in found.owners]
    assert users == [{user} for user in range(7)]
    few = federate(dataclasses.replace(data, longtail=NoTail(), partition=Natural(min_size=50)), 0)
    assert [len(o) for o in few.owners] == [n for n in map(len, found.owners) if n >= 50]


def test_types_and_words(data):
    found = federate(data, 0)
    assert found.columns["x"].dtype == found.test["x"].dtype == torch.float32
    assert found.columns["y"].dtype == torch.int64
    assert all(o.dtype == np.int64 for o in (*found.owners, *found.local_tests, found.validation, found.server))
    images = federate(Data(), 0)
    assert images.columns["x"].dtype == torch.uint8
    assert images.columns["x"].shape == (512, 1, 8, 8)  # floor(126 * 10^(-c/9)) over ten classes
    name, tail, partition = images.sources
    assert name.startswith("digits (E. Alpaydin")
    assert "CC BY 4.0" in name
    assert "factor=10.0" in tail
    assert "512 training examples" in tail
    assert "clients=8" in partition


def test_what_cannot_be_made(data):
    with pytest.raises(DataError, match=r"no such file"):
        federate(dataclasses.replace(data, name="else.npz"), 0)
    with pytest.raises(PartitionError, match=r"200 validation examples of class \d leave none"):
        federate(dataclasses.replace(data, validation=200), 0)
    with pytest.raises(PartitionError, match=r"data\.partition: dirichlet_proportional .* Use "):
        federate(dataclasses.replace(data, partition=DirichletProportional(clients=40)), 0)
    with pytest.raises(PartitionError, match=r"data\.longtail: .* Use "):
        federate(dataclasses.replace(data, longtail=Exponential(factor=1e4)), 0)


def test_images_are_normalised_unless_they_are_only_to_be_scaled():
    """Digits have bytes 0..255; with `normalise = false` the network sees them divided by 255, and nothing else changes."""
    plain, scaled = (federate(Data(normalise=normalise), 0) for normalise in (True, False))
    assert same(plain, scaled)
    x = plain.test["x"][:50]
    inputs = scaled.prepare(x, torch.float64)
    torch.testing.assert_close(inputs, x.double() / 255, rtol=0, atol=0)
    torch.testing.assert_close(plain.prepare(x, torch.float64), (inputs - 0.30542) / 0.37573, rtol=0, atol=1e-12)
