"""Methods with private layers or tuning afterwards: each against a plain autograd loop, and what must stay at home."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from contract_problem import CLASSES, distance, federated
from torch import nn
from torch.nn import functional as F

from fedtail import SGD, Adam, EngineOptions, Experiment, FedAvg, LocalWork, Participation, trees
from fedtail.algorithms.fedbabu import FedBABU
from fedtail.algorithms.fedbn import FedBN
from fedtail.algorithms.fedetf import CLASSIFIER, PROJECTION, TEMPERATURE, FedETF
from fedtail.algorithms.fedper import FedPer
from fedtail.algorithms.fedrep import FedRep
from fedtail.algorithms.lg_fedavg import LGFedAvg
from fedtail.checks.problems import BatchNormNet
from fedtail.checks.returns import play
from fedtail.engines.loop import iterate
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.local import overlay, split
from fedtail.losses import BalancedSoftmax
from fedtail.models.specs import MLP
from fedtail.schedule import Constant, Cosine
from fedtail.task import Variables

MOMENTUM = SGD(lr=0.1, momentum=0.5, weight_decay=0.01)  # both would move what only has no gradient
ADAM = Adam(lr=0.01, weight_decay=0.01)
HEAD = {"head.weight", "head.bias"}
NORM = {f"bn{i}.{name}" for i in (1, 2)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
NAMES = {"conv1.weight", "conv2.weight", *NORM, *HEAD}
PRIVATE = {FedPer: HEAD, FedRep: HEAD, LGFedAvg: NAMES - HEAD, FedBN: NORM}
every_private = pytest.mark.parametrize("method", PRIVATE, ids=lambda cls: cls.__name__)
every_optimizer = pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adam"])


def federation(algorithm, sizes=(6, 4, 8), images=True, rounds=2, **more):
    model, work = BatchNormNet() if images else MLP(hidden=(6,)), LocalWork(epochs=3, batch_size=4)
    experiment = Experiment(rounds=rounds, algorithm=algorithm, model=model, dtype="float64", local=work, **more)
    return contextlib.closing(Federation(experiment, federated(sizes, images)))


def names(variables):
    return {*variables.params, *variables.buffers}


def values(variables):
    return {**variables.params, **variables.buffers}


# ---- against a plain loop


def network(running, *parts):
    """A copy of the module with the initial values, those of the parts in their place, in training mode."""
    net = copy.deepcopy(running.task.module)
    net.load_state_dict(values(overlay(running.task.initial, *(split(part, NAMES)[0] for part in parts))))
    return net.train()


def torch_optimizer(optimizer, params, scale=1.0):
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(params, optimizer.lr * scale, optimizer.momentum, weight_decay=optimizer.weight_decay)
    return torch.optim.Adam(params, optimizer.lr * scale, weight_decay=optimizer.weight_decay)


def part(net, head):
    return [p for name, p in net.named_parameters() if (name in HEAD) is head]


def step(loss, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def batches(running, number, trained=0):
    setting = running.engine.setting
    return list(iterate(setting, setting.plans(running.context().round, trained, [number])[number]))


def state_of(running, number):
    ctx = running.context()
    return running.engine.setting.state(ctx, running.message(ctx), running.states, number)


def mean_of(running, found):
    """The mean by examples of every entry; numbers of batches, which are integers, are rounded."""
    sizes = [len(running.data.owners[i]) for i in range(len(found))]
    sums = {k: sum(n * one[k].double() for n, one in zip(sizes, found, strict=True)) / sum(sizes) for k in found[0]}
    return {k: v if found[0][k].is_floating_point() else v.round().long() for k, v in sums.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@every_optimizer
@pytest.mark.parametrize("method", [FedPer, LGFedAvg, FedBN], ids=lambda cls: cls.__name__)
def test_a_round_of_joint_training(method, optimizer):
    """All of the network by one optimizer, from the message and the client's own part; the rest is averaged."""
    with federation(method(optimizer=optimizer)) as running:
        running.advance(running.step())
        nets = []
        for number in range(3):
            net = network(running, running.server, state_of(running, number))
            sgd = torch_optimizer(optimizer, net.parameters())
            for batch in batches(running, number):
                step(F.cross_entropy(net(batch.x), batch.y), sgd)
            nets.append(net.state_dict())
        running.step()
        private = PRIVATE[method]
        assert_close(values(running.server), {k: v for k, v in mean_of(running, nets).items() if k not in private})
        for number, net in enumerate(nets):
            assert_close(values(running.states[number]), {k: v for k, v in net.items() if k in private})


