"""FedGA, FedLC, FedRS, FedNTD, MOON, FedDecorr, FedSAM: whole federations against plain PyTorch, limits, by hand."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract_problem import CLASSES, PROBLEMS, distance, federated
from oracles import label_skew_oracle as oracle

import fedtail
from fedtail import SGD, Batch, EngineOptions, Experiment, FedAvg, LocalWork, Participation, trees
from fedtail.algorithms.feddecorr import FedDecorr, correlation
from fedtail.algorithms.fedga import FedGA
from fedtail.algorithms.fedlc import FedLC
from fedtail.algorithms.fedntd import FedNTD, not_true_divergence
from fedtail.algorithms.fedrs import FedRS
from fedtail.algorithms.fedsam import FedSAM
from fedtail.algorithms.moon import MOON
from fedtail.config import Data
from fedtail.data.longtail import NoTail
from fedtail.data.partition import ClassSpecific
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.losses import LogitAdjustment
from fedtail.models.specs import MLP

STEP = SGD(lr=0.2, momentum=0.5, clip=1.0)  # a clip that acts
HIDDEN, COUNT = 5, 3
WORK = LocalWork(epochs=2, batch_size=5)
SIZES = (11, 7, 1, 14, 6)  # short batches, a client of one example
LOOP = EngineOptions(name="loop")

METHODS = {
    "fedga": (FedGA(optimizer=STEP), oracle.fedga, {"uniform": True}),
    "fedga by size": (FedGA(optimizer=STEP, weights="size"), oracle.fedga, {}),
    "fedga exact": (FedGA(optimizer=STEP, form="exact"), oracle.fedga_exact, {"uniform": True}),
    "fedlc": (FedLC(optimizer=STEP, tau=0.7), lambda *a: oracle.fedlc(*a, tau=0.7), {}),
    "fedrs": (FedRS(optimizer=STEP, alpha=0.3), lambda *a: oracle.fedrs(*a, alpha=0.3), {}),
    "fedrs soft": (FedRS(optimizer=STEP, soft=True), lambda *a: oracle.fedrs(*a, soft=True), {}),
    "fedntd": (FedNTD(optimizer=STEP, beta=0.8, tau=2.0), lambda *a: oracle.fedntd(*a, beta=0.8, tau=2.0), {}),
    "moon": (MOON(optimizer=STEP, mu=2.0, tau=0.4), lambda *a: oracle.moon(*a, mu=2.0, tau=0.4), {}),
    "feddecorr": (FedDecorr(optimizer=STEP, beta=0.3), lambda *a: oracle.feddecorr(*a, beta=0.3), {}),
    "fedsam": (FedSAM(optimizer=STEP, rho=0.3), oracle.plain, {"rho": 0.3}),
    # combinations that are a matter of configuration alone
    "fedntd with fedrs": (FedNTD(optimizer=STEP, loss=fedtail.losses.FedRS()),
                          lambda *a: oracle.fedntd(*a) - oracle.plain(*a) + oracle.fedrs(*a), {}),
    "fedsam with fedlc": (FedSAM(optimizer=STEP, rho=0.1, loss=fedtail.losses.FedLC()), oracle.fedlc, {"rho": 0.1}),
    "moon with fedga": (MOON(optimizer=STEP, mu=1.0, loss=fedtail.losses.FedGA()),
                        lambda *a: oracle.moon(*a, mu=1.0) - oracle.plain(*a) + oracle.fedga(*a), {}),
}  # fmt: skip


def run(algorithm, data, count=COUNT, engine=LOOP, work=WORK, cohort=3):
    """Returns the initial parameters, the server states, the plans, the client states at the end, and the records."""
    experiment = Experiment(rounds=9, algorithm=algorithm, model=MLP(hidden=(HIDDEN,)), local=work, engine=engine,
                            participation=Participation(clients=cohort), dtype="float64")  # fmt: skip
    with contextlib.closing(Federation(experiment, data)) as running:
        servers, plans, records = [], [], []
        for _ in range(count):
            plan = running.engine.setting.plans(running.context().round, 0, running.draw(algorithm.phases(0, 1)[0]))
            plans.append({k: np.split(p.order, np.cumsum(p.lengths)[:-1]) for k, p in plan.items()})
            records.append(running.step())
            running.advance(records[-1])
            servers.append(running.server)
        return running.task.initial, servers, plans, dict(running.states), records


def network(params):
    """The oracle's network with fedtail's parameters."""
    made = oracle.Network(params["hidden1.0.weight"].shape[1], HIDDEN, CLASSES).double()
    names = {"hidden.weight": "hidden1.0.weight", "hidden.bias": "hidden1.0.bias", "head.weight": "head.weight"}
    made.load_state_dict({**{own: params[name] for own, name in names.items()}, "head.bias": params["head.bias"]})
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_federation_is_the_plain_loop(name):
    algorithm, terms, more = METHODS[name]
    data = federated(SIZES, images=False)
    initial, servers, plans, states, _ = run(algorithm, data)
    done = oracle.federate(network(initial.params), data.columns["x"], data.columns["y"], list(data.owners), plans, terms,
                           lr=0.2, momentum=0.5, clip=1.0, **more)  # fmt: skip
    for server, params in zip(servers, done.rounds, strict=True):
        for own, theirs in (("hidden1.0.weight", "hidden.weight"), ("hidden1.0.bias", "hidden.bias"),
                            ("head.weight", "head.weight"), ("head.bias", "head.bias")):  # fmt: skip
            torch.testing.assert_close(server.params[own], params[theirs], rtol=0, atol=1e-9)
    assert distance(servers[-1].params, initial.params) > 1e-2
    if isinstance(algorithm, MOON):  # the client's state is its last own model
        for k, state in states.items():
            torch.testing.assert_close(state.params["head.weight"], done.models[k].head.weight.data, rtol=0, atol=1e-9)


def test_every_oracle_tells_its_method_from_fedavg():
    data = federated(SIZES, images=False)
    plain = run(FedAvg(optimizer=STEP), data)[1][-1]
    for name, (algorithm, _, _) in METHODS.items():
        assert distance(run(algorithm, data)[1][-1].params, plain.params) > 1e-5, name


# ---- exact limits

LIMITS = {
    "fedga": FedGA(optimizer=STEP, strength=0.0, weights="size"),
    "fedga exact": FedGA(optimizer=STEP, form="exact", strength=0.0, weights="size"),
    "fedrs": FedRS(optimizer=STEP, alpha=1.0),
    "fedntd": FedNTD(optimizer=STEP, beta=0.0),
    "moon": MOON(optimizer=STEP, mu=0.0),
    "feddecorr": FedDecorr(optimizer=STEP, beta=0.0),
    "fedsam": FedSAM(optimizer=STEP, rho=0.0),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("problem", ["ragged", "batchnorm"])
def test_switched_off_it_is_fedavg_bit_for_bit(name, problem):
    chosen = PROBLEMS[problem]
    data = federated(chosen.sizes, chosen.images)

    def servers(algorithm):
        experiment = Experiment(
            rounds=3, algorithm=algorithm, model=chosen.model, local=WORK, engine=LOOP, dtype="float64"
        )
        with contextlib.closing(Federation(experiment, data)) as running:
            for _ in range(3):
                running.advance(running.step())
                yield running.server

    pairs = zip(servers(LIMITS[name]), servers(FedAvg(optimizer=STEP)), strict=True)
    assert all(trees.equal(a, b) for a, b in pairs)


def test_the_methods_that_are_losses_are_fedavg_on_them_bit_for_bit():
    data = federated(SIZES, images=False)
    pairs = [
        (FedLC(optimizer=STEP, tau=0.3), fedtail.losses.FedLC(tau=0.3)),
        (FedRS(optimizer=STEP, soft=True), fedtail.losses.FedRS(soft=True)),
        (FedGA(optimizer=STEP, weights="size", counts="client"), fedtail.losses.FedGA(counts="client")),
    ]
    for method, loss in pairs:
        first, second = run(method, data), run(FedAvg(optimizer=STEP, loss=loss), data)
        assert all(trees.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_batches_of_equal_counts_make_fedga_fedavg():
    """Every class twice in each batch: the added term shifts the loss by 1 and moves no gradient."""
    data = federated((8, 8), images=False)
    y = torch.arange(CLASSES).repeat(len(data.columns["y"]) // CLASSES + 1)[: len(data.columns["y"])]
    data = type(data)({**data.columns, "y": y}, data.owners, data.test, data.local_tests, CLASSES)
    work = LocalWork(epochs=2, batch_size=8)
    ga, avg = (run(a, data, work=work, cohort=2) for a in (FedGA(optimizer=STEP), FedAvg(optimizer=STEP)))
    assert distance(ga[1][-1].params, avg[1][-1].params) < 1e-12
    for mine, theirs in zip(ga[4], avg[4], strict=True):
        assert mine["train"]["loss"] == pytest.approx(theirs["train"]["loss"] + 1, abs=1e-12)
        assert mine["train"]["cross_entropy"] == pytest.approx(theirs["train"]["loss"], abs=1e-12)


def one_class_a_client(algorithm):
    data = Data(longtail=NoTail(), partition=ClassSpecific(clients=10))
    *_, last = fedtail.run(
        Experiment(rounds=1, data=data, algorithm=algorithm, local=LocalWork(epochs=1), dtype="float64")
    )
    return last


def test_fedlc_learns_nothing_from_clients_of_one_class():
    """The gradient is 0 exactly, so the model stays where it began; FedRS and FedGA move."""
    still = one_class_a_client(FedLC())
    assert still.record["train"]["loss"] == 0
    moved = [one_class_a_client(algorithm) for algorithm in (FedRS(), FedGA())]
    assert all(distance(still.server.params, other.server.params) > 1e-3 for other in moved)
    zero = one_class_a_client(FedLC(optimizer=SGD(lr=1e-30)))
    assert distance(still.server.params, zero.server.params) == 0


# ---- FedNTD


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_fedntd_gradient_of_the_numeric_example():
    """z = [1, .5, -.4, -1], z^t = [.5, .5, .8, -.2], y = 0, tau = beta = 1."""
    z, teacher = double([1, 0.5, -0.4, -1]).requires_grad_(), double([0.5, 0.5, 0.8, -0.2])
    total = torch.nn.functional.cross_entropy(z, torch.tensor([0])) + not_true_divergence(
        teacher, z, torch.tensor([0]), 1.0
    )
    (grad,) = torch.autograd.grad(total.sum(), z)
    np.testing.assert_allclose(grad[0], [-0.497099, 0.567319, -0.100737, 0.030517], atol=1e-5)


# ---- the logit gradients of all methods, row by row of the literature's formulas


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradient_rows(z, y, n, teacher):
    """Per example, before 1 / B: each method's gradient on the logits by its formula, in NumPy. n: class counts."""
    p, delta, held = softmax(z), np.eye(z.shape[1])[y], n > 0
    own, m = n[y][:, None], (p * n).sum(1, keepdims=True)
    a = np.where(held, 1.0, 0.5)
    q = softmax(a * z)
    calibrated = np.where(held, p * np.exp(-(np.where(held, n, 1.0) ** -0.25)), 0.0)
    inverse = np.where(held, 1 / np.where(held, n, 1.0), 0.0)[y][:, None]  # divided by their sum, not by B
    wrong, gap = 1 - delta, np.zeros_like(z)
    for i in range(len(z)):
        rest = wrong[i] > 0
        gap[i, rest] = softmax(z[i : i + 1, rest] / 2)[0] - softmax(teacher[i : i + 1, rest] / 2)[0]
    return {
        "cross_entropy": p - delta,
        "label_smoothing": p - 0.9 * delta - 0.1 / z.shape[1],
        "class_weighted": len(z) * inverse / inverse.sum() * (p - delta),
        "fedrs": a * (q - delta),
        "balanced_softmax": p * n / m - delta,
        "fedlc": calibrated / calibrated.sum(1, keepdims=True) - delta,
        "fedntd": p - delta + 0.7 * 2 * gap,
        "fedga exact": p * n / own - delta,
        "fedga official": p * (1 + (n - m) / own) - delta,
    }


