"""Error asymmetry and update bias: the numbers by hand, the cohort's own models in every engine, and the pictures."""

import contextlib
import dataclasses
import itertools
import json
import math
from pathlib import Path

import contract_problem
import numpy as np
import pytest
import torch
from contract_problem import CASES, CLASSES, federated, own
from torch.nn import functional as F

import fedtail
import fedtail.plots
from fedtail import (
    SGD,
    EngineOptions,
    Evaluation,
    Experiment,
    FedAvg,
    Finetune,
    LocalWork,
    Participation,
    asymmetry,
    drawing,
    report,
    runs,
    tables,
    terminal,
    trees,
)
from fedtail.algorithms.fedbabu import FedBABU
from fedtail.algorithms.moon import MOON
from fedtail.engines import local_models
from fedtail.engines.base import Result, Sink
from fedtail.engines.local_models import network_of, soft_confusion
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.metrics import asymmetry_scores, error_asymmetry
from fedtail.models.specs import MLP

LOOP = EngineOptions(name="loop")


# ---- the metric


def test_error_asymmetry_of_a_soft_confusion_matrix():
    """pi = [[.8 .1 .1] [.2 .7 .1] [.3 .3 .4]]: .2/.5, .3/.4, .6/.2; the rows' sizes do not matter."""
    pi, support = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]), np.array([10, 2, 5])
    np.testing.assert_allclose(error_asymmetry(pi * support[:, None], support), [0.4, 0.75, 3.0], rtol=1e-12)
    scores = asymmetry_scores(pi * support[:, None], support)
    assert scores["mean_abs_log_ea"] == pytest.approx((math.log(2.5) + math.log(4 / 3) + math.log(3)) / 3, rel=1e-12)


def test_perfect_and_clueless_predictions_are_balanced():
    support = np.full(4, 7)
    np.testing.assert_array_equal(error_asymmetry(7 * np.eye(4), support), np.ones(4))
    np.testing.assert_allclose(error_asymmetry(np.full((4, 4), 7 / 4), support), np.ones(4), rtol=1e-12)


def test_classes_without_examples_are_left_out_on_both_sides():
    """Class 1 is absent: EA_0 = (.3 + .1) / .5, EA_2 = (.5 + .2) / .1; mass on class 1 counts as missed."""
    soft = np.array([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0], [5.0, 2.0, 3.0]])
    scores = asymmetry_scores(soft, np.array([10, 0, 10]))
    assert scores["error_asymmetry"] == [pytest.approx(0.8), None, pytest.approx(7.0)]
    assert scores["mean_abs_log_ea"] == pytest.approx((math.log(1.25) + math.log(7)) / 2)


def test_a_class_that_is_never_or_always_predicted_has_a_finite_value():
    soft = np.array([[5.0, 0.0], [5.0, 0.0]])
    np.testing.assert_allclose(error_asymmetry(soft, np.array([5, 5])), [1e-12, 1e12], rtol=1e-9)
    assert asymmetry_scores(np.zeros((2, 2)), np.zeros(2, np.int64)) == {
        "error_asymmetry": [None, None], "mean_abs_log_ea": None,
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "never"), [(10, 1.191), (100, 1.017), (200, 1.009)])
def test_bounds_of_the_double_softmax(classes, never):
    """Certain predictions: perfect 1, never predicted (e + C - 2) / (C - 1), always predicted 1 / e."""
    y = torch.arange(classes)
    sure = 1e4 * torch.eye(classes)
    z = sure.clone()
    z[3] = sure[5]  # class 3 is taken for 5
    support = np.ones(classes, np.int64)
    ea = error_asymmetry(soft_confusion(z, y, twice=True).numpy(), support)
    assert ea[3] == pytest.approx((math.e + classes - 2) / (classes - 1), abs=1e-9) == pytest.approx(never, abs=5e-4)
    assert ea[0] == pytest.approx(1, abs=1e-9)
    everything = sure[5].expand(classes, -1)
    ea = error_asymmetry(soft_confusion(everything, y, twice=True).numpy(), support)
    assert ea[5] == pytest.approx(1 / math.e, abs=1e-9)
    assert error_asymmetry(soft_confusion(everything, y).numpy(), support)[5] < 1e-9