@every_optimizer
def test_a_round_of_fedrep(optimizer):
    """Of 6, 3 and 6 steps the first 4, 2 and 4 are the head's; each part by an optimizer of its own; statistics the body's."""
    with federation(FedRep(optimizer=optimizer)) as running:
        running.advance(running.step())
        nets = []
        for number, first in enumerate((4, 2, 4)):
            net = network(running, running.server, state_of(running, number))
            head, body = (torch_optimizer(optimizer, part(net, inside)) for inside in (True, False))
            for index, batch in enumerate(batches(running, number)):
                before = {k: v.clone() for k, v in net.named_buffers()}
                step(F.cross_entropy(net(batch.x), batch.y), head if index < first else body)
                net.zero_grad()
                if index < first:
                    net.load_state_dict(before, strict=False)
            nets.append(net.state_dict())
        running.step()
        assert_close(values(running.server), {k: v for k, v in mean_of(running, nets).items() if k not in HEAD})
        for number, net in enumerate(nets):
            assert_close(values(running.states[number]), {k: v for k, v in net.items() if k in HEAD})


@every_optimizer
@pytest.mark.parametrize("tune", ["head", "all"])
@pytest.mark.parametrize("schedule", [Constant(), Cosine()], ids=["constant", "cosine"])
def test_the_last_round_of_fedbabu(tune, optimizer, schedule):
    """The body against the initial head; then all clients from the mean, at the learning rate before the schedule."""
    algorithm = FedBABU(optimizer=optimizer, tune=tune)
    with federation(algorithm, schedule=schedule, participation=Participation(clients=2)) as running:
        running.advance(running.step())
        assert not running.states
        scale = running.context().round.lr_scale
        asked, nets = running.draw(running.context().round.phase), []
        for number in asked:
            net = network(running, running.server)
            sgd = torch_optimizer(optimizer, part(net, False), scale)
            for batch in batches(running, number):
                step(F.cross_entropy(net(batch.x), batch.y), sgd)
                net.zero_grad()
            nets.append((len(running.data.owners[number]), net.state_dict()))
        record = running.step()
        total = sum(n for n, _ in nets)
        body = {k: sum(n * net[k].double() for n, net in nets) / total for k in running.server.params}
        assert_close(running.server.params, body)
        assert (record["train"]["clients"], record["tune"]["clients"]) == (2, 3)
        for number in range(3):
            net = network(running, running.server).train(tune == "all")
            sgd = torch_optimizer(optimizer, part(net, True) if tune == "head" else net.parameters())
            for batch in batches(running, number, trained=1):
                step(F.cross_entropy(net(batch.x), batch.y), sgd)
                net.zero_grad()
            kept = HEAD if tune == "head" else NAMES
            assert_close(values(running.states[number]), {k: v for k, v in net.state_dict().items() if k in kept})
            assert_close(values(running.variables(number)), net.state_dict())


def etf_logits(net, p, s, v, x):
    h = net.features(x) @ p.T
    return s * (h / h.square().sum(1, keepdim=True).sqrt()) @ v.T


def balanced(z, y, counts):
    """The mean of -log( n_y exp(z_y) / sum over held classes of n_c exp(z_c) )."""
    weighted = counts * z.exp()
    return -(weighted[torch.arange(len(y)), y] / weighted.sum(1)).log().mean()