GRADIENTS = {
    "cross_entropy": fedtail.losses.CrossEntropy(),
    "label_smoothing": fedtail.losses.LabelSmoothing(epsilon=0.1),
    "class_weighted": fedtail.losses.ClassWeighted(),
    "fedrs": fedtail.losses.FedRS(alpha=0.5),
    "balanced_softmax": fedtail.losses.BalancedSoftmax(),
    "fedlc": fedtail.losses.FedLC(tau=1.0),
    "fedga exact": fedtail.losses.FedGA(form="exact", counts="client"),
    "fedga official": fedtail.losses.FedGA(counts="client"),
}


@pytest.mark.parametrize("name", [*GRADIENTS, "fedntd"])
@pytest.mark.parametrize("counts", [(3, 0, 11, 0, 6), (0, 0, 9, 0, 0)], ids=["missing classes", "one class"])
def test_the_logit_gradient_of_every_method_is_its_formula(name, counts):
    """By automatic differentiation, on examples of the classes that are held; and what becomes of a missing class."""
    rng, n = np.random.default_rng(5), np.array(counts, float)
    z, teacher, y = rng.normal(size=(8, 5)) * 2, rng.normal(size=(8, 5)), rng.choice(np.flatnonzero(n), 8)
    leaf, labels = torch.from_numpy(z).requires_grad_(), torch.from_numpy(y)
    if name == "fedntd":
        divergence = not_true_divergence(torch.from_numpy(teacher), leaf, labels, 2.0).mean()
        value = torch.nn.functional.cross_entropy(leaf, labels) + 0.7 * 2**2 * divergence
    else:
        here = SimpleNamespace(counts=torch.from_numpy(n))
        batch = Batch({"x": torch.zeros(8, 1), "y": labels}, None, {})
        value = GRADIENTS[name](SimpleNamespace(here=here), None, leaf, batch)
    (grad,) = torch.autograd.grad(value, leaf)
    found, rows = 8 * grad.numpy(), gradient_rows(z, y, n, teacher)
    np.testing.assert_allclose(found, rows[name], rtol=0, atol=1e-12)
    p, missing = softmax(z), n == 0
    if name in ("balanced_softmax", "fedlc", "fedga exact"):
        assert not found[:, missing].any()
    if counts.count(0) == 4:  # the column of the one-class client
        own = p[np.arange(8), y]
        expected = {"balanced_softmax": 0 * own, "fedlc": 0 * own, "fedga exact": own - 1, "fedga official": -((1 - own) ** 2),
                    "cross_entropy": own - 1}  # fmt: skip
        if name in expected:
            np.testing.assert_allclose(found[np.arange(8), y], expected[name], rtol=0, atol=1e-12)
        if name == "fedga official":
            np.testing.assert_allclose(found[:, missing], p[:, missing] * (1 - own)[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_the_distillations_gradient_is_beta_tau_times_the_difference_of_the_wrong_classes(tau):
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5))).requires_grad_()
    teacher = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 5)))
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    (grad,) = torch.autograd.grad(tau**2 * not_true_divergence(teacher, z, y, tau).sum(), z)
    for i, label in enumerate(y.tolist()):
        wrong = [c for c in range(5) if c != label]
        gap = torch.softmax(z[i, wrong] / tau, 0) - torch.softmax(teacher[i, wrong] / tau, 0)
        torch.testing.assert_close(grad[i, wrong], tau * gap.detach(), rtol=0, atol=1e-12)
        assert grad[i, label] == 0
    (still,) = torch.autograd.grad(not_true_divergence(z.detach(), z, y, tau).sum(), z)
    assert float(still.abs().max()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_is_finite_for_certain_models(dtype):
    z = (100 * torch.eye(4, dtype=dtype)).requires_grad_()
    value = not_true_divergence(-z.detach(), z, torch.arange(4), 0.1)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(grad).all())


