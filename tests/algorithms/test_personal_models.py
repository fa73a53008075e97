"""Ditto, pFedMe, APFL, FedROD, FedProto: each client's round against a plain torch loop, limits, and what stays at home."""

import contextlib
import copy
import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from contract_problem import CLASSES, PROBLEMS, distance, federated
from torch import nn
from torch.nn import functional as F

from fedtail import SGD, Adam, EngineOptions, Experiment, FedAvg, LocalWork, Participation, trees
from fedtail.algorithms.apfl import APFL, blend
from fedtail.algorithms.ditto import Ditto
from fedtail.algorithms.fedproto import FedProto
from fedtail.algorithms.fedrod import FedROD
from fedtail.algorithms.pfedme import PFedMe
from fedtail.engines.base import Sink
from fedtail.engines.loop import iterate
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.losses import BalancedSoftmax, CrossEntropy
from fedtail.models.specs import MLP, UserModel
from fedtail.optim import Partition
from fedtail.schedule import StepDecay
from fedtail.task import Variables

LR, MOMENTUM, FACTOR = 0.1, 0.5, 0.5  # FACTOR: of the schedule, after the first round
PLAIN = SGD(lr=LR, momentum=MOMENTUM)
METHODS = [Ditto, PFedMe, APFL, FedROD, FedProto]
SHARING = METHODS[:4]  # those that send a model
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
sharing_method = pytest.mark.parametrize("method", SHARING, ids=lambda m: m.__name__)
each_network = pytest.mark.parametrize("images", [False, True], ids=["mlp", "batchnorm"])


def federation(algorithm, sizes=(9, 1, 6), images=False, data=None, engine="loop", **more):
    """A federation in float64; images: with BatchNorm and augmentation."""
    known = {"model": PROBLEMS["batchnorm"].model if images else MLP(hidden=(6,)),
             "local": LocalWork(epochs=2, batch_size=4)}  # fmt: skip
    experiment = Experiment(
        rounds=4, algorithm=algorithm, dtype="float64", engine=EngineOptions(name=engine), **{**known, **more}
    )
    return contextlib.closing(Federation(experiment, data or federated(sizes, images)))


def rounds(running, count=3):
    """Runs some rounds; returns the server and client states after each of them."""
    found = []
    for _ in range(count):
        running.advance(running.step())
        found.append((running.server, dict(running.states)))
    return found


# ---- oracles: one client's round, by torch.optim.SGD on copies of a network


def network(running, variables):
    """A copy of the network in training mode, with these values."""
    net = copy.deepcopy(running.task.module).train()
    net.load_state_dict({**variables.params, **variables.buffers})
    return net


def values(net):
    """A network's values in fedtail's form."""
    params = {k: v.detach().clone() for k, v in net.named_parameters()}
    return Variables(params, {k: v.clone() for k, v in net.named_buffers()})


def sgd(module, lr):
    return torch.optim.SGD(module.parameters(), lr, MOMENTUM)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def proximal(net, anchor):
    return sum(((p - a) ** 2).sum() for p, a in zip(net.parameters(), anchor, strict=True))


def detached(net):
    return [p.detach().clone() for p in net.parameters()]


def ditto(algorithm, running, batches, lr, own):
    w, v = network(running, running.server), network(running, own or running.server)
    anchor, optimizers = detached(w), [sgd(w, lr), sgd(v, lr)]
    for x, y in batches:
        step(optimizers[0], F.cross_entropy(w(x), y))
        step(optimizers[1], F.cross_entropy(v(x), y) + algorithm.lam / 2 * proximal(v, anchor))
    return values(w), values(v)


def pfedme(algorithm, running, batches, lr, own):
    v = network(running, running.server)
    w, optimizer = detached(v), sgd(v, lr)
    rate = algorithm.lr_shared * lr / LR * algorithm.lam
    for x, y in batches:
        for _ in range(algorithm.inner_steps):
            step(optimizer, F.cross_entropy(v(x), y) + algorithm.lam / 2 * proximal(v, w))
        w = [old - rate * (old - new) for old, new in zip(w, detached(v), strict=True)]
    found = values(v)
    return Variables(dict(zip(found.params, w, strict=True)), found.buffers), found


