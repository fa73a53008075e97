"""FedGAN and EFFGAN: a client's round against plain torch, the exact identities of the method, sampling, traffic."""

import contextlib
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from oracles.gan_oracle import Pair

import fedtail
from fedtail import Adam, EngineOptions, Experiment, LocalWork, gan, generation, teaching, trees
from fedtail.algorithms.effgan import EFFGAN
from fedtail.algorithms.fedgan import FedGAN, kl_weight
from fedtail.config import Data, Evaluation
from fedtail.data.federated import FederatedData
from fedtail.data.longtail import NoTail
from fedtail.data.partition import ClassSpecific
from fedtail.engines.base import Setting, Sink
from fedtail.engines.loop import iterate
from fedtail.errors import CheckpointError, ConfigError
from fedtail.experiment import Federation
from fedtail.models.specs import DCGAN28, MLP
from fedtail.task import Variables

CLASSES, SIZE, LATENT, WIDTH = 4, 8, 5, 3
SMALL = DCGAN28(width=WIDTH, latent=LATENT)


def images(sizes, size=SIZE, disjoint=False):
    """Made-up images of CLASSES classes; disjoint: client k holds class k only."""
    rng, total = np.random.default_rng(3), sum(sizes)
    y = np.repeat(np.arange(len(sizes)) % CLASSES, sizes) if disjoint else rng.integers(0, CLASSES, total)
    x = rng.integers(0, 200, (total, 1, size, size)).astype(np.uint8) + (10 * y[:, None, None, None]).astype(np.uint8)
    ends = np.cumsum([0, *sizes])
    columns = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    owners = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    return FederatedData(columns, owners, columns, [o[:1] for o in owners], CLASSES, mean=(0.3,), std=(0.2,))


def federation(algorithm, sizes=(9, 6, 7), model=SMALL, data=None, engine="loop", **more):
    known = {"rounds": 3, "local": LocalWork(epochs=2, batch_size=4, min_batch=2), "dtype": "float64", **more}
    whole = Experiment(algorithm=algorithm, model=model, engine=EngineOptions(name=engine), **known)
    return contextlib.closing(Federation(whole, data or images(sizes)))


def after(running, rounds):
    """The server's state after some more rounds."""
    for _ in range(rounds):
        running.advance(running.step())
    return running.server


def local_models(running):
    """What the clients of the next round would send, by client."""
    running.engine.open()
    phase = running.algorithm.phases(running.round, running.experiment.rounds)[0]
    ids = running.draw(phase)
    ctx = running.context(phase, len(ids))
    plans = running.engine.setting.plans(ctx.round, 0, ids)
    sink = Sink(list(plans), collect=True)
    running.engine.cohort(ctx.round, 0, running.message(ctx), running.states, plans, sink)
    return sink.updates


def generator_of(tensors):
    return {k: v for k, v in {**tensors.params, **tensors.buffers}.items() if k.startswith("generator.")}


# ---- one client's round


@pytest.mark.parametrize("conditional", [False, True])
def test_a_clients_round_is_that_of_plain_torch(conditional):
    model = dataclasses.replace(SMALL, conditional=conditional)
    with federation(FedGAN(), (11,), model) as running:
        setting, here = running.engine.setting, running.context().round
        [plan] = setting.plans(here, 0, [0]).values()
        oracle = Pair(WIDTH, LATENT, SIZE, CLASSES if conditional else 0)
        oracle.load(*running.task.initial)
        losses = []
        for batch in iterate(setting, plan):
            assert float(batch.x.min()) >= -1  # a generator's tanh makes [-1, 1]; the data's own scaling goes to -1.5
            draws = (batch.draws["latent_discriminator"], batch.draws["latent_generator"])
            losses.append(oracle.step(batch.x, batch.y, *draws))
        assert len(losses) == 6  # two epochs of 4, 4, 3
        record = running.step()
        found, expected = running.server.model, oracle.values()
    assert {*found.params, *found.buffers} == {*expected}
    for name, value in {**found.params, **found.buffers}.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    means = np.mean(losses, 0)
    assert record["train"]["loss_discriminator"] == pytest.approx(means[0], rel=1e-9)
    assert record["train"]["loss_generator"] == pytest.approx(means[1], rel=1e-9)
    assert record["train"]["loss"] == pytest.approx(means.sum(), rel=1e-9)


