"""The two-stage lightweight CNN: against a plain PyTorch loop, its traffic, its frozen groups, its stages, its limits."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedtail
from fedtail import stopping, trees
from fedtail.affine import Affine
from fedtail.algorithm import Context
from fedtail.algorithms.fedavg import FedAvg
from fedtail.algorithms.fedgrab import FedGraB
from fedtail.algorithms.lightweight import Lightweight, Server, Verdict
from fedtail.config import Data, Experiment, Participation
from fedtail.data.federated import FederatedData
from fedtail.data.longtail import NoTail
from fedtail.data.partition import IID
from fedtail.data.plan import LocalWork
from fedtail.engines import EngineOptions
from fedtail.engines.loop import iterate
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.federation import federate
from fedtail.losses import BalancedSoftmax
from fedtail.models import MLP, Unified
from fedtail.optim import SGD, Adam, Nadam
from fedtail.task import Variables

STILL = Affine(rotate=0.0, zoom=0.0, shift=0.0)


def images(sizes, shape=(1, 10, 10), classes=4, held=2, seed=3):
    """Images of clients with so many training examples, each with some more for validation."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *(n + held for n in sizes)])
    y = rng.integers(0, classes, ends[-1] + 12)
    x = (rng.integers(0, 120, (len(y), *shape)) + 30 * y[:, None, None, None]).astype(np.uint8)
    rows = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    tensors = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    test = {k: v[ends[-1] :] for k, v in tensors.items()}
    return FederatedData(
        {k: v[: ends[-1]] for k, v in tensors.items()}, [r[held:] for r in rows], test,
        [np.arange(12)] * len(sizes), classes, held=[r[:held] for r in rows],
    )  # fmt: skip


def federation(algorithm, data, *, batch=4, epochs=1, rounds=30, dropout=0.5, dtype="float64", engine="loop", **more):
    whole = Experiment(
        rounds=rounds, algorithm=algorithm, model=Unified(dropout=dropout), dtype=dtype,
        local=LocalWork(epochs=epochs, batch_size=batch), engine=EngineOptions(name=engine), **more,
    )  # fmt: skip
    return contextlib.closing(Federation(whole, data))


def go(running):
    record = running.step()
    state = running.server
    running.advance(record)
    return state, record


# Against a plain loop -------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """The paper's branch, from torch's layers; its classifier dense or a convolution."""

    def __init__(self, classes, dense):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 20, 3)
        self.head = nn.Linear(20, classes) if dense else nn.Conv2d(20, classes, 1)
        self.dense = dense

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1)) if self.dense else self.head(x).flatten(1)


class Plain(nn.Module):
    def __init__(self, classes, dense):
        super().__init__()
        self.branch1, self.branch2 = Branch(classes, dense), Branch(classes, dense)
        if not dense:
            self.hidden, self.head = nn.Linear(2 * classes, 32), nn.Linear(32, classes)

    def forward(self, x, mask):
        h = torch.cat([torch.relu(self.branch1(x)), torch.relu(self.branch2(x))], 1)
        return self.head(torch.relu(self.hidden(h)) * mask * 2)  # dropout 0.5


def sgd_of_keras(params, buffers):
    with torch.no_grad():
        for p, buffer in zip(params, buffers, strict=True):
            p.mul_(1 - 0.001 * 1e-4)
            buffer.mul_(0.9).add_(p.grad)
            p.sub_(0.001 * (p.grad + 0.9 * buffer))


