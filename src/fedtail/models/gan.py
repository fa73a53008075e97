"""Generative adversarial pairs: a generator and a discriminator in one module, so that they train and travel together.

A pair is any module with the parts `generator` (latents [B, latent] -> images) and `discriminator` (images -> one logit
[B, 1]) and the attributes `latent` and `conditional`; the module itself is its discriminator. A conditional pair is told
the class: the generator gets its one-hot code behind the latents, [B, latent + C]; the discriminator as C constant
planes behind the image's channels, [B, channels + C, height, width] (see `with_label`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedtail.models.specs import Norm


def is_pair(module: nn.Module) -> bool:
    """Says whether a network is a pair of generator and discriminator, which gives one logit and no classes."""
    return all(isinstance(getattr(module, part, None), nn.Module) for part in ("generator", "discriminator"))


def with_label(x: Tensor, code: Tensor | None) -> Tensor:
    """Appends one-hot labels [B, C] to latents [B, d] or, as constant planes, to images [B, channels, H, W]; None: x."""
    if code is None:
        return x
    planes = code.reshape(*code.shape, *[1] * (x.dim() - 2)).expand(*code.shape, *x.shape[2:])
    return torch.cat([x, planes.to(x.dtype)], 1)


class Generator(nn.Module):
    """Latents, as a map of one pixel, through transposed convolutions; normalisation and ReLU between them, tanh at the end.

    Args:
        latent: d_z, number of latents.
        classes: C for a conditional generator, 0 for one that is told no class.
        channels: of the maps in between, in order.
        out: channels of the images.
        start: height and width of the first map; every further layer doubles them.
        norm: "batch" or "group".
    """

    def __init__(
        self, latent: int, classes: int, channels: Sequence[int], out: int, start: tuple[int, int], norm: Norm
    ) -> None:
        super().__init__()
        self.latent = latent
        self.embedding = nn.Embedding(classes, latent) if classes else None
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent * (2 if classes else 1), channels[0], start, bias=False),
            _normalise(norm, channels[0]),
            nn.ReLU(),
        ]
        for before, after in pairwise(channels):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), _normalise(norm, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(channels[-1], out, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Map latents [B, latent] (conditional: [B, latent + C]) to images [B, out, H, W] in [-1, 1]."""
        if self.embedding is not None:
            z = torch.cat([z[:, : self.latent], z[:, self.latent :] @ self.embedding.weight], 1)
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Convolutions of stride 2 with LeakyReLU(.2), normalised but for the first, and one over the whole last map.

    Args:
        image: (channels, height, width).
        classes: C for a conditional discriminator, 0 for one that is told no class.
        channels: of the maps in between, in order; height and width are halved by each.
        norm: "batch" or "group".
    """

    def __init__(self, image: tuple[int, int, int], classes: int, channels: Sequence[int], norm: Norm) -> None:
        super().__init__()
        depth, height, width = image
        self.image = image
        self.embedding = nn.Embedding(classes, height * width) if classes else None
        layers: list[nn.Module] = [
            nn.Conv2d(depth + bool(classes), channels[0], 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2),
        ]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), _normalise(norm, after), nn.LeakyReLU(0.2)]
        whole = (height >> len(channels), width >> len(channels))
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, whole, bias=False), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] (conditional: [B, channels + C, H, W]) to logits [B, 1]; > 0 means real."""
        if self.embedding is not None:
            depth, height, width = self.image
            plane = x[:, depth:, 0, 0] @ self.embedding.weight
            x = torch.cat([x[:, :depth], plane.unflatten(1, (1, height, width))], 1)
        return self.layers(x)


class DCGAN(nn.Module):
    """A generator and a discriminator of the DCGAN kind.

    Weights of (transposed) convolutions start from N(0, .02), scales of the normalisation from N(1, .02), shifts at 0,
    embeddings of labels from PyTorch's N(0, 1).

    Args:
        image: (channels, height, width); height and width must be multiples of 2 ** len(channels).
        classes: C for a conditional pair, else 0.
        latent: d_z, number of latents.
        channels: of the discriminator's maps; the generator has them backwards.
        norm: "batch" or "group".
    """

    def __init__(
        self, image: tuple[int, int, int], classes: int, latent: int, channels: tuple[int, ...], norm: Norm
    ) -> None:
        super().__init__()
        self.latent, self.conditional = latent, bool(classes)
        start = (image[1] >> len(channels), image[2] >> len(channels))
        self.generator = Generator(latent, classes, channels[::-1], image[0], start, norm)
        self.discriminator = Discriminator(image, classes, channels, norm)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the discriminator's logits [B, 1]; without labels a conditional pair is told class 0."""
        if self.conditional and x.shape[1] == self.discriminator.image[0]:
            assert self.discriminator.embedding is not None
            code = x.new_zeros(len(x), self.discriminator.embedding.num_embeddings)
            code[:, 0] = 1
            x = with_label(x, code)
        return self.discriminator(x)


def _normalise(norm: Norm, channels: int) -> nn.Module:
    """The layer; GroupNorm has 8 groups, or one where the channels cannot be cut so."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)
