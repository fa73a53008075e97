"""FedLoGe: the step against a loop with three optimizers, and what realignment keeps and changes."""

import contextlib

import numpy as np
import pytest
import torch
from contract_problem import federated
from torch import nn
from torch.nn import functional as F

from fedtail import SGD, Evaluation, Experiment, FedAvg, LocalWork, Participation, Phase, trees
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.engines.base import Sink
from fedtail.errors import ConfigError
from fedtail.etf import sparse_etf
from fedtail.evaluate import Judge
from fedtail.experiment import Federation
from fedtail.models.specs import MLP

OPTIONS = {"sparsity": 0.4, "etf_steps": 30, "etf_lr": 1e-3, "optimizer": SGD(lr=0.1, momentum=0.5)}
MODEL = MLP(hidden=(8,))


def run(algorithm=None, data=None, **more):
    experiment = Experiment(rounds=4, algorithm=algorithm or FedLoGe(**OPTIONS), model=MODEL, dtype="float64",
                            local=LocalWork(epochs=2, batch_size=4), **more)  # fmt: skip
    return contextlib.closing(Federation(experiment, data or federated((6, 4, 8), images=False)))


def by_hand(running, order, again=False):
    """The next round by nn.Module and torch's own SGD: the new server's parameters and the private heads.

    Features once a batch, before any step (`again`: anew for each head); then one step on each of three losses, in this order.
    """
    setting, server, ctx = running.engine.setting, running.server.params, running.context()
    fixed, privates = running.constants["weight"], {}
    total, sums = 0, {k: torch.zeros_like(v) for k, v in server.items()}
    for number, plan in setting.plans(ctx.round, 0, range(setting.data.clients)).items():
        own = setting.state(ctx, running.server, running.states, number)
        nets = {"theta": nn.Linear(5, 8).double(), "psi": nn.Linear(8, 4).double(), "phi": nn.Linear(8, 4).double()}
        for name, place, values in (("theta", "hidden1.0", server), ("psi", "head", server), ("phi", "head", own)):
            nets[name].load_state_dict({k: values[f"{place}.{k}"] for k in ("weight", "bias")})
        optimizers = {name: torch.optim.SGD(net.parameters(), 0.1, 0.5) for name, net in nets.items()}
        for index in torch.from_numpy(plan.order).split(plan.lengths.tolist()):
            x, y = setting.data.columns["x"][index].double(), setting.data.columns["y"][index]
            h = torch.relu(nets["theta"](x))
            for name in order:
                if again and name != "theta":
                    h = torch.relu(nets["theta"](x))
                z = h @ fixed.T if name == "theta" else nets[name](h.detach())
                optimizers[name].zero_grad()
                F.cross_entropy(z, y).backward()
                optimizers[name].step()
        total += len(setting.data.owners[number])
        for name, place in (("theta", "hidden1.0"), ("psi", "head")):
            for key, value in nets[name].state_dict().items():
                sums[f"{place}.{key}"] += len(setting.data.owners[number]) * value
        privates[number] = {f"head.{key}": value for key, value in nets["phi"].state_dict().items()}
    return {k: v / total for k, v in sums.items()}, privates


@pytest.mark.parametrize(
    "order", [("theta", "psi", "phi"), ("theta", "phi", "psi"), ("phi", "psi", "theta")], ids="-".join
)
def test_a_round_is_the_loop_of_the_paper(order):
    """The mean of theta and psi is by examples; with features of before the step, the order of the three does not matter."""
    with run() as running:
        expected = by_hand(running, order)
        running.step()
        torch.testing.assert_close(running.server.params, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dict(running.states), expected[1], rtol=1e-10, atol=1e-12)


def test_the_heads_step_on_the_features_of_before_the_step():
    with run() as running:
        (before, firsts), (anew, others) = (by_hand(running, ("theta", "psi", "phi"), again) for again in (False, True))
    assert torch.equal(before["hidden1.0.weight"], anew["hidden1.0.weight"])
    assert not torch.allclose(before["head.weight"], anew["head.weight"], rtol=1e-3)
    assert not torch.allclose(firsts[0]["head.weight"], others[0]["head.weight"], rtol=1e-3)


def test_everything_but_the_frozen_head_trains():
    with run(participation=Participation(clients=1)) as running:
        before, fixed = running.server.params, running.constants["weight"].clone()
        [chosen] = running.draw(Phase())
        first = running.engine.setting.state(running.context(), running.server, {}, chosen)
        running.step()
        assert not any(torch.equal(value, before[name]) for name, value in running.server.params.items())
        assert list(running.states) == [chosen]
        assert not any(torch.equal(value, first[name]) for name, value in running.states[chosen].items())
        assert torch.equal(running.constants["weight"], fixed)


def test_no_gradient_of_the_two_trained_heads_reaches_the_backbone():
    """With V = 0 the first term's gradient in the features, (softmax - Y) V^T / B, is 0: theta must stay, bit for bit."""
    with run() as running:
        running.constants["weight"].zero_()
        before = running.server.params
        running.step()
        for name, value in running.server.params.items():
            assert torch.equal(value, before[name]) == name.startswith("hidden1."), name


