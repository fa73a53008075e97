"""The network of Flower's PyTorch quickstart, one epoch of SGD, and a node's own .npz file."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions and three linear layers; fedtail calls it lenet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to logits."""
        x = self.pool(F.relu(self.conv2(self.pool(F.relu(self.conv1(x))))))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def load(path: str, batch_size: int) -> DataLoader:
    """Reads a node's data, scaled to -1..1 as the quickstart does."""
    with np.load(path) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    return DataLoader(TensorDataset((x.float() / 255 - 0.5) / 0.5, y), batch_size=batch_size, shuffle=True)


def train(net: Net, loader: DataLoader, lr: float) -> float:
    """Trains one epoch; returns the mean loss."""
    optimizer, total = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.5), 0.0
    net.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