@every_optimizer
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_last_round_of_fedetf(share, optimizer):
    """Body, projection and temperature on the balanced loss; then the two parts of the tuning, step by step."""
    with federation(FedETF(optimizer=optimizer, tune_share=share, dimension=5, temperature=2.0)) as running:
        running.advance(running.step())
        v0, counts = running.constants, torch.from_numpy(running.data.counts()).double()

        def leaves():
            net = network(running, running.server)
            own = [running.server.params[k].clone() for k in (PROJECTION, TEMPERATURE)]
            return net, *(t.requires_grad_() for t in (*own, v0.clone()))

        def result(net, p, s):
            body = {k: v for k, v in net.state_dict().items() if k not in HEAD}
            return {**body, PROJECTION: p.detach(), TEMPERATURE: s.detach()}

        found = []
        for number in range(3):
            net, p, s, _ = leaves()
            sgd = torch_optimizer(optimizer, [*part(net, False), p, s])
            for batch in batches(running, number):
                step(balanced(etf_logits(net, p, s, v0, batch.x), batch.y, counts[number]), sgd)
            found.append(result(net, p, s))
        running.step()
        assert_close(values(running.server), mean_of(running, found))
        for number, steps in enumerate((6, 3, 6)):
            net, p, s, v = leaves()
            groups = {"body": [*part(net, False), s], "projection": [p], "classifier": [v]}
            sgd = {name: torch_optimizer(optimizer, group) for name, group in groups.items()}
            first = round(share * steps)  # 3, 2 (of 1.5: to even) and 3 for one half
            for index, batch in enumerate(batches(running, number, trained=1)):
                before = {k: b.clone() for k, b in net.named_buffers()}
                z = etf_logits(net, p, s, v, batch.x)
                for optim in sgd.values():
                    optim.zero_grad()
                (balanced(z, batch.y, counts[number]) if index < first else F.cross_entropy(z, batch.y)).backward()
                turn = ("body", "projection") if index < first else (("classifier", "projection")[(index - first) % 2],)
                for name in turn:
                    sgd[name].step()
                if index >= first:
                    net.load_state_dict(before, strict=False)
            assert_close(values(running.states[number]), {**result(net, p, s), CLASSIFIER: v})


# ---- limits


@pytest.mark.parametrize("engine", ["loop", "parallel", "vmap"])
def test_fedbn_without_batchnorm_is_fedavg_bit_for_bit(engine):
    ends = []
    for method in (FedBN, FedAvg):
        with federation(method(optimizer=MOMENTUM), images=False, engine=EngineOptions(name=engine)) as running:
            for _ in range(2):
                running.advance(running.step())
            ends.append(running.server)
    assert trees.equal(*ends)


@pytest.mark.parametrize("method", [FedPer, LGFedAvg, FedBN], ids=lambda cls: cls.__name__)
def test_with_one_client_joint_training_is_fedavg(method):
    """The client's own model is FedAvg's, up to the rounding of w + (w_k - w)."""
    ends = []
    for cls, number in ((method, 0), (FedAvg, None)):
        with federation(cls(optimizer=MOMENTUM), sizes=(11,), rounds=3) as running:
            for _ in range(3):
                running.advance(running.step())
            ends.append(values(running.variables(number)))
    assert distance(*ends) <= 1e-12


def test_fedrep_without_steps_of_the_head_is_fedbabu():
    """Bit for bit: a body trained against the initial head, which stays what it is."""
    ends = []
    for algorithm in (FedRep(optimizer=MOMENTUM, head_share=0.0), FedBABU(optimizer=MOMENTUM)):
        with federation(algorithm, rounds=3) as running:
            running.advance(running.step())
            running.advance(running.step())
            ends.append(running.server)
            for state in running.states.values():
                assert trees.equal(state, split(running.task.initial, HEAD)[0])
    assert trees.equal(*ends)


@every_optimizer
def test_fedrep_without_steps_of_the_body_leaves_it_alone(optimizer):
    with federation(FedRep(optimizer=optimizer, head_share=1.0)) as running:
        running.step()
        assert trees.equal(running.server, split(running.task.initial, HEAD)[1])
        for state in running.states.values():
            assert not torch.equal(state.params["head.weight"], running.task.initial.params["head.weight"])


def test_the_head_of_fedbabu_stays_and_its_personal_models_are_generic_until_they_are_tuned():
    with federation(FedBABU(optimizer=MOMENTUM), rounds=3) as running:
        for _ in range(2):
            running.advance(running.step())
            assert trees.equal(running.variables(1), running.variables())
        running.step()
        generic, personal = running.variables(), running.variables(1)
        for name, before in values(running.task.initial).items():
            assert torch.equal(values(generic)[name], before) == (name in HEAD), name
            assert torch.equal(values(personal)[name], values(generic)[name]) == (name not in HEAD), name