def test_rounds_with_a_kept_optimizer_are_one_training_in_plain_torch():
    """One client with all data: three rounds of two epochs are six epochs, with Adam's moments going on."""
    with federation(FedGAN(persist_optimizer=True), (11,)) as running:
        setting, here = running.engine.setting, running.context().round
        oracle = Pair(WIDTH, LATENT, SIZE)
        oracle.load(*running.task.initial)
        for index in range(3):
            [plan] = setting.plans(here._replace(index=index), 0, [0]).values()
            for batch in iterate(setting, plan):
                oracle.step(batch.x, batch.y, batch.draws["latent_discriminator"], batch.draws["latent_generator"])
        found, expected = after(running, 3).model, oracle.values()
    for name, value in {**found.params, **found.buffers}.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-10, msg=name)


def test_a_step_advances_the_counters_by_two_and_three():
    """G runs for each of the two steps; D on real and on generated images, and in the generator's step."""
    with federation(FedGAN(), (4,), local=LocalWork(steps=1, batch_size=4)) as running:
        buffers = after(running, 1).model.buffers
    counters = {k: int(v) for k, v in buffers.items() if k.endswith("num_batches_tracked")}
    assert sorted(counters.values()) == [2, 2, 3]
    assert {k: v for k, v in counters.items() if k.startswith("discriminator")} == {
        "discriminator.layers.3.num_batches_tracked": 3
    }


def test_images_are_scaled_to_the_range_of_tanh():
    with federation(FedGAN()) as running:
        black = running.data.prepare(torch.zeros((1, 1, 2, 2), dtype=torch.uint8), torch.float64)
        white = running.data.prepare(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.float64)
    assert black.unique().tolist() == [-1.0]
    assert white.unique().tolist() == [1.0]


# ---- identities of the method


def test_without_fine_tuning_all_experts_are_the_common_model():
    with federation(EFFGAN(finetune_epochs=0), dtype="float32") as running:
        server = after(running, 3)
        trained = after_rounds(FedGAN(), 2, dtype="float32")
        here = running.context().round
        setting = running.engine.setting
    common = generator_of(server.model)
    assert all(torch.equal(common[k], v) for k, v in generator_of(trained.model).items())  # two rounds of FedGAN
    for k in range(3):
        own = {**server.experts.params, **server.experts.buffers}
        assert all(torch.equal(own[name][k], value) for name, value in common.items())
    found = generation.sampler(EFFGAN(), setting.task, (), server, here, 0)
    z = torch.randn(6, LATENT, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(found.images(0, z), found.images(k, z)) for k in (1, 2, 3))


def after_rounds(algorithm, done, sizes=(9, 6, 7), **more):
    with federation(algorithm, sizes, **more) as running:
        return after(running, done)


def test_one_client_with_a_kept_optimizer_is_centralised_training():
    """Three rounds of two epochs are six epochs without a break, buffers included, bit for bit (in float32)."""
    with federation(FedGAN(persist_optimizer=True), (11,), dtype="float32") as running:
        algorithm, setting, worker = running.algorithm, running.engine.setting, running.task.worker()
        ctx = running.context()._replace(task=worker)
        local = gan.Local(running.task.initial, gan.both(algorithm.optimizer).init(running.task.initial.params), ())
        for index in range(3):
            [plan] = setting.plans(ctx.round._replace(index=index), 0, [0]).values()
            for batch in iterate(setting, plan):
                local, _ = algorithm.local_step(ctx, running.task.initial, (), local, batch)
        server = after(running, 3)
        assert trees.equal(server.model, local.variables)
        assert trees.equal(running.states[0], local.optimizer)
        fresh = after_rounds(FedGAN(), 3, (11,), dtype="float32")
        assert not trees.equal(fresh.model, server.model)


