"""Engines: what they say when something fails, how they add, and which one is chosen."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from contract_problem import CLASSES, federated
from torch import Tensor, nn

from fedtail import SGD, EngineOptions, Experiment, FedAvg, FedGraB, LocalWork, Scaffold, trees
from fedtail.algorithm import Algorithm, Phase
from fedtail.data.federated import FederatedData
from fedtail.engines import make_engine
from fedtail.engines.base import Result, Sink
from fedtail.engines.choice import activation_bytes, choose, fitting, free_memory, padded_share
from fedtail.engines.loop import run_client
from fedtail.engines.processes import ALIGN, Block
from fedtail.errors import ConfigError, DataError, TrainingError
from fedtail.experiment import Federation
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import cross_entropy
from fedtail.models.layers import Network
from fedtail.models.specs import MLP, ModelSpec
from fedtail.optim import Adam
from fedtail.task import Variables, build_task

ENGINES = [EngineOptions(name="loop"), EngineOptions(name="parallel", workers=2), EngineOptions(name="vmap"),
           EngineOptions(name="processes", workers=2)]  # fmt: skip
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
SIZES = (6, 4, 8)


NETWORK = MLP(hidden=(4,))
WORK = LocalWork(epochs=1, batch_size=4)


def federation(algorithm, engine, data=None, model=NETWORK, work=WORK, **more):
    whole = Experiment(rounds=2, algorithm=algorithm, model=model, local=work, engine=engine, dtype="float64", **more)
    return Federation(whole, data if data is not None else federated(SIZES, images=False))


def step(*args, **kwargs):
    with contextlib.closing(federation(*args, **kwargs)) as running:
        record = running.step()
        return record, running.server


# Errors ---------------------------------------------------------------------------------------------------------------


def poisoned(client, value=float("nan")):
    """Data in which the second batch of one client (in order of indices) holds a bad number."""
    data = federated(SIZES, images=False)
    x = data.columns["x"].clone()
    x[int(data.owners[client][-1])] = value
    return dataclasses.replace(data, columns={**data.columns, "x": x})


@every_engine
def test_a_loss_that_is_not_a_number_names_client_round_step_and_remedy(engine):
    data = poisoned(client=2)
    with contextlib.closing(federation(FedAvg(), engine, data)) as running:
        plan = running.engine.setting.plans(running.context().round, 0, [2])[2]
        bad = int(np.flatnonzero(plan.order == data.owners[2][-1])[0]) // 4
        with pytest.raises(TrainingError) as found:
            running.step()
    message = str(found.value)
    assert message.startswith(f"The loss is nan on client 2 in round 0, at local step {bad}. ")
    assert "Lower algorithm.optimizer.lr, set algorithm.optimizer.clip" in message


@every_engine
def test_divergence_is_noticed(engine):
    with pytest.raises(TrainingError, match=r"client \d in round 0.*Lower algorithm.optimizer.lr"):
        step(FedAvg(optimizer=SGD(lr=1e200)), engine)


@dataclass(frozen=True, kw_only=True)
class Broken(Algorithm):
    """FedAvg that fails where it is told to."""

    where: str = ""

    def fail(self, name):
        if name == self.where:
            raise ValueError("deliberate")

    def constants(self, task, rng):
        self.fail("constants")
        return ()

    def init_server(self, ctx, rng):
        self.fail("init_server")
        return ctx.task.initial

    def init_client(self, ctx, message, rng):
        self.fail("init_client")
        return ()

    def predict(self, ctx, message, client, x):
        self.fail("predict")
        return ctx.task.apply(message, x, train=False)[0]

    def broadcast(self, ctx, server):
        self.fail("broadcast")
        return server

    def phases(self, index, rounds):
        return (Phase(reduce="collect" if self.where == "server_collect" else "mean"),)

    def local_init(self, ctx, message, client):
        self.fail("local_init")
        return start(self.optimizer, message)

    def local_step(self, ctx, message, client, local, batch):
        if self.where == "local_step" and len(batch.y) == 2:  # the short last batch of the client with 6 examples
            raise ValueError("deliberate")

        def objective(v, extra):
            risk, v = cross_entropy(ctx.task, v, batch)
            return risk, (v, extra, {"share": torch.log(0 * risk.detach())} if self.where == "metric" else {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx, message, client, local):
        self.fail("local_final")
        update = delta(message, local.variables)
        if self.where == "update":
            update = trees.tree_map(lambda t: t / 0, update)
        return update, client

    def weight(self, ctx):
        self.fail("weight")
        return ctx.here.examples * {"negative weight": -1.0, "infinite weight": float("inf")}.get(self.where, 1.0)

    def server_update(self, ctx, server, mean, total):
        self.fail("server_update")
        if self.where == "server":
            return trees.tree_map(lambda t: t / 0, server)
        return descend(server, mean)

    def server_collect(self, ctx, server, updates, weights):
        self.fail("server_collect")
        return server

    def advance(self, ctx, server, metrics):
        self.fail("advance")
        return 0, server

    def diagnostics(self, ctx, server):
        self.fail("diagnostics")
        return {}


ONE = federated((6,), images=False)


@pytest.mark.parametrize("engine", ENGINES[:2], ids=lambda e: e.name)
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("init_client", "init_client of"),
        ("local_init", "local_init of"),
        ("local_step", "local_step at step 1 of"),
        ("local_final", "local_final of"),
        ("weight", "of"),
    ],
)
def test_an_exception_on_a_client_names_client_stage_step_and_remedy(where, words, engine):
    with pytest.raises(TrainingError) as found:
        step(Broken(where=where), engine, ONE)
    message = str(found.value)
    assert message.startswith("Client 0 failed in ")
    assert f"{words} round 0: ValueError: deliberate" in message
    assert 'engine.name = "loop"' in message
    assert isinstance(found.value.__cause__, ValueError)


@pytest.mark.parametrize("where", ["local_init", "local_final", "weight"])
def test_an_exception_under_vmap_names_method_round_and_clients(where):
    with pytest.raises(
        TrainingError,
        match=r"Broken failed in the vmap engine in round 0 \(clients \[0, 2, 1\]\): ValueError: deliberate",
    ):
        step(Broken(where=where), ENGINES[2])


@every_engine
@pytest.mark.parametrize(
    "where",
    ["constants", "init_server", "broadcast", "server_update", "server_collect", "diagnostics", "predict", "advance"],
)
def test_an_exception_on_the_server_names_the_method(where, engine):

    def run():
        with contextlib.closing(federation(Broken(where=where), engine)) as running:
            running.advance(running.step() | running.score())

    with pytest.raises(TrainingError, match=f"^The algorithm failed in {where}: ValueError: deliberate") as found:
        run()
    assert isinstance(found.value.__cause__, ValueError)


@every_engine
def test_an_update_or_a_server_state_that_is_not_finite(engine):
    with pytest.raises(
        TrainingError, match=r"^The update of client \d in round 0 is not finite \(first in params/hidden1.0.weight\)"
    ):
        step(Broken(where="update"), engine)
    with pytest.raises(TrainingError, match=r"^The server state is not finite after round 0.*server_lr"):
        step(Broken(where="server"), engine)


@every_engine
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("negative weight", r"^The weight of client 0 in round 0 is -6; it must be finite and >= 0.*weight\(\)"),
        ("infinite weight", r"^The weight of client 0 in round 0 is inf; it must be finite and >= 0.*weight\(\)"),
        ("metric", r"^The metric 'share' of client 0 in round 0 is -inf at some local step.*local_step"),
    ],
)
def test_a_weight_or_a_metric_that_no_mean_can_take(where, message, engine):
    with pytest.raises(TrainingError, match=message):
        step(Broken(where=where), engine, ONE)


@dataclass(frozen=True, kw_only=True)
class Branching(FedAvg):
    """Breaks the rule that nothing may branch on a tensor's value."""

    def local_step(self, ctx, message, client, local, batch):
        factor = 2.0 if batch.x.sum() > 0 else 1.0

        def objective(v, extra):
            risk, v = cross_entropy(ctx.task, v, batch)
            return factor * risk, (v, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Guessing(FedAvg):
    """Draws its own random numbers."""

    def local_final(self, ctx, message, client, local):
        update = delta(message, local.variables)
        return trees.tree_map(lambda t: t + torch.rand_like(t), update), client


@pytest.mark.parametrize("algorithm", [Branching(), Guessing()], ids=lambda a: type(a).__name__)
def test_vmap_names_the_rule_that_was_broken(algorithm):
    with pytest.raises(TrainingError) as found:
        step(algorithm, ENGINES[2])
    message = str(found.value)
    assert message.startswith(f"{type(algorithm).__name__} failed in the vmap engine in round 0")
    assert "A method must not branch on a tensor's value, call .item() or draw random numbers of its own." in message
    assert 'engine.name = "loop"' in message


@every_engine
def test_a_forgotten_column_names_what_there_is(engine):
    @dataclass(frozen=True, kw_only=True)
    class Taught(FedAvg):
        columns = ("x", "y", "teacher")

    with pytest.raises(DataError, match=r"wants the column 'teacher'; the data have \['x', 'y'\]"):
        step(Taught(), engine)


class Normed(nn.Module):
    """BatchNorm on vectors: a batch of one has no statistics."""

    def __init__(self, width, classes):
        super().__init__()
        self.low, self.norm, self.head = nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.low(x)))


