"""Client-level differential privacy of deployments: the noisy mean by hand, the noise, the budget, and what is refused."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")

import contract_problem as problem
import numpy as np
import torch
from flower_grid import deployed

from fedtail import config, trees
from fedtail.engines.base import Result, Sink
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.flower import privacy, server
from fedtail.flower.roster import Options


def result(client, *values):
    return Result(client, {"w": torch.tensor(values, dtype=torch.float64)}, 7.0 * client, (), {}, 1)


def mean(results, asked, clip, noise):
    private = privacy.privatise({r.client: r for r in results}, asked, clip, noise)
    sink = Sink(list(private))
    for each in private.values():
        sink.add(each)
    return sink.mean()["w"]


def test_the_mean_by_hand():
    """(3, 4) has the norm 5 and is cut to (.6, .8); (.3, .4) stays; four were asked, whatever the weights: (.9, 1.2) / 4."""
    found = mean([result(1, 3.0, 4.0), result(2, 0.3, 0.4)], asked=4, clip=1.0, noise=0.0)
    assert torch.allclose(found, torch.tensor([0.225, 0.3], dtype=torch.float64), rtol=1e-15)
    assert mean([result(1, 0.0, 0.0)], 1, 1.0, 0.0).tolist() == [0.0, 0.0]


def test_the_norm_is_that_of_the_whole_update():
    update = {"a": torch.full((2,), 3.0), "b": {"c": torch.full((2,), 4.0)}}  # squares: 9 + 9 + 16 + 16 = 50
    found = privacy.privatise({0: Result(0, update, 1.0, (), {}, 1)}, 1, 1.0, 0.0)[0].update
    assert torch.allclose(found["a"], torch.full((2,), 3 / math.sqrt(50)))
    assert torch.allclose(found["b"]["c"], torch.full((2,), 4 / math.sqrt(50)))


def test_the_noise_on_the_mean_has_its_deviation_however_many_answer():
    """z S / m = 3 * 2 / 5; of 100,000 numbers the deviation is within 2 % of it at nine standard errors."""
    for answered in (1, 2, 5):
        zeros = [result(k, *np.zeros(100_000)) for k in range(answered)]
        found = mean(zeros, asked=5, clip=2.0, noise=3.0)
        assert float(found.std()) == pytest.approx(1.2, rel=0.02)
        assert abs(float(found.mean())) < 0.04


def test_normals_are_normal():
    """On fixed entropy: the moments 0, 1, 0, 3 and the share beyond 1.96."""
    x = privacy.normal(400_000, np.random.default_rng(0).bytes)
    assert [float((x**k).mean()) for k in (1, 2, 3, 4)] == pytest.approx([0.0, 1.0, 0.0, 3.0], abs=0.03)
    assert float((np.abs(x) > 1.96).mean()) == pytest.approx(0.05, abs=0.002)
    assert np.isfinite(privacy.normal(8, lambda n: b"\0" * n)).all(), "the smallest uniform is not 0"


def test_the_noise_is_not_the_seeds():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(privacy.normal(4).tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(("noise", "sums"), [(1.0, 1), (4.0, 10), (20.0, 500)])
def test_the_budget_is_that_of_the_gaussian_mechanism(noise, sums):
    """Balle and Wang (ICML 2018), theorem 8: delta(epsilon) in terms of the normal distribution function."""
    delta, s = 1e-5, noise / math.sqrt(sums)
    epsilon = privacy.epsilon(noise, sums, delta)

    def phi(t):
        return math.erfc(-t / math.sqrt(2)) / 2

    assert phi(1 / (2 * s) - epsilon * s) - math.exp(epsilon) * phi(-1 / (2 * s) - epsilon * s) == pytest.approx(
        delta, rel=1e-6
    )
    assert privacy.epsilon(0.0, 3, delta) == math.inf


def federation(case, options, folder=None):
    chosen = problem.PROBLEMS["ragged"]
    data = problem.federated(chosen.sizes, chosen.images)
    _, roster, engine = deployed(problem.experiment(case, "ragged"), data, options)
    roster.look()
    roster.folder = folder
    return Federation(problem.experiment(case, "ragged"), data, engine=engine)


def test_without_noise_and_with_a_wide_clip_a_method_of_equal_weights_is_unchanged():
    wanted = problem.outcome("scaffold", "ragged")
    running = federation("scaffold", Options(clip=1e9))
    for index in range(problem.ROUNDS):
        record = running.step()
        assert trees.equal(running.server, wanted.servers[index])
        assert record["train"].pop("privacy") == {"epsilon": None, "delta": 1e-5, "sums": 1}
        running.advance(record)
    running.close()


def test_the_budget_in_the_record_counts_every_sum_also_those_of_a_round_that_is_begun_again(tmp_path):
    options = Options(clip=1.0, noise=2.0, delta=1e-3)
    models = []
    for sums in (1, 2):  # the second time as after a fault: the round is the first again
        running = federation("fedavg", options, tmp_path)
        found = running.step()["train"]["privacy"]
        assert found == {"epsilon": pytest.approx(privacy.epsilon(2.0, sums, 1e-3)), "delta": 1e-3, "sums": sums}
        models.append(running.server)
        running.close()
    assert not trees.equal(*models), "the noise is new"
    assert json.loads((tmp_path / "privacy.json").read_text()) == {"sums": 2}


def test_whole_numbers_and_methods_that_collect_are_refused():
    batchnorm = Result(0, {"seen": torch.tensor(3)}, 1.0, (), {}, 1)
    with pytest.raises(ConfigError, match="whole numbers"):
        privacy.privatise({0: batchnorm}, 1, 1.0, 1.0)
    collecting = problem.experiment("collecting", "ragged")
    with pytest.raises(ConfigError, match="collects single updates"):
        server.refuse(collecting, Options(clip=1.0))
    with pytest.raises(ConfigError, match="lightweight decides between rounds by metrics"):
        server.refuse(config.Experiment(algorithm=config.resolve(config.Algorithm, "lightweight")()), Options(clip=1.0))
    private = config.Experiment()
    with pytest.raises(ConfigError, match="shared class counts are not covered"):
        server.refuse(dataclasses.replace(private), Options(clip=1.0, share_counts=True))
    server.refuse(private, Options(clip=1.0, noise=1.0))


@pytest.mark.parametrize("options", [{"noise": 1.0}, {"clip": -1.0}, {"clip": 1.0, "noise": -1.0}, {"clip": math.inf},
                                     {"clip": 1.0, "delta": 0.0}, {"clip": 1.0, "delta": 1.0}])  # fmt: skip
def test_options_that_promise_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="noise needs a clip"):
        Options(**options)
