"""Limits in which one method is another, or has an answer that can be worked out: the cheapest strong tests there are."""

import contextlib
import dataclasses
from dataclasses import dataclass

import contract_problem
import numpy as np
import pytest
import torch
from contract_problem import CLASSES, PROBLEMS, distance, federated, outcome
from torch.nn import functional as F

from fedtail import SGD, EngineOptions, Experiment, FedAvg, FedGraB, FedProx, LocalWork, Scaffold, trees
from fedtail.algorithms.feddyn import FedDyn
from fedtail.data.federated import FederatedData
from fedtail.experiment import Federation
from fedtail.local import delta
from fedtail.models.specs import MLP
from fedtail.task import Variables

PLAIN = SGD(lr=0.1, momentum=0.0)
ENGINES = [EngineOptions(name="loop"), EngineOptions(name="parallel", workers=2), EngineOptions(name="vmap")]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)


NETWORK = MLP(hidden=(5,))


def federation(algorithm, data, work, model=NETWORK, engine=ENGINES[0]):
    return Federation(
        Experiment(rounds=9, algorithm=algorithm, model=model, local=work, engine=engine, dtype="float64"), data
    )


def rounds(algorithm, data, work, count=3, **more):
    """Returns the initial variables, the server states and client states after each round, and the plans."""
    with contextlib.closing(federation(algorithm, data, work, **more)) as running:
        servers, states, plans = [], [], []
        for _ in range(count):
            here = running.context().round
            plans.append(running.engine.setting.plans(here, 0, running.draw(algorithm.phases(0, 1)[0])))
            running.advance(running.step())
            servers.append(running.server)
            states.append(dict(running.states))
        return running.task.initial, servers, states, plans


def batches(plan):
    return np.split(plan.order, np.cumsum(plan.lengths)[:-1])


def logits(p, x):
    return F.linear(F.relu(F.linear(x, p["hidden1.0.weight"], p["hidden1.0.bias"])), p["head.weight"], p["head.bias"])


def cross_entropy(p, x, y):
    return F.cross_entropy(logits(p, x), y)


def sigmoid_loss(p, x, y):
    """Binary cross-entropy of each class against the rest: summed over classes, averaged over the batch."""
    z = logits(p, x)
    target = torch.zeros_like(z)
    target[torch.arange(len(y)), y] = 1
    return -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z)).sum(1).mean()


def gradients(loss, params, x, y):
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss(leaves, x, y).backward()
    return {k: v.grad for k, v in leaves.items()}


def averaging(loss, start, data, plans, lr, momentum):
    """Federated averaging with momentum SGD, written out; returns the parameters after each round."""
    x, y = data.columns["x"], data.columns["y"]
    params, found = start, []
    for plan in plans:
        mean = {k: torch.zeros_like(v) for k, v in params.items()}
        total = sum(len(data.owners[k]) for k in plan)
        for k, own in plan.items():
            here, buffer = dict(params), {n: torch.zeros_like(v) for n, v in params.items()}
            for rows in batches(own):
                grads = gradients(loss, here, x[rows], y[rows])
                buffer = {n: momentum * b + grads[n] for n, b in buffer.items()}
                here = {n: v - lr * buffer[n] for n, v in here.items()}
            mean = {n: m + here[n] * (len(data.owners[k]) / total) for n, m in mean.items()}
        params = mean
        found.append(params)
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_fedprox_without_its_term_is_fedavg_exactly(name, monkeypatch):
    monkeypatch.setitem(contract_problem.CASES, "fedprox0", FedProx(mu=0.0, optimizer=SGD(lr=0.1, momentum=0.5)))
    avg, prox = outcome("fedavg", name), outcome("fedprox0", name)
    assert all(trees.equal(a, b) for a, b in zip(avg.servers, prox.servers, strict=True))
    assert avg.records == prox.records


