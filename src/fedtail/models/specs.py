"""What a network is called and which options it has; free of torch, so that the command line answers at once.

A specification is a frozen dataclass whose fields are the options of one network. `build` makes the `torch.nn.Module`,
and only then imports torch. Layers draw their initial values from torch's global generator, as PyTorch's constructors
do: whoever builds a network seeds that generator, and puts its state back.

    name       parameters (3x32x32 and 10 classes unless stated)    features
    mlp        101,770 (28x28); hidden (200, 200): 199,210 (28x28)  last of hidden
    lenet      62,006; 44,426 (1x28x28)                             84
    resnet8    78,042                                               64
    resnet20   269,722                                              64
    resnet18   11,173,962                                           512
    resnet34   21,282,122                                           512
    resnet50   23,528,522                                           2,048
    branch_cnn 9,310; 6,930 (1x28x28)                               720; 500 (1x28x28)
    unified    19,622; 14,862 (1x28x28)                             32
    dcgan28    generator 759,680, discriminator 138,624 (1x28x28)   none: it makes images
    dcgan32    generator 1,068,928, discriminator 663,296           none: it makes images
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from fedtail.errors import ConfigError, did_you_mean
from fedtail.userfile import split_target

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["batch", "group"]
Stem = Literal["cifar", "imagenet"]


class ModelSpec(ABC):
    """The options of one network: a frozen, keyword-only dataclass."""

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network with fresh weights from torch's global generator.

        Args:
            input_shape: Shape of one example: (channels, height, width) for images, (features,) for tables.
            num_classes: C >= 1, the number of logits.

        Returns:
            A module from a float tensor [B, *input_shape] to logits [B, C], in training mode.

        Raises:
            ConfigError: The network cannot take such an input.
        """


def _check(model: str, input_shape: tuple[int, ...], num_classes: int, *, images: bool) -> None:
    """Refuse no classes, an input without axes or with an empty one, and, if `images`, another rank than 3."""
    if num_classes < 1:
        raise ConfigError(f"model {model}: num_classes must be in [1, inf), got {num_classes}.")
    if not input_shape or min(input_shape) < 1:
        raise ConfigError(f"model {model}: an example needs one axis or more, none of them empty, got {input_shape}.")
    if images and len(input_shape) != 3:
        raise ConfigError(
            f"model {model} needs images of shape (channels, height, width), got examples of shape {input_shape}. "
            "Use model mlp, which takes any shape."
        )


@dataclass(frozen=True, kw_only=True)
class MLP(ModelSpec):
    """Fully connected layers with ReLU between them on the flattened input (FedGA's network with the default width)."""

    hidden: tuple[int, ...] = (128,)
    """Width of each hidden layer, input to output, each >= 1; none at all is multinomial logistic regression."""

    dropout: float = 0.0
    """Probability, in [0, 1), with which a unit is left out after each hidden layer; at 0 there is no such layer."""

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"MLP.hidden must hold widths in [1, inf), got {self.hidden}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"MLP.dropout must be in [0, 1), got {self.dropout}.")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for inputs of any shape; see `ModelSpec.build`."""
        _check("mlp", input_shape, num_classes, images=False)
        from fedtail.models import small

        return small.MLP(input_shape, num_classes, self.hidden, self.dropout)


@dataclass(frozen=True, kw_only=True)
class LeNet(ModelSpec):
    """Two 5x5 convolutions (6 and 16 channels) and two hidden layers (120 and 84); images of 16 pixels or more."""

    padding: int = 0
    """Zeros around the image, pixels on each side, >= 0; 2 gives images of 28 pixels the 61,706 parameters of LeNet-5."""

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ConfigError(f"LeNet.padding must be in [0, inf), got {self.padding}.")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of at least 16 x 16 pixels; see `ModelSpec.build`."""
        _check("lenet", input_shape, num_classes, images=True)
        channels, height, width = input_shape
        if min(height, width) + 2 * self.padding < 16:
            raise ConfigError(
                f"model lenet needs images of at least 16 x 16 pixels, got {height} x {width}. "
                "Use model mlp, which takes any size."
            )
        from fedtail.models import small

        return small.LeNet((channels, height, width), num_classes, self.padding)


@dataclass(frozen=True, kw_only=True)
class _ResNet(ModelSpec):
    """What all residual networks share: the choice of the normalisation."""

    norm: Norm = "batch"
    """Normalisation: "batch" (BatchNorm, whose statistics travel with the model) or "group" (GroupNorm, has none)."""

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError(f"{type(self).__name__}.norm must be 'batch' or 'group', got {self.norm!r}.")

    def _channels(self, input_shape: tuple[int, ...], num_classes: int) -> int:
        """Check the input and give its number of channels."""
        _check(type(self).__name__.lower(), input_shape, num_classes, images=True)
        return input_shape[0]


@dataclass(frozen=True, kw_only=True)
class _StemResNet(_ResNet):
    """What the residual networks from 18 layers on share: the choice of the first layers."""

    stem: Stem = "cifar"
    """First layers: "cifar" (3x3, for small images) or "imagenet" (7x7 with stride 2 and max-pool, for large ones)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem not in get_args(Stem):
            raise ConfigError(f"{type(self).__name__}.stem must be 'cifar' or 'imagenet', got {self.stem!r}.")