def test_one_client_with_averaged_moments_is_centralised_training():
    """Three parts of two rounds each, batch by batch: torch's modules, autograd and NAdam over the same batches."""
    algorithm = Lightweight(moments="averaged", dual_rounds=2, unfreeze_rounds=(2,), final_rounds=2)
    with federation(algorithm, images([22]), batch=5) as running:
        plain = Plain(4, dense=True).double()
        plain.load_state_dict(running.server.model.params)
        optimizer = torch.optim.NAdam(plain.parameters(), lr=0.001, eps=1e-7, momentum_decay=1.0)
        for number in range(6):
            setting = running.engine.setting
            plan = setting.plans(running.context().round, 0, [0])[0]
            if number == 2:
                frozen = [k for k in running.server.model.params if not k.startswith("head.")]
                plain = Plain(4, dense=False).double()
                plain.load_state_dict(running.server.model.params)
                optimizer = torch.optim.NAdam(plain.head.parameters(), lr=0.001, eps=1e-7, momentum_decay=1.0)
            if number == 4:
                plain.load_state_dict(running.server.model.params)  # the best round's
                buffers = [torch.zeros_like(p) for p in plain.parameters()]
            before = trees.clone(running.server.model.params)
            for batch in iterate(setting, plan):
                if number < 2:
                    copies = algorithm.augment(batch.x, batch.draws["affine"])
                    loss = F.cross_entropy(plain.branch1(batch.x), batch.y) + F.cross_entropy(
                        plain.branch2(copies), batch.y
                    )
                else:
                    loss = F.cross_entropy(plain(batch.x, batch.draws["dropout:dropout"]), batch.y)
                plain.zero_grad()
                loss.backward()
                sgd_of_keras(list(plain.parameters()), buffers) if number >= 4 else optimizer.step()
            state, _ = go(running)
            for k, v in plain.state_dict().items():
                torch.testing.assert_close(state.model.params[k], v, rtol=0, atol=1e-10, msg=f"{k} in round {number}")
            if number in (2, 3):
                assert all(torch.equal(state.model.params[k], before[k]) for k in frozen)


def test_a_full_batch_step_is_the_centralised_one_for_any_partition():
    """Plain gradient descent, one step: sum_k n_k/n w_k is the step on all data together."""
    algorithm = Lightweight(optimizer=SGD(lr=0.1, momentum=0.0), augment=STILL, dual_rounds=1)
    found = []
    for sizes in ([12], [1, 4, 7], [6, 6]):
        data = images([12], held=3)
        rows = np.split(data.owners[0], np.cumsum(sizes)[:-1])
        held = [data.held[0]] * len(sizes)
        data = dataclasses.replace(data, owners=rows, held=held, local_tests=[np.arange(12)] * len(sizes))
        with federation(algorithm, data, batch=12, dropout=0.0) as running:
            found.append(go(running)[0].model)
            second, _ = go(running)  # the head alone
            found.append(second.model)
    for k in (2, 4):
        for now, first in zip(found[k : k + 2], found[:2], strict=True):
            for name, v in now.params.items():
                torch.testing.assert_close(v, first.params[name], rtol=0, atol=1e-12)


def test_the_branches_share_nothing():
    """Branch 1's trajectory does not depend on what branch 2 sees."""
    ends = []
    for augment in (Affine(), STILL):
        with federation(Lightweight(augment=augment), images([9, 6])) as running:
            go(running)
            ends.append(go(running)[0].model.params)
    for k in ends[0]:
        assert torch.equal(ends[0][k], ends[1][k]) == k.startswith("branch1."), k


def test_the_last_part_is_fedavg_of_the_unified_network():
    """The limit: from the same model and round on, with the same optimizer, FedAvg (which adds changes) to rounding."""
    algorithm = Lightweight(dual_rounds=1, unfreeze_rounds=(), loss=BalancedSoftmax())
    with federation(algorithm, images([9, 6])) as running:
        go(running)
        with federation(FedAvg(optimizer=algorithm.final, loss=BalancedSoftmax()), images([9, 6])) as other:
            other.server, other.round = running.server.model, running.round
            for _ in range(2):
                mine, theirs = go(running)[0].model, go(other)[0]
                for k, v in theirs.params.items():
                    torch.testing.assert_close(mine.params[k], v, rtol=0, atol=1e-12)


# Frozen groups and traffic --------------------------------------------------------------------------------------------


def test_frozen_groups_stay_to_the_bit():
    """Also with weight decay in the optimizer, and on every client."""
    algorithm = Lightweight(optimizer=Adam(lr=0.01, weight_decay=0.1, decoupled=True), dual_rounds=1,
                            unfreeze_rounds=(1, 1, 1, 1))  # fmt: skip
    with federation(algorithm, images([9, 6, 5]), dtype="float32") as running:
        go(running)
        groups = running.engine.setting.task.stages
        for open_groups in (1, 2, 3, 4, 5):
            before = trees.clone(running.server.model.params)
            state, _ = go(running)
            moved = {k for k, v in state.model.params.items() if not torch.equal(v, before[k])}
            assert moved == {k for group in groups[-open_groups:] for k in group}