def test_experts_are_the_local_models_of_fedgans_next_round():
    with federation(FedGAN(), dtype="float32") as running:
        after(running, 2)
        sent = local_models(running)
        averaged = after(running, 1)
    server = after_rounds(EFFGAN(), 3, dtype="float32")
    for k, update in enumerate(sent):
        for name, value in generator_of(Variables(update.params, update.buffers)).items():
            assert torch.equal({**server.experts.params, **server.experts.buffers}[name][k], value), name
    mixture = EFFGAN().generators(None, server)
    mean = generation.averaged(mixture).networks  # what FedGAN's third round makes of them
    for name, value in generator_of(averaged.model).items():
        torch.testing.assert_close({**mean.params, **mean.buffers}[name][0], value, rtol=0, atol=1e-6)
    relative = [norm(mixture, k, server) for k in (1, 2, 3)]
    assert float(server.drift.relative) == pytest.approx(np.mean(relative), rel=1e-4)


def norm(mixture, k, server):
    """||theta_k - theta|| / ||theta||."""
    parts = [(v[k] - v[0], v[0]) for v in mixture.networks.params.values()]
    square, size = (sum(float((part[i].double() ** 2).sum()) for part in parts) for i in (0, 1))
    return (square / size) ** 0.5


def test_drift_is_that_of_the_models():
    """Two clients that count the same: d = mean of the relative distances; the spread is half their distance."""
    with federation(FedGAN(), (8, 8)) as running:
        old = generator_of(running.server.model)
        first, second = (generator_of(Variables(u.params, u.buffers)) for u in local_models(running))
        server = after(running, 1)
    keys = [k for k in old if k.endswith("weight") or k.endswith("bias")]

    def distance(a, b):
        return sum(float((a[k] - b[k]).square().sum()) for k in keys) ** 0.5

    zero = {k: torch.zeros_like(v) for k, v in old.items()}
    expected = (distance(first, old) + distance(second, old)) / 2 / distance(old, zero)
    assert float(server.drift.relative) == pytest.approx(expected, rel=1e-9)
    assert float(server.drift.spread) == pytest.approx(distance(first, second) / 2, rel=1e-6)


def test_the_mean_of_identical_clients_is_each_of_them(monkeypatch):
    """Same data, same batches and draws: the average is each local model, up to rounding."""
    plans = Setting.plans

    def first_for_all(self, here, trained, ids):
        return dict.fromkeys(ids, plans(self, here, trained, [0])[0])

    monkeypatch.setattr(Setting, "plans", first_for_all)
    with federation(FedGAN(), (9, 9, 9), dtype="float32") as running:
        first, *others = local_models(running)
        assert all(trees.equal(first.params, other.params) for other in others)
        server = after(running, 1)
    for name, value in server.model.params.items():
        torch.testing.assert_close(value, first.params[name], rtol=0, atol=1e-6)


def test_a_client_without_a_step_gives_no_expert():
    server = after_rounds(EFFGAN(), 2, (9, 1, 6), rounds=2)
    assert server.shares.sum(1).tolist() == pytest.approx([0, 9 / 15, 0, 6 / 15])
    assert not any(bool(v[1].any()) for v in server.experts.params.values())


def test_everyone_is_fine_tuned_also_who_was_never_asked():
    from fedtail.config import Participation

    with federation(EFFGAN(weights="uniform"), participation=Participation(clients=1), rounds=1) as running:
        server = after(running, 1)
    assert server.shares.sum(1).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_shares_of_the_classes():
    server = after_rounds(EFFGAN(weights="classes"), 1, (4, 6), rounds=1, data=images((4, 6), disjoint=True))
    expected = torch.zeros(3, CLASSES, dtype=torch.float64)
    expected[1, 0], expected[2, 1] = 0.4, 0.6
    torch.testing.assert_close(server.shares, expected)


def test_steps_of_an_epoch():
    """A last batch of one image is left out, since BatchNorm needs two: 121 images in batches of 20 are 6, 122 are 7."""
    work = LocalWork(epochs=1, batch_size=20, min_batch=2)
    assert [len(work.lengths(n)) for n in (121, 122, 1, 2, 0)] == [6, 7, 0, 1, 0]


