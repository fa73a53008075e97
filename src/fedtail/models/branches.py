"""The two-stage lightweight CNN: one branch, two of them side by side, and both under one head.

Isong, "Building Efficient Lightweight CNN Models", 2025 (arXiv 2501.15547). Parameters with 10 classes:

                        28 x 28 x 1     32 x 32 x 3
    BranchCNN                 6,930           9,310
    Dual of two              13,860          18,620
    Unified over two         14,862          19,622

Initial values, as Keras has them: convolutions and the hidden layer He-normal (truncated at two standard deviations),
classifiers Glorot-uniform, biases 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail.models.layers import Dropout, Network

TRUNCATED = 0.87962566103423978
"""Standard deviation of a standard normal that is cut at -2 and 2."""


def he_normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Gives a layer Keras' He-normal weights, of standard deviation sqrt(2 / fan_in), and biases 0."""
    std = math.sqrt(2 / layer.weight[0].numel()) / TRUNCATED
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def glorot_limit(shape: Sequence[int]) -> float:
    """Returns sqrt(6 / (fan_in + fan_out)), the largest initial weight of a layer with weights of this shape."""
    return math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))


def glorot_uniform(layer: nn.Conv2d | nn.Linear) -> None:
    """Gives a layer Glorot-uniform weights and biases 0."""
    limit = glorot_limit(layer.weight.shape)
    nn.init.uniform_(layer.weight, -limit, limit)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _trunk(conv1: nn.Module, conv2: nn.Module, x: Tensor) -> Tensor:
    """Map images to [B, 20, h, h] by two convolutions, each with ReLU and max-pool 2."""
    return F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(x)), 2))), 2)


def side(size: int) -> int:
    """Height or width of the trunk's maps for images of this size: 5 for 28, 6 for 32."""
    return ((size - 2) // 2 - 2) // 2


class BranchCNN(Network):
    """Twice 3x3 convolution (to 10, to 20) without padding, ReLU and max-pool 2; then the classifier.

    Args:
        input_shape: (channels, height, width); height and width >= 10, so that the last map has a pixel.
        num_classes: C, number of logits.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = self.input_shape = input_shape
        self.conv1 = nn.Conv2d(channels, 10, 3)
        self.conv2 = nn.Conv2d(10, 20, 3)
        self.head = nn.Linear(20 * side(height) * side(width), num_classes)
        he_normal(self.conv1)
        he_normal(self.conv2)
        glorot_uniform(self.head)

    def features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, height, width] to features [B, d]."""
        return _trunk(self.conv1, self.conv2, x).flatten(1)


class ConvolutionalBranch(nn.Module):
    """A branch whose classifier is a convolution as large as its trunk's maps: the same function, weights in another shape.

    Args:
        branch: Whose trunk it takes; the convolution starts from weights of its own.
    """

    def __init__(self, branch: BranchCNN) -> None:
        super().__init__()
        self.input_shape, self.num_classes = branch.input_shape, branch.head.out_features
        self.conv1, self.conv2 = branch.conv1, branch.conv2
        self.head = nn.Conv2d(20, self.num_classes, (side(self.input_shape[1]), side(self.input_shape[2])))
        glorot_uniform(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to scores [B, C], which are the branch's logits."""
        return self.head(_trunk(self.conv1, self.conv2, x)).flatten(1)

    def stages(self) -> list[list[str]]:
        """Names of all parameters in groups from input to output."""
        return [[f"{name}.weight", f"{name}.bias"] for name in ("conv1", "conv2", "head")]


class Dual(nn.Module):
    """Two branches that share nothing; its prediction is the mean of their two softmaxes.

    Args:
        branch1: Trained on the images.
        branch2: Trained on their augmented copies.
    """

    def __init__(self, branch1: nn.Module, branch2: nn.Module) -> None:
        super().__init__()
        self.branch1, self.branch2 = branch1, branch2

    def forward(self, x: Tensor) -> Tensor:
        """Map examples to the logarithms of the mean probabilities, [B, C]."""
        both = torch.stack([F.log_softmax(branch(x), -1) for branch in (self.branch1, self.branch2)])
        return both.logsumexp(0) - math.log(2)

    def stages(self) -> list[list[str]]:
        """Names of all parameters in groups from input to output, those of both branches together."""
        return side_by_side(self.branch1, self.branch2)


class Unified(Network):
    """Both branches on the same input, ReLU on their scores, side by side; a hidden layer with ReLU and Dropout; the head.

    Args:
        branch1: A network of C logits; a `BranchCNN` gets a convolution in the place of its classifier.
        branch2: Another one of the same form.
        num_classes: C, number of logits.
        width: Units of the hidden layer.
        dropout: Probability of leaving one out; at 0 there is no Dropout layer.
    """

    def __init__(
        self, branch1: nn.Module, branch2: nn.Module, num_classes: int, width: int = 32, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.branch1, self.branch2 = (
            ConvolutionalBranch(b) if isinstance(b, BranchCNN) else b for b in (branch1, branch2)
        )
        self.hidden = nn.Linear(2 * num_classes, width)
        self.dropout = Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        he_normal(self.hidden)
        glorot_uniform(self.head)

    def features(self, x: Tensor) -> Tensor:
        """Map examples to the hidden units [B, width]."""
        scores = torch.cat([self.branch1(x), self.branch2(x)], 1)
        return self.dropout(F.relu(self.hidden(F.relu(scores))))

    def stages(self) -> list[list[str]]:
        """Names of all parameters in groups from input to output: the branches' groups, the hidden layer, the head."""
        groups = side_by_side(self.branch1, self.branch2)
        return [*groups, ["hidden.weight", "hidden.bias"], ["head.weight", "head.bias"]]

    def dual(self) -> Dual:
        """The two branches with dense classifiers, as they are trained first; weights have no meaning."""
        return Dual(_dense(self.branch1), _dense(self.branch2))


def _dense(branch: nn.Module) -> nn.Module:
    if not isinstance(branch, ConvolutionalBranch):
        return copy.deepcopy(branch)
    with torch.device("meta"):  # nothing is drawn
        dense = BranchCNN(branch.input_shape, branch.num_classes)
    weight = branch.head.weight
    return dense.to_empty(device=weight.device).to(weight.dtype)


def side_by_side(branch1: nn.Module, branch2: nn.Module) -> list[list[str]]:
    """Names of two branches' parameters, as parts `branch1` and `branch2` of a network, in groups from input to output."""
    groups: list[list[str]] = []
    for one, other in zip(_stages(branch1), _stages(branch2), strict=True):
        groups.append([f"branch1.{name}" for name in one] + [f"branch2.{name}" for name in other])
    return groups


def _stages(branch: nn.Module) -> list[list[str]]:
    own = getattr(branch, "stages", None)
    return own() if callable(own) else [[name] for name, _ in branch.named_parameters()]  # type: ignore[return-value]
