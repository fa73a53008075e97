"""fluke 0.8.1 (`fluke-fl`): its FedAVG with models in memory, 1 process, 1 thread; `fluke_.py WORKLOAD.npz`.

A round is `FedAVG.run(1, ...)`, weighted by examples. Clients are not persistent: each begins with the model that it
received and a new SGD with momentum. Batches are slices of shuffled tensors: fluke's FastDataLoader, which holds a
copy of the client's data.

What differs from the floor: every client of a round gets a copy of the model before the first one trains, clients
report their training loss, progress bars are kept. No evaluation. `finalize` is left out: `run` calls it at its end,
although told not to, and it sends the model to all clients that have taken part so far.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import serve
import torch

if torch.version.cuda is None and "+" not in version("torchvision"):
    # PyPI's torchvision is built for CUDA.
    # Without its operators, which are not needed, it imports if these are declared.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.server import Server

work = serve.load(sys.argv[1])
torch.set_num_threads(1)
FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)


class Cohorts(Server):
    """Draws the workload's cohorts instead of a random sample."""

    cohort: Sequence[int] = ()

    def get_eligible_clients(self, eligible_perc: float) -> list[Client]:
        """Returns who takes part."""
        return [self.clients[i] for i in self.cohort]


class Rounds(FedAVG):
    """FedAvg that can go on after `run`."""

    def get_server_class(self) -> type[Server]:
        """Returns the server with given cohorts."""
        return Cohorts

    def finalize(self) -> None:
        """Does nothing."""


def federation() -> Rounds:
    """Builds the clients and the server."""
    inputs, labels = work.inputs(), torch.from_numpy(work.y)
    loaders = [
        FastDataLoader(
            inputs[o], labels[o], num_labels=10, batch_size=work.batch_size, shuffle=True, skip_singleton=False
        )
        for o in map(torch.from_numpy, work.owners)
    ]
    data = DataSplitter(DummyDataContainer(loaders, [None] * len(loaders), None, num_classes=10))
    client = DDict(
        batch_size=work.batch_size,
        local_epochs=1,
        loss="CrossEntropyLoss",
        optimizer=DDict(name="SGD", lr=work.lr, momentum=work.momentum),
        scheduler=DDict(name="StepLR", step_size=1, gamma=1),
        persistency=False,
    )
    params = DDict(model=serve.network(work), client=client, server=DDict(weighted=True, lr=1.0))
    return Rounds(len(loaders), data, params)


fluke = federation()


def round_of(number: int) -> None:
    """Runs one round; the federation goes on where it stopped."""
    fluke.server.cohort = work.cohort(number)
    fluke.run(1, len(fluke.server.cohort) / fluke.n_clients, finalize=False)


serve.play(work, round_of)
