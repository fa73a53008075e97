"""The NumPy oracles against facts that the specs state or that can be worked out by hand."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import toy
from oracles.fedgrab_oracle import (
    Dpa,
    Sgb,
    amp,
    gate,
    is_flat,
    positional_controller,
    prior_from_norms,
    prior_literal,
    rank,
    row_norms,
    shot_split,
)
from oracles.rounds_oracle import (
    Sgd,
    aggregate,
    fedavg,
    fedgrab,
    fednova_a,
    fedprox,
    local_sgd,
    scaffold,
    softmax_cross_entropy,
)

NOBODY = np.zeros(3, dtype=bool)
STATE = ("pos", "neg", "u", "e1", "e2")

norms = hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(0.1, 5.0)).filter(lambda v: np.ptp(v) > 1e-3)


@pytest.fixture
def problem():
    """A small federation: 5 classes, 4 clients (sizes 6, 6, 9, 3), 3 rounds, client 2 absent in round 1."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 4)), rng.integers(0, 5, 24)
    owned = np.split(np.arange(24), [6, 12, 21])
    rounds = [
        {k: [rng.choice(own, 3, replace=False) for _ in range(2 + k)] for k, own in enumerate(owned)} for _ in range(3)
    ]
    del rounds[1][2]
    return {"W": rng.normal(size=(5, 4)) * 0.3, "b": rng.normal(size=5) * 0.1, "x": x, "y": y, "rounds": rounds}


SIZES = [6, 6, 9, 3]


def draws(rounds, classes=5, seed=7):
    rng = np.random.default_rng(seed)
    return [{k: rng.random((len(steps), classes)) for k, steps in one.items()} for one in rounds]


def assert_same_weights(first, second, tolerance=1e-12):
    for (W1, b1), (W2, b2) in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(W1, W2, rtol=0, atol=tolerance)
        np.testing.assert_allclose(b1, b2, rtol=0, atol=tolerance)


# --- fedgrab.md 6.1 item 1


@pytest.mark.parametrize(
    ("x", "value", "tolerance"),
    [
        (-10, 0.0075, 5e-5),
        (-5, 0.090, 5e-4),
        (-2, 0.393, 5e-4),
        (-1, 0.631, 5e-4),
        (0, 1.0, 1e-15),
        (1, 1.548, 5e-4),
        (2, 2.320, 5e-4),
        (5, 5.751, 5e-4),
        (10, 9.428, 5e-4),
        (20, 9.996, 5e-4),
    ],
)
def test_amp_table(x, value, tolerance):
    assert amp(x) == pytest.approx(value, abs=tolerance)
    assert amp(x) == pytest.approx((10 / 9) / (1 / 9 + math.exp(-x / 2)), rel=1e-14)


def test_amp_rises_and_at_most_one_factor_exceeds_one():
    grid = [amp(x) for x in np.linspace(-30, 30, 601)]
    assert all(low < high for low, high in itertools.pairwise(grid))
    assert all((amp(x) > 1) == (amp(-x) < 1) for x in (-3.0, -0.1, 0.1, 3.0))


# --- item 2


def test_incremental_controller_equals_positional_form():
    errors = np.random.default_rng(1).normal(size=300)
    sgb, outputs = Sgb(1, clip=math.inf), []
    for error in errors:
        sgb.pos[0], sgb.neg[0] = 0.0, error  # the controller sees e = neg - pos
        sgb.step(np.zeros((1, 1)), np.zeros(1), np.array([True]))
        outputs.append(sgb.u[0])
    np.testing.assert_allclose(outputs, positional_controller(errors), rtol=0, atol=1e-9)


def test_positional_form_by_hand():
    # e = 1, 3: u = 10 + .01 + .1 = 10.11, then 30 + .04 + .2 = 30.24
    np.testing.assert_allclose(positional_controller(np.array([1.0, 3.0])), [10.11, 30.24], rtol=1e-14)


