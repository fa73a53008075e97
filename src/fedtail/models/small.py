"""The small networks: fully connected (`MLP`) and LeNet; all layers start from PyTorch's default initial values."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fedtail.models.layers import Dropout, Network


class MLP(Network):
    """Flatten; then for each hidden layer linear, ReLU and, if wanted, Dropout; then the head.

    Args:
        input_shape: Shape of one example, of any rank >= 1.
        num_classes: C, number of logits.
        hidden: Widths of the hidden layers; d is the last one, or the size of an example if there is none.
        dropout: Probability of leaving out a hidden unit, in [0, 1); at 0 the network has no Dropout layer.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        widths = (math.prod(input_shape), *hidden)
        self.names = tuple(f"hidden{i}" for i in range(1, len(widths)))
        for name, (before, after) in zip(self.names, pairwise(widths), strict=True):
            layers: list[nn.Module] = [nn.Linear(before, after), nn.ReLU()]
            self.add_module(name, nn.Sequential(*layers, *([Dropout(dropout)] if dropout > 0 else [])))
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map examples [B, *input_shape] to features [B, d]."""
        x = x.flatten(1)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


class LeNet(Network):
    """Twice 5x5 convolution (to 6, to 16) without padding, ReLU and max-pool 2; hidden layers of 120 and 84; head.

    Args:
        input_shape: (channels, height, width); height and width >= 16 - 2 padding, so that the last map has a pixel.
        num_classes: C, number of logits.
        padding: Zeros around the image, pixels on each side.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, padding: int = 0) -> None:
        super().__init__()
        channels, height, width = input_shape
        rows, columns = (((size + 2 * padding - 4) // 2 - 4) // 2 for size in (height, width))
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.hidden1 = nn.Linear(16 * rows * columns, 120)
        self.hidden2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, height, width] to features [B, 84]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden2(F.relu(self.hidden1(x.flatten(1)))))
