"""Before and after tuning on each client's own data, and clients that join after training."""

import contextlib
import copy
import dataclasses
import re
import types

import numpy as np
import pytest
import torch
from contract_problem import Staged
from torch.nn import functional as F

import fedtail
from fedtail import config, evaluate, html, methods, plots, report, runs, tables, terminal, trees
from fedtail.algorithms.climb import CLIMB
from fedtail.algorithms.fedloge import FedLoGe
from fedtail.checks.problems import BatchNormNet, federated
from fedtail.config import Experiment, Participation
from fedtail.data.plan import make_plan
from fedtail.engines.loop import LoopEngine
from fedtail.errors import ConfigError, TrainingError
from fedtail.experiment import Federation, reopen, start
from fedtail.losses import FedIR
from fedtail.metrics import Cumulative, Thirds, client_spread
from fedtail.models.specs import MLP, UserModel

SIZES = (9, 5, 12, 0, 4, 7, 1, 6)  # one client of a single example, one of none
LOOP = fedtail.EngineOptions(name="loop")


def experiment(part="all", epochs=2, newcomers=0, model=None, rounds=2, **other):
    finetune = fedtail.Finetune(epochs=epochs, part=part, lr=0.2)
    return Experiment(**{
        "rounds": rounds, "model": model or MLP(hidden=(6,)), "dtype": "float64", "engine": LOOP,
        "local": fedtail.LocalWork(epochs=1, batch_size=4, min_batch=2),
        "participation": Participation(fraction=0.5, newcomers=newcomers),
        "evaluation": fedtail.Evaluation(finetune=finetune, groups=Cumulative(of="train")), **other,
    })  # fmt: skip


def small(images=False, augmentation="none"):
    """The problem's data; each client has eight or nine of the 30 test examples."""
    local = [np.arange(k, 30 - 3 * (k > 5), 3) for k in range(len(SIZES))]
    return dataclasses.replace(federated(SIZES, images), augmentation=augmentation, local_tests=local)


def finish(given, data=None):
    """Runs an experiment; returns its federation, which is closed, and its records."""
    federation = Federation(given, data if data is not None else small())
    return federation, [result.record for result in start(federation, None)]


def without_tuning(record):
    return {k: v for k, v in record.items() if "tuned" not in k}


def accuracies(federation, model, clients):
    """Each client's accuracy on its local test set by an nn.Module, or by one of a dict of them."""
    data = federation.data
    found = {}
    for k in clients:
        rows = torch.from_numpy(data.local_tests[k])
        net = (model[k] if isinstance(model, dict) else model).eval()
        with torch.no_grad():
            z = net(data.prepare(data.test["x"][rows], torch.float64))
        found[k] = float((z.argmax(1) == data.test["y"][rows]).double().mean())
    return found


