"""Distillation at the server on ten Gaussian classes: what it must show with one class a client, and near IID.

Ten classes in 32 dimensions (means .55 N(0, I), unit noise, plus .3 tanh of the reversed coordinates); 6,000 training examples,
2,000 test, 500 for the server; 50 clients, 5 a round, 2 epochs of batch 32, SGD .1 clipped at 5; MLP 32-64-10; 40 rounds; 20
server steps at T = 4 of SGD .05, batch 128. The teacher is the same MLP trained on the pooled data. Means over the last 10
rounds and two seeds; each threshold is about half of what an independent implementation of the toy measured.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch import nn

from fedtail import SGD, Experiment, FedAvg, LocalWork, Participation
from fedtail.algorithms.server_distillation import ServerDistillation
from fedtail.data.federated import FederatedData
from fedtail.data.partition import ClassSpecific, DirichletEqualSize
from fedtail.experiment import Federation
from fedtail.models.specs import MLP

pytestmark = pytest.mark.slow
CLIENTS, ROUNDS, LAST, SEEDS = 50, 40, 10, (0, 1)
SPLITS = {
    "one class": ClassSpecific(clients=CLIENTS, classes_per_client=1),
    "iid": DirichletEqualSize(clients=CLIENTS, alpha=1.0),
}


@functools.cache
def problem(seed):
    """Inputs, labels, test set, and the pooled teacher's logits of all training inputs with its test accuracy."""
    rng = np.random.default_rng(seed)
    means = 0.55 * rng.standard_normal((10, 32))

    def draw(n):
        y = np.arange(n) % 10
        x = means[y] + rng.standard_normal((n, 32))
        return torch.from_numpy(x + 0.3 * np.tanh(x[:, ::-1].copy())).float(), torch.from_numpy(y)

    (x, y), test = draw(6500), draw(2000)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    solver = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(8):
        for rows in torch.randperm(6000).split(32):
            solver.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            solver.step()
    with torch.no_grad():
        return x, y, test, net(x), float((net(test[0]).argmax(1) == test[1]).double().mean())


@functools.cache
def course(method, split, server, seed):
    """Test accuracy after each round, and before the server's steps, [rounds, 2]."""
    x, y, test, t, _ = problem(seed)
    owners = SPLITS[split].split(y[:6000].numpy(), 10, np.random.default_rng(seed + 10))
    data = FederatedData(
        {"x": x, "y": y, "teacher": t}, owners, {"x": test[0], "y": test[1]}, [np.zeros(0, np.int64)] * CLIENTS, 10,
        server=np.arange(6000, 6000 + server),
    )  # fmt: skip
    options = dict(optimizer=SGD(lr=0.1, momentum=0.0, clip=5.0))
    taught = dict(temperature=4.0, server_steps=20, server_optimizer=SGD(lr=0.05, momentum=0.0), server_cosine=False)
    algorithm = {
        "fedavg": lambda: FedAvg(**options), "both": lambda: ServerDistillation(**options, **taught),
        "kd": lambda: ServerDistillation(**options, **taught, clients=False),
    }[method]()  # fmt: skip
    experiment = Experiment(
        seed=seed, rounds=ROUNDS, algorithm=algorithm, model=MLP(hidden=(64,)), local=LocalWork(epochs=2, batch_size=32),
        participation=Participation(clients=5),
    )  # fmt: skip
    found = []
    with contextlib.closing(Federation(experiment, data)) as running:
        for _ in range(ROUNDS):
            record = running.step()
            z = [accuracy(running, model, test) for model in models(running)]
            found.append(z)
            running.advance(record)
    return np.array(found)


def models(running):
    server = running.server
    return (server.model, server.before) if hasattr(server, "before") else (server, server)


def accuracy(running, model, test):
    with torch.no_grad():
        z = running.worker.apply(model, test[0], train=False)[0]
    return float((z.argmax(1) == test[1]).double().mean())


def mean(method, split, server=500, column=0):
    """The mean over seeds and the last rounds."""
    return float(np.mean([course(method, split, server, seed)[-LAST:, column].mean() for seed in SEEDS]))


def spread(method, split):
    return float(np.mean([course(method, split, 500, seed)[-LAST:, 0].std() for seed in SEEDS]))


def test_the_gain_over_fedavg_is_large_with_one_class_a_client_and_smaller_near_iid():
    gains = {split: mean("both", split) - mean("fedavg", split) for split in SPLITS}
    assert gains["one class"] > 0.04
    assert gains["iid"] < gains["one class"]


def test_with_little_server_data_both_together_beat_either():
    assert mean("both", "one class", 50) - max(mean("fedavg", "one class"), mean("kd", "one class", 50)) > 0.02


def test_the_servers_steps_help_and_the_teacher_is_the_bound():
    assert mean("both", "one class") > mean("both", "one class", column=1)
    assert mean("both", "one class") <= np.mean([problem(seed)[4] for seed in SEEDS]) + 0.01


def test_rounds_differ_less():
    assert spread("both", "one class") < 0.3 * spread("fedavg", "one class")
