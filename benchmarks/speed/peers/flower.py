"""Flower 1.41 in its own simulation: Ray, 2 actors of 1 thread each; `flower.py WORKLOAD.npz`.

A round is the training half of `Strategy.start`: `configure_train`, `send_and_receive`, `aggregate_train`, with FedAvg
weighted by examples. Client code follows Flower's PyTorch quickstart (message API), with SGD and momentum.
`run_simulation` is marked as deprecated in favour of `flwr run`, which starts the same runtime without our stdin.

What differs from the floor: two actors work side by side, and clients report their training loss. The message tells a
node which client it plays, because the server of a simulation does not know who holds which partition. In Flower's
favour an actor makes the network and the images once, not for each message, and Ray's workers keep a normal priority.
No evaluation, no telemetry. The warm-up round includes the start of Ray, which follows that of the ServerApp.
"""

import contextlib
import ctypes
import os
import sys
import time
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")

import serve
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

torch.set_num_threads(1)
client_app = ClientApp()
server_app = ServerApp()


@cache
def load(path: str) -> tuple[serve.Workload, TensorDataset, nn.Module]:
    """Returns what an actor keeps between messages."""
    work = serve.load(path)
    return work, TensorDataset(work.inputs(), torch.from_numpy(work.y)), serve.network(work)


@client_app.train()
def train(msg: Message, context: Context) -> Message:
    """Trains a client for one epoch."""
    config = msg.content["config"]
    work, data, model = load(config["workload"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = DataLoader(Subset(data, work.owners[config["client"]].tolist()), work.batch_size, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum)
    running_loss = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    metrics = MetricRecord({"train_loss": running_loss / len(loader), "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


class Cohorts(FedAvg):
    """FedAvg over the workload's cohorts instead of a random sample."""

    def __init__(self, path: str, work: serve.Workload, nodes: list[int]):
        super().__init__(fraction_evaluate=0.0)
        self.path, self.work, self.nodes = path, work, nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Addresses a message to each client of the cohort."""
        for client in self.work.cohort(server_round):
            told = ConfigRecord({**config, "server-round": server_round, "workload": self.path, "client": client})
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: told})
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=self.nodes[client])


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays rounds until the input ends."""
    path = os.path.abspath(sys.argv[1])
    work = serve.load(path)
    while len(nodes := sorted(grid.get_node_ids())) < len(work.owners):
        time.sleep(0.01)
    strategy = Cohorts(path, work, nodes)
    arrays = ArrayRecord(serve.network(work).state_dict())

    def round_of(number: int) -> None:
        nonlocal arrays
        replies = grid.send_and_receive(strategy.configure_train(number, arrays, ConfigRecord(), grid), timeout=3600)
        failed = [r.error.reason for r in replies if r.has_error()]
        if failed or len(replies) != len(work.cohort(number)):
            raise RuntimeError(f"{len(replies)} replies, {len(failed)} errors: {failed[:1]}")
        arrays, metrics = strategy.aggregate_train(number, replies)
        print(metrics)

    serve.play(work, round_of)


if __name__ == "__main__":
    import flower  # so that actors import this file by its name and keep what it caches

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: actors outlive Ray for seconds; wait for them at the end
    clients = len(serve.load(sys.argv[1]).owners)
    config = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": 2, "log_to_driver": False},
    }
    try:
        run_simulation(flower.server_app, flower.client_app, num_supernodes=clients, backend_config=config)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # the ServerApp's thread would wait for Ray
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