def test_the_frozen_head_is_the_sparse_simplex_and_stays():
    with run() as running:
        before = running.constants["weight"].clone()
        zeros = int((before == 0).sum())
        running.advance(running.step())
        assert torch.equal(running.constants["weight"], before)
        assert zeros == int(0.4 * 4 * 8)
        assert not running.constants["bias"].any()
    assert sparse_etf(4, 8, sparsity=0.4, steps=30, lr=1e-3).shape == before.shape


def test_private_heads_differ_stay_at_home_and_wait_for_their_client():
    with run(participation=Participation(clients=1)) as running:
        seen: dict[int, dict[str, torch.Tensor]] = {}
        for _ in range(4):
            record = running.step()
            [now] = [i for i in running.states if i not in seen or not trees.equal(running.states[i], seen[i])]
            for other, state in seen.items():
                assert other == now or trees.equal(running.states[other], state)
            seen[now] = running.states[now]
            running.advance(record)
        assert len(seen) > 1
        message = running.message(running.context())
        assert trees.named_leaves(message).keys() == {f"params/{k}" for k in running.task.initial.params}
        firsts = [running.engine.setting.state(running.context(), message, {}, i)["head.weight"] for i in range(3)]
        assert not torch.equal(firsts[0], firsts[1])


def test_a_round_moves_what_fedavg_moves(monkeypatch):
    """Down and up: the same tensors, the same bytes, and nothing of the private heads."""
    moved, add = [], Sink.add

    def spy(sink, result):
        moved.append({name: value.nbytes for name, value in trees.named_leaves(result.update).items()})
        add(sink, result)

    monkeypatch.setattr(Sink, "add", spy)
    found = []
    for algorithm in (FedAvg(), None):
        with run(algorithm) as running:
            message = running.message(running.context())
            moved.append({name: value.nbytes for name, value in trees.named_leaves(message).items()})
            running.step()
        found.append(list(moved))
        moved.clear()
    assert found[0] == found[1]
    assert len(found[0]) == 4  # the message and three updates
    assert found[0][0].keys() == {f"params/{place}.{k}" for place in ("hidden1.0", "head") for k in ("weight", "bias")}


def heads(**options):
    """The generic and a personal head of a trained run, with psi and phi of the same client."""
    with run(FedLoGe(**{**OPTIONS, **options})) as running:
        running.advance(running.step())
        variables = [running.variables(None).params, running.variables(2).params]
        psi = {k: running.server.params[f"head.{k}"] for k in ("weight", "bias")}
        phi = {k: running.states[2][f"head.{k}"] for k in ("weight", "bias")}
        found = [{k: v[f"head.{k}"] for k in ("weight", "bias")} for v in variables]
        return *found, psi, phi, running.constants