def apfl(algorithm, running, batches, lr, own):
    w, u = network(running, running.server), network(running, own.model if own else running.server)
    v = copy.deepcopy(u)  # u is the mix: its values are set before each batch
    a, optimizers = (float(own.mix) if own else algorithm.mix), [sgd(w, lr), sgd(v, lr)]
    for number, (x, y) in enumerate(batches):
        with torch.no_grad():
            for mixed, private, shared in zip(u.parameters(), v.parameters(), w.parameters(), strict=True):
                mixed.copy_(a * private + (1 - a) * shared)
        u.zero_grad()
        F.cross_entropy(u(x), y).backward()
        slope = 0.0
        for mixed, private, shared in zip(u.parameters(), v.parameters(), w.parameters(), strict=True):
            slope += float((mixed.grad * (private - shared).detach()).sum())
            private.grad = a * mixed.grad
        optimizers[1].step()
        if algorithm.adaptive == "batch" or (algorithm.adaptive == "round" and number == 0):
            a = min(max(a - lr * slope, 0.0), 1.0)
        step(optimizers[0], F.cross_entropy(w(x), y))
    return values(w), {
        "params": values(v).params,
        "buffers": values(u).buffers,
        "mix": torch.tensor(a, dtype=torch.float64),
    }


def fedrod(algorithm, running, batches, lr, own):
    net, phi = network(running, running.server), nn.Linear(running.task.module.head.in_features, CLASSES).double()
    phi.load_state_dict({k: own[f"head.{k}"] if own else torch.zeros_like(v) for k, v in phi.state_dict().items()})
    every = torch.cat([y for _, y in batches])
    n = torch.bincount(every, minlength=CLASSES) / 2  # two epochs see each example twice
    optimizers = [sgd(net, lr), sgd(phi, lr)]
    for x, y in batches:
        h = net.features(x)
        z = net.head(h)
        balanced = torch.log((n * z.exp()).sum(1)) - z[range(len(y)), y] - torch.log(n[y])
        private = F.cross_entropy(z.detach() + phi(h.detach()), y)
        step(optimizers[0], balanced.mean())
        step(optimizers[1], private)
    return values(net), {f"head.{k}": v.detach() for k, v in phi.named_parameters()}


ORACLES = {Ditto: ditto, PFedMe: pfedme, APFL: apfl, FedROD: fedrod}
CASES = [
    Ditto(optimizer=PLAIN, lam=0.7),
    PFedMe(optimizer=PLAIN, lam=5.0, inner_steps=3, lr_shared=0.08),
    APFL(optimizer=PLAIN, mix=0.8),
    APFL(optimizer=PLAIN, mix=0.8, adaptive="batch"),
    APFL(optimizer=PLAIN, mix=0.3, adaptive="never"),
    FedROD(optimizer=PLAIN),
]


def batches_of(running, round, number):
    """The batches (x, y) of a client, as the engine prepares them; a round may be an evaluating one."""
    setting = running.engine.setting
    return [(b.x, b.y) for b in iterate(setting, setting.plans(round, int(not round.phase.local), [number])[number])]


def close(found, expected):
    """Compares trees leaf by leaf, whatever holds the leaves."""
    found, expected = (
        {k.rpartition("/")[2]: v for k, v in trees.named_leaves(tree).items()} for tree in (found, expected)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@each_network
@pytest.mark.parametrize("algorithm", CASES, ids=lambda a: type(a).__name__)
def test_a_round_is_a_plain_torch_loop(algorithm, images):
    """Two rounds, so that private states come back; the second at half the learning rate, by the schedule."""
    sizes = [9, 1, 6]
    with federation(algorithm, sizes, images, schedule=StepDecay(every=1, factor=FACTOR)) as running:
        for index in range(2):
            here, before = running.context().round, dict(running.states)
            batches = {k: batches_of(running, here, k) for k in range(3)}
            expected = {
                k: ORACLES[type(algorithm)](algorithm, running, batches[k], LR * FACTOR**index, before.get(k))
                for k in batches
            }
            running.advance(running.step())
            for k, (_, own) in expected.items():
                close(running.states[k], own)
            for name, found in trees.named_leaves(running.server).items():
                if found.is_floating_point():
                    leaves = [trees.named_leaves(expected[k][0])[name] for k in range(3)]
                    mean = sum(n * leaf for n, leaf in zip(sizes, leaves, strict=True)) / sum(sizes)
                    torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)