def test_clip_is_stored():
    sgb = Sgb(1)
    sgb.neg[0] = 1e6
    sgb.step(np.zeros((1, 1)), np.zeros(1), np.array([False]))
    assert sgb.u[0] == 100.0
    sgb.neg[0] = -1e6
    sgb.step(np.zeros((1, 1)), np.zeros(1), np.array([False]))
    assert sgb.u[0] == -100.0


# --- item 3


def test_gradient_is_that_of_the_weighted_loss():
    rng = np.random.default_rng(2)
    sgb, z, y = Sgb(4), rng.normal(size=(6, 4)) * 3, rng.integers(0, 4, 6)
    sgb.pos, sgb.neg = rng.random(4), rng.random(4)
    bypass = np.array([False, True, False, False])
    before = copy.deepcopy(sgb)
    weighted, unweighted, gradient = sgb.step(z, y, bypass)
    for i in range(6):
        for c in range(4):
            sides = []
            for h in (1e-5, -1e-5):
                moved = z.copy()
                moved[i, c] += h
                sides.append(copy.deepcopy(before).step(moved, y, bypass)[0])
            assert gradient[i, c] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-7)
    logits = torch.tensor(z)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.nn.functional.one_hot(torch.tensor(y), 4).double(), reduction="sum"
    )
    assert unweighted == pytest.approx(float(plain) / 6, rel=1e-12)
    assert abs(weighted - unweighted) > 1e-3


# --- item 4


def test_trace_table():
    table = [
        (0, 0, 1, 1, 0, 0.5),
        (0.5, 5.055, 5.818264, 0.087951, 0, 0.543976),
        (0.543976, 5.454593, 6.294999, 0.072138, 0, 0.580045),
        (0.580045, 5.820292, 6.710464, 0.060156, 0, 0.610122),
    ]
    sgb = Sgb(3)
    for batch, (e, u, rp, rn, pos, neg) in enumerate(table, start=1):
        _, unweighted, gradient = sgb.step(np.zeros((2, 3)), np.array([0, 1]), NOBODY)
        assert unweighted == pytest.approx(3 * math.log(2), abs=1e-12)
        seen = (sgb.e1[2], sgb.u[2], amp(sgb.u[2]), amp(-sgb.u[2]), sgb.pos[2], sgb.neg[2])
        assert seen == pytest.approx((e, u, rp, rn, pos, neg), abs=6e-7)
        np.testing.assert_allclose(sgb.u[:2], 0.0)
        np.testing.assert_allclose(np.stack([sgb.pos[:2], sgb.neg[:2]]), 0.25 * batch)
        np.testing.assert_allclose(gradient[:, 2], rn * 0.25, atol=1e-6)


# --- item 5


def test_bypassed_class_is_plain_and_frozen_but_controlled():
    sgb, z, y = Sgb(3), np.array([[0.3, -1.0, 2.0], [0.0, 0.7, -0.5]]), np.array([0, 1])
    for _ in range(3):
        sgb.step(z, y, NOBODY)
    before = sgb.state()
    _, _, gradient = sgb.step(z, y, np.array([False, False, True]))
    np.testing.assert_allclose(gradient[:, 2], 1 / (1 + np.exp(-z[:, 2])) / 2, rtol=1e-14)
    after = sgb.state()
    assert (after["pos"][2], after["neg"][2]) == (before["pos"][2], before["neg"][2])
    assert after["neg"][0] > before["neg"][0]
    assert after["u"][2] != before["u"][2]
    assert after["e1"][2] == before["neg"][2] - before["pos"][2]
    assert after["e2"][2] == before["e1"][2]


def test_rank_zero_class_never_starts_when_the_order_is_given(problem):
    run = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.1), warm=0, order="class_id", uniforms=draws(problem["rounds"]))
    for sgb in run.clients.values():
        assert [getattr(sgb, name)[0] for name in STATE] == [0.0] * 5
        assert sgb.neg[4] > 0


