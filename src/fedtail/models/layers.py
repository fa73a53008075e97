"""What the networks are made of: their common form, the choice of the normalisation, and Dropout whose mask is data."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fedtail.errors import ConfigError, TrainingError
from fedtail.models.specs import Norm

# Layers that draw random numbers by themselves. nn.Dropout proper is not here: it has a replacement.
_RANDOM_LAYERS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)


class Network(nn.Module, ABC):
    """A classifier in two parts: features of an example, and a linear head on them.

    Every parameter belongs to a direct child of the network, and the children are registered from input to output,
    `head` last: so they are the network's stages.
    """

    classifier = "head"
    """Name of the linear layer that gives the logits."""

    head: nn.Linear
    """The classifier: weight [C, d], bias [C]."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Map examples [B, *input_shape] to features [B, d]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map examples [B, *input_shape] to logits [B, C]."""
        return self.head(self.features(x))

    def stages(self) -> list[list[str]]:
        """Names of all parameters (no buffers) in groups from input to output, the last one the head's."""
        groups = [[f"{name}.{key}" for key, _ in child.named_parameters()] for name, child in self.named_children()]
        return [group for group in groups if group]


def norm_layer(norm: Norm, channels: int, groups: int) -> nn.Module:
    """A normalisation of maps [B, channels, H, W].

    Args:
        norm: "batch" or "group".
        channels: Number of channels.
        groups: Number of groups of GroupNorm, a divisor of `channels`; BatchNorm has no use for it.

    Returns:
        The layer, with scale 1 and shift 0 for each channel.
    """
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)


class Dropout(nn.Module):
    """Leave each unit out with probability p; which ones is data, not a draw of the layer's own.

    In training mode the result is x * mask / (1 - p), so that its expectation is x; in evaluation mode it is x. The
    mask comes from (seed, round, client, step), hence every engine leaves out the same units. One mask serves one pass:
    a layer that a module calls twice in the same pass leaves out the same units both times, so give each place a layer
    of its own.

    Args:
        p: Probability of leaving a unit out, in [0, 1).

    Raises:
        ConfigError: p is outside its range.
    """

    mask: Tensor | None = None
    """Slot for the draw, of the input's shape: 1 keeps, 0 leaves out. Set before each pass in training mode."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"Dropout.p must be in [0, 1), got {p}.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mask to x of any shape.

        Raises:
            TrainingError: In training mode, and the slot is empty or holds a mask of another shape.
        """
        if not self.training:
            return x
        if self.mask is None:
            raise TrainingError(
                f"Dropout(p={self.p}) was called in training mode without a mask: its draw was forgotten. "
                "Set `mask` before each pass, or call the model in evaluation mode."
            )
        if self.mask.shape != x.shape:
            raise TrainingError(
                f"Dropout(p={self.p}) got a mask of shape {tuple(self.mask.shape)} "
                f"for an input of shape {tuple(x.shape)}. Draw one value per unit; "
                "a layer that is called at two places needs to be two layers."
            )
        return x * self.mask / (1 - self.p)

    def extra_repr(self) -> str:
        """The option, for `print(model)`."""
        return f"p={self.p}"


def replace_dropout(module: nn.Module) -> list[str]:
    """Put `Dropout` in the place of every `torch.nn.Dropout` of a module, in place.

    A layer that is registered under two names becomes two layers, as each call of torch's own draws anew.

    Args:
        module: Any module; it is changed.

    Returns:
        Names of the replaced layers, in the module's order.

    Raises:
        ConfigError: The module has another layer that draws random numbers by itself (nn.Dropout2d, nn.AlphaDropout,
            nn.RReLU, nn.MultiheadAttention or a recurrent layer with dropout > 0, ...), or is itself an nn.Dropout.
    """
    replaced: list[str] = []
    # A list, since the loop changes what it walks over; with duplicates, since a shared layer goes at each place.
    for name, _ in list(module.named_modules(remove_duplicate=False)):
        # Looked up now: below a shared parent the layer may have been replaced under another name.
        layer = module.get_submodule(name)
        if type(layer) is nn.Dropout and name:
            parent, _, child = name.rpartition(".")
            replacement = Dropout(layer.p)
            replacement.train(layer.training)
            setattr(module.get_submodule(parent), child, replacement)
            replaced.append(name)
        elif isinstance(layer, _RANDOM_LAYERS) or _own_dropout(layer) > 0:
            raise ConfigError(
                f"model: layer '{name}' ({type(layer).__name__}) draws its own random numbers, which no engine "
                "can repeat. Use nn.Dropout as a layer of its own (fedtail draws its masks), or leave the layer out."
            )
    return replaced


def _own_dropout(layer: nn.Module) -> float:
    """The dropout probability inside a layer that calls the function by itself; 0 for all other layers."""
    return layer.dropout if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) else 0.0
