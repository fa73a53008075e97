"""Your own torch.nn.Module in a federation, by the name of its file.

python examples/own_model.py

In TOML:  model = { name = "own_model.py:SmallConv", options = { width = 16 } }
"""

import torch
from torch import Tensor, nn

import fedtail
from fedtail.models import UserModel


class SmallConv(nn.Module):
    """Two convolutions and a linear layer.

    fedtail passes those of `in_channels`, `input_shape` and `num_classes` that the signature asks for; `width` is an
    option. The linear layer named `head` with one output a class is found as the classifier; with another name, say so
    in an attribute: classifier = "final".
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, width: int = 8) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),  # no statistics to average; BatchNorm works too, with local.min_batch = 2
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.1),  # is replaced by a layer whose masks follow from the experiment's seed
        )
        self.head = nn.Linear(2 * width * (rows // 2) * (columns // 2), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [batch, channels, height, width] to logits [batch, classes]."""
        return self.head(self.body(x).flatten(1))


def main() -> None:
    """Trains the network with Fed-GraB, which reads its prior off the classifier."""
    experiment = fedtail.Experiment(
        rounds=6,
        algorithm=fedtail.FedGraB(optimizer=fedtail.SGD(lr=0.03, momentum=0.5, clip=5.0)),
        model=UserModel(target=f"{__file__}:SmallConv", options={"width": 16}),
        local=fedtail.LocalWork(epochs=2),
    )
    for result in fedtail.run(experiment, "runs/own-model"):
        print(f"round {result.index}: balanced accuracy {result.record['test']['balanced_accuracy']:.3f}")
    model = fedtail.load("runs/own-model")
    print(model)
    assert not model.training
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


if __name__ == "__main__":
    main()