@each_network
def test_a_round_of_fedproto_is_a_plain_torch_loop(images):
    """Prototypes in dictionaries, as the paper writes them; the second round is trained with those of the first."""
    algorithm, sizes, prototypes = FedProto(optimizer=PLAIN, lam=0.3), [9, 1, 6], {}
    with federation(algorithm, sizes, images, schedule=StepDecay(every=1, factor=FACTOR)) as running:
        for index in range(2):
            here, sums, counts, models = running.context().round, defaultdict(float), defaultdict(int), []
            for k in range(3):
                net = network(running, running.states.get(k, running.task.initial))
                optimizer = sgd(net, LR * FACTOR**index)
                for x, y in batches_of(running, here, k):
                    h = net.features(x)
                    known = [c for c in y.unique().tolist() if c in prototypes]
                    gaps = [((h[y == c].mean(0) - prototypes[c]) ** 2).sum() for c in known]
                    step(optimizer, F.cross_entropy(net.head(h), y) + 0.3 * sum(gaps) / max(len(gaps), 1))
                net.eval()
                for x, y in batches_of(running, here._replace(phase=algorithm.phases(0, 1)[1]), k):
                    for h, c in zip(net.features(x).detach(), y.tolist(), strict=True):
                        sums[c], counts[c] = sums[c] + h, counts[c] + 1
                models.append(values(net))
            assert sum(counts.values()) == sum(sizes)
            prototypes |= {c: sums[c] / n for c, n in counts.items()}
            record = running.step()
            assert record["prototypes"] == {"clients": 3, "examples": 16}
            running.advance(record)
            for k, model in enumerate(models):
                close(running.states[k], model)
            assert running.server.known.nonzero().flatten().tolist() == sorted(prototypes)
            for c, value in prototypes.items():
                torch.testing.assert_close(running.server.means[c], value, rtol=1e-10, atol=1e-10)
        assert (record["train"]["distance"] > 0) == (index > 0)


# ---- limits


def bits(first, second):
    assert trees.equal(first, second)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    "algorithm", [Ditto(optimizer=PLAIN, lam=0.0), Ditto(optimizer=PLAIN, lam=2.0), APFL(optimizer=PLAIN)]
)
def test_the_generic_model_of_ditto_and_apfl_is_fedavgs_bit_for_bit(algorithm, engine):
    with federation(algorithm, engine=engine) as one, federation(FedAvg(optimizer=PLAIN), engine=engine) as other:
        for (server, _), (average, _) in zip(rounds(one), rounds(other), strict=True):
            bits(server, average)


def test_without_their_coupling_ditto_apfl_and_fedproto_train_each_client_alone():
    """lam = 0, a_k = 1, lam = 0: each client's model is the torch loop from its own last model, with fresh momentum."""
    alone = [
        Ditto(optimizer=PLAIN, lam=0.0),
        APFL(optimizer=PLAIN, mix=1.0, adaptive="never"),
        FedProto(optimizer=PLAIN, lam=0.0),
    ]
    for algorithm in alone:
        with federation(algorithm) as running:
            nets = [network(running, running.task.initial) for _ in range(3)]
            for _ in range(3):
                for k, net in enumerate(nets):
                    optimizer = sgd(net, LR)
                    for x, y in batches_of(running, running.context().round, k):
                        step(optimizer, F.cross_entropy(net(x), y))
                rounds(running, 1)
                for k, net in enumerate(nets):
                    own = running.states[k].model if isinstance(algorithm, APFL) else running.states[k]
                    assert distance(own, values(net)) <= 1e-12, (type(algorithm), k)


def test_apfl_fixed_at_zero_has_the_generic_model_for_everyone():
    with federation(APFL(optimizer=PLAIN, mix=0.0, adaptive="never")) as running:
        rounds(running, 2)
        for k in range(3):
            bits(running.variables(k), running.server)
            bits(running.states[k].model, running.task.initial)  # nothing reaches v_k