# ---- in a record


def federation(algorithm, data, engine=LOOP, cohort=3, rounds=5, **evaluation):
    """A small federation in float64."""
    return Federation(
        Experiment(rounds=rounds, algorithm=algorithm, model=MLP(hidden=(5,)), local=LocalWork(epochs=2, batch_size=5),
                   participation=Participation(clients=cohort), engine=engine, evaluation=Evaluation(**evaluation),
                   dtype="float64"),
        data,
    )  # fmt: skip


def logits(params, x):
    h = F.relu(F.linear(x, params["hidden1.0.weight"], params["hidden1.0.bias"]))
    return F.linear(h, params["head.weight"], params["head.bias"])


def by_hand(params, data):
    """Right answers by class, EA, and macro F1, written out one example at a time."""
    y = data.test["y"].tolist()
    z = logits(params, data.test["x"]).numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    right, wrong, pi = np.zeros(CLASSES), np.zeros(CLASSES), np.zeros((CLASSES, CLASSES))
    for label, row, scores in zip(y, p, z, strict=True):
        right[label] += scores.argmax() == label
        wrong[scores.argmax()] += scores.argmax() != label
        pi[label] += row / y.count(label)
    ea = [(1 - pi[c, c]) / sum(pi[j, c] for j in range(CLASSES) if j != c) for c in range(CLASSES)]
    missed = [y.count(c) - right[c] for c in range(CLASSES)]
    f1 = [2 * right[c] / (2 * right[c] + wrong[c] + missed[c]) for c in range(CLASSES)]
    return right, np.array(ea), np.mean(f1)


def test_every_evaluation_has_the_error_asymmetry_of_the_generic_model():
    data = federated((9, 6, 12), images=False)
    with contextlib.closing(federation(FedAvg(), data, batch_size=7)) as running:  # the last batch is short
        running.step()
        record = running.score("all") | running.score("train")
        _, ea, f1 = by_hand(running.server.params, data)
    np.testing.assert_allclose(record["test"]["error_asymmetry"], ea, rtol=1e-9)
    assert record["test"]["macro_f1"] == pytest.approx(f1, rel=1e-12)
    assert record["test"]["mean_abs_log_ea"] == pytest.approx(np.abs(np.log(ea)).mean(), rel=1e-9)
    assert len(record["train"]["error_asymmetry"]) == CLASSES
    with contextlib.closing(federation(FedAvg(), data, double_softmax=True)) as running:
        running.step()
        assert running.score()["test"]["mean_abs_log_ea"] < record["test"]["mean_abs_log_ea"] / 2