@dataclass(frozen=True, kw_only=True)
class ResNet8(_ResNet):
    """CIFAR ResNet of 16-32-64 channels, one basic block a stage, 1x1 shortcuts; GroupNorm has 8 groups."""

    norm: Norm = "group"
    """Normalisation: "group" (GroupNorm of 8 groups, has no statistics) or "batch" (BatchNorm)."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of any size; see `ModelSpec.build`."""
        channels = self._channels(input_shape, num_classes)
        from fedtail.models.resnet import resnet8

        return resnet8(channels, num_classes, self.norm)


@dataclass(frozen=True, kw_only=True)
class ResNet20(_ResNet):
    """CIFAR ResNet of 16-32-64 channels, three basic blocks a stage, parameter-free shortcuts; FedGA's."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of any size; see `ModelSpec.build`."""
        channels = self._channels(input_shape, num_classes)
        from fedtail.models.resnet import resnet20

        return resnet20(channels, num_classes, self.norm)


@dataclass(frozen=True, kw_only=True)
class ResNet18(_StemResNet):
    """CIFAR ResNet of 64-128-256-512 channels with 2-2-2-2 basic blocks; the long-tail protocol's for CIFAR-10."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of any size; see `ModelSpec.build`."""
        channels = self._channels(input_shape, num_classes)
        from fedtail.models.resnet import resnet18

        return resnet18(channels, num_classes, self.norm, self.stem)


@dataclass(frozen=True, kw_only=True)
class ResNet34(_StemResNet):
    """CIFAR ResNet of 64-128-256-512 channels with 3-4-6-3 basic blocks; the long-tail protocol's for CIFAR-100."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of any size; see `ModelSpec.build`."""
        channels = self._channels(input_shape, num_classes)
        from fedtail.models.resnet import resnet34

        return resnet34(channels, num_classes, self.norm, self.stem)


@dataclass(frozen=True, kw_only=True)
class ResNet50(_StemResNet):
    """ImageNet ResNet with 3-4-6-3 bottlenecks, 2,048 features; the long-tail protocol's for large images."""

    stem: Stem = "imagenet"
    """First layers: "imagenet" (7x7 with stride 2 and max-pool, for large images) or "cifar" (3x3, for small ones)."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of any size; see `ModelSpec.build`."""
        channels = self._channels(input_shape, num_classes)
        from fedtail.models.resnet import resnet50

        return resnet50(channels, num_classes, self.norm, self.stem)


@dataclass(frozen=True, kw_only=True)
class _DCGAN(ModelSpec):
    """What the adversarial pairs share."""

    doublings: ClassVar[int]  # from the generator's first map to the image

    width: int = 64
    """Channels of the discriminator's first layer, >= 1; each further one has twice as many. 32 is half width."""

    latent: int = 100
    """Number of latents, >= 1; 64 goes with half width."""

    norm: Norm = "batch"
    """Normalisation: "batch" (BatchNorm, whose statistics travel with the model) or "group" (GroupNorm, has none)."""

    conditional: bool = False
    """Both networks are told the class, by learned embeddings."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.latent < 1:
            raise ConfigError(f"{type(self).__name__}: width and latent must be >= 1, got {self.width}, {self.latent}.")
        if self.norm not in get_args(Norm):
            raise ConfigError(f"{type(self).__name__}.norm must be 'batch' or 'group', got {self.norm!r}.")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the pair for images whose sides are multiples of 4 (dcgan28) or 8 (dcgan32); see `ModelSpec.build`."""
        name, step = type(self).__name__.lower(), 2**self.doublings
        _check(name, input_shape, num_classes, images=True)
        channels, height, width = input_shape
        if height % step or width % step:
            raise ConfigError(f"model {name} needs images whose height and width are multiples of {step}, got {height} x "
                              f"{width}. Use dcgan28 for multiples of 4, or resize them (data.image_size).")  # fmt: skip
        from fedtail.models.gan import DCGAN

        maps = tuple(self.width << i for i in range(self.doublings))
        return DCGAN((channels, height, width), num_classes if self.conditional else 0, self.latent, maps, self.norm)