@dataclass(frozen=True, kw_only=True)
class NormedSpec(ModelSpec):
    """Normed as a model."""

    def build(self, input_shape, num_classes):
        return Normed(*input_shape, num_classes)


@every_engine
def test_batch_norm_and_a_batch_of_one(engine):
    """Clients of 5, 1 and 4 examples in batches of 4: two batches of one, left out with min_batch = 2, and client 1 too."""
    data = federated((5, 1, 4), images=False)
    with pytest.raises(TrainingError) as found:
        step(FedAvg(), engine, data, NormedSpec())
    assert "Expected more than 1 value per channel" in str(found.value)
    assert "local.min_batch = 2" in str(found.value)
    record, server = step(FedAvg(), engine, data, NormedSpec(), LocalWork(epochs=1, batch_size=4, min_batch=2))
    assert record["train"]["clients"] == 2
    assert trees.all_finite(server)
    assert int(server.buffers["norm.num_batches_tracked"]) == 1


def test_nobody_left_is_an_error_before_anything_runs():
    with pytest.raises(ConfigError, match=r"local.min_batch leave no client with a batch"):
        federation(FedAvg(), ENGINES[0], federated((1, 1), images=False), work=LocalWork(batch_size=4, min_batch=2))


# What every engine gives an algorithm ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curious(FedAvg):
    """Reports what it is told about a client, from every method that runs on one."""

    def init_client(self, ctx, message, rng):
        return {"index": ctx.here.index.to(ctx.task.dtype), "steps": ctx.here.steps * 1}

    def local_step(self, ctx, message, client, local, batch):
        local, metrics = FedAvg.local_step(self, ctx, message, client, local, batch)
        return local, {**metrics, "size": batch.size, "ones": batch.sum(torch.ones_like(batch.y, dtype=ctx.task.dtype))}

    def local_final(self, ctx, message, client, local):
        here = ctx.here
        told = {
            "index": here.index * 1.0,
            "examples": here.examples * 1,
            "counts": here.counts * 1,
            "steps": here.steps * 1,
        }
        return {"model": delta(message, local.variables), "told": told}, client

    def server_update(self, ctx, server, mean, total):
        return descend(server, mean["model"])