@pytest.mark.parametrize(
    ("shape", "dual", "rows"),
    [
        ((1, 28, 28), 55_440, [1_320, 4_008, 44_088, 58_648, 59_448]),
        ((3, 32, 32), 74_480, [1_320, 4_008, 61_688, 76_248, 78_488]),
    ],
)
def test_traffic_is_what_trains(shape, dual, rows):
    """Bytes a client and direction, clients holding the model; the whole model travels when it is new."""
    algorithm = Lightweight(dual_rounds=2, unfreeze_rounds=(2, 2, 2, 2), final_rounds=2)
    clients, sizes, cumulative = 2, [dual, *rows], 0
    with federation(algorithm, images([2, 2], shape, 10, held=1), dtype="float32") as running:
        for part, size in enumerate(sizes):
            verdict = 12 if part == 0 else 8  # right answers of each branch, and examples
            for first in (True, False):
                found = go(running)[1]["bytes"]
                new = (dual, rows[-1])[part] if part < 2 else size  # restored: what had been trained, and more
                assert found["down"] == clients * (size + (new if first else 0))
                assert found["up"] == clients * (size + verdict)
                cumulative += found["down"]
                assert found["cumulative_down"] == cumulative
        last = go(running)[1]["bytes"]
        assert (last["down"], last["up"]) == (0, 0)


def test_traffic_of_ten_rounds_and_of_a_full_exchange():
    """Parts of 2, 3, 3, 2 rounds: 264,224 bytes a client and direction against 594,480."""
    sizes, rounds = (1_320, 4_008, 44_088, 58_648), (2, 3, 3, 2)
    assert sum(s * r for s, r in zip(sizes, rounds, strict=True)) == 264_224
    with federation(Lightweight(dual_rounds=1), images([2, 2], (1, 28, 28), 10, held=1), dtype="float32") as running:
        go(running)
        up = sum(go(running)[1]["bytes"]["up"] for _ in range(10))
    assert up == 2 * (264_224 + 10 * 8)


def test_a_sampled_cohort_gets_the_whole_model_and_averaged_moments_are_counted():
    sampled = Participation(clients=1)
    data = images([3, 3], (1, 28, 28), 10, held=1)
    with federation(Lightweight(dual_rounds=1), data, dtype="float32", participation=sampled) as running:
        assert go(running)[1]["bytes"]["down"] == 2 * 55_440
        for _ in range(2):
            assert go(running)[1]["bytes"]["down"] == 59_448 + 1_320
    moments = Lightweight(dual_rounds=1, moments="averaged")
    with federation(moments, data, dtype="float32") as running:
        go(running)
        go(running)
        found = go(running)[1]["bytes"]
        assert found["up"] == 2 * (3 * 1_320 + 8 + 8)  # two moments, step and product
        assert found["down"] == 2 * (3 * 1_320 + 8)


def test_bytes_of_fedavg_are_model_and_change():
    whole = Experiment(rounds=2, model=MLP(hidden=(8,)), engine=EngineOptions(name="loop"))
    with contextlib.closing(Federation(whole)) as running:
        size = trees.num_bytes(running.task.initial)
        for number in (1, 2):
            record = running.step()
            running.advance(record)
            clients = record["train"]["clients"]
            assert record["bytes"] == {"down": clients * size, "up": clients * size,
                                       "cumulative_down": number * clients * size,
                                       "cumulative_up": number * clients * size}  # fmt: skip


# Stages ---------------------------------------------------------------------------------------------------------------


def test_parts_of_the_schedules():
    def said(algorithm):
        return [(p.groups, p.rounds, p.patience, type(p.optimizer).__name__) for p in algorithm.parts()]

    ladder = [(slice(-k, None), n, 0, "Nadam") for k, n in zip((1, 2, 3, 4), (2, 3, 3, 2), strict=True)]
    first, last, done = (slice(None), 20, 5, "Nadam"), (slice(None), 50, 10, "SGD"), (slice(0), 0, 0, "SGD")
    assert said(Lightweight()) == [first, *ladder, last, done]
    assert said(Lightweight(schedule="notebook")) == [first, (slice(-1), 10, 5, "Nadam"), last, done]
    folds = [(slice(None), 10, 3, "SGD")] * 6
    assert said(Lightweight(refit="kfold-continue")) == [first, *ladder, last, *folds, done]
    assert said(Lightweight(final_rounds=0, unfreeze_rounds=())) == [first, done]


