"""The static sparse classifier: section 3.1's construction, checked for its geometry and against hand-made values."""

import math

import numpy as np
import pytest
import torch

from fedtail import etf
from fedtail.errors import ConfigError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path))
    return tmp_path / "etf"


def test_the_dense_simplex_has_unit_columns_and_equal_angles():
    for classes, size in ((2, 2), (5, 16), (10, 10), (10, 64)):
        v = etf.simplex(classes, size, np.random.default_rng(classes))
        gram = (v.T @ v).numpy()
        wanted = np.full((classes, classes), -1 / (classes - 1))
        np.fill_diagonal(wanted, 1)
        np.testing.assert_allclose(gram, wanted, atol=1e-10)


def test_the_objective_of_a_frame_that_is_known():
    """Three unit vectors in a plane at 120 degrees: the norm term is 3 (1 - 1/2)^2, the angle term 2 pi / 3."""
    turn = torch.tensor([0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
    v = torch.stack([turn.cos(), turn.sin()])
    assert float(etf.objective(v, 0.5)) == pytest.approx(0.75 - 2 * math.pi / 3)
    lengths = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    assert float(etf.objective(v * lengths, 0.5)) == pytest.approx(2.25 + 0.25 + 0 - 2 * math.pi / 3)


def test_the_objective_takes_the_nearest_other_class():
    v = torch.tensor([[1.0, 1.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)  # 0, 45 and 180 degrees
    angles = [math.pi / 4, math.pi / 4, 3 * math.pi / 4]
    assert float(etf.objective(v, 1.0)) == pytest.approx((2**0.5 - 1) ** 2 - sum(angles) / 3)


def test_the_objective_at_the_start_is_that_of_the_authors_logs():
    """100 classes, 512 features, 60 % pruned, norm .1: between 26.2 and 27.5 (the authors' log: 26.7).

    Pruning leaves a unit column a length of about sqrt(1 - .6).
    """
    v = etf.construct(100, 512, 0.6, 0.1, 0, 1e-4, np.random.default_rng(3))
    found = float(etf.objective(v, 0.1))
    assert 26.2 < found < 27.5
    unit = (v / v.norm(dim=0)).numpy()
    cosines = unit.T @ unit - 2 * np.eye(100)
    assert found == pytest.approx(100 * (0.4**0.5 - 0.1) ** 2 - np.arccos(cosines.max(1)).mean(), abs=0.5)


@pytest.mark.parametrize(
    ("classes", "size", "sparsity", "zeros"), [(10, 64, 0.6, 384), (10, 100, 0.29, 290), (7, 33, 0.3, 69)]
)
def test_what_is_pruned_stays_pruned_and_its_number_is_exact(classes, size, sparsity, zeros):
    before, after, again = (
        etf.construct(classes, size, sparsity, 0.1, steps, 1e-3, np.random.default_rng(1)) for steps in (0, 50, 50)
    )
    assert int((before == 0).sum()) == zeros  # floor(beta d C); 0.29 * 1000 is 289.99... in binary
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)
    assert torch.equal(after, again)


def check(rows, norm, miss, variance):
    lengths = rows.norm(dim=1)
    assert float((lengths / norm - 1).abs().max()) < miss
    found = etf.angles(rows)
    assert float(found.mean()) == pytest.approx(96.379, abs=0.05)  # arccos(-1 / 9)
    assert float(found.var()) < variance


def test_a_short_construction_spreads_the_classes():
    """10 classes, 64 features, 2,000 steps of 1e-3: norms within 6 %, angles within .05 degrees, variance < .2."""
    check(etf.construct(10, 64, 0.6, 0.1, 2000, 1e-3, np.random.default_rng(0)).T, 0.1, 0.06, 0.2)


@pytest.mark.slow
def test_the_construction_of_the_paper():
    """10,000 steps of 1e-4: norms within 1 %, variance < .1, and the objective ends at -1.6815."""
    v = etf.construct(10, 64, 0.6, 0.1, 10_000, 1e-4, np.random.default_rng(0))
    check(v.T, 0.1, 0.01, 0.1)
    assert float(etf.objective(v, 0.1)) == pytest.approx(-1.6815, abs=0.01)


def test_it_is_made_once_and_kept(cache, monkeypatch):
    options = {"sparsity": 0.3, "norm": 0.5, "steps": 20, "lr": 1e-3}
    first = etf.sparse_etf(4, 12, seed=1, **options)
    assert first.shape == (4, 12)
    assert first.dtype == torch.float32
    [file] = cache.iterdir()
    monkeypatch.setattr(etf, "construct", lambda *_: pytest.fail("made again"))
    assert torch.equal(etf.sparse_etf(4, 12, seed=1, **options), first)
    monkeypatch.undo()
    monkeypatch.setenv("FEDTAIL_DATA", str(cache.parent))
    file.write_bytes(b"damaged")
    assert torch.equal(etf.sparse_etf(4, 12, seed=1, **options), first)
    for change in ({"seed": 2}, {"norm": 0.6}, {"steps": 21}, {"lr": 2e-3}, {"sparsity": 0.2}):
        other = etf.sparse_etf(4, 12, **{"seed": 1, **options, **change})
        assert not torch.equal(other, first), change


def test_what_cannot_be_made_says_what_to_do():
    with pytest.raises(ConfigError, match="wider features"):
        etf.simplex(10, 9, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="two classes"):
        etf.simplex(1, 9, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="fewer than two of 8 entries"):
        etf.construct(8, 8, 0.9, 0.1, 0, 1e-3, np.random.default_rng(0))