@every_engine
def test_what_an_algorithm_knows_of_a_client(engine):
    data = federated((9, 1, 0, 4), images=False)
    with contextlib.closing(federation(Curious(), engine, data)) as running:
        ctx = running.context(Phase(), 3)
        plans = running.engine.setting.plans(ctx.round, 0, [0, 1, 3])
        sink = Sink(list(plans), collect=True)
        running.engine.cohort(ctx.round, 0, running.server, {}, plans, sink)
    y = data.columns["y"]
    for update, number in zip(sink.updates, (0, 1, 3), strict=True):
        told = update["told"]
        assert int(told["index"]) == number
        assert int(told["examples"]) == len(data.owners[number])
        assert told["counts"].tolist() == torch.bincount(y[data.owners[number]], minlength=CLASSES).tolist()
        assert int(told["steps"]) == len(plans[number].lengths)
        assert {k: int(v) for k, v in sink.states[number].items()} == {
            "index": number,
            "steps": len(plans[number].lengths),
        }
    assert sink.weights == [9.0, 1.0, 4.0]
    # metrics: a client's are means over its steps, the cohort's are weighted by examples: sizes 4 4 1, 1 and 4
    assert float(sink.metrics()["size"]) == pytest.approx((9 * 3 + 1 * 1 + 4 * 4) / 14, abs=1e-12)
    assert float(sink.metrics()["ones"]) == pytest.approx((9 * 3 + 1 * 1 + 4 * 4) / 14, abs=1e-12)