def test_rank_zero_class_freezes_after_a_warm_phase(problem):
    settings_ = {"sizes": SIZES, "sgd": Sgd(0.1), "warm": 1, "order": "class_id"}
    short = dict(problem, rounds=problem["rounds"][:1])
    first = fedgrab(**short, **settings_, uniforms=draws(problem["rounds"]))
    whole = fedgrab(**problem, **settings_, uniforms=draws(problem["rounds"]))
    for k in range(4):
        assert (whole.clients[k].pos[0], whole.clients[k].neg[0]) == (first.clients[k].pos[0], first.clients[k].neg[0])
        assert whole.clients[k].neg[4] > first.clients[k].neg[4]


# --- item 6


def test_copied_state_gives_the_same_next_step():
    rng = np.random.default_rng(3)
    sgb = Sgb(3)
    for _ in range(4):
        sgb.step(rng.normal(size=(5, 3)), rng.integers(0, 3, 5), NOBODY)
    other, z, y = Sgb(3), rng.normal(size=(5, 3)), rng.integers(0, 3, 5)
    for name, value in sgb.state().items():
        setattr(other, name, value)
    np.testing.assert_array_equal(sgb.step(z, y, NOBODY)[2], other.step(z, y, NOBODY)[2])
    for name in STATE:
        np.testing.assert_array_equal(getattr(sgb, name), getattr(other, name))


# --- item 7


@given(norms, st.floats(0.0, 10.0), st.floats(0.1, 10.0))
@settings(max_examples=50, deadline=None)
def test_prior_ignores_shift_and_scale_and_equals_the_literal_recipe(values, shift, scale):
    prior = prior_from_norms(values)
    assert prior.sum() == pytest.approx(1.0, abs=1e-12)
    assert prior.min() == 0.0
    np.testing.assert_allclose(prior_from_norms(scale * values + shift), prior, rtol=0, atol=1e-9)
    np.testing.assert_allclose(prior_literal(values) / 10000, prior, rtol=0, atol=1e-6)


def test_prior_by_hand():
    np.testing.assert_allclose(prior_from_norms(np.array([5.0, 2.0, 3.0])), [0.75, 0.0, 0.25])
    np.testing.assert_allclose(prior_from_norms(np.full(4, 2.0)), 0.25)
    np.testing.assert_allclose(row_norms(np.array([[3.0, 4.0], [0.0, 2.0]])), [5.0, 2.0])


def test_running_mean_counts_every_estimate():
    dpa = Dpa()
    for diagonal in ([5.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, 2.0, 1.0]):
        dpa.update(np.diag(diagonal))
    # (.75, 0, .25), (1/3, 1/3, 1/3), (0, 1, 0)
    np.testing.assert_allclose(dpa.pi_bar, np.array([13 / 12, 4 / 3, 7 / 12]) / 3)
    assert dpa.count == 3


# --- item 8 and 3.1


def test_rank_breaks_ties_by_class_index():
    np.testing.assert_array_equal(rank(np.array([0.2, 0.3, 0.2, 0.3])), [2, 0, 3, 1])


def test_gate_rank_values():
    listed = [1, 0.774, 0.599, 0.464, 0.359, 0.278, 0.215, 0.167, 0.129, 0.1]
    q, closed = gate("rank", np.arange(10, 0, -1) / 55)
    np.testing.assert_allclose(q, listed, atol=5e-4)
    assert not closed.any()
    np.testing.assert_allclose(gate("rank", np.arange(1, 11) / 55)[0], listed[::-1], atol=5e-4)
    np.testing.assert_allclose(gate("rank", np.array([0.4, 0.6]))[0], [0.1, 1.0])
    np.testing.assert_allclose(gate("rank", np.array([1.0]))[0], [1.0])


@pytest.mark.parametrize(("classes", "share"), [(10, 0.59), (100, 0.61)])
def test_mean_share_of_balanced_pairs(classes, share):
    q, _ = gate("rank", np.arange(classes, 0, -1.0))
    assert (1 - q).mean() == pytest.approx(share, abs=5e-3)