@every_engine
def test_fedproxs_gradient_at_the_broadcast_model_is_that_of_the_cross_entropy(engine):
    """Protocol 7.1 item 8: one step, however strong the term, is FedAvg's; the second is not."""
    data = federated((6, 8), images=False)
    one, two = LocalWork(steps=1, batch_size=8), LocalWork(steps=2, batch_size=8)
    avg, prox = (
        rounds(a, data, one, 1, engine=engine)[1][0]
        for a in (FedAvg(optimizer=PLAIN), FedProx(optimizer=PLAIN, mu=9.0))
    )
    assert distance(avg, prox) <= 1e-15
    avg, prox = (
        rounds(a, data, two, 1, engine=engine)[1][0]
        for a in (FedAvg(optimizer=PLAIN), FedProx(optimizer=PLAIN, mu=9.0))
    )
    assert distance(avg, prox) > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffolds_first_round_is_fedavg_when_clients_are_equally_large(momentum):
    """All control variates are 0 in round 0, and eight examples each weigh like one each, exactly."""
    data, work = federated((8, 8, 8, 8), images=False), LocalWork(epochs=2, batch_size=3)
    optimizer = SGD(lr=0.1, momentum=momentum)
    avg = rounds(FedAvg(optimizer=optimizer), data, work, 2)[1]
    scaffold = rounds(Scaffold(optimizer=optimizer), data, work, 2)[1]
    assert trees.equal(scaffold[0].model, avg[0])
    assert distance(scaffold[1].model, avg[1]) > 1e-4  # from round 1 on they differ


def test_scaffolds_control_is_the_mean_raw_gradient_along_the_path():
    """Plain SGD: c_k+ = c_k - c + (w^t - w_k) / (tau eta) is the mean of the uncorrected gradients; rounds 0 to 2."""
    data, lr = federated((9, 1, 4, 7), images=False), 0.1
    start, servers, states, plans = rounds(Scaffold(optimizer=PLAIN), data, LocalWork(epochs=2, batch_size=4))
    x, y = data.columns["x"], data.columns["y"]
    zero = {k: torch.zeros_like(v) for k, v in start.params.items()}
    for t in range(3):
        model, control = (start.params, zero) if t == 0 else (servers[t - 1].model.params, servers[t - 1].control)
        for k, plan in plans[t].items():
            own = zero if t == 0 else states[t - 1][k]
            here, raw = dict(model), []
            for rows in batches(plan):
                raw.append(gradients(cross_entropy, here, x[rows], y[rows]))
                here = {n: v - lr * (raw[-1][n] - own[n] + control[n]) for n, v in here.items()}
            for n, value in states[t][k].items():
                mean = torch.stack([g[n] for g in raw]).mean(0)
                assert float((value - mean).norm() / mean.norm()) <= 1e-9, (t, k, n)


@every_engine
@pytest.mark.parametrize(
    "algorithm", [FedAvg(optimizer=PLAIN), FedProx(optimizer=PLAIN, mu=0.3)], ids=lambda a: type(a).__name__
)
def test_one_full_batch_from_everyone_is_centralised_descent(algorithm, engine):
    """sum_k n_k (mean gradient of k) / sum_k n_k is the gradient of the mean over all data."""
    data = federated((5, 9, 1, 7), images=False)
    start, servers, _, _ = rounds(algorithm, data, LocalWork(epochs=1, batch_size=9), engine=engine)
    params, rows = start.params, np.concatenate(data.owners)
    for server in servers:
        grads = gradients(cross_entropy, params, data.columns["x"][rows], data.columns["y"][rows])
        params = {k: v - 0.1 * grads[k] for k, v in params.items()}
        assert distance(server.params, params) <= 1e-12


@every_engine
def test_fedgrab_without_gains_is_averaging_of_binary_cross_entropy(engine):
    """u stays 0, both factors stay 1: what is left is federated averaging of the sigmoid loss, with or without a gate."""
    data, work = federated((9, 1, 4, 7), images=False), LocalWork(epochs=2, batch_size=4)
    for gate in ("none", "rank"):
        algorithm = FedGraB(optimizer=SGD(lr=0.1, momentum=0.5), kp=0.0, ki=0.0, kd=0.0, gate=gate, warm=1)
        start, servers, states, plans = rounds(algorithm, data, work, engine=engine)
        expected = averaging(sigmoid_loss, start.params, data, plans, 0.1, 0.5)
        for server, params in zip(servers, expected, strict=True):
            assert distance(server.model.params, params) <= 1e-12
        assert all(not bool(state.output.any()) for state in states[-1].values())


