"""Every loss against numbers worked out by hand or in NumPy: values, logit gradients, masks, missing classes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtail import Batch, Context, Phase, Round, Variables
from fedtail.algorithm import Client
from fedtail.config import resolve
from fedtail.errors import ConfigError
from fedtail.losses import (
    LDAM,
    LOSSES,
    BalancedSoftmax,
    ClassWeighted,
    CrossEntropy,
    FedGA,
    FedIR,
    FedLC,
    FedRS,
    Focal,
    LabelSmoothing,
    LogitAdjustment,
    Loss,
    effective_weights,
)

ALL = [
    *(resolve(Loss, name)() for name in LOSSES),
    Focal(gamma=0.5),
    ClassWeighted(by="effective"),
    LDAM(drw=True),
    LDAM(counts="shared"),
    LogitAdjustment(prior="shared"),
    LogitAdjustment(prior="given", given=(0.1, 0.2, 0.3, 0.4)),
    LogitAdjustment(prior="estimated"),
    FedRS(soft=True),
    FedGA(form="exact"),
    FedGA(counts="client"),
    FedGA(form="exact", counts="client"),
]
every_loss = pytest.mark.parametrize("loss", ALL, ids=repr)
ROWS = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)  # norms 5, 2, 1, 3
MODEL = Variables({"head.weight": ROWS}, {})


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def context(counts, shared=None, index=9, classifier="head"):
    """A client with these class counts in round `index` of 10."""
    n = double(*counts)
    client = Client(torch.tensor(0), n.sum(), n, double(1.0)[0])
    here = Round(index, Phase(), 1, 1, 10, counts=None if shared is None else double(*shared))
    return Context(SimpleNamespace(classifier=classifier), here, (), client)


def batch_of(labels, mask=None):
    y = torch.tensor(labels)
    return Batch({"x": torch.zeros(len(y), 1, dtype=torch.float64), "y": y}, mask, {})


def value_and_grad(loss, z, labels, counts, mask=None, shared=(40, 30, 20, 10), **more):
    """Returns a batch's loss and its gradient on the logits."""
    leaf = z.clone().requires_grad_()
    value = loss(context(counts, shared, **more), MODEL, leaf, batch_of(labels, mask))
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def logits(batch=6, classes=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, classes)) * 2)


LABELS = [0, 1, 1, 3, 3, 3]
NUMBERS = (2, 6, 0, 8)  # class 2 is missing


# ---- the numeric table: z = [1, .5, -.4, -1], n = [2, 6, 0, 8], y = 0, five digits behind the point and more

TABLE = {
    CrossEntropy(): (-0.497099, 0.305025, 0.124014, 0.068060),
    LabelSmoothing(epsilon=0.1): (-0.422099, 0.280025, 0.099014, 0.043060),
    FedRS(alpha=0.5): (-0.510538, 0.296874, 0.073712, 0.066241),
    BalancedSoftmax(): (-0.702464, 0.541395, 0, 0.161069),
    FedLC(tau=1.0): (-0.477915, 0.387526, 0, 0.090389),
    FedGA(form="exact", counts="client"): (-0.497099, 0.915075, 0, 0.272241),
    FedGA(counts="client"): (-0.844210, 0.704541, -0.085596, 0.225265),
    # Worked out the same way: a = (.625, .875, .5, 1), g = a (softmax(a z) - e_0); e^z n^.5; e^z exp(-.5 n^(-1/4));
    # e^z (.4, .3, .2, .1); the rarest class held has the whole margin, 2 (softmax(2 (z - .2 e_0)) - e_0).
    FedRS(alpha=0.5, soft=True): (-0.371365, 0.294379, 0.088921, 0.079910),
    BalancedSoftmax(gamma=0.5): (-0.569191, 0.452583, 0, 0.116607),
    FedLC(tau=0.5): (-0.451768, 0.367850, 0, 0.083918),
    LogitAdjustment(prior="given", given=(0.4, 0.3, 0.2, 0.1)): (-0.379664, 0.282189, 0.076486, 0.020988),
    LDAM(scale=2.0, max_margin=0.2): (-0.800134, 0.658500, 0.108849, 0.032785),
}


@pytest.mark.parametrize(("loss", "gradient"), TABLE.items(), ids=repr)
def test_logit_gradients_of_the_numeric_example(loss, gradient):
    _, found = value_and_grad(loss, double([1, 0.5, -0.4, -1]), [0], NUMBERS)
    np.testing.assert_allclose(found[0], gradient, atol=1e-5)
    if isinstance(loss, FedGA) and loss.form == "exact":  # m / n_y - 1 with m = sum_c n_c p_c
        assert float(found.sum()) == pytest.approx(3.380433 / 2 - 1, abs=1e-6)
    elif not isinstance(loss, FedRS):  # all others only redistribute
        assert abs(float(found.sum())) < 1e-12


