"""The augmentation of the lightweight CNN's second branch: its maps, its borders, its laws."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedtail.affine import Affine, warp
from fedtail.errors import ConfigError


def parameters(n, angle=0.0, zoom=1.0, shift=(0.0, 0.0), dtype=torch.float64):
    return (torch.full((n,), angle, dtype=dtype), torch.full((n, 2), zoom, dtype=dtype),
            torch.tensor([shift] * n, dtype=dtype))  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("composed", [False, True])
def test_the_middle_of_every_range_is_the_identity(dtype, tolerance, composed):
    x = torch.rand(3, 2, 28, 30, dtype=dtype)
    found = Affine(composed=composed)(x, torch.full((3, 6), 0.5))
    assert found.dtype == dtype
    assert float((found - x).abs().max()) < tolerance


def test_the_image_is_reflected_half_a_pixel_beyond_its_edge():
    """The row 1 2 3 4 at -4 .. 7 reads 4 3 2 1 1 2 3 4 4 3 2 1."""
    x = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).reshape(1, 1, 1, 4)
    found = []
    for pixels in (4, 0, -4):  # the output's pixel i is the input's i - t
        found += warp(x, *parameters(1, shift=(0.0, pixels / 4))).flatten().tolist()
    assert found == pytest.approx([4, 3, 2, 1, 1, 2, 3, 4, 4, 3, 2, 1])


def square(size=28):
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x[..., 9:19, 9:19] = 1
    return x


def test_a_zoom_above_one_shrinks_the_content():
    area = {z: float(warp(square(), *parameters(1, zoom=z)).sum()) for z in (0.8, 1.0, 1.2)}
    assert area[1.0] == pytest.approx(100)
    assert area[1.2] == pytest.approx(100 / 1.2**2, rel=0.05)
    assert area[0.8] == pytest.approx(100 / 0.8**2, rel=0.05)


def test_a_quarter_turn_is_exact_and_a_shift_moves_by_whole_pixels():
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    turned = warp(x, *parameters(2, angle=math.pi / 2))
    assert any(torch.allclose(turned, x.rot90(k, (2, 3))) for k in (1, 3))
    moved = warp(x, *parameters(2, shift=(3 / 12, -2 / 12)))
    torch.testing.assert_close(moved[..., 3:, :-2], x[..., :-3, 2:])


def test_maps_against_a_plain_loop():
    """q -> c + R diag(s) (q - t - c), pixel by pixel, bilinear between four reflected neighbours."""
    size = (7, 9)
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    angle, (sy, sx), (ty, tx) = 0.5, (1.1, 0.85), (0.15, -0.1)
    found = warp(x, torch.tensor([angle], dtype=x.dtype), torch.tensor([[sy, sx]], dtype=x.dtype),
                 torch.tensor([[ty, tx]], dtype=x.dtype))[0, 0]  # fmt: skip

    def value(row, column):
        def reflected(i, n):
            i %= 2 * n
            return i if i < n else 2 * n - 1 - i

        r, c = math.floor(row), math.floor(column)
        total = 0.0
        for i, a in ((r, 1 - row + r), (r + 1, row - r)):
            for j, b in ((c, 1 - column + c), (c + 1, column - c)):
                total += a * b * float(x[0, 0, reflected(i, size[0]), reflected(j, size[1])])
        return total

    cy, cx = (size[0] - 1) / 2, (size[1] - 1) / 2
    for i in range(size[0]):
        for j in range(size[1]):
            dy, dx = sy * (i - ty * size[0] - cy), sx * (j - tx * size[1] - cx)
            row = cy + math.sin(angle) * dx + math.cos(angle) * dy
            column = cx + math.cos(angle) * dx - math.sin(angle) * dy
            assert float(found[i, j]) == pytest.approx(value(row, column), abs=1e-9)


def test_three_steps_are_near_the_composed_one_on_a_smooth_image():
    grid = torch.linspace(-3, 3, 28, dtype=torch.float64)
    x = torch.exp(-(grid[:, None] ** 2) - grid[None] ** 2)[None, None].repeat(8, 1, 1, 1)
    draw = torch.rand(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gap = (Affine()(x, draw) - Affine(composed=True)(x, draw))[..., 10:18, 10:18].abs()  # the border is another one
    assert 0 < float(gap.max()) < 0.1
    assert float((Affine()(x, draw) - x).abs().max()) > 0.2


def test_ranges_and_brightness():
    corner = Affine(brightness=0.25, composed=True)
    x = torch.full((2, 1, 8, 8), 0.5, dtype=torch.float64)  # constant: only brightness shows
    low, high = (corner(x, torch.full((2, 6), d, dtype=torch.float64)) for d in (0.0, 1.0))
    torch.testing.assert_close(low, x - 0.25)
    torch.testing.assert_close(high, x + 0.25)
    bump = F.pad(torch.ones(1, 1, 1, 1, dtype=torch.float64), (10, 10, 10, 10))
    shifted = Affine(rotate=0.0, zoom=0.0)(bump, torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.0, 0.5]], dtype=torch.float64))
    row, column = divmod(int(shifted.argmax()), 21)
    assert (row - 10, column - 10) == (4, -4)  # 0.2 of 21 is 4.2


@pytest.mark.parametrize(("option", "value"), [("rotate", 0.6), ("zoom", 1.0), ("shift", -0.1), ("brightness", -1.0)])
def test_options_outside_their_range_are_refused(option, value):
    with pytest.raises(ConfigError, match=rf"Affine.{option} must be in .*, got {value}"):
        Affine(**{option: value})


def test_under_vmap():
    x, draw = torch.rand(3, 4, 1, 9, 9, dtype=torch.float64), torch.rand(3, 4, 6, dtype=torch.float64)
    found = torch.vmap(Affine())(x, draw)
    torch.testing.assert_close(found, torch.stack([Affine()(a, d) for a, d in zip(x, draw, strict=True)]))
