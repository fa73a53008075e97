"""FedLoGe: the step against a loop with three optimizers, and what realignment keeps and changes."""

import contextlib

import pytest
import torch
from contract_problem import federated
from torch import nn
from torch.nn import functional as F

from fedtail import SGD, Experiment, FedAvg, LocalWork, Participation, trees
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.errors import ConfigError
from fedtail.etf import sparse_etf
from fedtail.experiment import Federation
from fedtail.models.specs import MLP

OPTIONS = {"sparsity": 0.4, "etf_steps": 30, "etf_lr": 1e-3, "optimizer": SGD(lr=0.1, momentum=0.5)}
MODEL = MLP(hidden=(8,))


def run(algorithm=None, **more):
    experiment = Experiment(rounds=4, algorithm=algorithm or FedLoGe(**OPTIONS), model=MODEL, dtype="float64",
                            local=LocalWork(epochs=2, batch_size=4), **more)  # fmt: skip
    return contextlib.closing(Federation(experiment, federated((6, 4, 8), images=False)))


def test_a_round_is_the_loop_of_the_paper():
    """Features once a batch, before the step; three losses, three SGDs; the mean of theta and psi by examples."""
    with run() as running:
        before = running.server
        setting = running.engine.setting
        plans = setting.plans(running.context().round, 0, [0, 1, 2])
        ctx = running.context()
        start = {i: setting.state(ctx, before, running.states, i) for i in plans}
        fixed = running.constants["weight"]
        running.step()
        total, sums = 0, {k: torch.zeros_like(v) for k, v in before.params.items()}
        for number, plan in plans.items():
            size = len(setting.data.owners[number])
            net = setting.task.module
            backbone, psi, phi = (
                nn.Linear(*net.hidden1[0].weight.shape[::-1]).double(),
                nn.Linear(8, 4).double(),
                nn.Linear(8, 4).double(),
            )
            backbone.load_state_dict({k: before.params[f"hidden1.0.{k}"] for k in ("weight", "bias")})
            psi.load_state_dict({k: before.params[f"head.{k}"] for k in ("weight", "bias")})
            phi.load_state_dict({k: start[number][f"head.{k}"] for k in ("weight", "bias")})
            optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.5) for m in (backbone, psi, phi)]
            offset = 0
            for n in plan.lengths:
                index = torch.from_numpy(plan.order[offset : offset + n])
                offset += int(n)
                x = setting.data.columns["x"][index].double().flatten(1)
                y = setting.data.columns["y"][index]
                h = torch.relu(backbone(x))
                losses = [
                    F.cross_entropy(h @ fixed.T, y),
                    F.cross_entropy(psi(h.detach()), y),
                    F.cross_entropy(phi(h.detach()), y),
                ]
                for optimizer, loss in zip(optimizers, losses, strict=True):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            total += size
            for key, value in {**{f"hidden1.0.{k}": v for k, v in backbone.state_dict().items()},
                               **{f"head.{k}": v for k, v in psi.state_dict().items()}}.items():  # fmt: skip
                sums[key] += size * value
            for key, value in phi.state_dict().items():
                torch.testing.assert_close(running.states[number][f"head.{key}"], value, rtol=1e-10, atol=1e-12)
        for key, value in sums.items():
            torch.testing.assert_close(running.server.params[key], value / total, rtol=1e-10, atol=1e-12)


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
    with run(FedAvg()) as average:
        assert trees.num_bytes(average.message(average.context())) == trees.num_bytes(message)


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