@dataclass(frozen=True, kw_only=True)
class Remembering(FedAvg):
    """Keeps where it started in the very tensors that it steps with."""

    def local_init(self, ctx, message, client):
        own = {k: v * 1 for k, v in message.params.items()}
        return Local(Variables(own, message.buffers), self.optimizer.init(own), own)

    def local_final(self, ctx, message, client, local):
        here, first = local.variables, local.extra
        return Variables({k: here.params[k] - first[k] for k in first}, here.buffers), client


@dataclass(frozen=True, kw_only=True)
class Anchored(FedAvg):
    """Steps along what the server sent, and starts each step from it: message tensors as gradients and as parameters."""

    def local_step(self, ctx, message, client, local, batch):
        def objective(v, extra):
            risk, v = cross_entropy(ctx.task, v, batch)
            return risk, (v, extra, {})

        anchored = local._replace(variables=message)
        return sgd_step(ctx, anchored, objective, self.optimizer, correct=lambda grads: dict(message.params))


@pytest.mark.parametrize("algorithm", [Remembering, Anchored])
@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1, weight_decay=0.1), Adam(lr=0.1, clip=0.01)], ids=lambda o: type(o).__name__
)
def test_donation_never_shows(algorithm, optimizer):
    """Whatever tensors an algorithm reuses, updating in place gives the same bits and leaves the message alone."""
    results = []
    for donate in (False, True):
        with contextlib.closing(
            federation(algorithm(optimizer=optimizer), EngineOptions(name="loop", donate=donate))
        ) as running:
            before, message = trees.clone(running.server), running.server
            running.step()
            assert trees.equal(message, before)
            results.append(running.server)
    assert trees.equal(*results)


THREADS: list[int] = []  # intra-op threads seen by the methods of `Watching`


@dataclass(frozen=True, kw_only=True)
class Watching(FedAvg):
    """FedAvg that notes with how many threads torch would compute."""

    def constants(self, task, rng):
        THREADS.append(torch.get_num_threads())
        return ()

    def init_server(self, ctx, rng):
        THREADS.append(torch.get_num_threads())
        return ctx.task.initial

    def broadcast(self, ctx, server):
        THREADS.append(torch.get_num_threads())
        return server

    def local_final(self, ctx, message, client, local):
        THREADS.append(torch.get_num_threads())
        return delta(message, local.variables), client

    def server_update(self, ctx, server, mean, total):
        THREADS.append(torch.get_num_threads())
        return descend(server, mean)

    def server_step(self, ctx, server, batch):
        THREADS.append(torch.get_num_threads())
        return server, {}

    def advance(self, ctx, server, metrics):
        THREADS.append(torch.get_num_threads())
        return 0, server

    def diagnostics(self, ctx, server):
        THREADS.append(torch.get_num_threads())
        return {}


def machine():
    return torch.get_num_threads(), sys.getswitchinterval()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    THREADS.clear()
    return machine()


@every_engine
def test_everything_is_computed_with_one_thread(engine, two_threads):
    """Also the server's part, from the first round on: else a machine's cores, or resuming, could move a bit."""
    with contextlib.closing(federation(Watching(), engine)) as running:
        running.advance(running.step())
        running.score()
    assert len(THREADS) >= (5 if engine.name == "processes" else 10)  # the list of a forked worker stays with it
    assert set(THREADS) == {1}
    assert machine() == two_threads


@every_engine
def test_threads_are_given_back_whatever_happens(engine, two_threads):
    federation(FedAvg(), engine)  # never used, never closed
    assert machine() == two_threads
    with pytest.raises(TrainingError):
        federation(Broken(where="init_server"), engine)
    assert machine() == two_threads
    with pytest.raises(TrainingError):
        step(Broken(where="local_init"), engine)
    assert machine() == two_threads


@every_engine
def test_runs_may_overlap(engine, two_threads):
    """Two runs in turns: when the first one ends, the second goes on with one thread; in the end all are given back."""
    first, second = federation(Watching(), engine), federation(Watching(), engine)
    first.step()
    second.step()
    first.close()
    THREADS.clear()
    second.advance(second.step())
    assert set(THREADS) == {1}
    second.close()
    assert machine() == two_threads


