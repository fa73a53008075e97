"""Crop and flip against plain loops over pixels."""

import numpy as np
import pytest
import torch

from fedtail.data.augment import PADDING, augment, augment_draws, random_crop


def images(n=5, channels=2, height=6, width=7, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (n, channels, height, width)).astype(np.uint8)


def crop_by_hand(x, corner):
    """Pixel (i, j) of image k comes from (i + row - 4, j + column - 4), or is black outside the image."""
    out = np.zeros_like(x)
    n, channels, height, width = x.shape
    for k in range(n):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    row, column = i + corner[k, 0] - PADDING, j + corner[k, 1] - PADDING
                    if 0 <= row < height and 0 <= column < width:
                        out[k, c, i, j] = x[k, c, row, column]
    return out


def test_crop():
    x = images()
    corner = np.array([[4, 4], [0, 0], [8, 8], [0, 8], [3, 5]])
    found = random_crop(torch.from_numpy(x), torch.from_numpy(corner))
    np.testing.assert_array_equal(found.numpy(), crop_by_hand(x, corner))
    np.testing.assert_array_equal(found[0].numpy(), x[0])  # the middle corner leaves the image as it is
    assert found.dtype == torch.uint8
    assert not np.array_equal(found[1].numpy(), x[1])


def test_crop_then_flip():
    x = images(seed=1)
    corner = np.array([[1, 2], [7, 3], [4, 4], [8, 0], [0, 5]])
    flip = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    expected = crop_by_hand(x, corner)
    for k in range(5):
        if flip[k]:
            for c in range(2):
                for i in range(6):
                    expected[k, c, i] = expected[k, c, i][::-1]
    draws = {"augment:crop": torch.from_numpy(corner), "augment:flip": torch.from_numpy(flip)}
    original = torch.from_numpy(x.copy())
    np.testing.assert_array_equal(augment(original, draws).numpy(), expected)
    np.testing.assert_array_equal(original.numpy(), x)  # the argument stays
    only = augment(torch.from_numpy(x), {"augment:flip": torch.from_numpy(flip)})
    np.testing.assert_array_equal(only[1].numpy(), x[1])
    np.testing.assert_array_equal(only[0].numpy(), x[0, :, :, ::-1])


def test_no_draws_no_change():
    x = torch.from_numpy(images())
    assert torch.equal(augment(x, {}), x)
    assert augment_draws("none", 8) == {}


@pytest.mark.parametrize(
    ("kind", "names"), [("flip", {"augment:flip"}), ("crop_flip", {"augment:crop", "augment:flip"})]
)
def test_draws_cover_every_corner_and_both_directions(kind, names):
    wanted = augment_draws(kind, 16)
    assert set(wanted) == names
    assert all(draw.per_example and draw.shape[0] == 16 for draw in wanted.values())
    rng = np.random.default_rng(0)
    flips = wanted["augment:flip"].sample(rng, 400)
    assert set(np.unique(flips)) == {0.0, 1.0}
    assert abs(flips.mean() - 0.5) < 0.03  # 6,400 draws: five standard deviations are .031
    if kind == "crop_flip":
        corners = wanted["augment:crop"].sample(rng, 400)
        assert corners.shape == (400, 16, 2)
        assert set(np.unique(corners)) == set(range(2 * PADDING + 1))  # offsets -4..4