# ---- MOON


def test_moon_at_the_first_participation_has_log_2_and_no_gradient():
    data = federated(SIZES, images=False)
    initial, [server], _, _, [record] = run(MOON(optimizer=STEP, mu=7.0), data, 1)
    assert record["train"]["contrast"] == pytest.approx(math.log(2), abs=1e-12)
    _, [plain], _, _, [base] = run(FedAvg(optimizer=STEP), data, 1)
    assert distance(server.params, plain.params) < 1e-12
    assert distance(server.params, initial.params) > 1e-2
    assert record["train"]["loss"] == pytest.approx(base["train"]["loss"] + 7 * math.log(2), abs=1e-12)


def test_moon_pulls_from_the_second_participation_on():
    data = federated((11, 7), images=False)
    first, second = (run(a, data, 2, cohort=2) for a in (MOON(optimizer=STEP), FedAvg(optimizer=STEP)))
    assert abs(first[4][1]["train"]["contrast"] - math.log(2)) > 1e-4
    assert distance(first[1][1].params, second[1][1].params) > 1e-4


@pytest.mark.parametrize("algorithm", [MOON(), FedDecorr()], ids=lambda a: type(a).__name__)
def test_a_model_without_features_is_refused(algorithm, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\n\ndef Net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes))\n"
    )
    model = fedtail.config.UserModel(target=f"{file}:Net")
    with pytest.raises(
        ConfigError, match=rf"{type(algorithm).__name__} works on features, but Sequential has no method"
    ):
        fedtail.run(Experiment(algorithm=algorithm, model=model))