def test_shot_split_examples():
    lengths = {
        (5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500): [5, 4, 1],
        (5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100): [4, 3, 3],
        (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50): [3, 3, 4],
        (100,): [1, 0, 0],
        (80, 15, 5): [1, 1, 1],
        (97, 2, 1): [1, 0, 2],
    }
    for counts, expected in lengths.items():
        assert [len(group) for group in shot_split(np.array(counts, dtype=float))] == expected


def test_gate_sets_and_their_combination():
    prior = np.array([0.01, 0.80, 0.03, 0.16])  # descending 1 3 2 0: head 1, middle 3 (.96), tail 2 0
    q, closed = gate("sets", prior)
    np.testing.assert_array_equal(closed, [False, True, False, True])
    np.testing.assert_array_equal(q, [0, 1, 0, 1])
    q, closed = gate("sets+rank", prior)
    np.testing.assert_array_equal(closed, [False, True, False, True])
    np.testing.assert_allclose(q, [0.1, 1, 1, 1])
    q, closed = gate("sets+rank", np.array([80.0, 15.0, 5.0]))  # a tail of one class
    np.testing.assert_array_equal(q, [1, 1, 1])
    np.testing.assert_array_equal(closed, [True, True, False])


def test_gate_ratio_and_none():
    np.testing.assert_allclose(gate("ratio", np.array([0.2, 0.5, 0.3]))[0], [0.4, 1.0, 0.6])
    np.testing.assert_array_equal(gate("none", np.array([0.2, 0.5, 0.3]))[0], 0.0)
    with pytest.raises(ValueError, match="gate"):
        gate("rnak", np.array([1.0]))


def test_gate_waits_for_warm_estimates_and_for_norms_that_differ():
    dpa, W = Dpa(), np.diag([3.0, 2.0, 1.0])
    for _ in range(3):
        np.testing.assert_array_equal(dpa.gate("rank", 3)[0], 0.0)
        dpa.update(W)
    np.testing.assert_allclose(dpa.gate("rank", 3)[0], [1, 0.1**0.5, 0.1])
    dpa.update(np.diag([1.09, 1.05, 1.0]))
    np.testing.assert_array_equal(dpa.gate("rank", 3)[0], 0.0)
    dpa.update(W)
    np.testing.assert_allclose(dpa.gate("rank", 3)[0], [1, 0.1**0.5, 0.1])


def test_flatness_limits():
    assert is_flat(np.array([1.0, 1.09]))
    assert not is_flat(np.array([1.0, 1.11]))
    assert not is_flat(np.array([0.0, 1.0]))
    assert is_flat(np.zeros(3))


# --- decision 6


def test_closed_class_accumulates_nothing_and_opens_from_zero():
    z, y, closed = np.zeros((2, 3)), np.array([0, 1]), np.array([False, False, True])
    sgb, fresh = Sgb(3), Sgb(3)
    for _ in range(3):
        sgb.step(z, y, NOBODY)
    _, _, gradient = sgb.step(z, y, NOBODY, closed)
    np.testing.assert_allclose(gradient[:, 2], 0.25)
    assert [getattr(sgb, name)[2] for name in STATE] == [0.0] * 5
    assert sgb.neg[0] == 1.0
    for _ in range(2):
        sgb.step(z, y, NOBODY)
        fresh.step(z, y, NOBODY)
    assert [getattr(sgb, name)[2] for name in STATE] == [getattr(fresh, name)[2] for name in STATE]


def test_federation_with_gate_sets_closes_after_the_warm_phase(problem):
    run = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.1), gate="sets", warm=2, uniforms=draws(problem["rounds"]))
    assert not run.server_log[1][1].any()
    closed = run.server_log[2][1]
    assert closed.any()
    for sgb in run.clients.values():
        np.testing.assert_array_equal(sgb.neg == 0.0, closed)


# --- 6.2 items 1 and 2