def test_the_notebooks_first_part_trains_all_but_the_head():
    algorithm = Lightweight(schedule="notebook", dual_rounds=1)
    with federation(algorithm, images([4], (1, 28, 28), 10), dtype="float32") as running:
        go(running)
        names = algorithm.trainable(running.context())
        params = running.engine.setting.task.initial.params
        assert sum(params[k].numel() for k in names) == 14_532
        assert not any(k.startswith("head.") for k in names)


def judged(running, accuracies, stage, model, server=None):
    """The server after a validation of a made-up model with made-up accuracies."""
    ctx = Context(running.worker, running.context()[1]._replace(
        stage=stage, phase=running.algorithm.phases(0, 9)[1]), running.constants, None)  # fmt: skip
    right = torch.tensor(accuracies, dtype=torch.float64) * 10_000
    mean = Verdict(right / 3, torch.tensor(10_000.0, dtype=torch.float64) / 3)
    server = server or running.server
    return running.algorithm.server_update(ctx, server._replace(model=model), mean, torch.tensor(3.0))


def filled(like, value):
    return Variables({k: torch.full_like(v, value) for k, v in like.params.items()}, {})


def test_each_branch_is_kept_from_its_own_best_round():
    with federation(Lightweight(dual_rounds=3), images([6])) as running:
        server = running.server
        for value, accuracies in enumerate([(0.5, 0.3), (0.6, 0.2), (0.6, 0.4)], 1):
            server = judged(running, accuracies, value > 1, filled(server.model, float(value)), server)
        assert {float(v.mean()) for k, v in server.best.params.items() if k.startswith("branch1.")} == {2.0}
        assert {float(v.mean()) for k, v in server.best.params.items() if k.startswith("branch2.")} == {3.0}
        running.server = server
        record = {"diagnostics": trees.plain(running.algorithm.diagnostics(running.context(), server))}
        stage, after = running.algorithm.advance(running.context(), server, record)
        assert stage == 2
        assert {float(after.model.params[f"branch{j}.conv1.bias"][0]) for j in (1, 2)} == {2.0, 3.0}
        assert torch.equal(after.model.params["head.weight"], running.task.initial.params["head.weight"])


def test_a_part_of_stage_two_is_left_from_its_best_round():
    """The best is the monitor's: .0005 is no improvement, and the later, slightly higher round is not restored."""
    with federation(Lightweight(dual_rounds=1, unfreeze_rounds=(3,)), images([6])) as running:
        go(running)
        server = running.server
        for value, accuracy in enumerate([0.7, 0.9, 0.9005], 1):
            server = judged(running, [accuracy], 3 if value > 1 else 2, filled(server.model, float(value)), server)
        record = {"diagnostics": trees.plain(running.algorithm.diagnostics(running.context(), server))}
        assert record["diagnostics"]["highest"] == [pytest.approx(0.9005)]
        stage, after = running.algorithm.advance(running.context(), server, record)
        assert stage == 4
        assert {float(v.mean()) for v in after.model.params.values()} == {2.0}


@pytest.mark.parametrize(("wait", "rounds", "ends"), [([5, 0], 9, True), ([4, 4], 9, False), ([0, 0], 20, True)])
def test_stage_one_ends_when_either_monitor_fires(wait, rounds, ends):
    with federation(Lightweight(), images([6])) as running:
        record = {"diagnostics": {"rounds": rounds, "wait": wait}}
        stage, server = running.algorithm.advance(running.context(), running.server, record)
        assert stage == (2 if ends else 1)
        assert isinstance(server, Server)
        assert trees.equal(server.watch, stopping.begin(1 if ends else 2, torch.device("cpu")))


def test_after_the_last_part_nothing_moves_and_the_best_is_judged():
    algorithm = Lightweight(dual_rounds=1, unfreeze_rounds=(), final_rounds=1)
    with federation(algorithm, images([6, 5])) as running:
        go(running)
        best = go(running)[0].best
        for _ in range(2):
            state, record = go(running)
            assert trees.equal(state.model, best)
            assert "loss" not in record["train"]
            assert record["diagnostics"]["validation"] == state.watch.last.tolist()