def test_the_simplex_of_fedetf_stays_and_its_temperature_moves():
    with federation(FedETF(optimizer=MOMENTUM), rounds=3) as running:
        before, temperatures = running.constants.clone(), [1.0]
        wanted = np.full((CLASSES, CLASSES), -1 / (CLASSES - 1)) + np.eye(CLASSES) * CLASSES / (CLASSES - 1)
        np.testing.assert_allclose((before @ before.T).numpy(), wanted, atol=1e-12)
        for _ in range(3):
            record = running.step()
            temperatures.append(record["diagnostics"]["temperature"])
            assert torch.equal(running.constants, before)
            running.advance(record)
        assert len(set(temperatures)) == 4
        assert CLASSIFIER not in running.server.params
        assert not torch.equal(running.states[0].params[CLASSIFIER], before)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_which_part_the_tuning_of_fedetf_moves(share):
    with federation(FedETF(optimizer=MOMENTUM, tune_share=share), rounds=1) as running:
        running.step()
        known = {**values(running.server), CLASSIFIER: running.constants}
        for name, value in values(running.states[2]).items():
            late = name in (PROJECTION, CLASSIFIER) if share == 0 else name != CLASSIFIER
            assert torch.equal(value, known[name]) != late, name


def test_the_network_that_fedetf_exports_gives_the_labels_that_it_predicts():
    with federation(FedETF(optimizer=MOMENTUM), rounds=1) as running, torch.no_grad():
        running.step()
        x = running.data.prepare(running.data.test["x"], torch.float64)
        for number in (None, 0, 2):
            ctx = running.context()
            state = None if number is None else state_of(running, number)
            z = running.algorithm.predict(ctx, running.message(ctx), state, x)
            net = network(running, running.variables(number)).eval()
            h = net.features(x) @ (running.server if state is None else state).params[PROJECTION].T
            torch.testing.assert_close(z * h.norm(dim=1, keepdim=True), net(x), rtol=1e-10, atol=1e-12)
            assert names(running.variables(number)) == NAMES


# ---- what stays at home


@every_private
def test_private_parts_neither_travel_nor_come_back(method):
    for shared in (False, True):
        with federation(method(optimizer=MOMENTUM, share_private=shared)) as running:
            travels = NAMES if shared else NAMES - PRIVATE[method]
            for cohort, answers in play(running):
                assert names(cohort.message) == travels
                for one in answers:
                    assert names(one.update) == travels
                    assert names(one.state) == PRIVATE[method]


@pytest.mark.parametrize("method", [FedBABU, FedETF], ids=lambda cls: cls.__name__)
def test_a_classifier_that_is_fixed_does_not_travel_and_tuning_sends_nothing(method):
    with federation(method(optimizer=MOMENTUM), rounds=3) as running:
        running.advance(running.step())
        running.advance(running.step())
        (train, trained), (tune, tuned) = play(running)
        for tree in (train.message, tune.message, *(one.update for one in trained)):
            assert not names(tree) & {*HEAD, CLASSIFIER}
        assert all(one.state == () for one in trained)
        assert all(trees.num_bytes(one.update) == 8 and not one.update["nothing"].any() for one in tuned)


@every_private
def test_sending_private_parts_changes_the_generic_model_and_nothing_else(method):
    found = []
    for shared in (False, True):
        with federation(method(optimizer=MOMENTUM, share_private=shared)) as running:
            for _ in range(2):
                running.advance(running.step())
            found.append((split(running.server, PRIVATE[method])[1], dict(running.states), running.variables()))
            if shared:
                expected = mean_of(running, [values(running.states[i]) for i in range(3)])
                assert_close(values(split(running.variables(), PRIVATE[method])[0]), expected)
            else:
                initial = split(running.task.initial, PRIVATE[method])[0]
                assert trees.equal(split(running.variables(), PRIVATE[method])[0], initial)
    (server, states, _), (other_server, other_states, _) = found
    assert trees.equal(server, other_server)
    assert all(trees.equal(states[i], other_states[i]) for i in range(3))


