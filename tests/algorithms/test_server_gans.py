"""MD-GAN, UA-GAN, AvgGAN, F2U, F2A: rounds against plain torch, the aggregates in closed form, and their limits."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from oracles.gan_oracle import Pair, sp
from test_gan import CLASSES, LATENT, SIZE, SMALL, WIDTH, after, federation, images

from fedtail import SGD, LocalWork, trees
from fedtail.algorithms.mdgan import MDGAN
from fedtail.algorithms.uagan import UAGAN, generator_loss
from fedtail.engines.loop import iterate
from fedtail.errors import ConfigError

ONE = LocalWork(steps=1, batch_size=4, min_batch=2)
GROUP = dataclasses.replace(SMALL, norm="group")
RNG = np.random.default_rng(1)


def the_same(found, expected, prefix, **more):
    tensors = {**found.params, **found.buffers}
    assert tensors
    for name, value in tensors.items():
        assert name.startswith(prefix)
        torch.testing.assert_close(value, expected[name], msg=name, **{"rtol": 1e-9, "atol": 1e-12, **more})


def test_a_round_of_mdgan_is_that_of_plain_torch():
    """The mean feedback, back-propagated, is the gradient of the mean of the clients' L_G; two rounds, Adam kept."""
    with federation(MDGAN(swap_every=0), (9, 6, 7), local=ONE) as running:
        setting = running.engine.setting
        server = Pair(WIDTH, LATENT, SIZE)
        server.load(*running.task.initial)
        workers = [copy.deepcopy(server) for _ in range(3)]
        for worker in workers:
            worker.adam_d = torch.optim.Adam(worker.d.parameters(), 2e-4, (0.5, 0.999))
        server.adam_g = torch.optim.Adam(server.g.parameters(), 2e-4, (0.5, 0.999))
        for index in range(2):
            here = running.context().round
            z_d, z_g = here.draws["training"], here.draws["feedback"]
            with torch.no_grad():
                training = copy.deepcopy(server.g)(z_d[..., None, None])
            made, losses = server.make(z_g, None), []
            for worker, plan in zip(workers, setting.plans(here, 0, [0, 1, 2]).values(), strict=True):
                [batch] = iterate(setting, plan)
                loss = sp(-worker.judge(batch.x, None)).mean() + sp(worker.judge(training, None)).mean()
                worker.adam_d.zero_grad()
                loss.backward()
                worker.adam_d.step()
                losses.append(sp(-worker.judge(made, None)).mean())
            server.adam_g.zero_grad()
            (sum(losses) / 3).backward()
            server.adam_g.step()
            found = after(running, 1)
            the_same(found.model, server.values(), "generator.")
            for k, worker in enumerate(workers):
                the_same(running.states[k].discriminator, worker.values(), "discriminator.")
            assert float(found.loss) == pytest.approx(sum(v.item() for v in losses) / 3, rel=1e-9), index


def test_the_mean_feedback_is_the_gradient_of_the_mean_loss():
    """With a plain step of rate 1 the generator's change is - d/dtheta (1/K) sum_k L_G(theta; phi_k), to 1e-12."""
    with federation(MDGAN(optimizer=SGD(lr=1.0, momentum=0.0), swap_every=0), (9, 6, 7), local=ONE) as running:
        z = running.context().round.draws["feedback"]
        before, found = running.task.initial, after(running, 1).model
        phis = [running.states[k].discriminator for k in range(3)]
    server = Pair(WIDTH, LATENT, SIZE)
    server.load(*before)
    made, losses = server.make(z, None), []
    for phi in phis:
        judge = Pair(WIDTH, LATENT, SIZE)
        judge.load({**before.params, **phi.params}, before.buffers)  # in training mode old statistics do not count
        losses.append(sp(-judge.judge(made, None)).mean())
    grads = torch.autograd.grad(sum(losses) / 3, list(server.g.parameters()))
    for (name, _), grad in zip(server.g.named_parameters(), grads, strict=True):
        change = found.params[f"generator.layers.{name}"] - before.params[f"generator.layers.{name}"]
        torch.testing.assert_close(-change, grad, rtol=1e-12, atol=1e-12, msg=name)
        assert bool(grad.any())


