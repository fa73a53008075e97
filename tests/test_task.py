"""Task and worker: what runs a network without owning its weights."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedtail import trees
from fedtail.algorithm import as_tensor
from fedtail.errors import ConfigError, TrainingError
from fedtail.models.layers import Dropout, Network
from fedtail.models.small import MLP
from fedtail.optim import SGD, Adam
from fedtail.seeds import Stream, generator
from fedtail.task import Variables, build_task


class Normed(nn.Module):
    """A user's own network: BatchNorm, and two torch.nn.Dropout layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.25))
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.drop(self.body(x)))


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


def task(build=Normed, seed=0, shape=(5,), classes=3, **more):
    return build_task(build, classes, shape, seed=seed, dtype=torch.float64, **more)


def inputs(n=8, seed=0):
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks(made, n, seed=0):
    draws = made.draws(n)
    return {
        name: as_tensor(d.sample(generator(seed, Stream.DRAWS), 1)[0], torch.float64, made.device)
        for name, d in draws.items()
    }


def test_what_a_task_says():
    made = task()
    assert list(made.initial.params) == [
        "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "out.weight", "out.bias",
    ]  # fmt: skip
    assert list(made.initial.buffers) == ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]
    assert made.classifier == "out"
    assert made.batch_statistics
    assert made.dropout == {"body.3": ((6,), 0.25), "drop": ((6,), 0.5)}
    assert [len(s) for s in made.stages] == [1] * 6  # a plain module: each parameter is a stage
    assert all(v.dtype == torch.float64 for v in made.initial.params.values())
    assert not task(lambda: MLP((5,), 3, (4,), 0.0)).batch_statistics
    assert task(lambda: MLP((5,), 3, (4,), 0.0)).stages[-1] == ("head.weight", "head.bias")


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = task(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert trees.equal(first.initial, task(seed=0).initial)
    other = task(seed=1)
    assert all(
        not torch.equal(first.initial.params[k], other.initial.params[k])
        for k in ("out.weight", "out.bias", "body.0.weight")
    )


@pytest.mark.parametrize("kind", ["eager", "vmap"])
def test_apply_equals_the_plain_module_and_modifies_nothing(kind):
    """Training mode with BatchNorm: same output and the same new statistics as the module itself."""
    made = task(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    plain = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    plain.load_state_dict({**made.initial.params, **made.initial.buffers})
    worker, variables, x = made.worker(kind), trees.clone(made.initial), inputs()
    for _ in range(2):
        before = trees.clone((variables, x))
        out, new = worker.apply(variables, x)
        assert trees.equal((variables, x), before)
        torch.testing.assert_close(out, plain(x), rtol=0, atol=0)
        for name, value in plain.named_buffers():
            assert torch.equal(new.buffers[name], value), name
        assert trees.equal(new.params, variables.params)
        variables = new
    assert int(variables.buffers["1.num_batches_tracked"]) == 2
    plain.eval()
    out, same = worker.apply(variables, x, train=False)
    assert torch.equal(out, plain(x))
    assert trees.equal(same, variables)


def test_apply_runs_a_part_and_ignores_names_it_does_not_know():
    made = task(lambda: MLP((5,), 3, (4,), 0.0))
    worker, x = made.worker(), inputs()
    params = {**made.initial.params, "personal.weight": torch.zeros(3, dtype=torch.float64)}
    variables = Variables(params, {})
    features, _ = worker.apply(variables, x, part="features")
    logits, kept = worker.apply(variables, features, part="head")
    assert features.shape == (8, 4)
    assert torch.equal(logits, worker.apply(variables, x)[0])
    assert "personal.weight" in kept.params


def test_tied_parameters_are_one():
    """Both uses get gradients: the sum of what two separate weights would get."""
    made = task(Tied)
    assert list(made.initial.params) == ["first.weight", "first.bias", "second.bias", "out.weight", "out.bias"]
    worker, x = made.worker(), inputs()

    def loss(params):
        return worker.apply(Variables(params, {}), x)[0].square().sum(), ()

    _, _, grads = worker.value_and_grad(loss, made.initial.params)
    p = {k: v.clone().requires_grad_() for k, v in made.initial.params.items()}
    again = p["first.weight"].detach().clone().requires_grad_()
    hidden = F.relu(F.linear(F.relu(F.linear(x, p["first.weight"], p["first.bias"])), again, p["second.bias"]))
    F.linear(hidden, p["out.weight"], p["out.bias"]).square().sum().backward()
    torch.testing.assert_close(grads["first.weight"], p["first.weight"].grad + again.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads["out.bias"], p["out.bias"].grad, rtol=1e-12, atol=1e-12)


def test_a_users_dropout_uses_the_declared_draw():
    made, x = task(), inputs()
    wanted = made.draws(8)
    assert {n: (d.kind, d.shape, d.per_example, d.p) for n, d in wanted.items()} == {
        "dropout:body.3": ("bernoulli", (8, 6), True, 0.75),
        "dropout:drop": ("bernoulli", (8, 6), True, 0.5),
    }
    assert isinstance(made.module.drop, Dropout)
    worker, drawn = made.worker(), masks(made, 8)
    out, _ = worker.apply(made.initial, x, draws=drawn)
    p, b = made.initial
    hidden = F.linear(x, p["body.0.weight"], p["body.0.bias"])
    hidden = F.batch_norm(hidden, b["body.1.running_mean"].clone(), b["body.1.running_var"].clone(), p["body.1.weight"],
                          p["body.1.bias"], training=True)  # fmt: skip
    hidden = F.relu(hidden) * drawn["dropout:body.3"] / 0.75 * drawn["dropout:drop"] / 0.5
    torch.testing.assert_close(out, F.linear(hidden, p["out.weight"], p["out.bias"]), rtol=1e-12, atol=1e-12)
    assert torch.equal(out, worker.apply(made.initial, x, draws=drawn)[0])
    other = worker.apply(made.initial, x, draws=masks(made, 8, seed=1))[0]
    assert not torch.equal(out, other)
    # a forgotten draw is an error, also right after a call that had one; evaluation needs none
    with pytest.raises(TrainingError, match="its draw was forgotten"):
        worker.apply(made.initial, x)
    worker.apply(made.initial, x, train=False)


def test_two_workers_in_two_threads_do_not_disturb_each_other():
    made, found = task(), {}
    drawn = masks(made, 8)
    other = Variables({k: v + 1 for k, v in made.initial.params.items()}, made.initial.buffers)
    expected = {i: made.worker().apply(v, inputs(), draws=drawn)[0] for i, v in enumerate((made.initial, other))}
    gate = threading.Barrier(2)

    def work(number, variables):
        worker, wrong = made.worker(), 0
        gate.wait()
        for _ in range(300):
            wrong += not torch.equal(worker.apply(variables, inputs(), draws=drawn)[0], expected[number])
        found[number] = wrong

    threads = [threading.Thread(target=work, args=item) for item in enumerate((made.initial, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0, 1: 0}
    assert trees.equal(made.initial, task().initial)


@pytest.mark.parametrize(("kind", "donate"), [("eager", False), ("eager", True), ("vmap", False)])
def test_value_and_grad_equals_autograd(kind, donate):
    made = task(lambda: MLP((5,), 3, (4,), 0.0))
    worker, x, y = made.worker(kind, donate), inputs(), torch.arange(8) % 3
    params = trees.clone(made.initial.params)
    before = trees.clone(params)

    def loss(p):
        value = F.cross_entropy(worker.apply(Variables(p, {}), x)[0], y)
        return value, {"twice": 2 * value, "weight": p["head.weight"], "constant": x}

    value, aux, grads = worker.value_and_grad(loss, params)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    expected = F.cross_entropy(made.worker().apply(Variables(leaves, {}), x)[0], y)
    expected.backward()
    assert torch.equal(value, expected)
    assert torch.equal(aux["twice"], 2 * expected)
    assert not any(t.requires_grad for t in (value, *aux.values(), *grads.values()))
    for k, g in grads.items():
        torch.testing.assert_close(g, leaves[k].grad, rtol=1e-12, atol=1e-14)
    assert trees.equal(params, before)
    # what the objective returned survives the step, also one in place
    kept = trees.clone(aux)
    worker.update(SGD(lr=0.1), grads, SGD().init(params), params)
    assert trees.equal(aux, kept)
    assert trees.equal(params, before) is not donate


@pytest.mark.parametrize(("kind", "donate"), [("eager", False), ("eager", True), ("vmap", False)])
def test_a_parameter_without_influence_has_gradient_zero(kind, donate):
    worker = task().worker(kind, donate)
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    _, _, grads = worker.value_and_grad(lambda p: (p["a"].square().sum(), ()), params)
    assert {k: g.tolist() for k, g in grads.items()} == {"a": [2, 2], "b": [0, 0, 0]}
    _, _, grads = worker.value_and_grad(lambda p: (torch.ones((), dtype=torch.float64), ()), params)
    assert {k: g.tolist() for k, g in grads.items()} == {"a": [0, 0], "b": [0, 0, 0]}


def test_gradients_that_share_memory_can_be_donated():
    """d/da and d/db of (a + b).sum() are one expanded tensor: an update in place must not see it twice."""
    params = {k: torch.zeros(3, dtype=torch.float64) for k in ("a", "b")}
    for optimizer in (SGD(lr=1.0, momentum=0.5, clip=0.5), Adam(lr=0.1, clip=0.5)):
        results = []
        for donate in (False, True):
            worker = task().worker("eager", donate)
            own = trees.clone(params)
            _, _, grads = worker.value_and_grad(lambda p: ((p["a"] + p["b"]).sum(), ()), own)
            results.append(worker.update(optimizer, grads, optimizer.init(own), own)[0])
        assert trees.equal(*results)
        assert torch.equal(results[0]["a"], results[0]["b"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LSTM(5, 3), r"model: the layers \[''\] are recurrent"),
        (lambda: nn.Sequential(nn.GRU(5, 3)), r"model: the layers \['0'\] are recurrent.*Use a convolutional"),
        (lambda: nn.Linear(5, 4), r"Linear must return logits \[batch, 3\], got \(2, 4\) for a batch of 2"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Flatten(0)), r"must return logits \[batch, 3\], got \(6,\)"),
        (lambda: nn.Linear(7, 3), r"Linear fails on inputs of shape \(5,\)"),
        (
            lambda: nn.Sequential(nn.Linear(5, 3), nn.AlphaDropout()),
            r"layer '1' \(AlphaDropout\) draws its own random numbers",
        ),
    ],
)
def test_networks_that_cannot_be_trained(build, message):
    with pytest.raises(ConfigError, match=message):
        task(build)


def test_a_network_that_returns_no_tensor():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ConfigError, match=r"Two must return logits \[batch, 3\], got tuple"):
        task(lambda: Two(5, 3))


def test_a_constructor_that_fails_leaves_the_generator_alone():
    def fail():
        torch.rand(3)
        raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        task(fail)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_layers_of_a_network_are_its_stages():
    class Staged(Network):
        def __init__(self):
            super().__init__()
            self.low, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def features(self, x):
            return F.relu(self.low(x))

    made = task(Staged)
    assert made.stages == (("low.weight", "low.bias"), ("head.weight", "head.bias"))