@dataclass(frozen=True, kw_only=True)
class ServerTrained(FedAvg):
    """Steps on server data in training mode."""

    def server_step(self, ctx, server, batch):
        def function(params):
            risk, new = cross_entropy(ctx.task, Variables(params, server.buffers), batch)
            return risk, new.buffers

        value, buffers, grads = ctx.task.value_and_grad(function, server.params)
        params, _ = ctx.task.update(self.optimizer, grads, self.optimizer.init(server.params), server.params)
        return Variables(params, buffers), {"loss": value}


@every_engine
def test_server_data_come_with_the_masks_of_dropout_layers(engine):
    """What a client can do in training mode the server can do too."""
    found = [step(ServerTrained(), engine, model=MLP(hidden=(4,), dropout=0.5)) for _ in range(2)]
    assert found[0][0]["server"]["loss"] > 0
    assert trees.equal(found[0][1], found[1][1])


# The sink -------------------------------------------------------------------------------------------------------------


def result(client, weight, value, examples=1, **metrics):
    update = {"w": torch.full((2,), value, dtype=torch.float64), "n": torch.tensor(int(value))}
    return Result(client, update, weight, (), {k: torch.tensor(v) for k, v in metrics.items()}, examples)


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_client_that_drops_out_leaves_the_mean_of_the_others(when):
    """Weights 1 and 3, values 0 and 4: 3, whenever client 5 between them is given up; its weight is not in the total."""
    sink = Sink([2, 5, 9])
    steps = [lambda: sink.add(result(9, 3.0, 4.0)), lambda: sink.add(result(2, 1.0, 0.0))]
    steps.insert(when, lambda: sink.drop(5, "gone"))
    for do in steps:
        do()
    assert sink.mean()["w"].tolist() == [3.0, 3.0]
    assert (sink.total, sink.examples, [answer.client for answer in sink.answers]) == (4.0, 2, [2, 9])
    assert sink.facts() == {"dropped": {"5": "gone"}}
    assert Sink([0]).facts() == {}


def test_the_mean_by_hand():
    """Weights 1 and 3, values 0 and 4: 3, for floats and integers. Weights 1 and 1, values 0 and 3: 1.5, or the integer 2."""
    sink = Sink([0, 1])
    for r in (result(0, 1.0, 0.0), result(1, 3.0, 4.0)):
        sink.add(r)
    assert sink.mean()["w"].tolist() == [3, 3]
    assert sink.mean()["n"].dtype == torch.int64
    assert int(sink.mean()["n"]) == 3
    assert sink.total == 4
    sink = Sink([0, 1])
    for r in (result(0, 1.0, 0.0), result(1, 1.0, 3.0)):
        sink.add(r)
    assert sink.mean()["w"].tolist() == [1.5, 1.5]
    assert int(sink.mean()["n"]) == 2


def test_a_single_result_is_returned_as_it_is():
    """(600 u) / 600 is not u in floating point."""
    value = 0.1 + 0.2
    sink = Sink([4])
    sink.add(result(4, 600.0, value))
    assert sink.mean()["w"].tolist() == [value, value]


def test_results_wait_for_their_turn():
    rng = np.random.default_rng(0)
    ids = [2, 3, 5, 8, 13]
    results = [
        result(i, float(rng.uniform(1, 9)), float(rng.normal() * 10.0 ** rng.integers(-8, 8)), 2, loss=0.1 * i)
        for i in ids
    ]
    means = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        sink = Sink(ids[::-1])
        for k in order:
            sink.add(results[k])
        assert [answer.client for answer in sink.answers] == ids
        means.append((sink.mean(), sink.metrics()))
    assert trees.equal(means[0], means[1])
    assert trees.equal(means[0], means[2])
    inputs = [r.update["w"].clone() for r in results]
    assert all(torch.equal(r.update["w"], w) for r, w in zip(results, inputs, strict=True))


def test_collecting_keeps_every_update_in_ascending_order():
    sink = Sink([1, 2, 3], collect=True)
    for i in (3, 1, 2):
        sink.add(result(i, float(i), float(10 * i)))
    assert [float(u["w"][0]) for u in sink.updates] == [10, 20, 30]
    assert sink.weights == [1, 2, 3]