def test_discriminators_go_round():
    """After round 1 the next client's, after round 2 the next but one's; among those who hold data (client 1 does not)."""
    sizes = (9, 0, 6, 7)
    for rounds, places in ((1, 1), (2, 2)):
        with federation(MDGAN(swap_every=0), sizes, local=ONE) as running:
            after(running, rounds)
            stayed = dict(running.states)
        with federation(MDGAN(swap_every=rounds), sizes, local=ONE) as running:
            after(running, rounds - 1)
            record = running.step()
            swapped = dict(running.states)
            assert record["gather"]["clients"] == record["hand_out"]["clients"] == 3
        holders = [0, 2, 3]
        for i, k in enumerate(holders):
            first = 1 if rounds > 1 else places  # the first swap of a run is by one place
            other = holders[(i + first) % 3]
            assert trees.equal(swapped[k].discriminator, stayed[other].discriminator)
            assert trees.equal(swapped[k].optimizer, stayed[k].optimizer)
    with federation(MDGAN(swap_every=1), sizes, local=ONE) as running:
        running.advance(running.step())
        giver = running.step() and running.server.giver
    assert [int(giver[k]) for k in (0, 2, 3)] == [3, 0, 2]  # by two places


def test_every_client_gets_the_same_images():
    with federation(MDGAN(), local=ONE) as running:
        first, again = (running.message(running.context()) for _ in range(2))
        running.advance(running.step())
        later = running.message(running.context())
    assert trees.equal(first, again)
    assert first.training.shape == first.feedback.shape == (4, 1, SIZE, SIZE)
    assert not torch.equal(first.training, first.feedback)
    assert not torch.equal(first.labels, later.labels) or not torch.equal(first.training, later.training)


# ---- aggregates

LOGITS = torch.from_numpy(RNG.normal(scale=3, size=(5, 40)))


def test_odds_in_closed_form():
    """o = sum_k pi_k D_k / (1 - D_k), D = o / (1 + o), loss -log D; in float64 without the authors' 1e-8."""
    counts = torch.from_numpy(RNG.integers(0, 4, (5, 40)).astype(float))
    counts[0, :] += 1  # nobody is without
    shares, each = counts / counts.sum(0), LOGITS.sigmoid()
    odds = (shares * each / (1 - each)).sum(0)
    expected = -(odds / (1 + odds)).log().mean()
    assert float(generator_loss(LOGITS, counts, "odds", 1.0)) == pytest.approx(float(expected), rel=1e-12)


def test_a_class_that_nobody_holds_counts_the_same_everywhere():
    none, one = torch.zeros(5, 40, dtype=torch.float64), torch.ones(5, 40, dtype=torch.float64)
    assert float(generator_loss(LOGITS, none, "odds", 1.0)) == float(generator_loss(LOGITS, one, "odds", 1.0))


def test_soft_lies_between_mean_and_maximum():
    counts = torch.ones_like(LOGITS)
    mean, largest = (-how.log().mean() for how in (LOGITS.sigmoid().mean(0), LOGITS.sigmoid().amax(0)))
    assert float(generator_loss(LOGITS, counts, "mean", 5.0)) == pytest.approx(float(mean), rel=1e-12)
    assert float(generator_loss(LOGITS, counts, "max", 5.0)) == pytest.approx(float(largest), rel=1e-12)
    apart = torch.tensor([[-2.0, 0.5], [1.0, -1.0], [0.2, 2.0]], dtype=torch.float64)
    even = torch.ones_like(apart)
    ends = [float(generator_loss(apart, even, how, 0.0)) for how in ("mean", "max")]
    soft = [float(generator_loss(apart, even, "soft", sharpness)) for sharpness in (0.0, 2.0, 1e4)]
    assert soft[0] == pytest.approx(ends[0], rel=1e-12)
    assert soft[2] == pytest.approx(ends[1], rel=1e-12)
    assert soft[0] > soft[1] > soft[2]