def test_generic_realignment():
    generic, _, psi, _, constants = heads()
    torch.testing.assert_close(generic["weight"].norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(F.normalize(generic["weight"], dim=1), F.normalize(psi["weight"], dim=1))
    assert not generic["bias"].any()
    kept, _, psi, _, _ = heads(bias="keep", constant=1.7)
    torch.testing.assert_close(kept["weight"], 1.7 * generic["weight"])
    assert torch.equal(kept["bias"], psi["bias"])
    raw, *_ = heads(generic_head="raw")
    assert torch.equal(raw["weight"], psi["weight"])
    assert torch.equal(raw["bias"], psi["bias"])
    fixed, *_ = heads(generic_head="fixed")
    assert torch.equal(fixed["weight"], constants["weight"])


def test_personal_realignment():
    _, sum_, psi, phi, _ = heads()
    _, realigned, _, _, _ = heads(personal_head="realigned")
    lengths = phi["weight"].norm(dim=1)
    torch.testing.assert_close(realigned["weight"].norm(dim=1), psi["weight"].norm(dim=1) * lengths)
    torch.testing.assert_close(F.normalize(realigned["weight"], dim=1), F.normalize(psi["weight"], dim=1))
    assert torch.equal(realigned["bias"], psi["bias"])
    torch.testing.assert_close(sum_["weight"], realigned["weight"] + phi["weight"])
    torch.testing.assert_close(sum_["bias"], psi["bias"] + phi["bias"])
    _, other, _, _, _ = heads(personal_head="realigned", personal_bias="private")
    assert torch.equal(other["bias"], phi["bias"])
    _, during, _, _, _ = heads(personal_head="raw+private")
    torch.testing.assert_close(during["weight"], psi["weight"] + phi["weight"])
    _, private, _, _, _ = heads(personal_head="private")
    assert torch.equal(private["weight"], phi["weight"])


def labels(head, h):
    return F.linear(h, head["weight"], head["bias"]).argmax(1)


H = torch.randn(500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_a_bias_the_constant_decides_nothing():
    generic, _, psi, *_ = heads()
    small, *_ = heads(constant=0.01)
    large, *_ = heads(constant=70.0)
    assert torch.equal(labels(generic, H), labels(small, H))
    assert torch.equal(labels(generic, H), labels(large, H))
    assert not torch.equal(labels(generic, H), labels({**psi, "bias": 0 * psi["bias"]}, H))  # but realignment does


@contextlib.contextmanager
def with_lengths(psi, phi):
    """A trained run in which psi and the private head of client 2 have rows of this length; yields it with those two."""
    with run() as running:
        running.advance(running.step())
        own = dict(running.states[2])
        params = dict(running.server.params)
        for head, length in ((params, psi), (own, phi)):
            head["head.weight"] = length * F.normalize(head["head.weight"], dim=1)
        running.server, running.states[2] = running.server._replace(params=params), own
        yield running, params, own


def test_rows_of_one_length_stay_what_they_are():
    with with_lengths(3.0, 1.0) as (running, psi, _):
        generic, personal = running.variables(None).params, heads_of(running, "realigned")
        torch.testing.assert_close(3 * generic["head.weight"], psi["head.weight"], rtol=1e-12, atol=0)
        raw = {"weight": psi["head.weight"], "bias": torch.zeros(4, dtype=torch.float64)}
        assert torch.equal(labels({k: generic[f"head.{k}"] for k in ("weight", "bias")}, H), labels(raw, H))
        torch.testing.assert_close(personal["head.weight"], psi["head.weight"], rtol=1e-12, atol=0)


def heads_of(running, personal_head):
    """Client 2's model as another setting reads it, from psi, phi and the frozen head alone: there is no client and no data."""
    other = FedLoGe(**{**OPTIONS, "personal_head": personal_head})
    ctx = running.context()
    assert ctx.client is None
    return other.variables(ctx, running.server, running.states[2]).params


def test_realignment_changes_nothing_it_is_given():
    with run() as running:
        running.advance(running.step())
        server, state, constants = (trees.clone(t) for t in (running.server, running.states[2], running.constants))
        for client in (None, 2):
            params = running.variables(client).params
            params["head.weight"].zero_()
            params["head.bias"].zero_()
        heads_of(running, "realigned")
        assert trees.equal(running.server, server)
        assert trees.equal(running.states[2], state)
        assert trees.equal(running.constants, constants)


def judge(running, mask):
    """Labels of each client's local test set by its own model."""
    ctx = running.context()
    options = Evaluation(label_mask=mask)
    found = Judge(
        running.engine, ctx.round, running.constants, running.message(ctx), running.states, options, np.arange(0)
    )
    return found.each(running.algorithm, True, range(running.data.clients))


@pytest.mark.parametrize("dead", [False, True], ids=["features", "h = 0"])
@pytest.mark.parametrize("mask", ["train", "test"])
def test_a_masked_class_is_never_predicted(mask, dead):
    """Also where all features are 0, so that the bias alone speaks and a mask on the weights would do nothing."""
    with run() as running:
        running.advance(running.step())
        data, masked = running.data, 0
        held = data.counts() if mask == "train" else data.test_counts()
        for c in range(4):
            params = {k: v.clone() for k, v in running.server.params.items()}
            params["head.bias"][c] += 1e3  # everybody wants this class
            params["hidden1.0.bias"] -= 1e3 * dead
            running.server = running.server._replace(params=params)
            assert all((found == c).all() for found in judge(running, "none"))
            for found, own in zip(judge(running, mask), held, strict=True):
                assert (found == c).all() if own[c] else np.isin(found, np.flatnonzero(own)).all()
                masked += not own[c]
            params["head.bias"][c] -= 1e3
        assert masked


def test_with_all_classes_at_home_the_mask_changes_nothing():
    data = federated((40, 30, 50), images=False)
    assert (data.counts() > 0).all()
    with run(data=data) as running:
        running.advance(running.step())
        for plain, masked in zip(judge(running, "none"), judge(running, "train"), strict=True):
            assert np.array_equal(plain, masked)


def test_a_row_of_zeros_is_left_alone():
    with run() as running:
        params = dict(running.server.params)
        params["head.weight"] = params["head.weight"].clone()
        params["head.weight"][1] = 0
        running.server = running.server._replace(params=params)
        assert torch.isfinite(running.variables(None).params["head.weight"]).all()


def test_the_authors_frozen_bias_is_an_option():
    with run(FedLoGe(**{**OPTIONS, "fixed_bias": True})) as running:
        bias = running.constants["bias"]
        assert 0 < float(bias.abs().max()) <= 8**-0.5


def test_the_other_heads_are_read_too():
    assert list(FedLoGe().readings()) == ["fixed", "raw"]
    assert list(FedLoGe(generic_head="raw").readings()) == ["realigned", "fixed"]


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"norm": 0.0}, {"etf_steps": -1}, {"etf_lr": 0.0},
                                     {"constant": 0.0}])  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(ConfigError, match="FedLoGe"):
        FedLoGe(**options)


def test_a_model_with_fewer_features_than_classes_is_refused():
    with pytest.raises(ConfigError, match="wider features"):
        Federation(Experiment(algorithm=FedLoGe(), model=MLP(hidden=(3,))), federated((6, 4, 8), images=False))
