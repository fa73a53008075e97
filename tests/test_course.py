"""Drift, stability and convergence of a run, from its records."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedtail import methods, report, tables
from fedtail.config import Evaluation, Experiment
from fedtail.course import course, rounds_to, targets
from fedtail.experiment import run
from fedtail.methods import Method
from fedtail.metrics import Thirds
from fedtail.runs import RunRecord


def record(accuracies, every=1, rounds=None, targets=(), drift=None, seed=0):
    """A run whose evaluations gave these accuracies, `every` rounds apart."""
    records = []
    for index in range(rounds or every * len(accuracies)):
        entry = {
            "round": index,
            "train": {} if drift is None else {"drift_relative": drift[index], "drift_cosine": 0.5},
        }
        if (index + 1) % every == 0 and index // every < len(accuracies):
            entry["test"] = {"accuracy": accuracies[index // every]}
        records.append(entry)
        if "test" in entry:
            entry["test"] |= {"test_set": "t", "groups": "g"}
    config = {"rounds": len(records), "seed": seed, "evaluation": {"targets": list(targets), "every": every}}
    return RunRecord(Path("none"), config, records, np.zeros((1, 1)), np.zeros((1, 1)), {}, 0.0)


def comparison(*methods):
    """Methods a, b, ... side by side, each of which is a list of runs."""
    return report.Comparison(tuple(Method(name, tuple(found)) for name, found in zip("abcd", methods, strict=False)))


def test_spread_is_that_of_the_last_twenty_rounds():
    # 40 rounds, the first 20 wild: the last 20 alternate between .4 and .6, so the variance is 20 * .01 / 19.
    found = course(record([0.0, 1.0] * 10 + [0.4, 0.6] * 10))
    assert found["spread"] == pytest.approx((20 * 0.01 / 19) ** 0.5)
    assert "drift_cosine" not in found
    assert "spread" not in course(record([0.4, 0.6], every=20))  # of two values it would say nothing
    assert "spread" not in course(record([0.4, 0.6] * 19))  # 38 rounds: half of them would be learning
    # Evaluated every fourth round: five of the last twenty.
    assert course(record([0.9] * 5 + [0.1, 0.2, 0.3, 0.4, 0.5], every=4))["spread"] == pytest.approx(
        np.std([1, 2, 3, 4, 5], ddof=1) / 10
    )


def test_drift_is_averaged_over_the_last_twenty_rounds():
    found = course(record([0.5] * 30, drift=[100.0] * 10 + [1.0, 3.0] * 10))
    assert found["drift_relative"] == pytest.approx(2.0)
    assert found["drift_cosine"] == pytest.approx(0.5)


def test_rounds_to_a_target_count_rounds_not_evaluations():
    made = record([0.2, 0.5, 0.4, 0.7], every=5, targets=(0.5, 0.7, 0.9))
    assert [rounds_to(made, t) for t in (0.2, 0.5, 0.6, 0.9)] == [5, 10, 20, None]
    assert {k: v for k, v in course(made).items() if k.startswith("rounds")} == {
        "rounds_to_0.5": 10, "rounds_to_0.7": 20, "rounds_to_0.9": None,
    }  # fmt: skip
    made.config["start"] = "runs/fedavg-seed0"  # forty of its rounds were another run's
    assert not any(name.startswith("rounds") for name in course(made))
    assert targets([made, record([0.1], targets=(0.6,))]) == [0.5, 0.6, 0.7, 0.9]


def test_compare_shows_them_in_a_table_of_their_own(tmp_path):
    plain = Experiment(rounds=4, evaluation=Evaluation(groups=Thirds(), drift=True, targets=(0.05, 0.999)))
    for seed in (0, 1):
        list(run(dataclasses.replace(plain, seed=seed), tmp_path / str(seed)))
    comparison = report.compare([tmp_path / "0", tmp_path / "1"])
    section = comparison.sections[-1]
    assert [c.title for c in section.columns] == ["relative drift", "cosine", "rounds to 5"]
    row = comparison.rows(section)[0]
    assert row.cells[2] == "1.0 ± 0.0"  # both seeds pass 5 % in the first round; nobody reaches 99.9 %
    assert 0 < float(row.cells[1].partition(" ")[0]) <= 1
    for text in (tables.to_text(comparison), tables.to_markdown(comparison), tables.to_latex(comparison)):
        assert "Drift, stability and convergence" in text
        assert "last 20 rounds" in text.replace("\n", " ")
    assert "drift_cosine" in tables.to_csv(comparison)


def test_rounds_to_a_target_have_a_mean_only_if_every_seed_reached_it():
    """Method a: rounds 2 and 4. Method b: round 1 and never; its "mean" of 1 round would win."""
    reached = [record([0.1, 0.5, 0.5, 0.5], targets=(0.5,)), record([0.1, 0.1, 0.1, 0.5], targets=(0.5,), seed=1)]
    missed = [record([0.5, 0.5, 0.5, 0.5], targets=(0.5,)), record([0.1, 0.1, 0.1, 0.1], targets=(0.5,), seed=1)]
    found = comparison(reached, missed)
    a, b = found.methods
    key = "course.rounds_to_0.5"
    assert found.summary(a, key) == report.Summary(3.0, 2**0.5, 2)
    assert found.summary(b, key) == report.Summary(None, None, 1)
    assert found.difference(b, key) == report.Summary(None, None, 1)
    section = found.sections[-1]
    assert [row.cells for row in found.rows(section)] == [("3.0 ± 1.4",), ("-",), ("-",)]
    assert found.best(section.columns[0]) == [True, False]
    assert '"-" where not every seed reached it' in found.caption(section)
    assert found.summary(b, "test.accuracy").n == 2


def test_the_caption_explains_the_differences_and_the_stars():
    runs = [[record([0.5 - 0.1 * worse, 0.6], targets=(0.5,), seed=seed, drift=[1.0, 1.0]) for seed in range(5)]
            for worse in (False, True)]  # fmt: skip
    found = comparison(*runs)
    section = found.sections[-1]
    assert found.rows(section)[-1].cells[-1] == "+1.0 ± 0.0*"
    caption = found.caption(section)
    assert "Differences: paired over the common seeds, mean ± half the width of its 95 % t-interval." in caption
    assert caption.endswith(" *: the interval excludes 0; not corrected for the number of comparisons.")
    assert "Bold: the lowest rounds to 50, and what lies within its own standard deviation of it." in caption
    few = comparison(*(members[:4] for members in runs))
    assert "*" not in few.caption(few.sections[-1])
    alone = comparison(runs[0])
    assert "Differences" not in alone.caption(alone.sections[-1])
    drift = comparison(*([record([0.5], drift=[1.0])] for _ in "ab"))
    assert "Bold" not in drift.caption(drift.sections[-1])  # neither end of it is the best


def test_what_depends_on_the_evaluated_rounds_is_left_out_where_they_differ():
    often = [record([0.5] * 40, targets=(0.5,), drift=[1.0] * 40)]
    seldom = [record([0.5] * 20, every=2, targets=(0.5,), drift=[1.0] * 40)]
    titles = ["relative drift", "cosine", "spread over rounds", "rounds to 50"]
    assert [c.title for c in comparison(often, often).sections[-1].columns] == titles
    found = comparison(often, seldom)
    assert [c.title for c in found.sections[-1].columns] == titles[:2]
    assert "Spread" not in found.caption(found.sections[-1])


def test_the_course_of_a_run_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(methods, "course", lambda run: calls.append(run) or course(run))
    found = comparison(
        *([record([0.1, 0.5], targets=(0.1, 0.5), drift=[1.0, 1.0], seed=s) for s in (0, 1)] for _ in "ab")
    )
    assert "relative drift" in tables.to_text(found)
    assert len(calls) == 4
