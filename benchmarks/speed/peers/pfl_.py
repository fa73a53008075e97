"""Apple's pfl-research 0.6.0: its FederatedAveraging on SimulatedBackend, 1 process, 1 thread; `pfl_.py WORKLOAD.npz`.

A round is one central iteration of `FederatedAveraging.run`, weighted by datapoints, with a central SGD of learning
rate 1. pfl makes a local SGD with momentum for each client. It reads batches in the order of the data, so they are
gathered in a shuffled order when the user is drawn, as pfl's own `from_slices` gathers them.

What differs from the floor: the mean is of differences to the weights sent, not of weights, and pfl prints its metrics
of every round. No evaluation, except in the warm-up round: pfl always evaluates in iteration 0.
"""

import sys
from collections import deque
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import serve
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import MetricValue, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

work = serve.load(sys.argv[1])
torch.set_num_threads(1)
inputs, labels, rng = work.inputs(), torch.from_numpy(work.y).to(serve.DEVICE), np.random.default_rng(0)


class Net(nn.Module):
    """The workload's network with the two methods that pfl asks for."""

    def __init__(self):
        super().__init__()
        self.net = serve.network(work)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns what local training minimizes."""
        return F.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, MetricValue]:
        """Returns what an evaluation reports."""
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


def user(client: int) -> PyTorchTensorDataset:
    """Gathers a client's data in a new order."""
    order = torch.from_numpy(rng.permutation(work.owners[client])).to(serve.DEVICE)
    return PyTorchTensorDataset((inputs[order], labels[order]), user_id=str(client))


net = Net()
drawn: deque[int] = deque()
users = FederatedDataset(user, drawn.popleft)
model = PyTorchModel(net, partial(torch.optim.SGD, momentum=work.momentum), torch.optim.SGD(net.parameters(), 1.0))
backend = SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()])
algorithm = FederatedAveraging()
train_params = NNTrainHyperParams(local_batch_size=work.batch_size, local_num_epochs=1, local_learning_rate=work.lr)
eval_params = NNEvalHyperParams(local_batch_size=None)


def round_of(number: int) -> None:
    """Runs one central iteration; the algorithm goes on where it stopped."""
    cohort = work.cohort(number)
    drawn.extend(cohort)
    params = NNAlgorithmParams(
        central_num_iterations=number + 1,
        evaluation_frequency=sys.maxsize,
        train_cohort_size=len(cohort),
        val_cohort_size=None,
    )
    algorithm.run(params, backend, model, train_params, eval_params)
    assert not drawn


serve.play(work, round_of)