def test_fine_tuning_has_its_own_length():
    with federation(EFFGAN(finetune_epochs=5), (8,), rounds=1) as running:
        counters = [v for k, v in after(running, 1).experts.buffers.items() if k.endswith("tracked")]
    assert [int(c[0]) for c in counters] == [2 * 2 * 5] * 2  # two forward passes a step, two steps an epoch


# ---- traffic


def floats(running):
    """Parameter floats that travel in the next round, by client and direction; buffers are counted apart."""
    down = sum(v.numel() for v in running.message(running.context()).params.values())
    sent = [getattr(u, "generator", u) for u in local_models(running)]
    return len(sent) * down, sum(v.numel() for u in sent for v in u.params.values())


SWEEPS = [
    (DCGAN28(), 10, [(100, 1_796_608_000, 1_795_221_760), (20, 359_321_600, 357_935_360), (10, 179_660_800, 178_274_560),
                     (5, 89_830_400, 88_444_160), (2, 35_932_160, 34_545_920)]),
    (DCGAN28(width=32, latent=64), 5, [(40, 108_288_000, 108_105_280), (8, 21_657_600, 21_474_880),
                                       (2, 5_414_400, 5_231_680)]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "clients", "rows"), SWEEPS, ids=["full", "half"])
def test_traffic_of_the_sweeps(model, clients, rows):
    """FedGAN of R rounds and EFFGAN of R (R - 1 and the fine-tuning), every row of the two tables of the sweeps."""
    more = {"data": images([2] * clients, 28), "model": model, "dtype": "float32",
            "local": LocalWork(steps=1, batch_size=2)}  # fmt: skip
    with federation(FedGAN(), rounds=1, **more) as running:
        one = sum(floats(running))
    with federation(EFFGAN(), rounds=1, **more) as running:
        last = sum(floats(running))
    for rounds, fedgan, effgan in rows:
        assert rounds * one == fedgan
        assert (rounds - 1) * one + last == effgan


# ---- weights of FeGAN


def test_weights_by_divergence():
    """Ten equal clients with a class each: s_k = ln(10) / 10 = .230, so the weight is exp(.230) = 10^(1/10)."""
    population = torch.full((10,), 30.0, dtype=torch.float64)
    own = torch.zeros(10, dtype=torch.float64)
    own[3] = 30.0
    assert float(kl_weight(own, population, 1)) == pytest.approx(10**0.1, rel=1e-12)
    assert float(kl_weight(own, population, -1)) == pytest.approx(10**-0.1, rel=1e-12)
    assert float(kl_weight(population / 10, population, 1)) == 1.0  # IID: all equal


def test_weighting_changes_the_mean():
    states = [
        after_rounds(FedGAN(weighting=w), 1, data=images((12, 4), disjoint=True)) for w in ("examples", "uniform", "kl")
    ]
    assert len({float(s.model.params["generator.layers.0.weight"].sum()) for s in states}) == 3


# ---- sampling


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [4, 3, 3]),  # equal remainders: the lower index
        ([0.999, 0.001], 100, [100, 0]),
        ([0.29, 0.71], 100, [29, 71]),
        ([2, 1], 4, [3, 1]),  # not normalised
        ([0.25, 0.25, 0.5], 0, [0, 0, 0]),
    ],
)
def test_quotas(shares, count, expected):
    assert generation.quotas(np.array(shares), count).tolist() == expected