def test_adding_does_not_change_what_was_given():
    first, second = result(0, 2.0, 1.0), result(1, 2.0, 5.0)
    sink = Sink([0, 1])
    sink.add(first)
    sink.add(second)
    sink.mean()
    assert first.update["w"].tolist() == [1, 1]
    assert second.update["w"].tolist() == [5, 5]


# The choice -----------------------------------------------------------------------------------------------------------


def task_of(module, shape=(10,), classes=3):
    return build_task(lambda: module, classes, shape)


SMALL = nn.Linear(10, 3)
LARGE = nn.Sequential(nn.Linear(10, 5000), nn.Linear(5000, 3))  # 55,000 + 15,003 parameters
AT_LIMIT = nn.Sequential(nn.Linear(10, 3571), nn.Linear(3571, 3))  # 11 * 3,571 + 3 * 3,571 + 3 = 49,997
CONVOLUTION = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
HUGE = nn.Sequential(nn.Linear(10, 200_000), nn.Linear(200_000, 3))
LIGHT = "processes" if sys.platform == "linux" else "parallel"


@pytest.mark.parametrize(
    ("module", "shape", "cohort", "cores", "expected"),
    [
        (SMALL, (10,), 25, 2, "vmap"),
        (SMALL, (10,), 25, 1, "vmap"),
        (AT_LIMIT, (10,), 25, 2, "vmap"),
        (SMALL, (10,), 24, 2, LIGHT),
        (LARGE, (10,), 100, 2, LIGHT),
        (HUGE, (10,), 100, 2, "parallel"),
        (LARGE, (10,), 100, 1, "loop"),
        (CONVOLUTION, (1, 4, 4), 100, 8, LIGHT),
        (CONVOLUTION, (1, 4, 4), 1, 8, "loop"),
        (SMALL, (10,), 1, 8, "loop"),
        (SMALL, (10,), 24, 1, "loop"),
    ],
)
def test_the_rule_of_auto(module, shape, cohort, cores, expected, monkeypatch):
    monkeypatch.setattr("threading.active_count", lambda: 1)  # pytest may have threads of its own
    name, reason = choose(task_of(module, shape), cohort, cores)
    assert name == expected
    assert str(cohort) in reason


def test_auto_does_not_fork_beside_other_threads(monkeypatch):
    monkeypatch.setattr("threading.active_count", lambda: 2)
    assert choose(task_of(CONVOLUTION, (1, 4, 4)), 100, 2) == (
        "parallel", "100 clients a round on 2 cores, in a process with other threads")  # fmt: skip


def test_the_chunk_is_what_half_of_the_free_memory_holds():
    """Linear(10, 3): 33 parameters of 4 bytes, six copies each; its backward pass keeps an example's 10 inputs."""
    task = task_of(SMALL)
    parameters, kept = 4 * 33, 4 * 10
    assert activation_bytes(task) == kept
    each = 6 * parameters + 8 * kept
    assert fitting(task, 100, 8, 2 * 7 * each) == 7
    assert fitting(task, 100, 8, 2 * 7 * each - 1) == 6
    assert fitting(task, 100, 8, 1) == 1
    assert fitting(task, 20, 8, 1 << 40) == 20
    assert fitting(task, 100, 8, 1 << 40) == 32  # the most on a CPU
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


def test_the_share_of_padding_by_hand():
    """Chunks by steps: (4, 2) and (3,) compute 4 + 4, 2 rows and 3; with everyone together step 0 computes 4 + 4 + 4."""
    lengths = [np.array([3]), np.array([4, 2]), np.array([2])]
    assert padded_share(lengths, 3) == 1 - 11 / 14
    assert padded_share(lengths, 2) == 1 - 11 / 12
    assert padded_share(lengths, 1) == 0
    assert padded_share([], 4) == 0


def test_a_gpu_always_stacks():
    on_gpu = dataclasses.replace(task_of(SMALL), device=torch.device("cuda", 1))
    assert choose(on_gpu, 1, 1) == ("vmap", "the device is cuda:1")


def test_auto_is_resolved_in_the_runs_configuration():
    with contextlib.closing(federation(FedAvg(), EngineOptions(workers=1))) as running:
        assert running.experiment.engine.name == "loop"
        assert "3 client(s) a round on 1 core(s)" in running.reason
    with pytest.raises(ConfigError, match=r"engine\.name must be resolved"):
        make_engine(EngineOptions(), running.engine.setting)