@pytest.mark.parametrize(("share", "ratio", "limit"), [(0.5, 1, 0.01), (0.2, 4, 0.015), (0.02, 49, 0.03)])
def test_loop_closes(share, ratio, limit):
    z, free = np.zeros((10, 1)), np.array([False])
    for seed in range(4):
        rng, sgb = np.random.default_rng(seed), Sgb(1)
        plain = np.zeros(2)
        for _ in range(1000):
            labels = (rng.random(10) >= share).astype(np.int64)  # label 0 = positive for the only class
            sgb.step(z, labels, free)
            plain += [0.05 * (labels == 0).sum(), 0.05 * (labels == 1).sum()]
            assert abs(sgb.pos[0] - sgb.neg[0]) < 5
        assert abs(sgb.pos[0] - sgb.neg[0]) / max(sgb.pos[0], sgb.neg[0]) < limit
        assert abs(sgb.u[0]) < 40
        assert plain[1] / plain[0] == pytest.approx(ratio, rel=0.25)


def test_gate_frequencies_and_the_counter_fault():
    q, _ = gate("rank", np.arange(10, 0, -1.0))
    drawn = (np.random.default_rng(4).random((2000, 10)) < q).mean(axis=0)
    assert np.abs(drawn - q).max() < 0.04
    # Decision 3: the fault uses the number of bypasses so far in place of the rank; exact marginals by recursion.
    so_far, faulty = {0: 1.0}, []
    for _ in range(10):
        faulty.append(sum(p * 0.1 ** (j / 9) for j, p in so_far.items()))
        following: dict[int, float] = {}
        for j, p in so_far.items():
            hit = 0.1 ** (j / 9)
            following[j + 1] = following.get(j + 1, 0.0) + p * hit
            following[j] = following.get(j, 0.0) + p * (1 - hit)
        so_far = following
    listed = [1, 0.774, 0.639, 0.546, 0.477, 0.424, 0.382, 0.347, 0.318, 0.294]
    np.testing.assert_allclose(faulty, listed, atol=5e-4)
    assert abs(faulty[-1] - q[-1]) > 0.04


# --- rounds


def test_cross_entropy_gradient_by_differences_and_by_hand():
    rng = np.random.default_rng(5)
    W, b, x, y = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=(4, 2)), np.array([0, 2, 1, 2])
    _, grad_W, grad_b = softmax_cross_entropy(W, b, x, y)
    for c in range(3):
        for j in range(3):
            sides = []
            for h in (1e-6, -1e-6):
                moved_W, moved_b = W.copy(), b.copy()
                target, place = (moved_b, c) if j == 2 else (moved_W, (c, j))
                target[place] += h
                sides.append(softmax_cross_entropy(moved_W, moved_b, x, y)[0])
            expected = grad_b[c] if j == 2 else grad_W[c, j]
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(expected, abs=1e-8)
    loss, _, grad_b = softmax_cross_entropy(np.zeros((4, 2)), np.zeros(4), x, y)
    assert loss == pytest.approx(math.log(4))
    np.testing.assert_allclose(grad_b, [0, 0, -0.25, 0.25], atol=1e-15)


def test_aggregate_example():
    for order in ([0, 1], [1, 0]):
        values, sizes = [np.zeros(2), np.full(2, 4.0)], [1, 3]
        np.testing.assert_allclose(aggregate([values[i] for i in order], [sizes[i] for i in order]), 3.0)


@pytest.mark.parametrize(
    ("steps", "momentum", "value"),
    [(1, 0.5, 1), (2, 0.5, 2.5), (5, 0.5, 8.0625), (5, 0.9, 13.1441), (20, 0.9, 120.9419), (7, 0.0, 7)],
)
def test_fednova_a(steps, momentum, value):
    assert fednova_a(steps, momentum) == pytest.approx(value, abs=5e-5)
    closed = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    assert fednova_a(steps, momentum) == pytest.approx(closed, rel=1e-12)