def test_quotas_always_sum_to_the_count():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares, count = rng.dirichlet(np.full(7, 0.3)), int(rng.integers(0, 1000))
        found = generation.quotas(shares, count)
        assert found.sum() == count
        assert (np.abs(found - count * shares) < 1 + 1e-9).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a conditional ensemble on the embedded digits, two clients with five classes each."""
    folder = tmp_path_factory.mktemp("gan") / "run"
    whole = Experiment(
        rounds=2, algorithm=EFFGAN(weights="classes"), model=DCGAN28(width=2, latent=3, conditional=True),
        data=Data(longtail=NoTail(), partition=ClassSpecific(clients=2, classes_per_client=5)),
        local=LocalWork(steps=3, batch_size=8), evaluation=Evaluation(every=1), engine=EngineOptions(name="loop"),
    )  # fmt: skip
    list(fedtail.run(whole, folder))
    return folder


def test_a_run_keeps_a_picture_a_round(run):
    from PIL import Image

    pictures = sorted(run.glob("samples/*.png"))
    assert [p.name for p in pictures] == ["round-0000.png", "round-0001.png"]
    with Image.open(pictures[-1]) as picture:
        assert picture.size == (2 * (8 * 10 + 2),) * 2  # eight images of 8 x 8 a row, lines of two, twice as large
    assert "test" not in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_images_come_from_the_checkpoint_alone(run, monkeypatch):
    monkeypatch.setattr(teaching, "federate", None)  # nothing can be loaded
    found = generation.load(run)
    samples = found.draw(40)
    assert samples.images.shape == (40, 1, 8, 8)
    assert float(samples.images.abs().max()) <= 1
    counts = np.load(run / "partition.npz", allow_pickle=False)["counts"]
    for maker, label in zip(samples.generators, samples.labels, strict=True):
        assert counts[maker - 1, label] > 0  # an expert is asked only for what its client holds; 0 is the common model
    assert torch.equal(samples.images, generation.load(run).draw(40).images)
    seven = found.draw(5, label=7)
    assert set(seven.labels) == {7}
    assert len(set(seven.generators)) == 1


def test_an_expert_draws_from_a_stream_of_its_own(run):
    """More images of one begin with the same images; other generators do not change them."""
    found = generation.load(run)
    few, many = found.draw(3, label=7, shuffle=False), found.draw(9, label=7, shuffle=False)
    torch.testing.assert_close(few.images, many.images[:3], rtol=0, atol=1e-6)


# ---- what is refused


def test_errors(run, tmp_path):
    with pytest.raises(ConfigError, match=r"class 10: no generator makes it; there are classes 0 to 9"):
        generation.load(run).draw(3, label=10)
    with pytest.raises(ConfigError, match="count must be >= 1, got 0"):
        generation.load(run).draw(0)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        generation.load(tmp_path)
    with pytest.raises(ConfigError, match=r"fedgan needs a pair of generator and discriminator .* got MLP"):
        Federation(Experiment(algorithm=FedGAN(), model=MLP()))
    with pytest.raises(ConfigError, match=r"fedavg needs a network that classifies .* got DCGAN28"):
        Federation(Experiment(model=SMALL))
    for options in ({"keep": "best"}, {"local_models": 1}):
        with pytest.raises(ConfigError, match="finetune judge predictions, and effgan makes images"):
            Experiment(algorithm=EFFGAN(), data=Data(validation=2), evaluation=Evaluation(**options))
    with pytest.raises(ConfigError, match=r"finetune_epochs must be >= -1, got -2"):
        EFFGAN(finetune_epochs=-2)
    with pytest.raises(ConfigError, match="multiples of 4, got 30 x 30"):
        DCGAN28().build((1, 30, 30), 10)
    with federation(FedGAN()) as running:
        here, setting = running.context().round, running.engine.setting
        found = generation.sampler(FedGAN(), setting.task, (), running.server, here, 0)
        with pytest.raises(ConfigError, match="these generators are told no class"):
            found.draw(3, label=1)


@pytest.mark.parametrize("engine", ["parallel", "vmap"])
def test_engines_agree_on_a_conditional_dcgan(engine):
    model = dataclasses.replace(SMALL, conditional=True)
    algorithm = EFFGAN(optimizer=Adam(lr=0.01, beta1=0.5, eps=1e-4), weights="classes")
    loop, other = (after_rounds(algorithm, 3, model=model, engine=e) for e in ("loop", engine))
    for name, value in trees.named_leaves(loop).items():
        torch.testing.assert_close(
            trees.named_leaves(other)[name], value, rtol=0, atol=0 if engine == "parallel" else 1e-9
        )