def test_without_stage_one_it_is_the_unified_network_from_random_weights():
    """The baseline of the same rounds: every part, optimizer and stopping rule of stage 2, and nothing transplanted."""
    algorithm = Lightweight(dual_rounds=0, unfreeze_rounds=(), final_rounds=2)
    with federation(algorithm, images([9, 6])) as running:
        assert trees.equal(running.server.model, running.task.initial)
        with federation(FedAvg(optimizer=algorithm.final), images([9, 6])) as other:
            for number in range(2):
                (mine, record), theirs = go(running), go(other)[0]
                for k, v in theirs.params.items():
                    torch.testing.assert_close(mine.model.params[k], v, rtol=0, atol=1e-12)
                assert record["diagnostics"]["part"] == 1
                assert len(record["diagnostics"]["validation"]) == 1
                size = trees.num_bytes(theirs)
                assert record["bytes"]["down"] == 2 * (size + (0 if number else size))
        best = mine.best
        state, record = go(running)
        assert trees.equal(state.model, best)
        assert "loss" not in record["train"]


def test_a_ladder_without_stage_one_sends_what_trains():
    algorithm = Lightweight(dual_rounds=0, unfreeze_rounds=(1, 1))
    with federation(algorithm, images([2, 2], (1, 28, 28), 10, held=1), dtype="float32") as running:
        found = [go(running)[1]["bytes"] for _ in range(3)]
    assert [b["down"] for b in found] == [2 * (59_448 + 1_320), 2 * 2 * 4_008, 2 * 2 * 59_448]
    assert [b["up"] for b in found] == [2 * (size + 8) for size in (1_320, 4_008, 59_448)]


def test_a_client_without_validation_examples_gets_the_new_model_too():
    data = images([2, 2], (1, 28, 28), 10, held=1)
    data = dataclasses.replace(data, held=[data.held[0], data.held[1][:0]])
    with federation(Lightweight(), data, dtype="float32") as running:
        first, second = (go(running)[1] for _ in range(2))
    assert first["validate"]["clients"] == 1
    assert first["bytes"]["down"] == 2 * 2 * 55_440
    assert second["bytes"]["down"] == 2 * 55_440  # trained from what came for validation
    assert second["bytes"]["up"] == 2 * 55_440 + 12


def test_fedgrab_goes_on_from_the_unified_network(tmp_path):
    """Controllers at rest, and the prior read off the head before the first step."""
    method = Lightweight(dual_rounds=1, unfreeze_rounds=(1,), final_rounds=0)
    options = {"model": Unified(branch=MLP(hidden=(8,))), "engine": EngineOptions(name="loop"),
               "data": Data(client_validation=0.2, partition=IID(clients=3))}  # fmt: skip
    list(fedtail.run(Experiment(rounds=3, algorithm=method, **options), tmp_path / "unfrozen"))
    model = fedtail.load(tmp_path / "unfrozen").network
    whole = Experiment(
        rounds=1, algorithm=FedGraB(warm=1, initial_prior=True), start=str(tmp_path / "unfrozen"), **options
    )
    with contextlib.closing(Federation(whole)) as running:
        ctx = running.context()
        message = running.message(ctx)
        assert all(torch.equal(v, message.model.params[k]) for k, v in model.named_parameters())
        norms = model.head.weight.detach().norm(dim=1)
        shares = (norms - norms.min()) / (norms - norms.min()).sum()
        torch.testing.assert_close(running.server.prior, shares)
        torch.testing.assert_close(message.prior, shares if norms.max() >= 1.1 * norms.min() else 0 * shares)
        state = running.engine.setting.state(ctx, message, running.states, 0)
        assert all(not bool(v.any()) for v in trees.leaves(state))
        running.advance(running.step())
        assert any(bool(v.any()) for v in trees.leaves(running.states[0]))