# ---- limits

EQUAL = (5, 5, 5, 5)
CROSS_ENTROPY = [
    (Focal(gamma=0.0), NUMBERS),
    (LabelSmoothing(epsilon=0.0), NUMBERS),
    (FedRS(alpha=1.0), NUMBERS),
    (FedRS(alpha=1.0, soft=True), NUMBERS),
    (FedRS(soft=True), EQUAL),
    (FedRS(), EQUAL),
    (LDAM(max_margin=0.0, scale=1.0), NUMBERS),
    (LDAM(max_margin=0.0, scale=1.0, drw=True), EQUAL),
    (LogitAdjustment(tau=0.0), NUMBERS),
    (LogitAdjustment(), EQUAL),
    (LogitAdjustment(prior="given", given=(0.2, 0.2, 0.2, 0.2)), NUMBERS),
    (BalancedSoftmax(), EQUAL),
    (FedLC(), EQUAL),
    (FedLC(tau=0.0), (4, 3, 2, 1)),
    (ClassWeighted(), EQUAL),
    (ClassWeighted(by="effective"), EQUAL),
    (ClassWeighted(by="effective", beta=1e-12), NUMBERS),
    (FedIR(), (4, 3, 2, 1)),  # the shares of the population of `value_and_grad`
]


@pytest.mark.parametrize(("loss", "counts"), CROSS_ENTROPY, ids=repr)
def test_limits_in_which_a_loss_is_the_cross_entropy(loss, counts):
    z = logits()
    found, expected = (value_and_grad(each, z, LABELS, counts) for each in (loss, CrossEntropy()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    other = value_and_grad(type(loss)(), z, LABELS, NUMBERS)
    assert float((other[1] - expected[1]).abs().max()) > 1e-3  # with its defaults it is another


def test_effective_weights_are_inverse_frequency_when_beta_is_near_one():
    z = logits()
    near = ClassWeighted(by="effective", beta=1 - 1e-9)
    torch.testing.assert_close(
        value_and_grad(near, z, LABELS, NUMBERS), value_and_grad(ClassWeighted(), z, LABELS, NUMBERS), rtol=0, atol=1e-7
    )


def test_logit_adjustment_and_balanced_softmax_have_equal_gradients():
    """n_c and n_c / n differ by a factor that a softmax does not see; no class is missing."""
    for counts in (EQUAL, (17, 3, 1, 120)):
        shared = value_and_grad(LogitAdjustment(prior="shared"), logits(), LABELS, EQUAL, shared=counts)
        local = value_and_grad(LogitAdjustment(), logits(), LABELS, counts)
        balanced = value_and_grad(BalancedSoftmax(), logits(), LABELS, counts)
        torch.testing.assert_close(local, balanced, rtol=0, atol=1e-14)
        torch.testing.assert_close(shared, balanced, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", [BalancedSoftmax(), FedLC()], ids=repr)
def test_a_client_of_one_class_learns_nothing(loss):
    value, grad = value_and_grad(loss, logits(), [2] * 6, (0, 0, 9, 0))
    assert float(value) == 0
    assert not bool(grad.any())
    assert float(value_and_grad(CrossEntropy(), logits(), [2] * 6, (0, 0, 9, 0))[1].abs().min()) > 1e-4


def test_class_weights_with_labels_and_with_one_hot_targets_differ_by_the_batch_over_the_sum_of_weights():
    """With a one-hot target the weighted mean divides by B, with labels by sum_i v_{y_i}."""
    z, weights = logits(), np.array([1 / 2, 1 / 6, 0, 1 / 8])
    log_p = torch.log_softmax(z, -1).numpy()
    one_hot = np.eye(4)[LABELS]
    by_batch = -(one_hot * weights * log_p).sum() / 6
    found = float(value_and_grad(ClassWeighted(), z, LABELS, NUMBERS)[0])
    assert found == pytest.approx(by_batch * 6 / weights[LABELS].sum(), rel=1e-12)


# ---- values


def test_focal_loss_by_hand():
    """p_y = .8 and .5: -(1 - p_y)^2 log p_y = .04 * .223144 and .25 * .693147, mean .0911063."""
    z = double([math.log(4), 0], [0, 0])
    value = Focal()(context((1, 1)), MODEL, z, batch_of([0, 1]))
    assert float(value) == pytest.approx((0.04 * 0.2231435513 + 0.25 * 0.6931471806) / 2, rel=1e-9)


def test_focal_loss_of_a_certain_example_has_a_finite_gradient():
    value, grad = value_and_grad(Focal(gamma=0.5), double([900, 0, 0, 0]), [0], EQUAL)
    assert float(value) == 0
    assert not bool(grad.any())


@pytest.mark.parametrize(("count", "weight"), [(0, 0), (1, 1), (2, 1 / 1.5), (3, 1 / 1.75)])
def test_effective_weights_by_hand(count, weight):
    """beta = .5: 1 - beta^n = .5, .75, .875, so (1 - beta) / (1 - beta^n) = 1, 2/3, 4/7; a missing class weighs nothing."""
    assert float(effective_weights(double(count), 0.5)[0]) == pytest.approx(weight, rel=1e-14)


def test_effective_weights_keep_their_digits_in_float32():
    """1 - .9999^1 = 1e-4 computed as a difference in float32 would be wrong in the fourth digit."""
    assert float(effective_weights(torch.tensor([1.0]), 0.9999)[0]) == pytest.approx(1, rel=1e-6)


def test_fedir_by_hand():
    """Shares .4 .3 .2 .1 of the population over 2/16, 6/16, -, 8/16 of the client: v = 3.2, .8, 0, .2."""
    z = logits()
    each = -torch.log_softmax(z, -1).numpy()[np.arange(6), LABELS]
    weights = np.array([3.2, 0.8, 0.8, 0.2, 0.2, 0.2])
    found = float(value_and_grad(FedIR(), z, LABELS, NUMBERS)[0])
    assert found == pytest.approx((weights * each).sum() / weights.sum(), rel=1e-12)


def test_ldam_with_equal_counts_subtracts_half_from_every_true_logit():
    z = logits()
    shifted = z - 0.5 * torch.eye(4, dtype=torch.float64)[LABELS]
    expected = value_and_grad(CrossEntropy(), 30 * shifted, LABELS, EQUAL)[0]
    assert float(value_and_grad(LDAM(), z, LABELS, EQUAL)[0]) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("counts", ["local", "shared"])
def test_ldam_margins_and_deferred_weights_by_hand(counts):
    """n = 1, 16, 0, 81: n^(-1/4) = 1, 1/2, -, 1/3, so the margins are .5, .25, none, 1/6; weights from rounds 8 of 10."""
    numbers, labels = (1, 16, 0, 81), [0, 1, 3]
    z = logits(3)
    local, shared = (numbers, EQUAL) if counts == "local" else ((7, 7, 7, 7), numbers)
    shifted = 30 * (z.numpy() - np.array([0.5, 0.25, 0, 1 / 6]) * np.eye(4)[labels])
    each = np.log(np.exp(shifted - shifted.max(1, keepdims=True)).sum(1)) + shifted.max(1) - shifted[range(3), labels]
    weights = np.array([0.5 / (1 - 0.5**n) if n else 0 for n in numbers])
    weights = weights / weights.sum() * 3  # mean 1 over the three classes that are not missing
    for index in (7, 8):
        loss = LDAM(drw=True, beta=0.5, counts=counts)
        found = float(value_and_grad(loss, z, labels, local, shared=shared, index=index)[0])
        expected = (each if index == 7 else weights[labels] * each).mean()
        assert found == pytest.approx(expected, rel=1e-12)
    plain = float(value_and_grad(LDAM(counts=counts), z, labels, local, shared=shared)[0])
    assert plain == pytest.approx(each.mean(), rel=1e-12)


def test_logit_adjustment_keeps_missing_classes_as_if_they_had_one_example():
    z = logits()
    found = value_and_grad(LogitAdjustment(tau=1.5), z, LABELS, NUMBERS)
    adjusted = z + 1.5 * double(2, 6, 1, 8).log()
    expected = value_and_grad(CrossEntropy(), adjusted, LABELS, NUMBERS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert float(found[1][:, 2].min()) > 0


def test_estimated_shares_are_read_off_the_classifier():
    """Norms 5, 2, 1, 3: shares 4/7, 1/7, 0, 2/7; with epsilon = .2 each has .05 added."""
    loss = LogitAdjustment(prior="estimated", epsilon=0.2)
    shares = loss.shares(context(EQUAL), MODEL, logits())
    np.testing.assert_allclose(shares, np.array([4, 1, 0, 2]) / 7 + 0.05, rtol=1e-14)


@pytest.mark.parametrize(("factor", "flat"), [(1.09, True), (1.11, False)])
def test_while_the_row_norms_are_flat_the_estimate_is_uniform(factor, flat):
    rows = torch.eye(4, dtype=torch.float64) * double(1, 1, 1, factor)
    shares = LogitAdjustment(prior="estimated").shares(context(EQUAL), Variables({"head.weight": rows}, {}), logits())
    assert (len(set(shares.tolist())) == 1) == flat


# ---- what holds for every loss


@every_loss
def test_a_masked_batch_is_the_shorter_batch(loss):
    z, mask = logits(), double(1, 1, 1, 1, 0, 0)
    whole = value_and_grad(loss, z, [0, 1, 1, 3, 2, 2], NUMBERS, mask)  # padding even has a class that is missing
    short = value_and_grad(loss, z[:4], [0, 1, 1, 3], NUMBERS)
    torch.testing.assert_close(whole[0], short[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(whole[1][:4], short[1], rtol=0, atol=1e-13)
    assert not bool(whole[1][4:].any())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_whatever_is_missing(loss, dtype):
    for counts, labels in ((NUMBERS, LABELS), ((0, 0, 1, 0), [2] * 6), ((60000, 1, 0, 0), [0] * 5 + [1])):
        for z in (logits(), 40 * logits(), torch.zeros(6, 4, dtype=torch.float64)):
            value, grad = value_and_grad(loss, z.to(dtype), labels, counts)
            assert bool(torch.isfinite(value))
            assert bool(torch.isfinite(grad).all())


@every_loss
def test_only_losses_that_say_so_see_the_population(loss):
    z = logits()
    first, second = (value_and_grad(loss, z, LABELS, NUMBERS, shared=s) for s in ((4, 3, 2, 1), (1, 50, 2, 9)))
    assert torch.equal(first[1], second[1]) != loss.shares_counts


@every_loss
def test_every_option_matters(loss):
    z, counts = logits(), (2, 60, 0, 8)
    before = value_and_grad(loss, z, LABELS, counts)[1]
    for name, value in vars(loss).items():
        if name in ("prior", "given", "counts", "by", "drw", "soft", "form") or (
            name == "beta" and not uses_beta(loss)
        ):
            continue
        if name == "epsilon" and getattr(loss, "prior", "estimated") != "estimated":
            continue
        after = value_and_grad(type(loss)(**{**vars(loss), name: value * 0.9}), z, LABELS, counts)[1]
        assert not torch.equal(before, after), name


def uses_beta(loss):
    return getattr(loss, "drw", False) or getattr(loss, "by", "") == "effective"


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Focal(gamma=-1.0), r"Focal\.gamma must be in \[0, inf\), got -1\.0"),
        (lambda: Focal(gamma=math.inf), r"Focal\.gamma must be in \[0, inf\), got inf"),
        (lambda: ClassWeighted(beta=1.0), r"ClassWeighted\.beta must be in \(0, 1\), got 1\.0"),
        (lambda: LDAM(max_margin=-0.1), r"LDAM\.max_margin must be in \[0, inf\)"),
        (lambda: LDAM(scale=0.0), r"LDAM\.scale must be in \(0, inf\), got 0\.0"),
        (lambda: LDAM(beta=0.0), r"LDAM\.beta must be in \(0, 1\)"),
        (lambda: BalancedSoftmax(gamma=math.nan), r"BalancedSoftmax\.gamma must be in \[0, inf\), got nan"),
        (lambda: LogitAdjustment(tau=-1.0), r"LogitAdjustment\.tau must be in \[0, inf\)"),
        (lambda: LogitAdjustment(epsilon=0.0), r"LogitAdjustment\.epsilon must be in \(0, inf\)"),
        (lambda: LogitAdjustment(prior="given"), r'prior = "given" needs the shares: given ='),
        (lambda: LogitAdjustment(given=(0.5, 0.0)), r"given must hold finite numbers > 0, got \(0\.5, 0\.0\)"),
        (lambda: LabelSmoothing(epsilon=1.0), r"LabelSmoothing\.epsilon must be in \[0, 1\), got 1\.0"),
        (lambda: FedLC(tau=-0.1), r"FedLC\.tau must be in \[0, inf\), got -0\.1"),
        (lambda: FedRS(alpha=1.1), r"FedRS\.alpha must be in \[0, 1\], got 1\.1"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_given_shares_of_another_number_of_classes():
    loss = LogitAdjustment(prior="given", given=(0.6, 0.3, 0.1))
    with pytest.raises(ConfigError, match="given has 3 shares, but there are 4 classes"):
        value_and_grad(loss, logits(), LABELS, NUMBERS)


def test_shares_cannot_be_estimated_without_a_classifier():
    with pytest.raises(ConfigError, match=r"no linear layer with one output a class.*attribute `classifier`"):
        value_and_grad(LogitAdjustment(prior="estimated"), logits(), LABELS, NUMBERS, classifier=None)
