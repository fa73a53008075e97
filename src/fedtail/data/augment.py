"""Augmentation as tensor functions whose randomness is handed in."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedtail.task import Draw

Augmentation = Literal["none", "crop_flip", "flip"]
PADDING = 4  # pixels on each side, the long-tail protocol's


def augment_draws(kind: Augmentation, batch_size: int) -> dict[str, Draw]:
    """Returns what an augmentation wants at each step: the crop's corner and whether to flip, an image each."""
    wanted: dict[str, Draw] = {}
    if kind == "crop_flip":
        wanted["augment:crop"] = Draw("integers", (batch_size, 2), per_example=True, high=2 * PADDING + 1)
    if kind in ("crop_flip", "flip"):
        wanted["augment:flip"] = Draw("bernoulli", (batch_size,), per_example=True)
    return wanted


def augment(x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Applies crop and flip to images [N, C, H, W] as far as their draws are given ([N, 2] and [N])."""
    if "augment:crop" in draws:
        x = random_crop(x, draws["augment:crop"])
    if "augment:flip" in draws:
        x = torch.where(draws["augment:flip"].bool()[:, None, None, None], x.flip(-1), x)
    return x


def random_crop(x: Tensor, corner: Tensor) -> Tensor:
    """Pads by 4 with zeros (black, before normalisation) and cuts the original size at `corner` [N, 2] in 0..8."""
    n, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, [PADDING] * 4)
    rows = (corner[:, :1] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (corner[:, 1:] + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(n, device=x.device)[:, None, None, None]
    return padded[images, torch.arange(channels, device=x.device)[None, :, None, None], rows, columns]