def test_with_nothing_to_train_after_it_stage_one_ends_in_the_two_branches():
    """The ensemble: each branch from its best round, and no surgery."""
    with federation(Lightweight(dual_rounds=2, unfreeze_rounds=(), final_rounds=0), images([9])) as running:
        go(running)
        best = go(running)[0].best
        state, _ = go(running)
        assert trees.equal(state.model, best)
        assert {k for k, _ in running.module().network.named_parameters()} == set(best.params)
        x, y = running.data.test["x"], running.data.test["y"]
        one, other = (getattr(running.module().network, f"branch{j}")(x.double() / 255).softmax(-1) for j in (1, 2))
        right = float((((one + other) / 2).argmax(-1) == y).double().mean())
        assert running.score()["test"]["accuracy"] == pytest.approx(right)


def test_folds_cover_all_data_and_validate_on_what_was_trained_on():
    algorithm = Lightweight(refit="kfold-continue")
    data = images([17, 5], held=3)
    first = len(algorithm.parts()) - 7
    folds = [algorithm.stage_data(data, 2 * (first + f)) for f in range(6)]
    assert algorithm.stage_data(data, 2 * first - 1) is data
    for client in (0, 1):
        everything = {*data.owners[client].tolist(), *data.held[client].tolist()}
        for fold in folds:
            assert {*fold.owners[client].tolist()} | {*fold.held[client].tolist()} == everything
            assert not {*fold.owners[client].tolist()} & {*fold.held[client].tolist()}
        assert sorted(np.concatenate([f.held[client] for f in folds]).tolist()) == sorted(everything)
    assert any({*f.held[0].tolist()} & {*data.owners[0].tolist()} for f in folds)


# Validation at the clients --------------------------------------------------------------------------------------------


def test_validation_counts_the_held_examples_and_trains_on_none():
    data = images([9, 6], held=3)
    with federation(Lightweight(), data) as running:
        state, record = go(running)
        assert record["validate"]["clients"] == 2
        assert record["validate"]["examples"] == 6
        x = torch.cat([data.columns["x"][torch.from_numpy(r)] for r in data.held]).double() / 255
        y = torch.cat([data.columns["y"][torch.from_numpy(r)] for r in data.held])
        task = running.engine.setting.task
        right = [float((task.worker().apply(state.model, x, part=p, train=False)[0].argmax(1) == y).double().mean())
                 for p in ("branch1", "branch2")]  # fmt: skip
        assert record["diagnostics"]["validation"] == pytest.approx(right)


def test_clients_hold_out_their_share_once():
    options = Data(name="digits", longtail=NoTail(), partition=IID(clients=3), client_validation=1 / 6)
    data, whole = federate(options, 0), federate(dataclasses.replace(options, client_validation=0.0), 0)
    for kept, held, rows in zip(data.owners, data.held, whole.owners, strict=True):
        assert len(held) == int(len(rows) / 6 + 1e-6)
        assert sorted([*kept.tolist(), *held.tolist()]) == sorted(rows.tolist())
    assert [len(r) for r in whole.held] == [0, 0, 0]
    assert not np.array_equal(data.held[0], federate(options, 1).held[0])
    raw = federate(dataclasses.replace(options, normalise=False), 0)
    assert (raw.mean, raw.std) == ((), ())
    assert whole.mean


def test_it_asks_for_validation_examples_and_for_two_branches():
    with pytest.raises(ConfigError, match=r"lightweight validates at the clients: set data.client_validation"):
        Federation(Experiment(algorithm=Lightweight(), model=Unified(branch=MLP())))
    with pytest.raises(ConfigError, match="works on a network of two branches, got MLP"):
        Federation(Experiment(algorithm=Lightweight(), data=Data(client_validation=0.2)))


@pytest.mark.parametrize(
    "option",
    [{"dual_rounds": -1}, {"unfreeze_rounds": (2, 0)}, {"final_rounds": -1}, {"patience": 0}, {"min_delta": -0.1},
     {"final_patience": 0}, {"ignored": -1}],
)  # fmt: skip
def test_options_have_ranges(option):
    with pytest.raises(ConfigError, match=rf"Lightweight.{next(iter(option))} must"):
        Lightweight(**option)


def test_its_optimizers_are_the_papers():
    assert Lightweight().optimizer == Nadam(lr=0.001, beta1=0.9, beta2=0.999, eps=1e-7)
    final = SGD(lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4, decoupled=True)
    assert Lightweight().final == final
