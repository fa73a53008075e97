"""The pair of generator and discriminator that generative methods are checked with: a user's own, loaded as one."""

import math

from torch import Tensor, nn

from fedtail.models.gan import with_label


class Pair(nn.Module):
    """A dense pair for features, a convolutional one with BatchNorm for images of 6 x 6.

    Args:
        input_shape: of an example.
        num_classes: C.
        dropout: of the discriminator's hidden layer.
        conditional: the class is told.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, dropout: float = 0.0, conditional: bool = False
    ) -> None:
        super().__init__()
        self.latent, self.conditional, self.classes = 3, conditional, num_classes
        more = num_classes if conditional else 0
        first, size = input_shape[0], math.prod(input_shape)
        if len(input_shape) == 1:
            leave_out = [nn.Dropout(dropout)] if dropout else []
            self.generator = nn.Sequential(nn.Linear(3 + more, 4), nn.Tanh(), nn.Linear(4, size))
            self.discriminator = nn.Sequential(nn.Linear(size + more, 4), nn.Tanh(), *leave_out, nn.Linear(4, 1))
            return
        # no bias before BatchNorm: its gradient would be rounding noise; maps of 9 pixels, so that a batch of one is possible
        self.generator = nn.Sequential(
            nn.Unflatten(1, (3 + more, 1, 1)), nn.ConvTranspose2d(3 + more, 3, 3, bias=False), nn.BatchNorm2d(3),
            nn.ReLU(), nn.ConvTranspose2d(3, first, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(first + more, 3, 4, 2, 1, bias=False), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 3),
            nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map examples to the discriminator's logits [B, 1]; a conditional pair is told no class here."""
        return self.discriminator(with_label(x, x.new_zeros(len(x), self.classes) if self.conditional else None))