def oracle(federation, client, part, epochs=2, lr=0.2):
    """Tunes the exported module by torch's own SGD, batch by batch in the order of the round behind the last."""
    net = copy.deepcopy(federation.module().network)
    data, given = federation.data, federation.experiment
    work = dataclasses.replace(given.local, epochs=epochs)
    plan = make_plan(given.seed, given.rounds, 0, client, data.owners[client], work, {})
    head = [p for n, p in net.named_parameters() if n.startswith("head.")]
    assert head
    tuned = list(net.parameters()) if part == "all" else head
    net.train(part == "all")
    optimizer = torch.optim.SGD(tuned, lr=lr)
    for rows in torch.from_numpy(plan.order).split(plan.lengths.tolist()):
        x = data.prepare(data.columns["x"][rows], torch.float64)
        loss = F.cross_entropy(net(x), data.columns["y"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


# ---- before and after


@pytest.mark.parametrize("model", [None, BatchNormNet()], ids=["mlp", "batchnorm"])
@pytest.mark.parametrize("part", ["all", "head"])
def test_against_a_plain_loop(part, model, monkeypatch):
    states = {}
    each = evaluate.Judge.each

    def spy(judge, algorithm, personal, clients):
        if personal:
            states.update(judge.states)
        return each(judge, algorithm, personal, clients)

    monkeypatch.setattr(evaluate.Judge, "each", spy)
    federation, records = finish(experiment(part, model=model), small(images=model is not None))
    able = [k for k, n in enumerate(SIZES) if n >= 2]
    assert sorted(states) == able
    nets = {k: oracle(federation, k, part) if k in able else federation.module().network for k in range(len(SIZES))}
    generic = federation.module().network.state_dict()
    for k in able:
        expected = nets[k].state_dict()
        moved = [name for name, value in expected.items() if not torch.equal(value, generic[name])]
        assert moved
        assert part == "all" or all(name.startswith("head.") for name in moved)
        if part == "all":
            assert set(moved) == set(expected)  # with BatchNorm: its statistics too
        for name, value in {**states[k].params, **states[k].buffers}.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
        assert states[k].params.keys() == {n for n in moved if n in dict(nets[k].named_parameters())}
    after = np.array(list(accuracies(federation, nets, range(len(SIZES))).values()))
    before = np.array(list(accuracies(federation, federation.module().network, range(len(SIZES))).values()))
    assert (after != before).sum() >= 2  # lr is large enough for the comparison to mean something
    for name, values in (("local", before), ("tuned", after)):
        assert records[-1][name]["clients"] == len(SIZES)
        assert records[-1][name]["mean"] == pytest.approx(values.mean())
        assert records[-1][name]["std"] == pytest.approx(values.std())
        assert records[-1][name]["worst_decile"] == pytest.approx(values.min())  # of eight clients: one
    assert "tuned" not in records[0]


@pytest.mark.parametrize(
    "algorithm",
    [fedtail.FedAvg(), fedtail.Scaffold(), FedLoGe(etf_steps=5, sparsity=0.3), Staged()],
    ids=lambda a: type(a).__name__,
)
def test_training_does_not_notice(algorithm):
    """`Staged` has another network in its last round than in its first."""
    kept = []
    for epochs in (0, 2):
        federation, records = finish(experiment(epochs=epochs, algorithm=algorithm, newcomers=2))
        kept.append((federation, records))
    (first, plain), (second, tuned) = kept
    assert trees.equal(first.server, second.server)
    assert first.states.keys() == second.states.keys()
    assert all(trees.equal(first.states[k], second.states[k]) for k in first.states)
    assert list(map(without_tuning, tuned)) == plain
    assert {"tuned", "newcomers_tuned"} <= tuned[-1].keys()
    assert not {"tuned", "newcomers_tuned"} & tuned[0].keys()


@pytest.mark.parametrize("model", [MLP(hidden=(6,), dropout=0.3), BatchNormNet()], ids=["dropout", "batchnorm"])
@pytest.mark.parametrize("part", ["all", "head"])
def test_engines(part, model):
    """With dropout masks and augmentation, whose draws are handed in."""
    images = isinstance(model, BatchNormNet)
    data = small(images, "crop_flip" if images else "none")
    found = {}
    for name in ("loop", "parallel", "processes", "vmap"):
        options = fedtail.EngineOptions(name=name, workers=2, chunk=3)
        _, records = finish(experiment(part, model=model, newcomers=2, engine=options), data)
        found[name] = records[-1]
    assert found["loop"] == found["parallel"] == found["processes"]
    for name in ("tuned", "newcomers_tuned"):  # equal to rounding: no logit of these few examples is that close
        assert found["vmap"][name] == found["loop"][name]


def test_few_tuned_models_exist_at_a_time(monkeypatch):
    _, expected = finish(experiment(newcomers=2))
    asked = []
    cohort = LoopEngine.cohort

    def spy(engine, round, trained, message, states, plans, sink):
        if round.phase.name == "finetune":
            asked.append(list(plans))
        return cohort(engine, round, trained, message, states, plans, sink)

    monkeypatch.setattr(LoopEngine, "cohort", spy)
    monkeypatch.setattr(evaluate, "PIECE", 4)
    _, found = finish(experiment(newcomers=2))
    assert found == expected
    assert [len(piece) for piece in asked] == [3, 3]  # six clients hold a batch


def test_a_client_without_test_examples_is_not_tuned(monkeypatch):
    data = small()
    data = dataclasses.replace(
        data, local_tests=[rows[:0] if k == 2 else rows for k, rows in enumerate(data.local_tests)]
    )
    asked = []
    monkeypatch.setattr(evaluate.Judge, "_piece", lambda judge, clients: asked.extend(clients) or judge.each(
        judge.engine.setting.algorithm, False, clients))  # fmt: skip
    _, records = finish(experiment(), data)
    assert asked == [0, 1, 4, 5, 7]
    assert records[-1]["tuned"] == records[-1]["local"]  # nobody was tuned, and nobody is judged without test examples
    assert records[-1]["tuned"]["clients"] == 7


def test_the_label_mask_counts_after_tuning_too():
    given = experiment("head")
    masked = dataclasses.replace(given.evaluation, label_mask="train")
    federation, records = finish(dataclasses.replace(given, evaluation=masked))
    assert "training data" in records[-1]["tuned"]["test_set"]
    data, hits = federation.data, []
    for k in range(len(SIZES)):
        if not SIZES[k]:
            continue
        net = (oracle(federation, k, "head") if SIZES[k] > 1 else federation.module().network).eval()
        z = net(data.test["x"][torch.from_numpy(data.local_tests[k])].double())
        z = z.masked_fill(torch.from_numpy(data.counts()[k] == 0), -torch.inf)
        hits.append(float((z.argmax(1) == data.test["y"][torch.from_numpy(data.local_tests[k])]).double().mean()))
    nobody = float((data.test["y"][torch.from_numpy(data.local_tests[3])] == 0).double().mean())  # all masked: class 0
    everything = [*hits[:3], nobody, *hits[3:]]
    assert records[-1]["tuned"]["mean"] == pytest.approx(np.mean(everything))


@pytest.mark.parametrize("newcomers", [0, 2])
def test_a_run_stopped_before_its_last_round_gives_the_same_record(tmp_path, newcomers):
    given = Experiment(
        rounds=3, engine=LOOP, local=fedtail.LocalWork(epochs=1), participation=Participation(newcomers=newcomers),
        evaluation=fedtail.Evaluation(finetune=fedtail.Finetune(epochs=1, part="head")),
    )  # fmt: skip
    whole = [result.record for result in fedtail.run(given, tmp_path / "whole")]
    with contextlib.closing(fedtail.run(given, tmp_path / "cut")) as rounds:
        next(rounds)
        next(rounds)
    assert [result.index for result in fedtail.resume(tmp_path / "cut")] == [2]
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with contextlib.closing(reopen(tmp_path / "cut")) as federation:  # what `fedtail evaluate` does
        again = federation.score("test")
        assert "tuned" not in federation.score("train")
    assert again == {name: whole[-1][name] for name in again}
    assert again.keys() >= ({"tuned", "newcomers_tuned"} if newcomers else {"tuned"})
    text = terminal.scores_table(again)
    assert ("newcomers_tuned: each newcomer's" in text) == bool(newcomers)


def test_a_learning_rate_too_high_is_named():
    given = experiment(epochs=60)
    finetune = fedtail.Finetune(epochs=60, lr=1e200)
    given = dataclasses.replace(given, evaluation=dataclasses.replace(given.evaluation, finetune=finetune))
    with pytest.raises(
        TrainingError, match=r"In evaluation\.finetune, which has its own lr: The loss is nan on client"
    ):
        finish(given)


# ---- newcomers


def counting(federation):
    """Counts who is trained; returns the list of indices that grows."""
    asked = []
    cohort = federation.engine.cohort

    def spy(engine, round, trained, message, states, plans, sink):
        asked.extend(plans)
        return cohort(round, trained, message, states, plans, sink)

    federation.engine.cohort = types.MethodType(spy, federation.engine)
    return asked


@pytest.mark.parametrize("algorithm", [fedtail.FedAvg(), CLIMB()], ids=lambda a: type(a).__name__)
def test_newcomers_never_take_part(algorithm):
    """CLIMB has a phase over everyone besides."""
    given = experiment(algorithm=algorithm, newcomers=3, epochs=0, rounds=12)
    federation = Federation(given, small())
    asked = counting(federation)
    list(start(federation, None))
    holders = {k for k, n in enumerate(SIZES) if n >= 2}
    newcomers = set(federation.newcomers.tolist())
    assert len(newcomers) == 3
    assert newcomers < holders
    assert set(asked) == set(federation.holders.tolist()) == holders - newcomers
    assert federation.cohort_size == 2  # half of the five clients that are no newcomers
    assert newcomers.isdisjoint(federation.states.keys())


def test_newcomers_are_drawn_by_their_own_stream_of_the_seed():
    drawn = {
        seed: tuple(Federation(experiment(newcomers=2, seed=seed), small()).newcomers.tolist()) for seed in range(9)
    }
    assert len(set(drawn.values())) > 4
    assert all(list(pair) == sorted(set(pair)) for pair in drawn.values())
    other = experiment(newcomers=2, rounds=7, algorithm=fedtail.Scaffold(), epochs=0)
    assert tuple(Federation(other, small()).newcomers.tolist()) == drawn[0]


def test_newcomers_data_leave_no_trace_in_training():
    """Other examples and other labels on the newcomers: the same server, bit for bit, also where class counts are shared."""
    given = experiment(newcomers=3, epochs=1, algorithm=fedtail.FedAvg(loss=FedIR()))
    data = small()
    first, records = finish(given, data)
    theirs = torch.from_numpy(np.concatenate([data.owners[k] for k in first.newcomers]))
    x, y = data.columns["x"].clone(), data.columns["y"].clone()
    x[theirs], y[theirs] = -x[theirs], 3 - y[theirs]
    second, changed = finish(given, dataclasses.replace(data, columns={"x": x, "y": y}))
    assert trees.equal(first.server, second.server)
    assert records[0]["train"] == changed[0]["train"]
    left = np.delete(data.counts(), first.newcomers, axis=0).sum(0)
    assert first.counts.tolist() == second.counts.tolist() == left.tolist()
    assert left.tolist() != data.class_totals().tolist() == data.counts().sum(0).tolist()


def test_newcomers_are_judged_apart():
    federation, records = finish(experiment("head", newcomers=2, epochs=1, rounds=3))
    last, new = records[-1], federation.newcomers.tolist()
    others = [k for k in range(len(SIZES)) if k not in new]
    generic = federation.module().network
    tuned = {k: oracle(federation, k, "head", epochs=1) if SIZES[k] > 1 else generic for k in range(len(SIZES))}
    for name, clients, model in [("local", others, generic), ("newcomers", new, generic), ("tuned", others, tuned),
                                 ("newcomers_tuned", new, tuned)]:  # fmt: skip
        values = np.array(list(accuracies(federation, model, clients).values()))
        assert last[name]["clients"] == len(clients)
        assert last[name]["mean"] == pytest.approx(values.mean())
        assert last[name]["std"] == pytest.approx(values.std())
        assert last[name]["worst_decile"] == pytest.approx(values.min())
        assert last[name]["groups"] == "cumulative 75/95 % of the training counts"
    assert last["newcomers"]["test_set"] == "each newcomer's matched part of the test set"
    assert all("newcomers" in record for record in records)  # wherever "local" is


def test_shot_groups_are_those_of_the_whole_population():
    """The accuracy in a group follows from groups of all clients' training counts; groups without newcomers differ here."""
    rule = Thirds(of="train")
    federation, records = finish(experiment(newcomers=3, evaluation=fedtail.Evaluation(groups=rule)))
    data, groups = federation.data, rule.split(federation.data.class_totals())
    assert rule.split(data.class_totals(without=federation.newcomers.tolist())) != groups
    net = federation.module().network.eval()
    counts = np.stack([
        evaluate.confusion(data.test["y"][rows].numpy(), net(data.test["x"][rows]).argmax(1).numpy(), 4)
        for rows in map(torch.from_numpy, data.local_tests)
    ])  # fmt: skip
    expected = client_spread(counts[federation.newcomers], groups)
    assert {k: records[-1]["newcomers"][k] for k in expected} == expected
    assert None not in expected.values()


def test_the_training_split_is_what_was_trained_on():
    federation, _ = finish(experiment(newcomers=2))
    held = sum(SIZES) - sum(SIZES[k] for k in federation.newcomers)
    assert federation.score("train")["train"]["test_set"] == f"training examples of all clients, {held} examples"


def test_personal_models_are_those_of_clients_that_took_part():
    _, records = finish(experiment(newcomers=2, algorithm=FedLoGe(etf_steps=5, sparsity=0.3)))
    assert records[-1]["personal"]["clients"] == len(SIZES) - 2
    assert records[-1]["readings"]["raw"]["newcomers"]["clients"] == 2


# ---- options, tables, old runs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedtail.Finetune(epochs=-1), "evaluation.finetune: epochs must be >= 0 and lr in (0, inf), got -1 and"),
        (lambda: fedtail.Finetune(lr=0.0), "got 0 and 0.0"),
        (lambda: fedtail.Finetune(lr=float("nan")), "got 0 and nan"),
        (lambda: Participation(newcomers=-1), "newcomers >= 0; got 1.0, 0 and -1"),
        (lambda: fedtail.Evaluation(local=False, finetune=fedtail.Finetune(epochs=1)), "set evaluation.local = true"),
        (lambda: Federation(experiment(newcomers=6), small()),
         "participation.newcomers = 6 leaves nobody to train: 6 clients hold a batch"),
        (lambda: config.from_dict(Experiment, {"evaluation": {"finetune": {"part": "body"}}}),
         "evaluation.finetune.part must be one of 'all', 'head'; got 'body'"),
    ],
)  # fmt: skip
def test_impossible_options(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_a_head_that_is_not_there(tmp_path):
    """The last layer is a convolution: everything can be tuned, a head cannot."""
    file = tmp_path / "conv.py"
    file.write_text("from torch import nn\n\ndef Net(input_shape, num_classes):\n"
                    "    return nn.Sequential(nn.Conv2d(1, num_classes, 3), nn.AvgPool2d(4), nn.Flatten())\n")  # fmt: skip
    model = UserModel(target=f"{file}:Net")
    with pytest.raises(
        ConfigError, match=r'^evaluation\.finetune\.part = "head" works on the classifier, but the model has no'
    ):
        Federation(experiment("head", model=model), small(images=True))
    _, records = finish(experiment("all", model=model), small(images=True))
    assert records[-1]["tuned"]["clients"] == len(SIZES)
    Federation(experiment("head", epochs=0, model=model), small(images=True)).close()  # nothing is to be tuned


def test_one_client_may_be_left_to_train():
    federation, _ = finish(experiment(newcomers=5))
    assert len(federation.holders) == federation.cohort_size == 1


def test_tables_show_what_was_judged(tmp_path):
    given = Experiment(
        rounds=1, engine=LOOP, local=fedtail.LocalWork(epochs=1), participation=Participation(newcomers=2),
        evaluation=fedtail.Evaluation(finetune=fedtail.Finetune(epochs=1)),
    )  # fmt: skip
    plain = dataclasses.replace(given, evaluation=fedtail.Evaluation())
    for name, one in (("tuned", given), ("plain", plain)):
        list(fedtail.run(one, tmp_path / name))
    comparison = report.compare([tmp_path / "tuned"])
    assert [s.name for s in comparison.sections] == ["test", "local", "tuned", "newcomers", "newcomers_tuned"]
    last = runs.read(tmp_path / "tuned").last
    text = tables.to_text(comparison)
    for name, title in (("tuned", "Tuned models, local test sets"), ("newcomers_tuned", "Tuned models, newcomers")):
        assert title in text
        part = text[text.index(title) :]
        assert f"{100 * last[name]['worst_decile']:.1f}" in part[: part.index("Test set:")]
    assert [s.name for s in report.compare([tmp_path / "plain"]).sections] == ["test", "local", "newcomers"]
    both = report.compare([tmp_path / "plain", tmp_path / "tuned"], allow=["evaluation.finetune"])
    assert both.summary(both.methods[0], "tuned.mean").mean is None
    assert both.summary(both.methods[1], "tuned.mean").mean == last["tuned"]["mean"]
    figure = plots.clients([runs.read(tmp_path / "tuned")])
    labels = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
    assert labels == ["fedavg", "fedavg, tuned", "fedavg, newcomers", "fedavg, newcomers, tuned"]
    for name, tuned in (("tuned", True), ("plain", False)):
        html.report([tmp_path / name], tmp_path / "page.html", "fedtail report")
        page = (tmp_path / "page.html").read_text()
        assert "never took part" in page
        assert ("trained it further" in page) == tuned
    with np.load(tmp_path / "tuned" / "partition.npz") as arrays:
        assert len(arrays["newcomers"]) == 2


def test_runs_of_before_still_read(tmp_path):
    """Without the new options in config.toml and without newcomers in partition.npz."""
    list(fedtail.run(Experiment(rounds=1, engine=LOOP), tmp_path / "run"))
    file = tmp_path / "run" / "config.toml"
    text = file.read_text()
    old = re.sub(r"\[evaluation\.finetune\]\n(\w.*\n)+", "", text.replace("newcomers = 0\n", ""))
    assert len(text) - len(old) == len('newcomers = 0\n[evaluation.finetune]\nepochs = 0\npart = "all"\nlr = 0.03\n')
    file.write_text(old)
    with np.load(tmp_path / "run" / "partition.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if name != "newcomers"}
    np.savez_compressed(tmp_path / "run" / "partition.npz", **kept)
    record = runs.read(tmp_path / "run")
    assert record.config["evaluation"]["finetune"]["epochs"] == record.config["participation"]["newcomers"] == 0
    assert [s.name for s in report.compare([tmp_path / "run"]).sections] == ["test", "local"]
    assert methods.group([record])[0].values("tuned.mean") == {0: None}
