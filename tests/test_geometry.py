"""Class means, within-class spread and angles, against cases computed by hand and a loop in NumPy."""

import math

import numpy as np
import pytest
import torch

from fedtail.etf import simplex
from fedtail.geometry import class_geometry, nearest_angles, row_angles

# Two classes of two points: means (0, 1) and (4, -1), centre (2, 0); squared distances to the means are 1 and 4.
POINTS = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [4.0, 1.0], [4.0, -3.0]])
LABELS = torch.tensor([0, 0, 1, 1])


def test_a_case_by_hand():
    found = class_geometry(POINTS, LABELS, 2)
    assert found.means.tolist() == [[0, 1], [4, -1]]
    assert found.centred.tolist() == [[-2, 1], [2, -1]]
    assert found.variances.tolist() == [[1, 0], [0, 4]]
    assert found.within.tolist() == [1, 4]
    assert found.between.tolist() == [5, 5]
    assert found.spread() == (1 + 4) / (5 + 5)
    assert (found.spread([0]), found.spread([1])) == (1 / 5, 4 / 5)


def test_every_class_counts_the_same_however_rare():
    """Class 0 nine times: neither the centre nor the spread moves."""
    often = torch.cat([POINTS[:2]] * 9 + [POINTS[2:]])
    labels = torch.cat([LABELS[:2]] * 9 + [LABELS[2:]])
    found, wanted = class_geometry(often, labels, 2), class_geometry(POINTS, LABELS, 2)
    torch.testing.assert_close(found.centred, wanted.centred)
    assert found.spread() == pytest.approx(wanted.spread())


def test_a_class_without_examples_is_left_out():
    found = class_geometry(POINTS, LABELS * 2, 3)  # classes 0 and 2
    assert found.within.isnan().tolist() == [False, True, False]
    assert found.centred[[0, 2]].tolist() == [[-2, 1], [2, -1]]
    assert found.spread() == found.spread([0, 1, 2]) == 0.5
    assert math.isnan(found.spread([1]))
    assert nearest_angles(found.centred).isnan().tolist() == [False, True, False]
    assert nearest_angles(found.centred)[0] == pytest.approx(180)


def test_against_numpy_with_classes_of_different_size():
    rng = np.random.default_rng(3)
    y = rng.choice(4, 200, p=[0.6, 0.25, 0.1, 0.05])
    x = (rng.normal(size=(4, 6))[y] + 0.3 * rng.normal(size=(200, 6))).astype(np.float32)
    found = class_geometry(torch.from_numpy(x), torch.from_numpy(y), 4)
    parts = [x[y == c].astype(np.float64) for c in range(4)]
    means = np.stack([part.mean(0) for part in parts])
    within = sum(np.cov(part.T, bias=True) for part in parts) / 4
    between = np.cov(means.T, bias=True)
    np.testing.assert_allclose(found.means.numpy(), means)
    np.testing.assert_allclose(found.spread(), np.trace(within) / np.trace(between))


def test_collapsed_features_have_no_spread_and_the_angles_of_a_simplex():
    """Neural collapse itself: every feature is its class's column of a simplex, far from the origin."""
    rows = simplex(5, 8, np.random.default_rng(0)).T
    y = torch.arange(5).repeat(3)
    found = class_geometry(rows[y] + 7.0, y, 5)
    assert found.spread() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(found.between, torch.ones(5, dtype=torch.float64))
    wanted = math.degrees(math.acos(-1 / 4))
    np.testing.assert_allclose(nearest_angles(found.centred), wanted, atol=1e-6)
    np.testing.assert_allclose(row_angles(found.centred, 0.1 * rows), 0, atol=1e-5)


def test_angles_by_hand():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    second = torch.tensor([[5.0, 0.0], [1.0, 1.0], [-0.1, 0.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(row_angles(first, second), [0, 45, 180, np.nan, np.nan], atol=1e-5)


def test_the_nearest_is_another_row_and_scale_does_not_matter():
    """Directions 0, 30, 120 and 200 degrees: the gaps are 30, 90, 80 and 160."""
    turn = torch.deg2rad(torch.tensor([0.0, 30.0, 120.0, 200.0], dtype=torch.float64))
    rows = torch.stack([turn.cos(), turn.sin()], 1) * torch.tensor([[1.0], [9.0], [0.1], [2.0]])
    np.testing.assert_allclose(nearest_angles(rows), [30, 30, 80, 80])
    with_none = torch.cat([rows, torch.zeros(1, 2)])
    np.testing.assert_allclose(nearest_angles(with_none), [30, 30, 80, 80, np.nan])
