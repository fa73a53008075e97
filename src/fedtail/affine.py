"""Random rotation, zoom and shift of images whose randomness is handed in, as Keras' preprocessing layers compute them.

An output pixel takes its value from a place q in the input, by bilinear interpolation; outside the image, half a pixel
beyond the outermost centres, the image is reflected: d c b a | a b c d | d c b a. c is the image's centre.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.errors import ConfigError
from fedtail.task import Draw


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Rotation, zoom, brightness and shift, in this order, an image each; inputs that are no images stay as they are.

    rotation:  q -> c + R (q - c),             the angle uniform within a share of the whole turn
    zoom:      q -> c + diag(s) (q - c),       a factor for each axis, uniform about 1; above 1 the content shrinks
    brightness: x -> x + b,                    b uniform about 0
    shift:     q -> q - t,                     t uniform within a share of height and width
    """

    rotate: float = 0.1
    """Largest rotation, a share of the whole turn, in [0, 0.5]; 0.1 (36 degrees) is the paper's."""
    zoom: float = 0.2
    """Largest distance of a zoom factor from 1, in [0, 1); 0.2 is the paper's."""
    shift: float = 0.2
    """Largest shift, a share of height and width, in [0, 1]; 0.2 is the paper's."""
    brightness: float = 0.0
    """Largest value added to a prepared image, >= 0; the paper names brightness, its author's code has the factor 0."""
    composed: bool = False
    """Interpolate once through the composed map: cheaper and sharper; Keras does so three times in a row."""

    def __post_init__(self) -> None:
        for name, most in (("rotate", 0.5), ("zoom", 1 - 1e-9), ("shift", 1.0), ("brightness", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                interval = {"zoom": "[0, 1)", "brightness": "[0, inf)"}.get(name, f"[0, {most:g}]")
                raise ConfigError(f"Affine.{name} must be in {interval}, got {getattr(self, name)}.")

    def draws(self, batch_size: int) -> dict[str, Draw]:
        """Returns what `__call__` wants: angle, zoom of height and width, shift of height and width, brightness."""
        return {"affine": Draw("uniform", (batch_size, 6), per_example=True)}

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        """Returns augmented images [N, C, H, W].

        Args:
            x: the images.
            draw: uniform in [0, 1), [N, 6].
        """
        around = 2 * draw.to(x.dtype) - 1  # uniform in [-1, 1)
        angle = around[:, 0] * (2 * math.pi * self.rotate)
        zoom = 1 + self.zoom * around[:, 1:3]
        shift = self.shift * around[:, 3:5]
        bright = (self.brightness * around[:, 5])[:, None, None, None]
        if self.composed:
            return warp(x, angle, zoom, shift) + bright
        still, whole, rest = torch.zeros_like(angle), torch.ones_like(zoom), torch.zeros_like(shift)
        x = warp(warp(x, angle, whole, rest), still, zoom, rest)
        return warp(x + bright, still, whole, shift)


def warp(x: Tensor, angle: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Resamples images at q -> c + R diag(s) (q - t - c).

    Args:
        x: images [N, C, H, W].
        angle: in radians, (N,).
        zoom: s of height and width, [N, 2].
        shift: t of height and width, as shares of them, [N, 2].

    Returns:
        Images of the same shape.
    """
    height, width = x.shape[-2:]
    # torch's coordinates g: q - c = g * size / 2, along each axis
    rows = ((2 * torch.arange(height, dtype=x.dtype, device=x.device) + 1) / height - 1)[None, :, None]
    columns = ((2 * torch.arange(width, dtype=x.dtype, device=x.device) + 1) / width - 1)[None, None, :]
    zoom, shift, angle = zoom[:, :, None, None], shift[:, :, None, None], angle[:, None, None]
    down = zoom[:, 0] * (rows - 2 * shift[:, 0]) * (height / 2)
    right = zoom[:, 1] * (columns - 2 * shift[:, 1]) * (width / 2)
    turned = (torch.cos(angle) * right - torch.sin(angle) * down, torch.sin(angle) * right + torch.cos(angle) * down)
    grid = torch.stack([turned[0] / (width / 2), turned[1] / (height / 2)], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