@every_private
def test_a_client_that_is_not_asked_keeps_its_part_and_a_new_one_has_the_initial_one(method):
    with federation(method(optimizer=MOMENTUM), rounds=9, participation=Participation(clients=1)) as running:
        seen = {}
        for _ in range(5):
            [now] = running.draw(running.context().round.phase)
            running.advance(running.step())
            for other, state in seen.items():
                assert other == now or trees.equal(running.states[other], state)
            assert now not in seen or not trees.equal(running.states[now], seen[now])
            seen[now] = running.states[now]
            assert running.states.keys() == seen.keys()
            for new in {0, 1, 2} - seen.keys():
                expected = overlay(running.task.initial, running.server)
                assert trees.equal(running.variables(new), expected)
        assert len(seen) > 1


def test_a_client_without_data_is_never_tuned_and_has_the_generic_model():
    for method in (FedBABU, FedETF):
        with federation(method(optimizer=MOMENTUM), sizes=(6, 0, 8), rounds=1) as running:
            running.step()
            assert sorted(running.states) == [0, 2]
            assert trees.equal(running.variables(1), running.variables())
            assert running.score()["personal"]["clients"] == 3


# ---- engines and options


@pytest.mark.parametrize(
    "algorithm",
    [
        FedPer(optimizer=MOMENTUM, share_private=True), FedRep(optimizer=ADAM, head_share=0.3, share_private=True),
        LGFedAvg(optimizer=MOMENTUM, share_private=True), FedBN(optimizer=MOMENTUM, share_private=True),
        FedBABU(optimizer=MOMENTUM, tune="all"), FedETF(optimizer=MOMENTUM, tune_share=0.2, dimension=6),
    ],
    ids=lambda a: type(a).__name__,
)  # fmt: skip
def test_engines_agree_on_other_than_default_options(algorithm):
    ends = []
    for engine in (EngineOptions(name="loop"), EngineOptions(name="loop", donate=False), EngineOptions(name="vmap")):
        with federation(algorithm, sizes=(6, 1, 4, 8), engine=engine) as running:
            for _ in range(2):
                running.advance(running.step())
            ends.append({"server": running.server, **{str(i): running.states[i] for i in range(4)}})
    assert trees.equal(ends[0], ends[1])
    assert distance(ends[0], ends[2]) <= 1e-10


def test_a_network_is_split_and_put_together_again():
    whole = Variables({"a": torch.zeros(1), "b": torch.ones(1)}, {"c": torch.ones(2)})
    some, rest = split(whole, ["b", "c", "unknown"])
    assert (list(some.params), list(some.buffers), list(rest.params), list(rest.buffers)) == (["b"], ["c"], ["a"], [])
    changed = Variables({"b": torch.full((1,), 7.0)}, {})
    assert trees.equal(overlay(rest, some), whole)
    assert trees.equal(overlay(whole, None, (), changed), Variables({**whole.params, **changed.params}, whole.buffers))
    assert list(overlay(whole, changed).params) == ["a", "b"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FedRep, {"head_share": -0.1}), (FedRep, {"head_share": 1.1}), (FedRep, {"head_share": float("nan")}),
        (FedETF, {"dimension": -1}), (FedETF, {"temperature": 0.0}), (FedETF, {"tune_share": 1.5}),
        (FedETF, {"temperature": float("nan")}),
    ],
)  # fmt: skip
def test_impossible_options(method, options):
    with pytest.raises(ConfigError, match=method.__name__):
        method(**options)


def test_a_simplex_needs_as_many_dimensions_as_classes():
    with pytest.raises(ConfigError, match=r"FedETF.dimension must be 0 or >= 4, the classes' number; got 3"):
        federation(FedETF(dimension=3))


def test_the_paper_of_fedetf_has_the_balanced_loss():
    assert FedETF().loss == BalancedSoftmax(gamma=1.0)


class Headless(nn.Module):
    """A network whose logits are no linear layer's."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("method", [FedPer, FedRep, LGFedAvg, FedBABU, FedETF], ids=lambda cls: cls.__name__)
def test_a_network_without_a_classifier_is_refused(method, monkeypatch):
    monkeypatch.setattr(BatchNormNet, "build", lambda self, shape, classes: Headless(shape[0], classes))
    with pytest.raises(ConfigError, match=f"{method.__name__} works on the classifier"):
        federation(method())
