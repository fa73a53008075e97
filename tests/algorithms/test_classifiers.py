"""Post-hoc corrections, cRT, CCVR and CReFF against NumPy oracles, by hand, and in their limits."""

import contextlib
import dataclasses
import json

import contract_problem
import numpy as np
import pytest
import torch
from contract_problem import PLAIN, PROBLEMS, ROUNDS, distance, federated, federation, outcome
from oracles import classifier_oracle as oracle
from torch.nn import functional as F

import fedtail
from fedtail import EngineOptions, Experiment, FedAvg, LocalWork, trees
from fedtail.algorithms import creff
from fedtail.algorithms.ccvr import CCVR, Moments, gaussians, root
from fedtail.algorithms.creff import CReFF
from fedtail.algorithms.crt import CRT, balance
from fedtail.algorithms.posthoc import PostHoc
from fedtail.config import Data
from fedtail.data.longtail import Exponential
from fedtail.data.partition import DirichletMultinomial
from fedtail.engines.base import Sink
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.heads import fit_head
from fedtail.models.specs import MLP, UserModel


def before_the_last_round(case, problem):
    """A federation of a case that has one round left."""
    running = federation(case, problem)
    for _ in range(ROUNDS - 1):
        running.advance(running.step())
    return running


def everything(running):
    """Features of all training examples at the present model in evaluation mode [N, d], labels, owners; NumPy."""
    data, model = running.data, contract_problem.model_of(running.server)
    rows = data.gather(torch.arange(len(data.columns["y"])), torch.float64, {}, ("x", "y"))
    h = running.worker.apply(model, rows["x"], part="features", train=False)[0]
    return h.numpy(), rows["y"].numpy(), data.owners


def head(params):
    return params["head.weight"].numpy(), params["head.bias"].numpy()


def phase_sink(running, phase):
    """What a phase's cohort sends at the present state."""
    ids = running.draw(phase)
    ctx = running.context(phase, len(ids))
    plans = running.engine.setting.plans(ctx.round, 0, ids)
    sink = Sink(list(plans))
    running.engine.cohort(ctx.round, 0, running.message(ctx), running.states, plans, sink)
    return ctx, sink


# ---- cRT