def test_pfedme_with_one_inner_step_and_a_full_outer_one_is_fedavg():
    """lr_shared * lam = 1 makes w_k = v_k after each batch, and the first inner step there has no pull."""
    algorithm = PFedMe(optimizer=PLAIN, lam=4.0, inner_steps=1, lr_shared=0.25)
    with federation(algorithm) as one, federation(FedAvg(optimizer=PLAIN)) as other:
        for (server, _), (average, _) in zip(rounds(one), rounds(other), strict=True):
            assert distance(server, average) <= 1e-12
        assert distance(one.states[0], one.server) > 1e-3  # a client's own result is not the mean


def test_pfedmes_shared_step_is_the_envelopes_gradient():
    """At the inner minimum lam (w - v) = grad F(v): a linear network, one full batch, many steps, gradient by torch at v."""
    algorithm = PFedMe(optimizer=SGD(lr=0.1, momentum=0.0), lam=5.0, inner_steps=400, lr_shared=0.02)
    with federation(algorithm, sizes=(8,), model=MLP(hidden=()), local=LocalWork(epochs=1, batch_size=8)) as running:
        [(x, y)] = batches_of(running, running.context().round, 0)
        before = running.server
        rounds(running, 1)
        net = network(running, running.states[0])
        F.cross_entropy(net(x), y).backward()
        for name, p in net.named_parameters():
            gradient = (before.params[name] - running.server.params[name]) / 0.02
            torch.testing.assert_close(gradient, p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("each", [1, 2])
def test_fedrod_with_equal_counts_has_fedavgs_generic_model(each):
    """n_c = 1 adds log 1 = 0 to each logit, n_c = 2 the same number to all."""
    data = federated((4 * each, 4 * each), images=False)
    y = data.columns["y"].clone()
    y[: 8 * each] = torch.arange(CLASSES).repeat(2 * each)
    data = dataclasses.replace(data, columns={**data.columns, "y": y})
    with federation(FedROD(optimizer=PLAIN), data=data) as one, federation(FedAvg(optimizer=PLAIN), data=data) as other:
        assert (one.data.counts() == each).all()
        for (server, _), (average, _) in zip(rounds(one), rounds(other), strict=True):
            assert distance(server, average) <= (0 if each == 1 else 1e-12)


def test_fedrod_on_the_cross_entropy_has_fedavgs_generic_model():
    algorithm = FedROD(optimizer=PLAIN, loss=CrossEntropy())
    with federation(algorithm) as one, federation(FedAvg(optimizer=PLAIN)) as other:
        for (server, _), (average, _) in zip(rounds(one), rounds(other), strict=True):
            assert distance(server, average) <= 1e-14
    with (
        federation(FedROD(optimizer=PLAIN)) as one,
        federation(FedAvg(optimizer=PLAIN, loss=BalancedSoftmax())) as other,
    ):
        for (server, _), (average, _) in zip(rounds(one), rounds(other), strict=True):
            assert distance(server, average) <= 1e-14


def test_apfls_share_is_learned_and_stays_in_its_range():
    with federation(APFL(optimizer=SGD(lr=0.5, momentum=0.9), mix=0.9, adaptive="batch")) as running:
        found = [float(states[k].mix) for _, states in rounds(running, 4) for k in range(3)]
        assert all(0 <= a <= 1 for a in found)
        assert {0.0, 1.0} & set(found)  # at least one is held at an end
        assert any(0 < a < 1 and a != 0.9 for a in found)
    with federation(APFL(optimizer=PLAIN)) as running:
        (_, first), (_, second) = rounds(running, 2)
        assert [float(first[k].mix) for k in range(3)] == [0.5] * 3  # v_k = w_k at the only batch that counts
        assert all(float(second[k].mix) not in (0.5, 0.0, 1.0) for k in range(3))
    mix = blend({"p": torch.tensor([2.0])}, {"p": torch.tensor([6.0])}, torch.tensor(0.25))
    assert mix["p"].tolist() == [5.0]  # a quarter of 2 and three quarters of 6


# ---- what stays at home


def sent(running, states, ids=(0, 2)):
    """The message, and what these clients send together in each phase of the present round."""
    setting, found = running.engine.setting, []
    for trained, phase in enumerate(running.algorithm.phases(0, 1)):
        ctx = running.context(phase, len(ids))
        message, sink = running.message(ctx), Sink(list(ids))
        running.engine.cohort(ctx.round, trained, message, states, setting.plans(ctx.round, trained, ids), sink)
        found.append(sink.mean())
        states = {**states, **sink.states}
    return message, found


@sharing_method
def test_private_state_is_neither_sent_nor_felt_by_what_is_sent(method):
    """Message and update have the model's names alone, and do not change by a bit when the private state is another."""
    with federation(method(optimizer=PLAIN), images=True) as running:
        rounds(running, 1)
        message, [update] = sent(running, dict(running.states))
        names = trees.named_leaves(running.task.initial).keys()
        assert trees.named_leaves(message).keys() == trees.named_leaves(update).keys() == names
        others = {
            k: trees.tree_map(lambda t: t * 0.9 if t.is_floating_point() else t, s) for k, s in running.states.items()
        }
        bits(sent(running, others)[1][0], update)


def test_fedproto_moves_sums_and_counts_only():
    with federation(FedProto(optimizer=PLAIN)) as running:
        rounds(running, 1)
        message, (after_training, update) = sent(running, dict(running.states))
        shapes = {k: tuple(v.shape) for k, v in trees.named_leaves((message, update)).items()}
        assert shapes == {"0/means": (4, 6), "0/known": (4,), "1/features": (4, 6), "1/counts": (4,)}
        held = running.data.counts()[[0, 2]].mean(0)
        assert after_training["counts"].tolist() == update.counts.tolist() == held.tolist()


@every_method
def test_a_client_that_is_not_asked_keeps_its_state_bit_for_bit(method):
    with federation(method(optimizer=PLAIN), participation=Participation(clients=1)) as running:
        before, seen = {}, set()
        for _ in range(4):
            [chosen] = running.draw(running.algorithm.phases(0, 1)[0])
            [(_, after)] = rounds(running, 1)
            assert after.keys() == before.keys() | {chosen}
            for k, state in after.items():
                assert trees.equal(state, before.get(k, ())) == (k != chosen)
            before, seen = after, seen | {chosen}
        assert len(seen) > 1


@every_method
def test_a_client_that_never_took_part_is_judged_too(method):
    """By the generic model of the day; FedProto has none, and takes the initial one."""
    with federation(method(optimizer=PLAIN), participation=Participation(clients=1)) as running:
        rounds(running, 1)
        new = next(k for k in range(3) if k not in running.states)
        if method is FedProto:
            state = running.engine.setting.state(running.context(), running.server, running.states, new)
            bits(state, running.task.initial)
            bits(running.variables(), running.task.initial)
        else:
            assert distance(running.variables(new), running.server) <= 1e-15
            assert distance(running.server, running.task.initial) > 1e-3
            bits(running.variables(), running.server)
        assert running.score()["personal"]["clients"] == 3


@every_method
def test_personal_models_differ_from_the_generic_one_and_from_each_other(method):
    with federation(method(optimizer=PLAIN), images=True) as running:
        rounds(running, 2)
        found, part = [running.variables(k) for k in (None, 0, 2)], "head." if method is FedROD else "conv"
        for i, one in enumerate(found):
            for other in found[i + 1 :]:
                same = [torch.equal(one.params[k], v) for k, v in other.params.items() if k.startswith(part)]
                assert same
                assert not any(same)
        if method is not FedROD:  # its backbone is everyone's, statistics included
            assert not torch.equal(found[1].buffers["bn1.running_mean"], found[2].buffers["bn1.running_mean"])


@every_method
def test_every_client_moves_every_tensor_of_its_state(method):
    """From its first round to its second; among 16 examples a hidden unit may be dead for one class, not a whole tensor."""
    with federation(method(optimizer=PLAIN), sizes=(9, 12), images=True) as running:
        (_, first), (_, second) = rounds(running, 2)
        for k in range(2):
            for name, value in trees.named_leaves(first[k]).items():
                assert not torch.equal(value, trees.named_leaves(second[k])[name]), name


# ---- FedProto's prototypes


def test_a_class_that_nobody_in_the_cohort_holds_keeps_its_prototype():
    """Client 1 holds one example, of one class: when it is alone in the cohort, the others' prototypes stay."""
    with federation(FedProto(optimizer=PLAIN)) as running:
        rounds(running, 1)
        before = running.server
        [label] = np.flatnonzero(running.data.counts()[1])
        running.holders, running.cohort_size = np.array([1]), 1
        rounds(running, 1)
        changed = (running.server.means != before.means).any(1)
        assert changed.nonzero().flatten().tolist() == [label]
        assert torch.equal(running.server.known, before.known)


def test_fedproto_predicts_the_nearest_prototype_that_there_is():
    with federation(FedProto(optimizer=PLAIN)) as running:
        rounds(running, 1)
        means = running.server.means
        running.server = running.server._replace(known=torch.tensor([1.0, 1.0, 0.0, 1.0]).double())
        x = running.data.prepare(running.data.test["x"], torch.float64)
        h = network(running, running.states[2]).eval().features(x)
        far = torch.cdist(h, means)
        far[:, 2] = torch.inf
        ctx = running.context()
        z = running.algorithm.predict(ctx, running.server, running.states[2], x)
        assert torch.equal(z.argmax(1), far.argmin(1))
        assert len(z.argmax(1).unique()) > 1
        assert torch.equal(running.module(2)(running.data.test["x"].double()), z)  # what is exported is what is judged
        other = running.algorithm.readings()["classifier"]
        z = other.predict(ctx, running.server, running.states[2], x)
        torch.testing.assert_close(z, network(running, running.states[2]).eval()(x))
        assert other.readings() == {}
        assert set(running.score()["readings"]) == {"classifier"}


NO_BIAS = """
import torch
class Net(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.body, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, num_classes, bias=False)
    def {name}(self, x):
        return self.body(x).relu()
    def forward(self, x):
        return self.head(self.body(x).relu())
"""


def on_a_users_network(algorithm, folder, name="features"):
    """A federation on a network without a bias in its classifier, and with this name for what gives features."""
    (folder / "net.py").write_text(NO_BIAS.format(name=name))
    return federation(algorithm, model=UserModel(target=f"{folder / 'net.py'}:Net"))


@pytest.mark.parametrize("method", [FedProto, FedROD])
def test_a_network_without_features_is_refused(method, tmp_path):
    with pytest.raises(ConfigError, match=f"{method.__name__} works on features"):
        on_a_users_network(method(), tmp_path, "hidden")


def test_the_nearest_prototype_needs_a_bias(tmp_path):
    with pytest.raises(ConfigError, match="needs a classifier with a bias"):
        on_a_users_network(FedProto(), tmp_path)


@pytest.mark.parametrize("algorithm", [FedProto(prediction="classifier"), FedROD()])
def test_others_need_none(algorithm, tmp_path):
    with on_a_users_network(algorithm, tmp_path) as running:
        rounds(running, 1)
        assert running.score()["personal"]["clients"] == 3


@pytest.mark.parametrize(
    ("method", "options"),
    [(Ditto, {"lam": -0.1}), (Ditto, {"lam": float("nan")}), (Ditto, {"lam": float("inf")}), (PFedMe, {"lam": 0.0}),
     (PFedMe, {"inner_steps": 0}), (PFedMe, {"lr_shared": 0.0}), (PFedMe, {"server_lr": -1.0}), (APFL, {"mix": 1.1}),
     (APFL, {"mix": -0.1}), (APFL, {"optimizer": Partition(parts={"": SGD()})}), (FedProto, {"lam": -1.0})],
)  # fmt: skip
def test_impossible_options_are_refused(method, options):
    with pytest.raises(ConfigError, match=f"{method.__name__}.{next(iter(options))} must be"):
        method(**options)


def test_optimizers_that_fit():
    parts = Partition(parts={"": SGD(lr=LR), "head": Adam()})
    with federation(APFL(optimizer=parts, adaptive="never")) as running:
        assert all(float(state.mix) == 0.5 for state in rounds(running, 1)[0][1].values())
    with federation(APFL(optimizer=Adam(lr=0.01))) as running:
        assert all(float(state.mix) != 0.5 for state in rounds(running, 2)[1][1].values())