def test_the_cohorts_own_models_by_hand():
    """MOON without its term is FedAvg, and keeps each client's own model: what is judged can be rebuilt from it."""
    data = federated((9, 6, 0, 12, 7), images=False)
    y = data.test["y"].numpy()
    support = np.bincount(y, minlength=CLASSES)
    with contextlib.closing(
        federation(MOON(mu=0.0, optimizer=SGD(lr=0.2)), data, local_models=1, batch_size=7)
    ) as running:
        running.advance(running.step())
        before, _, f1_before = by_hand(running.server.params, data)
        ids = running.draw(fedtail.Phase())
        found = running.step()["local_models"]
        states, counts = dict(running.states), data.counts()
    rights, eas, f1s = zip(*(by_hand(states[k].params, data) for k in ids), strict=True)
    assert found["clients"] == len(ids) == 3
    assert found["test_set"] == f"global test set, {len(y)} examples"
    assert found["accuracy_before"] == pytest.approx(before.sum() / len(y))
    assert found["macro_f1_before"] == pytest.approx(f1_before, rel=1e-12)
    assert found["macro_f1_after"] == pytest.approx(np.mean(f1s), rel=1e-12)
    assert found["accuracy_after"] == pytest.approx(np.sum(rights) / len(y) / 3)
    np.testing.assert_allclose(found["recall_before"], before / support)
    np.testing.assert_allclose(found["recall_after"], np.sum(rights, 0) / support / 3)
    np.testing.assert_allclose(found["error_asymmetry_after"], np.exp(np.mean(np.log(eas), 0)), rtol=1e-9)
    assert found["mean_abs_log_ea_after"] == pytest.approx(np.abs(np.log(eas)).mean(), rel=1e-9)
    groups = {"frequent": [], "rare": [], "missing": []}
    for position, k in enumerate(ids):
        for c in range(CLASSES):
            n = counts[k, c]
            name = "missing" if n == 0 else "frequent" if n >= counts[k].sum() / CLASSES else "rare"
            groups[name].append((position, c))
    for name, pairs in groups.items():
        assert pairs, name
        below = sum(support[c] for _, c in pairs)
        assert found[f"{name}_before"] == pytest.approx(sum(before[c] for _, c in pairs) / below)
        assert found[f"{name}_after"] == pytest.approx(sum(rights[i][c] for i, c in pairs) / below)
        assert found[f"log_ea_{name}_after"] == pytest.approx(
            np.mean([math.log(eas[i][c]) for i, c in pairs]), rel=1e-9
        )


def judged(algorithm, engine, every=1, rounds=3):
    data = federated((9, 6, 0, 12, 7), images=False)
    with contextlib.closing(federation(algorithm, data, engine, rounds=rounds, local_models=every)) as running:
        records, servers = [], []
        for _ in range(rounds):
            records.append(running.step())
            running.advance(records[-1])
            servers.append(running.server)
        return records, servers


def test_engines_agree_on_the_cohorts_own_models():
    records, servers = judged(FedAvg(), LOOP)
    assert all("local_models" in record for record in records)
    for engine in (EngineOptions(name="parallel", workers=2), EngineOptions(name="processes", workers=2)):
        others, models = judged(FedAvg(), engine)
        assert others == records
        assert all(trees.equal(a, b) for a, b in zip(models, servers, strict=True))
    for other, record in zip(judged(FedAvg(), EngineOptions(name="vmap"))[0], records, strict=True):
        for key, value in record["local_models"].items():
            if key != "test_set":
                np.testing.assert_allclose(other["local_models"][key], value, rtol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "parallel", "vmap"])
def test_judging_the_cohorts_own_models_changes_no_bit_of_training(engine):
    for case in ("fedavg", "fedgrab-rank", "scaffold"):
        options = EngineOptions(name=engine, workers=2)
        with_, without = (judged(CASES[case], options, every) for every in (1, 0))
        assert all(trees.equal(a, b) for a, b in zip(with_[1], without[1], strict=True)), case
        for record in with_[0]:
            del record["local_models"]
        assert with_[0] == without[0]


def test_batchnorms_statistics_survive_the_judging():
    """The network is judged in evaluation mode in the middle of a round, and goes on in training mode."""
    chosen = contract_problem.PROBLEMS["batchnorm"]

    def servers(every):
        experiment = contract_problem.experiment("fedavg", "batchnorm")
        experiment = dataclasses.replace(experiment, evaluation=Evaluation(local_models=every))
        with contextlib.closing(Federation(experiment, federated(chosen.sizes, True))) as running:
            for _ in range(2):
                running.advance(running.step())
            return running.server

    assert trees.equal(servers(1), servers(0))


def test_rounds_in_which_the_cohorts_own_models_are_judged():
    records, _ = judged(FedAvg(), LOOP, every=2, rounds=5)
    assert [record["round"] for record in records if "local_models" in record] == [1, 3, 4]
    assert not any("local_models" in record for record in judged(FedAvg(), LOOP, every=0)[0])
    with pytest.raises(ConfigError, match=r"evaluation\.local_models must be >= 0, got -1"):
        Evaluation(local_models=-1)