@every_engine
def test_fedavg_is_what_its_formula_says(engine):
    data, work = federated((9, 1, 4, 7), images=False), LocalWork(epochs=2, batch_size=4)
    start, servers, _, plans = rounds(FedAvg(optimizer=SGD(lr=0.1, momentum=0.5)), data, work, engine=engine)
    expected = averaging(cross_entropy, start.params, data, plans, 0.1, 0.5)
    for server, params in zip(servers, expected, strict=True):
        assert distance(server.params, params) <= 1e-12
    half = rounds(FedAvg(optimizer=SGD(lr=0.1, momentum=0.5), server_lr=0.5), data, work, 1, engine=engine)[1][0]
    middle = {k: (start.params[k] + expected[0][k]) / 2 for k in expected[0]}
    assert distance(half.params, middle) <= 1e-12


@dataclass(frozen=True, kw_only=True)
class Constants(FedAvg):
    """FedAvg whose clients end with every number equal to 0 (a single example) or 4."""

    def local_final(self, ctx, message, client, local):
        value = torch.where(ctx.here.examples == 1, 0.0, 4.0)
        constant = trees.tree_map(lambda t: (torch.ones_like(t) * value).to(t.dtype), local.variables)
        return delta(message, constant), client


@every_engine
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
def test_two_clients_of_one_and_three_examples_with_zero_and_four_give_three(sizes, engine):
    """Protocol 7.1 item 7: (1 * 0 + 3 * 4) / 4, BatchNorm statistics and integer buffers included, in either order."""
    model = PROBLEMS["batchnorm"].model
    data = federated(sizes, images=True)
    server = rounds(Constants(), data, LocalWork(epochs=1, batch_size=4), 1, model=model, engine=engine)[1][0]
    for name, value in trees.named_leaves(server).items():
        torch.testing.assert_close(value, torch.full_like(value, 3), rtol=0, atol=1e-14, msg=name)
    assert {v.dtype for v in server.buffers.values()} == {torch.float64, torch.int64}


def traffic(algorithm):
    """Bytes of a broadcast and of one client's update, in float32 with a network of 5 -> 6 -> 4."""
    data = federated((9, 4), images=False)
    data = dataclasses.replace(data, columns={**data.columns, "x": data.columns["x"].float()})
    whole = Experiment(rounds=2, algorithm=algorithm, model=MLP(hidden=(6,)), engine=ENGINES[0])
    with contextlib.closing(Federation(whole, data)) as running:
        from fedtail.engines.base import Sink

        ctx = running.context(cohort=1)
        message = algorithm.broadcast(ctx, running.server)
        sink = Sink([0])
        running.engine.cohort(ctx.round, 0, message, {}, running.engine.setting.plans(ctx.round, 0, [0]), sink)
        return trees.num_bytes(message), trees.num_bytes(sink.mean())


def test_bytes_of_a_round():
    """Protocol 7.1 item 9 and fedgrab.md 6.1 item 10: (5 + 1) 6 + (6 + 1) 4 = 64 floats; Fed-GraB sends C more down."""
    assert traffic(FedAvg()) == traffic(FedProx()) == (256, 256)
    assert traffic(FedGraB()) == (256 + 4 * CLASSES, 256)
    assert traffic(Scaffold()) == (512, 512)


def test_statistics_travel_too():
    """Protocol 7.1 item 7: no message or update leaves BatchNorm's buffers out."""
    for case in ("fedavg", "fedprox", "fedgrab-rank", "scaffold"):
        done = outcome(case, "batchnorm")
        model = contract_problem.model_of(done.servers[0])
        assert isinstance(model, Variables)
        assert model.buffers.keys() == done.initial.buffers.keys()
        assert len(model.buffers) == 6


@pytest.mark.parametrize("method", [FedAvg, Scaffold, FedDyn], ids=lambda method: method.__name__)
def test_a_client_that_holds_nothing_has_no_part(method):
    """Decision 6 of the protocol: an empty client changes nothing; the others keep their places."""
    data, work = federated((6, 0, 8), images=False), LocalWork(epochs=1, batch_size=4)
    without = FederatedData(data.columns, [data.owners[0], data.owners[2]], data.test, [np.arange(3)] * 2, CLASSES)
    whole = LocalWork(epochs=1, batch_size=8)  # one batch a client: its order does not matter
    full, same = (rounds(method(optimizer=PLAIN), d, whole, 3)[1] for d in (data, without))
    assert max(distance(a, b) for a, b in zip(full, same, strict=True)) <= 1e-15
    assert rounds(method(optimizer=PLAIN), data, work, 1)[3][0].keys() <= {0, 2}
