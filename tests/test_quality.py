"""Quality metrics: closed forms and identities, and scipy's matrix square root as an oracle."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from fedtail import quality
from fedtail.generation import quotas

RNG = np.random.default_rng(0)


def cloud(count, d=6, shift=0.0):
    return np.random.default_rng(count + d).normal(size=(count, d)) @ np.diag(np.arange(1, d + 1)) + shift


def frechet_by_scipy(x, y):
    """With a complex matrix square root, as the first implementations had it; population covariances."""
    a, b = np.cov(x.T, bias=True), np.cov(y.T, bias=True)
    root = sqrtm(a @ b)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(root))


def distance(x, y, **more):
    return quality.frechet(quality.moments(x), quality.moments(y), **more)


def test_frechet_distance_against_scipy():
    x, y = cloud(300), cloud(400, shift=0.3) ** 3 / 50
    assert distance(x, y) == pytest.approx(frechet_by_scipy(x, y), rel=1e-9)
    wide = RNG.normal(size=(40, 60))  # fewer points than features: singular
    assert distance(wide, wide[:30] + 1) == pytest.approx(frechet_by_scipy(wide, wide[:30] + 1), rel=1e-4)


def test_frechet_distance_of_a_set_with_itself_is_nothing():
    x = cloud(200)
    assert abs(distance(x, x)) < 1e-9 * np.trace(quality.moments(x).covariance)


def test_frechet_distance_is_symmetric_and_keeps_under_rotations():
    x, y = cloud(200), cloud(150, shift=1.0)
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)
    assert distance(x @ rotation, y @ rotation) == pytest.approx(distance(x, y), rel=1e-10)


def test_frechet_distance_in_closed_form():
    """Equal covariances: the squared distance of the means. Equal means, diagonal: sum (s_i - t_i)^2."""
    x = cloud(100)
    assert distance(x, x + 2.0) == pytest.approx(6 * 4.0, rel=1e-9)
    s, t, zero = np.array([1.0, 2.0, 5.0]), np.array([4.0, 2.0, 1.0]), np.zeros(3)
    first, second = (quality.Moments(1, zero, np.diag(v**2)) for v in (s, t))
    assert quality.frechet(first, second) == pytest.approx(9 + 0 + 16, rel=1e-12)
    assert quality.frechet(first, second, ridge=1e-6) == pytest.approx(25, rel=1e-5)


def test_moments_of_a_mixture_are_those_of_the_pooled_images():
    """By realised quotas: 500 of three generators by their shares, one of whom makes none."""
    counts = quotas(np.array([0.55, 0.4495, 0.0005]), 500)
    assert counts.tolist() == [275, 225, 0]
    parts = [cloud(n, shift=10.0 * k) for k, n in enumerate(counts) if n]
    whole, combined = quality.moments(np.concatenate(parts)), quality.pooled([quality.moments(p) for p in parts])
    real = quality.moments(cloud(400, shift=3.0))
    assert combined.size == 500
    np.testing.assert_allclose(combined.mean, whole.mean, rtol=1e-12)
    assert quality.frechet(real, combined) == pytest.approx(quality.frechet(real, whole), rel=1e-6)
    np.testing.assert_allclose(combined.covariance, np.cov(np.concatenate(parts).T, bias=True), rtol=1e-9, atol=1e-9)


def kernel_by_loops(x, y):
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    own = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    return sum(own) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_against_loops():
    x, y = cloud(12, 3), cloud(12, 3, shift=0.5) + 0.1
    mean, deviation = quality.kernel_distance(x, y, RNG, subsets=3, size=12)  # the whole sets, in another order
    assert mean == pytest.approx(kernel_by_loops(x, y), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [20, 5])  # the kernel of all pairs, and that of each subset
def test_kernel_distance_of_subsets_against_loops(size):
    x, y, rng = cloud(30, 3), cloud(25, 3, shift=0.5), np.random.default_rng(5)
    rows = [(rng.choice(30, size, replace=False), rng.choice(25, size, replace=False)) for _ in range(4)]
    each = [kernel_by_loops(x[i], y[j]) for i, j in rows]
    found = quality.kernel_distance(x, y, np.random.default_rng(5), 4, size)
    assert found == pytest.approx((np.mean(each), np.std(each)), rel=1e-10)


def test_kernel_distance_of_one_distribution_averages_to_nothing():
    draws = [
        quality.kernel_distance(RNG.normal(size=(200, 4)), RNG.normal(size=(200, 4)), RNG, 1, 200)[0] for _ in range(60)
    ]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))
    x = RNG.normal(size=(200, 4))
    assert quality.kernel_distance(x, x, RNG, 1, 200)[0] < 0  # the diagonal is left out of two of three terms


def test_a_set_compared_with_itself():
    x = cloud(300)
    assert quality.precision_recall(x, x) == {"precision": 1.0, "recall": 1.0}
    assert quality.density_coverage(x, x) == {"density": 1.0, "coverage": 1.0}
    far = quality.precision_recall(x, x + 1e6) | quality.density_coverage(x, x + 1e6)
    assert set(far.values()) == {0.0}


def test_neighbourhoods_against_full_matrices(monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 7)
    real, fake = cloud(60, 3), cloud(45, 3, shift=0.8)
    own, other, cross = cdist(real, real), cdist(fake, fake), cdist(real, fake)
    third, fifth = np.sort(own, 1)[:, 3], np.sort(own, 1)[:, 5]
    fakes_third = np.sort(other, 1)[:, 3]
    found = quality.precision_recall(real, fake) | quality.density_coverage(real, fake)
    assert found["precision"] == pytest.approx((cross < third[:, None]).any(0).mean())
    assert found["recall"] == pytest.approx((cross < fakes_third[None]).any(1).mean())
    assert found["density"] == pytest.approx((cross < fifth[:, None]).sum() / (5 * 45))
    assert found["coverage"] == pytest.approx((cross.min(1) < fifth).mean())
    np.testing.assert_allclose(quality.nearest(real, fake), cross.min(1), rtol=1e-12)


def test_modes():
    """Shares .5, .495, .005, 0 against equal: KL = ln 4 - H, total variation (.25 + .245 + .245 + .25) / 2."""
    labels = np.repeat([0, 1, 2], [500, 495, 5])
    found = quality.modes(labels, np.ones(4))
    entropy = -sum(p * np.log(p) for p in (0.5, 0.495, 0.005))
    assert found == pytest.approx({"modes": 2, "mode_kl": np.log(4) - entropy, "mode_distance": 0.495}, rel=1e-9)
    expert = quality.modes(np.repeat([0, 1], 50), np.array([10, 10, 0, 0]))
    assert expert["mode_kl"] == pytest.approx(0, abs=1e-5)
    uniform = quality.modes(np.repeat([0, 1], 50), np.ones(10))
    assert uniform["mode_kl"] == pytest.approx(np.log(5))  # of a pure expert of two classes


def test_purity():
    held = np.array([[3, 0, 1], [0, 9, 0], [1, 1, 1]])
    found = quality.purity(np.array([0, 1, 2, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1, 1]), held)
    assert found[:2] == pytest.approx([2 / 3, 3 / 4])
    assert np.isnan(found[2])


def test_classifier_score():
    assert quality.classifier_score(np.tile(np.eye(10), (20, 1)))[0] == pytest.approx(10)
    assert quality.classifier_score(np.full((100, 10), 0.1)) == pytest.approx((1, 0))
    half = np.tile([[0.9, 0.1], [0.1, 0.9]], (50, 1))
    expected = np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    assert quality.classifier_score(half, 5) == pytest.approx((expected, 0))