@dataclass(frozen=True, kw_only=True)
class DCGAN28(_DCGAN):
    """Generator and discriminator with two strided layers each, for MNIST and Fashion-MNIST (DCGAN, ICLR 2016)."""

    doublings: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class DCGAN32(_DCGAN):
    """Generator and discriminator with three strided layers each, for CIFAR-10 and SVHN (DCGAN, ICLR 2016)."""

    doublings: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class BranchCNN(ModelSpec):
    """Two 3x3 convolutions (10 and 20 channels) and a classifier; one branch of `unified`, for images of 10 pixels or more."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for images of at least 10 x 10 pixels; see `ModelSpec.build`."""
        _check("branch_cnn", input_shape, num_classes, images=True)
        channels, height, width = input_shape
        if min(height, width) < 10:
            raise ConfigError(
                f"model branch_cnn needs images of at least 10 x 10 pixels, got {height} x {width}. "
                "Use model mlp, which takes any size."
            )
        from fedtail.models import branches

        return branches.BranchCNN((channels, height, width), num_classes)


@dataclass(frozen=True, kw_only=True)
class Unified(ModelSpec):
    """Two branches on one input and a small head over their scores (the two-stage lightweight CNN)."""

    branch: ModelSpec = BranchCNN()
    """The network that both branches are."""

    width: int = 32
    """Units of the hidden layer, >= 1; 32 is the paper's."""

    dropout: float = 0.5
    """Probability, in [0, 1), with which one is left out; at 0 there is no such layer; 0.5 is the paper's."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"Unified.width must be in [1, inf), got {self.width}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"Unified.dropout must be in [0, 1), got {self.dropout}.")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network for whatever inputs its branch takes; see `ModelSpec.build`."""
        from fedtail.models import branches

        one, other = (self.branch.build(input_shape, num_classes) for _ in range(2))
        return branches.Unified(one, other, num_classes, self.width, self.dropout)


@dataclass(frozen=True, kw_only=True)
class UserModel(ModelSpec):
    """A network of your own: a class derived from torch.nn.Module, or a function that returns a module."""

    target: str
    """Where it is, as "file.py:Name"; the path is relative to the working directory."""

    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further keyword arguments for it, by name."""

    def __post_init__(self) -> None:
        split_target(self.target)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the network; see `ModelSpec.build` and `fedtail.models.user.load_model`."""
        _check(self.target, input_shape, num_classes, images=False)
        from fedtail.models.user import load_model

        return load_model(self.target, input_shape, num_classes, self.options)


MODELS: dict[str, type[ModelSpec]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "resnet8": ResNet8,
    "resnet20": ResNet20,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "branch_cnn": BranchCNN,
    "unified": Unified,
    "dcgan28": DCGAN28,
    "dcgan32": DCGAN32,
}
"""The networks by name; a network of the user's own has a `UserModel` instead of a name."""


def model_spec(name: str) -> ModelSpec:
    """The specification of a network with its default options.

    Args:
        name: A key of `MODELS`, or "file.py:Name" for a network of the user's own.

    Returns:
        The specification; `dataclasses.replace` changes its options.

    Raises:
        ConfigError: There is no such name; the message names the nearest one.

    >>> model_spec("resnet8")
    ResNet8(norm='group')
    >>> model_spec("nets.py:Wide")
    UserModel(target='nets.py:Wide', options={})
    """
    if name in MODELS:
        return MODELS[name]()
    if ":" in name or name.endswith(".py"):
        return UserModel(target=name)
    raise ConfigError(
        f"unknown model '{name}'{did_you_mean(name, MODELS)} "
        f"Known are {', '.join(MODELS)}, and 'file.py:Name' for a network of your own."
    )