@pytest.mark.parametrize("case", [c for c in CASES if "-" not in c and not CASES[c].generative])
def test_every_method_has_local_models(case):
    experiment = contract_problem.experiment(case, "ragged")
    experiment = dataclasses.replace(experiment, rounds=2, evaluation=Evaluation(local_models=1))
    data = federated(
        contract_problem.PROBLEMS["ragged"].sizes, False, (*CASES[case].columns, *CASES[case].server_columns)
    )
    with contextlib.closing(Federation(experiment, data)) as running:
        assert 0 < running.step()["local_models"]["mean_abs_log_ea_after"] < 30


def test_tuning_is_no_local_training(monkeypatch):
    """Three of four clients train; FedBABU's last round lets all four tune, and `finetune` all that are judged."""
    data = federated((9, 6, 0, 12, 7), images=False)
    with contextlib.closing(
        federation(FedBABU(), data, rounds=1, local_models=1, finetune=Finetune(epochs=1))
    ) as running:
        record = running.step()
        assert (record["tune"]["clients"], record["local_models"]["clients"]) == (4, 3)
        monkeypatch.setattr(local_models, "network_of", None)
        record |= running.score()
    text = terminal.scores_table(record)
    assert "tuned: each client's" in text
    assert "local_models" not in text, "no scores by shot group"


def test_a_local_state_without_a_network_is_not_judged():
    assert network_of(()) is None
    assert network_of({"sum": torch.zeros(3), "more": (torch.zeros(2),)}) is None
    variables = fedtail.Variables({"w": torch.zeros(1)}, {})
    assert network_of((torch.zeros(1), fedtail.Local(variables, (), ()))) is variables


def test_sums_of_several_sinks_are_the_sums_of_one():
    """What ranks of a distributed run add up."""

    def result(client):
        sums = {"clients": torch.ones((), dtype=torch.float64), "after": torch.full((3, 4), float(client))}
        return Result(client, torch.ones(2), 1.0, (), {}, 1, sums)

    whole, parts = Sink([0, 1, 2]), [Sink([0, 2]), Sink([1])]
    for client in range(3):
        whole.add(result(client))
        parts[client % 2].add(result(client))
    total = trees.tree_map(torch.add, *(part.sums()["judged"] for part in parts))
    assert trees.equal(total, whole.judged)
    parts[0].take(parts[0], {**whole.sums(), "judged": total}, whole.answers, {})
    assert trees.equal(parts[0].judged, total)
    assert Sink([0]).sums()["judged"] == ()


def test_the_contract_suites_own_methods_are_judged_too():
    assert "local_models" in judged(own("Judging")(), LOOP)[0][0]  # two phases, of which one trains


# ---- tables and pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real runs on digits: FedAvg and FedGA, two seeds, three rounds."""
    root = tmp_path_factory.mktemp("runs")
    from fedtail.algorithms.fedga import FedGA

    found = []
    for algorithm, seed in itertools.product((FedAvg(), FedGA()), (0, 1)):
        experiment = Experiment(rounds=3, seed=seed, algorithm=algorithm, local=LocalWork(epochs=1), engine=LOOP,
                                evaluation=Evaluation(every=2, local_models=1))  # fmt: skip
        found.append(root / f"{type(algorithm).__name__}-{seed}")
        list(fedtail.run(experiment, found[-1]))
    return found