def test_momentum_moves_by_a_k_under_a_constant_gradient():
    def gradient(W, b, index, step):
        return 0.0, np.ones_like(W), 2 * np.ones_like(b)

    local = local_sgd(np.zeros((2, 3)), np.zeros(2), [np.arange(2)] * 5, gradient, Sgd(0.1, momentum=0.5))
    np.testing.assert_allclose(local.W, -0.80625)
    np.testing.assert_allclose(local.b, -1.6125)


def test_local_sgd_equals_torch(problem):
    sgd = Sgd(0.2, momentum=0.7, weight_decay=0.05, clip=0.4)
    steps = problem["rounds"][0][3]
    x, y = problem["x"], problem["y"]
    run = fedavg(problem["W"], problem["b"], x, y, [{3: steps}], SIZES, sgd)
    W, b = (torch.tensor(problem[name], requires_grad=True) for name in ("W", "b"))
    optimizer = torch.optim.SGD([W, b], lr=0.2, momentum=0.7, weight_decay=0.05)
    clipped = 0
    for index in steps:
        optimizer.zero_grad()
        logits = torch.tensor(x[index]) @ W.T + b
        torch.nn.functional.cross_entropy(logits, torch.tensor(y[index])).backward()
        clipped += float(torch.nn.utils.clip_grad_norm_([W, b], 0.4)) > 0.4
        optimizer.step()
    assert clipped > 0
    np.testing.assert_allclose(run.weights[0][0], W.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(run.weights[0][1], b.detach().numpy(), atol=1e-12)


def test_one_client_one_full_batch_is_gradient_descent(problem):
    everything = [{0: [np.arange(24)]}] * 2
    problem = dict(problem, rounds=everything)
    run = fedavg(**problem, sizes=[24], sgd=Sgd([0.5, 0.25], momentum=0.9))  # momentum is fresh each round: no effect
    W, b = problem["W"], problem["b"]
    for lr, (W_run, b_run) in zip((0.5, 0.25), run.weights, strict=True):
        _, grad_W, grad_b = softmax_cross_entropy(W, b, problem["x"], problem["y"])
        W, b = W - lr * grad_W, b - lr * grad_b
        np.testing.assert_allclose(W_run, W, atol=1e-14)
        np.testing.assert_allclose(b_run, b, atol=1e-14)


def test_client_without_batches_is_left_out(problem):
    with_empty = dict(problem, rounds=[problem["rounds"][0] | {1: []}])
    without = {k: steps for k, steps in problem["rounds"][0].items() if k != 1}
    sgd = Sgd(0.1)
    assert_same_weights(
        fedavg(**with_empty, sizes=SIZES, sgd=sgd), fedavg(**dict(problem, rounds=[without]), sizes=SIZES, sgd=sgd)
    )
    assert_same_weights(
        scaffold(**with_empty, clients=4, sgd=sgd), scaffold(**dict(problem, rounds=[without]), clients=4, sgd=sgd)
    )


def test_fedprox_reduces_to_fedavg_and_pulls_back(problem):
    sgd = Sgd(0.1, momentum=0.5)
    plain = fedavg(**problem, sizes=SIZES, sgd=sgd)
    assert_same_weights(fedprox(**problem, sizes=SIZES, sgd=sgd, mu=0.0), plain)
    pulled = fedprox(**problem, sizes=SIZES, sgd=sgd, mu=2.0)
    assert np.linalg.norm(pulled.weights[0][0] - problem["W"]) < np.linalg.norm(plain.weights[0][0] - problem["W"])
    # the first step of a round starts at w = w^t, where the proximal term has no gradient
    single = dict(problem, rounds=[{k: steps[:1] for k, steps in problem["rounds"][0].items()}])
    assert_same_weights(fedprox(**single, sizes=SIZES, sgd=sgd, mu=2.0), fedavg(**single, sizes=SIZES, sgd=sgd))


def test_fedprox_second_step_by_hand():
    # x = 0: the cross-entropy has no gradient on W, so W stays put; b alone: b1 = -lr g0, b2 = b1 - lr (g1 + mu b1)
    x, y, batches = np.zeros((1, 2)), np.array([0]), [np.array([0])] * 2
    run = fedprox(np.ones((2, 2)), np.zeros(2), x, y, [{0: batches}], [1], Sgd(1.0), mu=0.5)
    p = 1 / (1 + math.exp(1.0))  # b1 = (.5, -.5), so the wrong class has probability 1 / (1 + e)
    np.testing.assert_allclose(run.weights[0][0], 1.0)
    np.testing.assert_allclose(run.weights[0][1], [0.5 + p - 0.25, -0.5 - p + 0.25])


def test_scaffold_first_round_is_fedavg_with_equal_sizes(problem):
    sgd = Sgd(0.1, momentum=0.5)
    control, plain = scaffold(**problem, clients=4, sgd=sgd), fedavg(**problem, sizes=[1] * 4, sgd=sgd)
    np.testing.assert_allclose(control.weights[0][0], plain.weights[0][0], atol=1e-13)
    assert np.abs(control.weights[1][0] - plain.weights[1][0]).max() > 1e-4


def test_scaffold_control_is_the_mean_raw_gradient(problem):
    run = scaffold(**problem, clients=4, sgd=Sgd(0.1))
    for k in range(4):
        for part in (0, 1):
            raw = np.mean([gradient[part] for gradient in run.locals[-1][k].raw], axis=0)
            np.testing.assert_allclose(run.clients[k][part], raw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffold_server_control_is_the_mean_over_all_clients(problem, momentum):
    run = scaffold(**problem, clients=6, sgd=Sgd(0.1, momentum=momentum))  # clients 4 and 5 never take part
    for part in (0, 1):
        mean = np.mean([run.clients[k][part] for k in range(6)], axis=0)
        np.testing.assert_allclose(run.server[part], mean, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(run.clients[5][0], 0.0)


def test_scaffold_step_count_with_momentum_by_hand():
    # Momentum .5, two steps: a = 2.5. Raw gradients g0, g1 enter the move as 1.5 g0 + g1.
    x, y, batches = np.array([[1.0, -1.0]]), np.array([0]), [np.array([0])] * 2
    run = scaffold(np.zeros((2, 2)), np.zeros(2), x, y, [{0: batches}], 1, Sgd(0.3, momentum=0.5))
    first, second = (raw[0] for raw in run.locals[0][0].raw)
    np.testing.assert_allclose(run.clients[0][0], (1.5 * first + second) / 2.5, atol=1e-14)


def test_scaffold_server_rate_scales_the_step(problem):
    single = dict(problem, rounds=problem["rounds"][:1])
    full, half = (scaffold(**single, clients=4, sgd=Sgd(0.1), server_lr=rate) for rate in (1.0, 0.5))
    np.testing.assert_allclose(half.weights[0][0], (full.weights[0][0] + problem["W"]) / 2, atol=1e-14)
    np.testing.assert_allclose(half.weights[0][1], (full.weights[0][1] + problem["b"]) / 2, atol=1e-14)


def test_fedgrab_with_all_classes_bypassed_is_bce_fedavg(problem):
    everything = [{k: np.ones((len(steps), 5), dtype=bool) for k, steps in one.items()} for one in problem["rounds"]]
    run = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.1), bypass=everything)
    W, b, x, y = (problem[name] for name in ("W", "b", "x", "y"))
    for one, (W_run, b_run) in zip(problem["rounds"], run.weights, strict=True):
        total, sum_W, sum_b = 0, 0.0, 0.0
        for k, steps in one.items():
            W_k, b_k = W, b
            for index in steps:
                delta = (1 / (1 + np.exp(-(x[index] @ W_k.T + b_k))) - np.eye(5)[y[index]]) / len(index)
                W_k, b_k = W_k - 0.1 * delta.T @ x[index], b_k - 0.1 * delta.sum(0)
            total, sum_W, sum_b = total + SIZES[k], sum_W + SIZES[k] * W_k, sum_b + SIZES[k] * b_k
        W, b = sum_W / total, sum_b / total
        np.testing.assert_allclose(W_run, W, atol=1e-13)
        np.testing.assert_allclose(b_run, b, atol=1e-13)
    assert all(sgb.pos.sum() + sgb.neg.sum() == 0 for sgb in run.clients.values())


def test_fedgrab_trains_the_classifier_and_keeps_absent_clients_as_they_were(problem):
    uniforms = draws(problem["rounds"])
    short = dict(problem, rounds=problem["rounds"][:1])
    one = fedgrab(**short, sizes=SIZES, sgd=Sgd(0.1, momentum=0.5), uniforms=uniforms)
    two = fedgrab(
        **dict(problem, rounds=problem["rounds"][:2]), sizes=SIZES, sgd=Sgd(0.1, momentum=0.5), uniforms=uniforms
    )
    assert np.abs(one.weights[0][0] - problem["W"]).min() > 0
    assert np.abs(one.weights[0][1] - problem["b"]).min() > 0
    for name in STATE:
        np.testing.assert_array_equal(getattr(two.clients[2], name), getattr(one.clients[2], name))
    assert not np.array_equal(two.clients[0].neg, one.clients[0].neg)
    assert two.server.count == 2


def test_fedgrab_uniforms_and_the_decisions_they_imply_agree(problem):
    uniforms = draws(problem["rounds"])
    drawn = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.3), warm=1, uniforms=uniforms)
    decisions = [
        {k: rows < q for k, rows in one.items()} for one, (q, _) in zip(uniforms, drawn.server_log, strict=True)
    ]
    assert drawn.server_log[0][0].max() == 0.0
    assert sorted(drawn.server_log[1][0]) == pytest.approx([0.1 ** (r / 4) for r in (4, 3, 2, 1, 0)])
    handed_in = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.3), bypass=decisions)
    assert_same_weights(drawn, handed_in, tolerance=0.0)
    without = fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.3), gate="none", uniforms=uniforms)
    assert np.abs(drawn.weights[-1][0] - without.weights[-1][0]).max() > 1e-6