# ---- FedDecorr


def whole(count, mask=None):
    return Batch({"x": torch.zeros(count, 1), "y": torch.zeros(count, dtype=torch.int64)}, mask, {})


def test_two_equal_features_have_the_penalty_b_minus_1_squared_over_b():
    """B = 16: 225 / 16 = 14.0625, but for the 1e-8 beside the variance."""
    column = torch.from_numpy(np.random.default_rng(0).normal(size=16) * 50)
    h = torch.stack([column, column], 1)
    assert float(correlation(h, whole(16))) == pytest.approx(14.0625, rel=1e-9)


def test_one_example_or_one_feature_has_no_penalty_and_a_finite_gradient():
    for shape in ((1, 4), (5, 1)):
        h = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = correlation(h, whole(shape[0]))
        (grad,) = torch.autograd.grad(value, h)
        assert value.item() == 0
        assert not bool(grad.any())


def test_padding_is_left_out_of_the_correlation():
    h = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 4)))
    mask = double(1, 1, 1, 1, 1, 0, 0)
    torch.testing.assert_close(correlation(h, whole(7, mask)), correlation(h[:5], whole(5)), rtol=0, atol=1e-12)


# ---- FedSAM


def test_fedsam_steps_by_the_gradient_at_the_perturbed_model():
    """f(w) = w^4 / 4 at w = 1 with rho = .5: g = 1, the perturbed gradient is 1.5^3 = 3.375."""

    class Fourth(LogitAdjustment):
        def __call__(self, ctx, model, z, batch):
            return (z**4 / 4).sum()

        def risk(self, ctx, model, variables, batch):
            return self(ctx, model, variables.params["w"], batch), variables

    start = fedtail.Variables({"w": double(1.0)}, {})
    data = federated((4,), images=False)
    with contextlib.closing(
        Federation(Experiment(dtype="float64", engine=LOOP, model=MLP(hidden=(2,))), data)
    ) as running:
        ctx = fedtail.Context(running.worker, running.context().round, (), SimpleNamespace())
        algorithm = FedSAM(optimizer=SGD(lr=0.1, momentum=0.0), rho=0.5, loss=Fourth())
        local, metrics = algorithm.local_step(ctx, start, (), algorithm.local_init(ctx, start, ()), whole(1))
    assert float(local.variables.params["w"]) == pytest.approx(1 - 0.1 * 3.375, abs=1e-9)
    assert float(metrics["sharpness"]) == pytest.approx((1.5**4 - 1) / 4, abs=1e-9)
    assert float(metrics["loss"]) == pytest.approx(1.5**4 / 4, abs=1e-9)


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedGA(strength=-1.0), r"FedGA\.strength must be in \[0, inf\), got -1\.0"),
        (lambda: FedLC(tau=math.nan), r"FedLC\.tau must be in \[0, inf\), got nan"),
        (lambda: FedRS(alpha=2.0), r"FedRS\.alpha must be in \[0, 1\], got 2\.0"),
        (lambda: FedNTD(tau=0.0), r"FedNTD\.beta must be in \[0, inf\) and tau in \(0, inf\), got 1\.0 and 0\.0"),
        (lambda: MOON(mu=-0.1), r"MOON\.mu must be in \[0, inf\) and tau in \(0, inf\), got -0\.1 and 0\.5"),
        (lambda: FedDecorr(beta=math.inf), r"FedDecorr\.beta must be in \[0, inf\), got inf"),
        (lambda: FedSAM(rho=-1.0), r"FedSAM\.rho must be in \[0, inf\), got -1\.0"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