def test_balanced_weights_by_hand():
    """Ten examples, three classes held: an example counts 10 / (3 n_c), so that each class has the share 1/3."""
    found = balance(torch.tensor([6.0, 3.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([10 / 18, 10 / 9, 0.0, 10 / 3], dtype=torch.float64))


@pytest.mark.parametrize("name", PROBLEMS)
def test_crt_without_retraining_is_fedavg_exactly(name, monkeypatch):
    monkeypatch.setitem(contract_problem.CASES, "crt0", CRT(optimizer=PLAIN, retrain_rounds=0))
    avg, crt = outcome("fedavg", name), outcome("crt0", name)
    assert all(trees.equal(a, b) for a, b in zip(avg.servers, crt.servers, strict=True))
    assert avg.records == crt.records


@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_crt_trains_as_fedavg_and_then_the_head_alone(name):
    avg, crt = outcome("fedavg", name), outcome("crt", name)
    assert all(trees.equal(a, b) for a, b in zip(avg.servers[:-1], crt.servers[:-1], strict=True))
    before, after = crt.servers[-2], crt.servers[-1]
    assert trees.equal(after.buffers, before.buffers)
    assert [k for k, v in after.params.items() if not torch.equal(v, before.params[k])] == ["head.weight", "head.bias"]


def test_crt_retrains_a_new_head_on_balanced_classes():
    with contextlib.closing(before_the_last_round("crt", "dropout")) as running:
        h, y, owners = everything(running)
        plans = running.engine.setting.plans(
            running.context().round, 0, running.draw(running.algorithm.phases(2, 3)[0])
        )
        clients = {k: (owners[k], np.split(p.order, np.cumsum(p.lengths)[:-1])) for k, p in plans.items()}
        fresh = head(running.constants)
        running.step()
        expected = oracle.crt_round(*fresh, h, y, clients, lr=0.1, momentum=0.5)
        for found, wanted in zip(head(running.server.params), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    bound = 1 / np.sqrt(6)  # PyTorch's initial values of a linear layer with six inputs
    assert 0.8 * bound < abs(fresh[0]).max() < bound


def test_crt_goes_on_with_the_head_of_the_round_before(monkeypatch):
    monkeypatch.setitem(contract_problem.CASES, "crt2", CRT(optimizer=PLAIN, retrain_rounds=2))
    with contextlib.closing(before_the_last_round("crt2", "dropout")) as running:
        h, y, owners = everything(running)
        plans = running.engine.setting.plans(
            running.context().round, 0, running.draw(running.algorithm.phases(2, 3)[0])
        )
        clients = {k: (owners[k], np.split(p.order, np.cumsum(p.lengths)[:-1])) for k, p in plans.items()}
        before = head(running.server.params)
        assert any(abs(a - b).max() > 1e-3 for a, b in zip(before, head(running.constants), strict=True))
        running.step()
        expected = oracle.crt_round(*before, h, y, clients, lr=0.1, momentum=0.5)
        for found, wanted in zip(head(running.server.params), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_crt_sends_only_the_head_when_it_retrains():
    with contextlib.closing(before_the_last_round("crt", "batchnorm")) as running:
        _, sink = phase_sink(running, running.algorithm.phases(2, 3)[0])
        assert list(trees.named_leaves(sink.mean())) == ["params/head.weight", "params/head.bias"]


def test_crt_needs_enough_rounds():
    with pytest.raises(ConfigError, match=r"CRT.retrain_rounds = 4 is more than rounds = 3"):
        Federation(Experiment(rounds=3, algorithm=CRT(retrain_rounds=4)), federated((5, 5), images=False))


# ---- CCVR


@pytest.mark.parametrize("name", ["ragged", "batchnorm"])
def test_ccvr_pools_to_the_moments_of_all_features(name):
    with contextlib.closing(before_the_last_round("ccvr", name)) as running:
        h, y, owners = everything(running)
        phase = running.algorithm.phases(2, 3)[0]
        _, sink = phase_sink(running, phase)
        pooled = trees.tree_map(lambda v: v * sink.total, sink.mean())
        mean, covariance = (v.numpy() for v in gaussians(pooled))
        assert len(sink.answers) == sum(len(own) > 0 for own in owners)  # everyone who holds data
    held = np.concatenate(owners)
    np.testing.assert_allclose(pooled.counts, np.bincount(y[held], minlength=4), atol=1e-12)
    for c in range(4):
        direct = h[held][y[held] == c]
        assert len(direct) >= 2
        np.testing.assert_allclose(mean[c], direct.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(covariance[c], np.cov(direct.T, ddof=1), rtol=0, atol=1e-12)
        clients = [h[own][y[own] == c] for own in owners if (y[own] == c).any()]
        by_client = oracle.pooled_from_clients(clients)
        np.testing.assert_allclose(by_client[0], mean[c], rtol=0, atol=1e-12)
        np.testing.assert_allclose(by_client[1], covariance[c], rtol=0, atol=1e-12)


def rare(number):
    """Data in which class 3 has so many examples with a client."""
    data = federated((9, 7, 12), images=False)
    y = data.columns["y"].clone()
    y[y == 3] = 0
    y[data.owners[1][:number].copy()] = 3
    return dataclasses.replace(data, columns={**data.columns, "y": y})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_ccvr_retrains_the_head_on_what_it_draws(number):
    """Classes with fewer than two examples get no features; the whole calibration is worked out in NumPy."""
    method = CCVR(optimizer=PLAIN, per_class=5, retrain_lr=0.3, retrain_steps=4)
    setting = Experiment(rounds=2, algorithm=method, model=MLP(hidden=(4,)), dtype="float64")
    with contextlib.closing(Federation(setting, rare(number))) as running:
        running.advance(running.step())
        h, y, owners = everything(running)
        noise, before = running.constants.numpy(), running.server
        running.step()
        after = running.server
    held = np.concatenate(owners)
    virtual, labels = [], []
    for c in range(4):
        own = h[held][y[held] == c]
        if len(own) >= 2:
            virtual.append(own.mean(0) + noise @ oracle.symmetric_root(np.cov(own.T, ddof=1)))
            labels += [c] * 5
    assert len(labels) == (15 if number < 2 else 20)
    expected = oracle.fit_head(*head(before.params), np.concatenate(virtual), np.array(labels), 0.3, 4)
    for found, wanted in zip(head(after.params), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
    assert all(torch.equal(v, before.params[k]) for k, v in after.params.items() if not k.startswith("head."))


def test_ccvrs_moments_of_absent_and_single_examples_are_finite():
    """No example: mean and covariance 0; one example h = (1, 2): mean h, covariance 0; two, (0, 0) and (2, 4): by hand."""
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    groups = [torch.zeros(0, 2), one, two]
    mean, covariance = gaussians(
        Moments(
            torch.tensor([0.0, 1.0, 2.0]),
            torch.stack([g.sum(0) for g in groups]),
            torch.stack([g.T @ g for g in groups]),
        )
    )
    assert mean.tolist() == [[0, 0], [1, 2], [1, 2]]
    assert covariance.tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[2, 4], [4, 8]]]
    square = root(covariance)
    torch.testing.assert_close(square @ square, covariance, rtol=0, atol=1e-5)


def test_ccvr_is_fedavg_until_its_last_round():
    avg, ccvr = outcome("fedavg", "batchnorm"), outcome("ccvr", "batchnorm")
    assert all(trees.equal(a, b) for a, b in zip(avg.servers[:-1], ccvr.servers[:-1], strict=True))
    assert "train" not in ccvr.records[-1]
    assert ccvr.records[-1]["calibrate"] == {"clients": 5, "examples": 33}
    unchanged = outcome_of(CCVR(optimizer=PLAIN, retrain_steps=0), "batchnorm")
    assert trees.equal(unchanged.servers[-1], avg.servers[-2])


def outcome_of(algorithm, problem):
    """Runs an algorithm on a problem without keeping the outcome."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contract_problem.CASES, "this", algorithm)
        return outcome.__wrapped__("this", problem)


# ---- CReFF


@pytest.mark.parametrize("name", PROBLEMS)
def test_creffs_model_is_fedavgs_exactly(name):
    avg, found = outcome("fedavg", name), outcome("creff", name)
    assert all(trees.equal(a, b.model) for a, b in zip(avg.servers, found.servers, strict=True))
    assert [r["train"] for r in avg.records] == [r["train"] for r in found.records]
    assert all(r["gradients"]["clients"] == r["train"]["clients"] for r in found.records)


def test_creff_gradients_are_means_over_holders_of_the_training_cohort():
    with contextlib.closing(before_the_last_round("creff", "batchnorm")) as running:
        h, y, owners = everything(running)
        first, second = running.algorithm.phases(2, 3)
        cohort = running.draw(first)
        assert cohort == running.draw(second)
        _, sink = phase_sink(running, first)
        mean, retrained = sink.mean(), head(running.server.head)
    assert sink.total == len(cohort)
    for c in range(4):
        holders = [h[owners[k]][y[owners[k]] == c] for k in cohort if (y[owners[k]] == c).any()]
        assert float(mean.held[c]) == pytest.approx(len(holders) / len(cohort), abs=1e-15)
        expected = sum((oracle.class_gradient(*retrained, own, c) for own in holders), np.zeros((4, 5)))
        np.testing.assert_allclose(mean.rows[c] * sink.total, expected, rtol=0, atol=1e-12)


def by_autograd(h, W, b):
    """Gradients of each class's mean cross-entropy with respect to W and b, as a list of pairs, differentiable in h."""
    losses = [F.cross_entropy(own @ W.T + b, torch.full((len(own),), c)) for c, own in enumerate(h)]
    return [torch.autograd.grad(loss, (W, b), create_graph=True) for loss in losses]


def test_creffs_explicit_gradient_is_autograds():
    rng = np.random.default_rng(3)
    h, W, b = (torch.from_numpy(rng.normal(size=size)) for size in ((3, 5, 4), (3, 4), (3,)))
    found = creff.synthetic_gradients(h, h @ W.T + b)
    for c, (dW, db) in enumerate(by_autograd(h, W.requires_grad_(), b.requires_grad_())):
        torch.testing.assert_close(found[c].detach(), torch.column_stack([dW, db]).detach(), rtol=0, atol=1e-14)
        expected = oracle.class_gradient(W.detach().numpy(), b.detach().numpy(), h[c].numpy(), c)
        np.testing.assert_allclose(found[c].detach(), expected, rtol=0, atol=1e-14)


def test_creffs_distance():
    """Against the oracle; and by hand: opposite rows count 2 (as does the bias's), a row of zeros 1."""
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 3, 3, 5))
    found = creff.distance(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(
        found, [oracle.match_distance(s, g) for s, g in zip(first, second, strict=True)], atol=1e-14
    )
    row = torch.tensor([[[3.0, 4.0, 1.0], [0.0, 0.0, 2.0]]], dtype=torch.float64)
    assert creff.distance(row, -row).tolist() == pytest.approx([5.0], abs=2e-6)


def test_creff_server_against_double_backpropagation():
    """Two steps of the features by differentiating autograd's gradient, then three of a new head in NumPy."""
    with contextlib.closing(before_the_last_round("creff", "ragged")) as running:
        ctx, sink = phase_sink(running, running.algorithm.phases(2, 3)[0])
        mean, server, fresh = sink.mean(), running.server, head(running.constants)
        mean = mean._replace(held=mean.held * torch.tensor([1.0, 1.0, 0.0, 1.0]))  # as if nobody held class 2
        with torch.no_grad():  # as the library calls it
            after = running.algorithm.server_update(ctx, server, mean, torch.tensor(sink.total))
    h = server.features
    W, b = (server.head[k].clone().requires_grad_() for k in ("head.weight", "head.bias"))
    for _ in range(2):
        h, loss = h.clone().requires_grad_(), torch.tensor(0.0, dtype=torch.float64)
        for (dW, db), rows, held in zip(by_autograd(h, W, b), mean.rows, mean.held, strict=True):
            if held > 0:
                for s, g in [*zip(dW, rows[:, :-1] / held, strict=True), (db, rows[:, -1] / held)]:
                    loss = loss + 1 - s @ g / (s.norm() * g.norm() + 1e-6)
        h = (h - 0.1 * torch.autograd.grad(loss, h)[0]).detach()
    assert torch.equal(after.features[2], server.features[2])
    assert not torch.equal(after.features[1], server.features[1])
    torch.testing.assert_close(after.features, h, rtol=0, atol=1e-12)
    labels = np.repeat(np.arange(4), 3)
    expected = oracle.fit_head(*fresh, after.features.flatten(0, 1).numpy(), labels, 0.3, 3)
    for found, wanted in zip(head(after.head), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert trees.equal(after.model, server.model)


def test_creff_fits_features_to_gradients():
    """With enough steps the distance to a real problem's gradients falls to less than a fifth."""
    with contextlib.closing(federation("creff", "ragged")) as running:
        ctx, sink = phase_sink(running, running.algorithm.phases(0, 3)[0])
        mean, server = sink.mean(), running.server
        real = mean.rows / torch.where(mean.held > 0, mean.held, 1.0)[:, None, None]
        method = CReFF(features_per_class=3, match_steps=200, match_lr=0.3, retrain_steps=1)
        after = method.server_update(ctx, server, mean, torch.tensor(sink.total))
    W, b = server.head["head.weight"], server.head["head.bias"]
    gaps = [creff.distance(creff.synthetic_gradients(s.features, s.features @ W.T + b), real) for s in (server, after)]
    held = mean.held > 0
    assert gaps[1][held].sum() < 0.2 * gaps[0][held].sum()


def test_creff_is_judged_with_the_retrained_classifier():
    with contextlib.closing(before_the_last_round("creff", "batchnorm")) as running:
        h, _, _ = everything(running)
        V, b = head(running.server.head)
        data = running.data
        x = data.gather(torch.arange(len(h)), torch.float64, {}, ("x", "y"))["x"]
        ctx = running.context()
        z = running.algorithm.predict(ctx._replace(task=running.worker), running.message(ctx), None, x)
        np.testing.assert_allclose(z, h @ V.T + b, rtol=0, atol=1e-12)
        assert torch.equal(running.variables().params["head.weight"], running.server.head["head.weight"])


# ---- post-hoc corrections

SMALL = Experiment(
    rounds=2, algorithm=FedAvg(), model=MLP(hidden=(5,)), local=LocalWork(steps=3, batch_size=8),
    data=Data(longtail=Exponential(factor=20.0), partition=DirichletMultinomial(clients=4)),
    engine=EngineOptions(name="loop"),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of FedAvg."""
    folder = tmp_path_factory.mktemp("runs") / "fedavg-seed0"
    list(fedtail.run(SMALL, folder))
    return folder


def judged(finished, **options):
    """Post-processes the finished run; returns (record, corrected variables, the run's variables)."""
    setting = dataclasses.replace(SMALL, rounds=1, start=str(finished), algorithm=PostHoc(**options))
    with contextlib.closing(Federation(setting)) as running:
        record = running.step()
        record.update(running.score())
        return record, running.variables(), running.server


def test_tau_norm_divides_rows_by_their_norms(finished):
    """tau = 1: unit rows; tau = 0: the finished model but for its bias, which is dropped."""
    for tau in (0.0, 0.4, 1.0):
        _, found, model = judged(finished, tau=tau)
        expected = oracle.tau_norm(model.params["head.weight"].double().numpy(), tau)
        np.testing.assert_allclose(found.params["head.weight"], expected, rtol=1e-6, atol=0)
        assert not found.params["head.bias"].any()
        assert model.params["head.bias"].any()
        assert torch.equal(found.params["hidden1.0.weight"], model.params["hidden1.0.weight"])
    assert torch.equal(judged(finished, tau=0.0)[1].params["head.weight"], model.params["head.weight"])


def test_logit_adjustment_subtracts_the_log_prior(finished):
    counts = fedtail.read(finished).counts.sum(0)
    shares = counts / counts.sum()
    for options in (dict(prior="shared"), dict(prior="given", given=tuple(map(float, counts)))):
        record, found, model = judged(finished, prediction="logit_adjustment", tau=0.7, **options)
        wanted = model.params["head.bias"].double().numpy() - 0.7 * np.log(shares)
        np.testing.assert_allclose(found.params["head.bias"], wanted, rtol=1e-5)
        assert torch.equal(found.params["head.weight"], model.params["head.weight"])
        np.testing.assert_allclose(record["diagnostics"]["prior"], shares, rtol=1e-6)


def test_logit_adjustment_counts_an_absent_class_as_one_example():
    ctx = contract_context(torch.tensor([6.0, 3.0, 0.0, 0.0]))
    method = PostHoc(prediction="logit_adjustment")
    np.testing.assert_allclose(
        method.diagnostics(ctx, ctx.task.initial)["prior"], np.array([6, 3, 1, 1]) / 11, rtol=1e-7
    )


def contract_context(counts):
    with contextlib.closing(federation("fedavg", "ragged")) as running:
        ctx = running.context()
        return ctx._replace(round=ctx.round._replace(counts=counts))


def test_an_estimated_prior_is_positive_and_follows_the_row_norms(finished):
    record, _, model = judged(finished, prediction="logit_adjustment", prior="estimated")
    prior = np.array(record["diagnostics"]["prior"])
    norms = model.params["head.weight"].norm(dim=1).numpy()
    assert prior.min() > 0
    assert prior.sum() == pytest.approx(1, abs=1e-6)
    assert norms.max() >= 1.1 * norms.min()  # else it would be uniform
    assert np.argsort(prior).tolist() == np.argsort(norms).tolist()


def test_without_a_correction_the_scores_are_the_finished_runs(finished):
    record, found, _ = judged(finished, prediction="logit_adjustment", tau=0.0)
    last = fedtail.read(finished).last
    assert record["test"] == last["test"]
    assert record["local"] == last["local"]
    with contextlib.closing(fedtail.experiment.reopen(finished)) as before:
        assert trees.equal(found, before.variables())


def test_post_hoc_trains_nothing_in_any_engine_and_resumes(finished, tmp_path):
    setting = dataclasses.replace(SMALL, start=str(finished), algorithm=PostHoc())
    records = []
    for name in ("loop", "parallel", "vmap"):
        whole = dataclasses.replace(setting, engine=EngineOptions(name=name))
        records.append([result.record for result in fedtail.run(whole, tmp_path / name)])
    assert records[0] == records[1] == records[2]
    assert json.loads(json.dumps(records[0])) == records[0]
    assert all("train" not in record for record in records[0])
    iterator = fedtail.run(setting, tmp_path / "parts")
    next(iterator)
    iterator.close()
    assert [r.index for r in fedtail.resume(tmp_path / "parts")] == [1]
    for file in ("checkpoint.safetensors", "metrics.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "loop" / file).read_bytes()


@pytest.mark.parametrize("method", [CRT(retrain_rounds=1), CCVR()], ids=lambda m: type(m).__name__)
def test_a_finished_runs_head_can_be_retrained_alone(method, finished):
    setting = dataclasses.replace(SMALL, rounds=1, start=str(finished), algorithm=method)
    with contextlib.closing(Federation(setting)) as running:
        before = running.server
        running.step()
        moved = [k for k, v in running.server.params.items() if not torch.equal(v, before.params[k])]
    assert moved == ["head.weight", "head.bias"]


def test_post_hoc_without_a_finished_run_is_refused():
    with pytest.raises(
        ConfigError, match="algorithm post_hoc trains no backbone in 20 rounds: name a finished run in start"
    ):
        Federation(Experiment(algorithm=PostHoc()))
    for method, count in ((CRT(retrain_rounds=2), "2 rounds"), (CCVR(), "1 round")):
        with pytest.raises(ConfigError, match=f"trains no backbone in {count}: name a finished run in start"):
            Federation(Experiment(rounds=int(count[0]), algorithm=method))


def test_impossible_options_are_refused(finished):
    for options, message in (
        (dict(tau=1.5), r"PostHoc.tau must be in \[0, 1\] for tau_norm, got 1.5"),
        (dict(prediction="logit_adjustment", tau=-1.0), "PostHoc.tau must be in"),
        (dict(prediction="logit_adjustment", prior="given"), "needs the shares"),
        (dict(prediction="logit_adjustment", prior="given", given=(1.0, 0.0)), "numbers > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            PostHoc(**options)
    with pytest.raises(ConfigError, match="has 2 shares, but there are 10 classes"):
        judged(finished, prediction="logit_adjustment", prior="given", given=(1.0, 2.0))
    for method, option, value in ((CRT, "retrain_rounds", -1), (CCVR, "per_class", 0), (CReFF, "match_lr", 0.0)):
        with pytest.raises(ConfigError, match=f"{method.__name__}.* {value}"):
            method(**{option: value})


NO_FEATURES = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__(nn.Linear(input_shape[0], 3), nn.ReLU(), nn.Linear(3, num_classes))
"""


NOT_WHAT_REACHES_THE_HEAD = """
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.first, self.head = nn.Linear(input_shape[0], 3), nn.Linear(3, num_classes)

    def features(self, x):
        return self.first(x)

    def forward(self, x):
        return self.head(self.features(x).relu())
"""


def test_a_model_without_features_or_classifier_is_refused_by_those_who_need_them(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NO_FEATURES)
    data = federated((5, 5), images=False)

    def start(method):
        setting = Experiment(rounds=2, algorithm=method, model=UserModel(target=f"{file}:Net"))
        Federation(setting, data).close()

    start(CRT(retrain_rounds=1))  # works on the logits
    for method in (CCVR(), CReFF()):
        with pytest.raises(ConfigError, match=f"{type(method).__name__} works on features, but Net has no method"):
            start(method)
    file.write_text(NOT_WHAT_REACHES_THE_HEAD)  # before the ReLU, where the classifier is applied after it
    for method in (CCVR(), CReFF()):
        with pytest.raises(ConfigError, match=r"that returns what its classifier is applied to, \[batch, 3\]"):
            start(method)
    file.write_text(NO_FEATURES.replace("nn.Linear(3, num_classes))", "nn.Linear(3, 2 * num_classes), nn.GLU())"))
    with pytest.raises(ConfigError, match="CRT works on the classifier, but the model has no linear layer"):
        start(CRT(retrain_rounds=1))


def test_fitting_a_head_takes_only_classes_with_weight():
    """No weight at all: the head stays, bit for bit."""
    with contextlib.closing(federation("fedavg", "ragged")) as running:
        initial = {k: v for k, v in running.server.params.items() if k.startswith("head.")}
        h = torch.ones((4, 2, 6), dtype=torch.float64)
        unmoved = fit_head(running.worker, initial, h, torch.zeros(4, dtype=torch.float64), 0.5, 3)
        moved = fit_head(running.worker, initial, h, torch.ones(4, dtype=torch.float64), 0.5, 3)
    assert trees.equal(unmoved, initial)
    assert distance(moved, initial) > 1e-3
