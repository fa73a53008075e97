"""What every contestant of the speed benchmark shares: the workload's file, the networks, and the conversation with run.py.

A contestant is a script in an environment of its own: `python peers/NAME.py WORKLOAD.npz [OPTION ...]`. It builds everything,
plays one round to warm up, and then plays a round for every line that it reads, so that run.py can interleave the contestants.
Needs numpy and torch, not fedtail.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

DEVICE = os.environ.get("SPEED_DEVICE", "cpu")  # what run.py --device says


class Workload(NamedTuple):
    """A federation and how it trains; the arrays are in the file that run.py writes."""

    x: np.ndarray[Any, Any]  # uint8 [examples, channels, height, width]
    y: np.ndarray[Any, Any]  # int64 [examples]
    owners: list[np.ndarray[Any, Any]]  # one int64 index array a client
    cohorts: np.ndarray[Any, Any]  # int64 [rounds, cohort]: who takes part; rounds beyond the last begin again
    model: str  # "lenet", "mlp", "resnet8" or "cnn"
    batch_size: int
    lr: float
    momentum: float

    def inputs(self) -> Tensor:
        """Returns all images as the network sees them: float32 in [-1, 1], on the device."""
        return torch.from_numpy(self.x).to(DEVICE).float().div_(127.5).sub_(1)

    def cohort(self, round: int) -> list[int]:
        """Returns who takes part in a round."""
        return self.cohorts[round % len(self.cohorts)].tolist()


def load(path: str | Path) -> Workload:
    """Reads a workload's file."""
    with np.load(path) as file:
        owners = np.split(file["members"], file["offsets"][1:-1])
        return Workload(file["x"], file["y"], owners, file["cohorts"], str(file["model"]), int(file["batch_size"]),
                        float(file["lr"]), float(file["momentum"]))  # fmt: skip


class CNN(nn.Sequential):
    """The network of pfl-research's CIFAR-10 benchmark, without its Dropout: two 3x3 convolutions, 128 hidden units."""

    def __init__(self, input_shape: tuple[int, ...] = (3, 32, 32), num_classes: int = 10):
        side = (input_shape[1] - 4) // 2
        super().__init__(
            nn.Conv2d(input_shape[0], 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * side * side, 128), nn.ReLU(), nn.Linear(128, num_classes),
        )  # fmt: skip


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, width)
        same = stride == 1 and before == width
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.GroupNorm(8, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, before, h, w] to [B, width, h / stride, w / stride]."""
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.short(x))


def network(workload: Workload) -> nn.Module:
    """Makes the workload's network on the device: as large as fedtail's lenet, mlp (200, 200), resnet8 with GroupNorm."""
    torch.manual_seed(0)
    return _network(workload).to(DEVICE)


def _network(workload: Workload) -> nn.Module:
    if workload.model == "cnn":
        return CNN(workload.x.shape[1:])
    channels, height, _ = workload.x.shape[1:]
    if workload.model == "mlp":
        sizes = [channels * height * height, 200, 200, 10]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if workload.model == "lenet":
        side = ((height - 4) // 2 - 4) // 2
        return nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * side * side, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU(), _Block(16, 16, 1), _Block(16, 32, 2),
        _Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def say(**fields: Any) -> None:
    """Writes a line for run.py; other output of a contestant does not begin with "@"."""
    print("@" + json.dumps(fields), file=sys.__stdout__, flush=True)


def play(workload: Workload, round_of: Callable[[int], None]) -> None:
    """Plays a round to warm up, then one for every line on the standard input, until it ends.

    Args:
        workload: for the number of samples in a round.
        round_of: plays round number i: local training of `workload.cohort(i)` and the mean.
    """
    for number in range(sys.maxsize):
        if number and not sys.__stdin__.readline().strip():
            return
        samples = sum(len(workload.owners[i]) for i in workload.cohort(number))
        start = time.perf_counter()
        round_of(number)
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        say(seconds=seconds, samples=samples)
