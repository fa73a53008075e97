"""The two-stage lightweight CNN's networks and its surgery: counts, initial values, and that nothing is lost on the way."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedtail.errors import ConfigError
from fedtail.models import MLP, BranchCNN, LeNet, Unified
from fedtail.models.branches import Dual
from fedtail.task import build_task
from fedtail.transplant import dual_task, transplant

SHAPES = [(1, 28, 28), (3, 32, 32)]


def count(module):
    return sum(p.numel() for p in module.parameters())


def unified_task(shape=(1, 28, 28), spec=None, seed=0):
    spec = spec or Unified()
    return build_task(lambda: spec.build(shape, 10), 10, shape, seed=seed)


@pytest.mark.parametrize(
    ("shape", "branch", "dual", "unified", "groups"),
    [  # arXiv 2501.15547; 32 x 32 x 3 by hand: 3*9*10+10, 10*9*20+20, 720*10+10
        ((1, 28, 28), 6_930, 13_860, 14_862, [330, 672, 10_020, 3_640, 200]),
        ((3, 32, 32), 9_310, 18_620, 19_622, [330, 672, 14_420, 3_640, 560]),
    ],
)
def test_parameter_counts(shape, branch, dual, unified, groups):
    task = unified_task(shape)
    assert count(BranchCNN().build(shape, 10)) == branch
    assert count(task.module.dual()) == dual
    assert count(task.module) == unified
    assert [sum(task.initial.params[k].numel() for k in g) for g in task.stages][::-1] == groups
    two = dual_task(task, "x")
    assert sum(v.numel() for v in two.initial.params.values()) == dual
    assert [k for g in two.stages for k in g] == [k for g in task.stages[:3] for k in g]


def test_the_reference_network_has_its_parameters():
    assert count(LeNet(padding=2).build((1, 28, 28), 10)) == 61_706  # LeNet-5
    assert count(LeNet().build((1, 28, 28), 10)) == 44_426


@pytest.mark.parametrize("shape", SHAPES)
def test_initial_values_are_keras(shape):
    """He-normal: truncated at two sd, of variance 2 / fan_in; Glorot-uniform; biases 0."""
    many = [unified_task(shape, seed=seed) for seed in range(6)]

    def pooled(name, tasks):
        return torch.cat([t.initial.params[name].flatten() for t in tasks])

    fans = {"conv1": 9 * shape[0], "conv2": 90}
    for layer, fan in fans.items():
        w = torch.cat([pooled(f"branch{j}.{layer}.weight", many) for j in (1, 2)])
        assert float(w.abs().max()) <= 2 * math.sqrt(2 / fan) / 0.87962 * (1 + 1e-6)
        assert float(w.std()) == pytest.approx(math.sqrt(2 / fan), rel=0.06)
    assert float(pooled("hidden.weight", many).std()) == pytest.approx(math.sqrt(2 / 20), rel=0.06)
    side = {28: 5, 32: 6}[shape[1]]
    limits = {"head.weight": math.sqrt(6 / 42), "branch1.head.weight": math.sqrt(6 / (30 * side * side))}
    for name, limit in limits.items():
        largest = float(pooled(name, many).abs().max())
        assert 0.98 * limit < largest <= limit * (1 + 1e-6)
    dense = float(pooled("branch2.head.weight", [dual_task(t, "x") for t in many]).abs().max())
    assert dense == pytest.approx(math.sqrt(6 / (20 * side * side + 10)), rel=0.02)  # 0.1085 for 500 -> 10
    for task in many:
        assert all(bool((v == 0).all()) for k, v in task.initial.params.items() if k.endswith("bias"))
        one, other = (task.initial.params[f"branch{j}.conv1.weight"] for j in (1, 2))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_transplanted_scores_are_the_logits(shape):
    task = unified_task(shape)
    two = dual_task(task, "x")
    trained = two.initial._replace(params={k: v + 0.05 * torch.randn_like(v) for k, v in two.initial.params.items()})
    worker, whole = two.worker(), task.worker()
    model = transplant(worker, trained, task.initial)
    assert {k: v.shape for k, v in model.params.items()} == {k: v.shape for k, v in task.initial.params.items()}
    x = torch.rand(7, *shape)
    for part in ("branch1", "branch2"):
        before = worker.apply(trained, x, part=part, train=False)[0]
        assert float((whole.apply(model, x, part=part, train=False)[0] - before).abs().max()) < 1e-5
    for name in ("hidden.weight", "hidden.bias", "head.weight", "head.bias"):
        assert torch.equal(model.params[name], task.initial.params[name])
    # the whole network from the formulas: h = relu(logits), v = relu(A u + a), z = B v + b
    u = F.relu(torch.cat([worker.apply(trained, x, part=p, train=False)[0] for p in ("branch1", "branch2")], 1))
    v = F.relu(u @ model.params["hidden.weight"].T + model.params["hidden.bias"])
    z = v @ model.params["head.weight"].T + model.params["head.bias"]
    torch.testing.assert_close(whole.apply(model, x, train=False)[0], z, atol=1e-5, rtol=1e-5)


def test_only_the_first_classifier_can_be_transplanted():
    task = unified_task()
    two = dual_task(task, "x")
    trained = two.initial._replace(params={k: v + 1 for k, v in two.initial.params.items()})
    first = transplant(two.worker(), trained, task.initial, heads="first")
    both = transplant(two.worker(), trained, task.initial)
    differ = {k for k in first.params if not torch.equal(first.params[k], both.params[k])}
    assert differ == {"branch2.head.weight", "branch2.head.bias"}
    assert all(torch.equal(first.params[k], task.initial.params[k]) for k in differ)


def test_the_ensemble_is_the_mean_of_the_softmaxes():
    task = dual_task(unified_task(), "x")
    worker, x = task.worker(), torch.rand(5, 1, 28, 28)
    z = worker.apply(task.initial, x, train=False)[0]
    parts = [worker.apply(task.initial, x, part=p, train=False)[0].softmax(-1) for p in ("branch1", "branch2")]
    torch.testing.assert_close(z.exp(), (parts[0] + parts[1]) / 2)
    assert isinstance(task.module, Dual)


def test_any_network_can_be_a_branch():
    task = unified_task((5,), Unified(branch=MLP(hidden=(6,), dropout=0.3), dropout=0.0))
    two = dual_task(task, "x")
    assert two.dropout == {k: v for k, v in task.dropout.items() if k.startswith("branch")}
    assert set(two.initial.params) == {k for k in task.initial.params if k.startswith("branch")}
    assert all(torch.equal(v, task.initial.params[k]) for k, v in two.initial.params.items())
    other = build_task(lambda: MLP().build((5,), 10), 10, (5,))
    with pytest.raises(ConfigError, match=r'two branches, got MLP. Set model.name = "unified"'):
        dual_task(other, "lightweight")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BranchCNN().build((1, 9, 28), 10), "at least 10 x 10 pixels, got 9 x 28"),
        (lambda: BranchCNN().build((20,), 10), "needs images"),
        (lambda: Unified(width=0), r"Unified.width must be in \[1, inf\), got 0"),
        (lambda: Unified(dropout=1.0), r"Unified.dropout must be in \[0, 1\), got 1.0"),
        (lambda: LeNet(padding=-1), r"LeNet.padding must be in \[0, inf\), got -1"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_smallest_image_has_one_pixel_left():
    assert BranchCNN().build((1, 10, 10), 3)(torch.zeros(2, 1, 10, 10)).shape == (2, 3)