def test_extreme_logits_stay_finite():
    wild = torch.tensor([[-800.0, 800.0], [-900.0, -800.0]], dtype=torch.float64, requires_grad=True)
    for how in ("odds", "mean", "max", "soft"):
        loss = generator_loss(wild, torch.ones_like(wild), how, 3.0)
        [grads] = torch.autograd.grad(loss, [wild])
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(grads).all())


def test_one_client_without_penalty_is_mdgan():
    """One discriminator is every aggregate of itself; without batch statistics both modes are one."""
    with federation(MDGAN(swap_every=0), (9,), GROUP, local=ONE) as running:
        expected = after(running, 3)
    for how in ("odds", "mean", "max", "soft"):
        with federation(UAGAN(aggregate=how, scale=1.0, penalty=0.0), (9,), GROUP, local=ONE) as running:
            found = after(running, 3)
        for name, value in expected.model.params.items():
            torch.testing.assert_close(found.model.params[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_clients_step_of_uagan_is_that_of_plain_torch(conditional):
    """.1 (BCE real + BCE fake) + 10 mean ||grad_x sigmoid(D(x))||^2, and what comes back: logits and their gradients."""
    model = dataclasses.replace(SMALL, conditional=conditional)
    with federation(UAGAN(), (9,), model, data=images((9,)), local=ONE) as running:
        setting, here = running.engine.setting, running.context().round
        oracle = Pair(WIDTH, LATENT, SIZE, CLASSES if conditional else 0)
        oracle.load(*running.task.initial)
        [batch] = iterate(setting, setting.plans(here, 0, [0])[0])
        labels = here.draws["labels"]
        with torch.no_grad():
            training = copy.deepcopy(oracle).make(here.draws["training"], labels)
        x = batch.x.clone().requires_grad_()
        # the batch statistics of the penalty's own pass are not kept: it is on a copy with the same parameters
        twin = copy.deepcopy(oracle)
        for own, other in zip(twin.d.parameters(), oracle.d.parameters(), strict=True):
            own.data = other.data
        real, bad = oracle.judge(x, batch.y), oracle.judge(training, labels)
        [slope] = torch.autograd.grad(real.sigmoid().sum(), [x], create_graph=True)
        loss = 0.1 * (sp(-real).mean() + sp(bad).mean()) + 10 * slope.flatten(1).square().sum(1).mean()
        oracle.adam_d.zero_grad()
        loss.backward()
        oracle.adam_d.step()
        record = running.step()
        assert record["train"]["loss"] == pytest.approx(loss.item(), rel=1e-9)
        the_same(running.states[0].discriminator, oracle.values(), "discriminator.", rtol=1e-8, atol=1e-10)


def test_a_conditional_odds_counts_by_label():
    """A client without a label's class has no say there: the gradient of its logits is nothing."""
    logits = LOGITS[:2, :3].clone().requires_grad_()
    counts = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    [grads] = torch.autograd.grad(generator_loss(logits, counts, "odds", 1.0), [logits])
    assert (grads == 0).tolist() == [[False, True, False], [True, False, False]]


def test_errors():
    for bad, words in [
        (lambda: MDGAN(swap_every=-1), "swap_every must be >= 0, got -1"),
        (lambda: UAGAN(scale=0.0), "scale > 0; got 1.0, 10.0 and 0.0"),
        (lambda: UAGAN(penalty=-1.0), "must be >= 0"),
        (lambda: UAGAN(sharpness=-0.5), "must be >= 0"),
    ]:
        with pytest.raises(ConfigError, match=words):
            bad()
    assert len({(a, UAGAN(aggregate=a).shares_counts) for a in ("odds", "mean")}) == 2
    assert list(itertools.compress("ab", (UAGAN().shares_counts, UAGAN(aggregate="max").shares_counts))) == ["a"]