def test_a_chunk_of_zero_is_resolved_in_the_runs_configuration():
    with contextlib.closing(federation(FedAvg(), EngineOptions(name="vmap"))) as running:
        assert running.experiment.engine.chunk == len(SIZES)


@pytest.mark.parametrize("options", [{"workers": -1}, {"chunk": -1}, {"states_mib": -1}])
def test_impossible_options(options):
    with pytest.raises(ConfigError, match="engine: workers, states_mib and chunk must be >= 0"):
        EngineOptions(**options)


def test_a_model_without_a_classifier_cannot_be_analysed():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(5, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    @dataclass(frozen=True, kw_only=True)
    class Spec(ModelSpec):
        def build(self, input_shape, num_classes):
            return Nothing()

    with pytest.raises(ConfigError, match=r"no linear layer with one output a class.*attribute `classifier`"):
        federation(FedGraB(), ENGINES[0], model=Spec())


def test_data_need_inputs_and_labels():
    x = torch.zeros(3, 2)
    with pytest.raises(DataError, match="column 'y' is missing"):
        FederatedData({"x": x}, [np.arange(3)], {"x": x, "y": torch.zeros(3)}, [np.arange(3)], 2)


# Other ways to compute the same ---------------------------------------------------------------------------------------


class Convolutions(Network):
    """A convolution and a head, for images of one channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def features(self, x):
        return torch.relu(self.conv(x)).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class ConvolutionSpec(ModelSpec):
    def build(self, input_shape, num_classes):
        return Convolutions()


def weights(server):
    return torch.cat([leaf.flatten() for leaf in trees.leaves(server)])


def server_after_a_step(engine, **more):
    data = federated(SIZES, images=True)
    whole = Experiment(rounds=2, algorithm=FedAvg(), model=ConvolutionSpec(), local=WORK, engine=engine, **more)
    with contextlib.closing(Federation(whole, data)) as running:
        before = weights(running.server)
        running.step()
        return before, weights(running.server)


@pytest.mark.parametrize("name", ["loop", "parallel"])
def test_channels_last_is_the_same_to_rounding(name):
    _, plain = server_after_a_step(EngineOptions(name=name), dtype="float64")
    _, other = server_after_a_step(EngineOptions(name=name, channels_last=True), dtype="float64")
    torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["loop", "parallel", "vmap"])
def test_autocast_is_near_and_other(name):
    """bfloat16 has 8 bits of mantissa: a step's change is right to about a hundredth, and the state stays float32."""
    before, plain = server_after_a_step(EngineOptions(name=name))
    _, other = server_after_a_step(EngineOptions(name=name), autocast=True)
    assert other.dtype == torch.float32
    assert 0 < float((other - plain).norm()) < 0.05 * float((plain - before).norm())


def test_autocast_leaves_float64_alone_and_is_refused_there():
    with pytest.raises(ConfigError, match="Set one of the two"):
        Experiment(autocast=True, dtype="float64")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler, about torch.jit
@pytest.mark.parametrize("name", ["loop", "vmap"])
def test_compiled_is_the_same_to_rounding(name):
    _, plain = server_after_a_step(EngineOptions(name=name), dtype="float64")
    _, other = server_after_a_step(EngineOptions(name=name, compile=True), dtype="float64")
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler, which is imported
def test_what_does_not_go_with_vmap_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.channels_last does not go with the engine vmap"):
        federation(FedAvg(), EngineOptions(name="vmap", channels_last=True))
    dropped = MLP(hidden=(4,), dropout=0.5)
    with pytest.raises(ConfigError, match=r"engine\.compile, with a model that has Dropout layers, does not go with"):
        federation(FedAvg(), EngineOptions(name="vmap", compile=True), model=dropped)


# Processes ------------------------------------------------------------------------------------------------------------

PROCESSES = EngineOptions(name="processes", workers=2)


def test_a_killed_worker_ends_the_run_with_a_clear_error_and_the_next_use_starts_new_ones():
    with contextlib.closing(federation(FedAvg(), PROCESSES)) as running:
        running.engine.open()
        for hand in running.engine._pool:
            hand.process.kill()
            hand.process.join()
        with pytest.raises(TrainingError, match="ended without an answer"):
            running.step()
        record = running.step()
    assert record["train"]["clients"] == len(SIZES)


def test_workers_end_with_their_engine():
    running = federation(FedAvg(), PROCESSES)
    running.step()
    workers = [hand.process for hand in running.engine._pool]
    assert all(process.is_alive() for process in workers)
    running.close()
    assert not any(process.is_alive() for process in workers)


def heavy(worker, item):
    """Enough work for MKL to keep memory for the thread."""
    for size in (8, 32, 7, 256):
        x = torch.randn(size, 3, 32, 32, requires_grad=True)
        nn.functional.conv2d(x, torch.ones(6, 3, 5, 5)).flatten(1).matmul(torch.ones(6 * 28 * 28, 120)).sum().backward()
    return threading.get_native_id()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("engine", [EngineOptions(name="parallel", workers=2), PROCESSES], ids=lambda e: e.name)
def test_a_closed_engine_leaves_no_thread_that_is_still_ending(engine):
    """A process forked while a thread of MKL ends waits for ever for a lock that nobody gives back."""
    running = federation(FedAvg(), engine)
    for _ in range(3):
        threads = set(running.engine.map_batches(heavy, range(8)))
        running.engine.close()
        assert not any(os.path.exists(f"/proc/self/task/{thread}") for thread in threads)


@pytest.mark.slow
def test_processes_fork_again_after_evaluation_threads_have_ended(monkeypatch):
    """Without the wait in `ParallelEngine.close` about every tenth worker never answers."""

    def rings(*_):
        raise AssertionError("A worker hangs.")

    monkeypatch.setattr("fedtail.engines.processes.run_client", lambda *args: heavy(None, 0) and run_client(*args))
    before = signal.signal(signal.SIGALRM, rings)
    signal.alarm(120)
    try:
        with contextlib.closing(federation(FedAvg(), PROCESSES)) as running:
            for _ in range(25):
                running.engine.map_batches(heavy, range(4))
                running.engine.close()
                running.step()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_block_keeps_what_fits_and_hands_on_the_rest():
    block = Block(2 * ALIGN)
    tree = {"a": torch.arange(3.0), "b": (torch.tensor(7), torch.ones(100, dtype=torch.float64)), "c": torch.zeros(0)}
    assert not block.fits(tree)
    laid = block.put(tree)
    assert isinstance(laid["b"][1], np.ndarray)
    assert trees.equal(block.get(laid), tree)
    view = block.get(laid, copy=False)["a"]
    assert view.data_ptr() % ALIGN == 0
    kept = block.get(laid)["a"]
    block.put({"a": torch.full((3,), 9.0)})
    assert view.tolist() == [9, 9, 9]
    assert kept.tolist() == [0, 1, 2]


def test_states_and_results_without_room_travel_all_the_same(monkeypatch):
    """Blocks of one page: everything but scalars goes through the pipe, and a second client waits where it might block."""
    with contextlib.closing(federation(Scaffold(), EngineOptions(name="loop"))) as running:
        for _ in range(2):
            running.advance(running.step())
        expected = running.server, dict(running.states)
    whole = Block.__init__
    monkeypatch.setattr(Block, "__init__", lambda self, size: whole(self, 64))
    monkeypatch.setattr("fedtail.engines.processes.AHEAD", 0)
    with contextlib.closing(federation(Scaffold(), PROCESSES)) as running:
        for _ in range(2):
            running.advance(running.step())
        assert trees.equal((running.server, dict(running.states)), expected)


def test_processes_need_a_cpu():
    running = federation(FedAvg(), EngineOptions(name="loop"))
    setting = running.engine.setting
    elsewhere = dataclasses.replace(setting, task=dataclasses.replace(setting.task, device=torch.device("meta")))
    with pytest.raises(ConfigError, match='device = "cpu"'):
        make_engine(PROCESSES, elsewhere)


def test_an_interrupt_of_the_whole_group_leaves_the_workers_to_their_parent():
    with contextlib.closing(federation(FedAvg(), PROCESSES)) as running:
        running.step()
        for hand in running.engine._pool:
            os.kill(hand.process.pid, signal.SIGINT)
        running.step()
        assert all(hand.process.is_alive() for hand in running.engine._pool)