def test_fedgrab_wants_exactly_one_source_of_decisions(problem):
    with pytest.raises(ValueError, match="exactly one"):
        fedgrab(**problem, sizes=SIZES, sgd=Sgd(0.1))


# --- the toy federation


def test_toy_has_the_described_shape():
    features, labels, clients, test_features, test_labels = toy.toy(0)
    np.testing.assert_array_equal(np.bincount(labels), toy.counts())
    assert (toy.counts()[0], toy.counts()[-1]) == (500, 5)
    np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(len(labels)))
    assert len(clients) == 8
    assert features.min() == 0.0
    assert test_features.shape == (2000, 32)
    np.testing.assert_array_equal(np.bincount(test_labels), 200)
    plan = toy.batches(0, clients, rounds=2)
    for k, own in enumerate(clients):
        np.testing.assert_array_equal(np.sort(np.concatenate(plan[1][k])), np.sort(np.tile(own, 5)))
        assert len(plan[0][k]) == 5 * math.ceil(len(own) / 10)


def test_toy_evaluate_counts_groups():
    features, labels = np.eye(10), np.arange(10)
    scores = toy.evaluate(np.eye(10)[[0, 1, 2, 3, 4, 6, 5, 7, 8, 9]], np.zeros(10), features, labels)
    assert scores == pytest.approx({"all": 80.0, "head": 100.0, "middle": 200 / 3, "tail": 75.0})


def test_toy_repeats_and_the_balancer_lifts_the_norm_order_of_the_first_round():
    first, again = toy.run("sgb_none", 0, rounds=1), toy.run("sgb_none", 0, rounds=1)
    np.testing.assert_array_equal(first.weights[0][0], again.weights[0][0])
    balanced = toy.spearman(row_norms(first.weights[0][0]), toy.counts())
    plain = toy.spearman(row_norms(toy.run("bce", 0, rounds=1).weights[0][0]), toy.counts())
    assert balanced > 0.6  # spec: mean .91, worst .67 of 20 seeds
    assert plain < 0.0  # spec: mean -.55