def last(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_compare_has_a_table_of_them(folders):
    comparison = report.compare(folders)
    [section] = [s for s in comparison.sections if s.name == "local_models"]
    text = tables.to_markdown(comparison)
    groups = " | ".join(f"{name} before | {name} after" for name in ("frequent", "rare", "missing"))
    assert f"| method | EA | local EA | before | after | macro-F1 after | {groups} | n |" in text
    values = [last(folder)["test"]["mean_abs_log_ea"] for folder in folders]
    first = comparison.rows(section)[0]
    assert first.cells[0] == f"{np.mean(values[:2]):.2f} ± {np.std(values[:2], ddof=1):.2f}"
    after = 100 * np.array([last(folder)["local_models"]["accuracy_after"] for folder in folders])
    assert first.cells[3] == f"{after[:2].mean():.1f} ± {after[:2].std(ddof=1):.1f}"
    caption = comparison.caption(section)
    assert caption.startswith("EA: mean over classes of abs(log EA)")
    assert "the lowest EA, local EA" in caption
    assert "Drift" not in caption


def texts(figure):
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


def test_the_picture_of_classes_over_rounds(folders):
    found = [runs.read(folder) for folder in folders]
    figure = asymmetry.classes(found)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["fedavg", "fedga"]
    values = [[r["test"]["error_asymmetry"] for r in run.records if "test" in r] for run in found[2:]]
    expected = np.log2(np.array(values)).mean(0)  # [rounds 2 and 3, classes]
    order = np.argsort(-found[0].counts.sum(0), kind="stable")
    drawn = panels[1].collections[0].get_array().reshape(10, 2)
    np.testing.assert_allclose(drawn, expected[:, order].T, rtol=1e-12)
    assert "Round" in texts(figure)
    assert drawing.render(figure, "png").startswith(b"\x89PNG")


def test_the_picture_of_accuracy_against_asymmetry(folders):
    found = [runs.read(folder) for folder in folders]
    figure = asymmetry.tradeoff(found)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["Global model", "Clients' own models"]
    marks = [tuple(float(v[0]) for v in c.lines[0].get_data()) for c in panels[0].containers]
    for mark, pair in zip(marks, (folders[:2], folders[2:]), strict=True):
        tests = [last(folder)["test"] for folder in pair]
        assert mark == pytest.approx((np.mean([t["mean_abs_log_ea"] for t in tests]),
                                      100 * np.mean([t["accuracy"] for t in tests])))  # fmt: skip
    assert {"fedavg", "fedga"} <= set(texts(figure))
    alone = [dataclasses.replace(run, records=[{k: v for k, v in r.items() if k != "local_models"} for r in run.records])
             for run in found]  # fmt: skip
    assert len(asymmetry.tradeoff(alone).axes) == 1


def test_runs_of_an_older_version_cannot_be_drawn(folders):
    run = runs.read(folders[0])
    for record in run.records:
        for table in (record.get("test", {}), record.get("local_models", {})):
            for key in [k for k in table if "_ea" in k or "asymmetry" in k]:
                del table[key]
    for draw in (asymmetry.classes, asymmetry.tradeoff):
        with pytest.raises(ConfigError, match="no run records error asymmetry"):
            draw([run])


def test_curves_of_the_asymmetry_are_no_percentages(folders):
    found = [runs.read(folder) for folder in folders]
    figure = fedtail.plots.curves(found, ("test.mean_abs_log_ea", "local_models.accuracy_after"))
    first, second = figure.axes
    assert first.get_ylabel() == "Mean abs log EA"
    assert second.get_ylabel() == "Accuracy after local training (%)"
    assert float(first.lines[0].get_ydata()[-1]) == pytest.approx(
        np.mean([last(folder)["test"]["mean_abs_log_ea"] for folder in folders[:2]])
    )


@pytest.mark.parametrize("kind", ["asymmetry", "tradeoff"])
def test_plot_by_the_command_line(folders, kind, tmp_path, monkeypatch, capsys):
    from fedtail import cli

    monkeypatch.chdir(tmp_path)
    cli.dispatch(["plot", kind, *map(str, folders)])
    assert capsys.readouterr().out == f"{kind}.png\n"
    assert Path(f"{kind}.png").read_bytes().startswith(b"\x89PNG")
