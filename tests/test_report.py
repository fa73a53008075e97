import csv
import dataclasses
import io
import json
import math
import shutil
import statistics
import subprocess
import sys

import pytest
from scipy import stats

import fedtail
from fedtail import Experiment, FedAvg, FedGraB, FedProx, LocalWork, config, methods, report, runs, tables
from fedtail.engines import EngineOptions
from fedtail.errors import CheckpointError, ConfigError
from fedtail.report import Summary

TEST = ("accuracy", "balanced_accuracy", "head", "medium", "tail", "macro_f1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two algorithms x two seeds on digits: fedavg-0, fedavg-1, fedgrab-0, fedgrab-1."""
    root = tmp_path_factory.mktemp("runs")
    experiment = Experiment(rounds=2, local=LocalWork(epochs=1), engine=EngineOptions(name="loop"))
    found = []
    for name, algorithm in (("fedavg", FedAvg()), ("fedgrab", FedGraB(gate="none", warm=0))):
        for seed in (0, 1):
            found.append(root / f"{name}-{seed}")
            list(fedtail.run(dataclasses.replace(experiment, algorithm=algorithm, seed=seed), found[-1]))
    return found


def _last(folder):
    """The last line of metrics.jsonl, read without fedtail."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def _variant(folder, target, **changes):
    """A copy of a run folder with another configuration: dotted keys, dots written as two underscores."""
    shutil.copytree(folder, target)
    table = config.to_dict(config.load(folder))
    for key, value in changes.items():
        *path, name = key.split("__")
        node = table
        for part in path:
            node = node[part]
        node[name] = value
    (target / "config.toml").write_text(config.dumps(config.from_dict(Experiment, table)))
    return target


# ---- numbers


@pytest.mark.parametrize("key", [f"test.{name}" for name in TEST] + ["local.mean", "local.std", "local.worst_decile"])
def test_summaries_and_paired_differences_are_those_of_the_records(folders, key):
    section, name = key.split(".")
    numbers = [_last(folder)[section][name] for folder in folders]
    comparison = report.compare(folders)
    avg, grab = comparison.methods
    assert comparison.summary(avg, key).mean == pytest.approx(statistics.mean(numbers[:2]), abs=1e-15)
    assert comparison.summary(grab, key).std == pytest.approx(statistics.stdev(numbers[2:]), abs=1e-15)
    differences = [numbers[2] - numbers[0], numbers[3] - numbers[1]]
    assert comparison.difference(grab, key).mean == pytest.approx(statistics.mean(differences), abs=1e-15)
    assert comparison.difference(grab, key).std == pytest.approx(statistics.stdev(differences), abs=1e-15)
    assert comparison.difference(grab, key).n == 2


def test_the_last_round_counts_not_the_best(folders, tmp_path):
    run = _variant(folders[0], tmp_path / "falls")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[0]["test"]["accuracy"], records[1]["test"]["accuracy"] = 0.9, 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = report.compare([run])
    assert comparison.summary(comparison.methods[0], "test.accuracy") == Summary(0.25, None, 1)


def test_differences_use_the_common_seeds_only(folders):
    comparison = report.compare([folders[0], folders[1], folders[3]])
    grab = comparison.methods[1]
    assert grab.seeds == (1,)
    difference = _last(folders[3])["test"]["tail"] - _last(folders[1])["test"]["tail"]
    assert comparison.difference(grab, "test.tail") == Summary(pytest.approx(difference), None, 1)
    assert comparison.notes[0].startswith("The seeds are not the same (fedavg 0, 1; fedgrab 1)")


@pytest.mark.parametrize(
    ("values", "n", "difference", "text"),
    [
        ([0.5, 0.6], 2, False, "55.0 ± 7.1"),  # sample standard deviation: 0.1 / sqrt(2)
        ([0.5, None], 2, False, "50.0 (n=1)"),
        ([None], 1, False, "-"),
        ([0.012], 1, True, "+1.2"),
        ([-0.0001], 1, True, "+0.0"),
        # half the interval's width: t_1 s / sqrt(2) = 12.706 * 0.1 / sqrt(2) * sqrt(2) / 2 = 1.27 points
        ([-0.012, -0.014], 2, True, "-1.3 ± 1.3"),
        # s = 0.2 / sqrt(3), t_3 = 3.182, half = 0.18 points: excludes 0, but no star below five seeds
        ([0.01, 0.01, 0.012, 0.012], 4, True, "+1.1 ± 0.2"),
        # s = 0.1 points, t_4 = 2.776, half = 0.12 points
        ([0.01, 0.01, 0.012, 0.012, 0.011], 5, True, "+1.1 ± 0.1*"),
        ([0.01, 0.01, 0.012, 0.012, 0.011, None], 6, True, "+1.1 ± 0.1* (n=5)"),
        ([0.01, -0.01, 0.012, 0.012, 0.011], 5, True, "+0.7 ± 1.2"),  # s = sqrt(3.64 / 4), half = 1.18 points
        ([-0.01, -0.01, -0.012, -0.012, -0.011], 5, True, "-1.1 ± 0.1*"),
    ],
)
def test_cells(values, n, difference, text):
    assert Summary.of(values).text(n, difference) == text


@pytest.mark.parametrize("freedom", [*range(1, 41), 99, 100, 1000])
def test_t_quantile(freedom):
    assert report.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)


def test_interval():
    """scipy's interval of the mean, and the hand's: 1..5 has s = sqrt(2.5), t_4 = 2.776, half = 1.963."""
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert summary.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), abs=1e-3)
    assert summary.interval == pytest.approx(stats.t.interval(0.95, 4, 3.0, math.sqrt(0.5)))
    assert summary.significant
    assert Summary.of([1.0]).interval is None
    assert Summary.of([]).interval is None
    assert not Summary.of([1.0, 1.0, 1.0, 1.0]).significant  # four seeds
    assert not Summary.of([0.0] * 5).significant


# ---- who is who


def test_label_names_only_hyper_parameters_in_which_runs_of_an_algorithm_differ(folders, tmp_path):
    ranked = _variant(folders[2], tmp_path / "ranked", algorithm__gate="rank")
    assert [m.label for m in report.compare(folders).methods] == ["fedavg", "fedgrab"]
    labels = [m.label for m in report.compare([*folders, ranked]).methods]
    assert labels == ["fedavg", "fedgrab (gate=none)", "fedgrab"]  # rank is the default


def test_hyper_parameters_that_no_label_says_are_noted(folders, tmp_path):
    assert "fedgrab: not its defaults are gate=none, warm=0." in report.compare(folders).notes
    assert not any("reveal" in note for note in report.compare(folders).notes)
    revealing = _variant(folders[0], tmp_path / "fedir", algorithm__loss__name="fedir")
    assert (
        "fedavg (loss=fedir): clients reveal their class counts to the server."
        in report.compare([*folders, revealing]).notes
    )
    ranked = _variant(folders[2], tmp_path / "ranked", algorithm__gate="rank")
    notes = report.compare([*folders, ranked]).notes
    assert "fedgrab (gate=none): not its defaults are warm=0." in notes


def test_order_of_methods_is_the_order_of_folders_and_seeds_ascend(folders):
    comparison = report.compare(folders[::-1])
    assert [m.label for m in comparison.methods] == ["fedgrab", "fedavg"]
    assert [m.seeds for m in comparison.methods] == [(0, 1), (0, 1)]
    assert [row.label for row in comparison.rows(comparison.sections[0])] == ["fedgrab", "fedavg", "fedavg - fedgrab"]


def test_users_classes_of_one_name_keep_their_files_in_the_label(folders):
    base = runs.read(folders[0])

    def mine(path):
        return dataclasses.replace(
            base, config={**base.config, "algorithm": {**base.config["algorithm"], "name": path}}
        )

    assert [m.label for m in methods.group([mine("a.py:Mine"), base])] == ["Mine", "fedavg"]
    assert [m.label for m in methods.group([mine("a.py:Mine"), mine("b.py:Mine")])] == ["a.py:Mine", "b.py:Mine"]


def test_a_default_that_is_not_all_known_shows_every_hyper_parameter(folders):
    base = runs.read(folders[0])

    def mine(mu):
        return dataclasses.replace(
            base, config={**base.config, "algorithm": {**base.config["algorithm"], "name": "m.py:Mine", "mu": mu}}
        )

    assert [m.label for m in methods.group([mine(0.1), mine(1.0)])] == ["Mine (mu=0.1)", "Mine (mu=1)"]
    assert methods.defaults({"algorithm.name": "fedprox"})["algorithm.mu"] == FedProx().mu


# ---- refusals


def test_refuses_other_data_and_names_every_key_with_both_values(folders, tmp_path):
    other = _variant(folders[2], tmp_path / "other", data__longtail__factor=50.0, rounds=1)
    with pytest.raises(ConfigError) as caught:
        report.compare([folders[0], other])
    text = str(caught.value)
    assert f"rounds: 2 ({folders[0]}) and 1 ({other})" in text
    assert f"data.longtail.factor: 10.0 ({folders[0]}) and 50.0 ({other})" in text
    assert "--allow rounds --allow data.longtail.factor." in text
    assert "algorithm." not in text


def test_refuses_an_option_that_only_one_of_them_has(folders, tmp_path):
    one = {"name": "iid", "clients": 8}
    other = _variant(folders[0], tmp_path / "iid", data__partition=one, seed=1)
    with pytest.raises(ConfigError, match=r"data\.partition\.alpha: 0\.5 \(.*\) and absent \("):
        report.compare([folders[0], other])


def test_a_differing_optimizer_must_be_allowed_and_is_named(folders, tmp_path):
    other = _variant(folders[2], tmp_path / "other", algorithm__optimizer__lr=0.1)
    with pytest.raises(
        ConfigError, match=r"(?s)algorithm\.optimizer\.lr: 0\.03 .* and 0\.1 .*--allow algorithm\.optimizer\.$"
    ) as caught:
        report.compare([folders[0], other])
    assert "gate" not in str(caught.value)
    comparison = report.compare([folders[0], other], allow=["algorithm.optimizer"])
    said = f"Allowed to differ: algorithm.optimizer.lr, 0.03 ({folders[0]}) and 0.1 ({other})."
    assert said in comparison.notes
    assert [m.label for m in comparison.methods] == ["fedavg (optimizer.lr=0.03)", "fedgrab (optimizer.lr=0.1)"]
    for text in (tables.to_text(comparison), tables.to_markdown(comparison)):
        assert "algorithm.optimizer.lr" in text


def test_allow_takes_tables_and_refuses_unknown_keys(folders, tmp_path):
    other = _variant(folders[0], tmp_path / "other", data__longtail__factor=50.0)
    comparison = report.compare([folders[0], other], allow=["data"])
    assert [m.label for m in comparison.methods] == [
        "fedavg (data.longtail.factor=10)",
        "fedavg (data.longtail.factor=50)",
    ]
    with pytest.raises(ConfigError, match=r"--allow data\.longtial: .*did you mean 'data\.longtail'"):
        report.compare([folders[0], other], allow=["data.longtial"])


def test_engine_and_rhythm_do_not_matter_but_vmap_is_noted(folders, tmp_path):
    parallel = _variant(folders[1], tmp_path / "parallel", engine__name="parallel", checkpoint_every=2)
    comparison = report.compare([folders[0], parallel])
    assert [m.label for m in comparison.methods] == ["fedavg"]
    assert comparison.notes == ()
    stacked = _variant(folders[1], tmp_path / "vmap", engine__name="vmap", evaluation__every=2)
    comparison = report.compare([folders[0], stacked])
    assert [m.label for m in comparison.methods] == ["fedavg"]
    assert [note.partition(";")[0] for note in comparison.notes] == ["Engines: loop, vmap", "evaluation.every is 1, 2"]
    assert "The spread over rounds and the rounds to a target are left out" in comparison.notes[1]


def test_refuses_an_unfinished_run_with_the_command_that_finishes_it(folders, tmp_path):
    run = _variant(folders[0], tmp_path / "half", rounds=5)
    with pytest.raises(ConfigError, match=rf"half has 2 of 5 rounds.*`fedtail resume {run}`"):
        report.compare([run])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has 0 of 5 rounds"):
        report.compare([run])


def test_refuses_the_same_run_twice(folders, tmp_path):
    with pytest.raises(ConfigError, match="same experiment with the same seed 0"):
        report.compare([folders[0], folders[2], _variant(folders[0], tmp_path / "again")])


def test_refuses_runs_whose_clients_hold_other_examples(folders, tmp_path):
    other = _variant(folders[2], tmp_path / "other")
    shutil.copy(folders[3] / "partition.npz", other / "partition.npz")
    with pytest.raises(ConfigError, match=r"seed 0, but their clients hold other examples \(partition\.npz\)"):
        report.compare([folders[0], other])


def test_refuses_nothing_and_what_is_no_run(folders, tmp_path):
    with pytest.raises(ConfigError, match="needs at least one run folder"):
        report.compare([])
    with pytest.raises(CheckpointError, match="is not a run folder"):
        report.compare([folders[0], tmp_path])


def test_other_versions_are_noted(folders, tmp_path):
    other = _variant(folders[1], tmp_path / "other")
    known = json.loads((other / "environment.json").read_text())
    mine, known["packages"]["torch"] = known["packages"]["torch"], "9.9"
    (other / "environment.json").write_text(json.dumps(known))
    assert report.compare([folders[0], other]).notes == (f"Made with different versions of torch: {mine}, 9.9.",)


def test_other_commits_are_noted_and_a_missing_one_is_no_difference(folders, tmp_path):
    def at(commit, name, folder):
        made = _variant(folder, tmp_path / name)
        known = json.loads((made / "environment.json").read_text())
        (made / "environment.json").write_text(json.dumps({**known, "commit": commit}))
        return made

    one, other = at("a" * 40, "one", folders[0]), at("b" * 40, "other", folders[1])
    dirty = at("a" * 40 + "-dirty", "dirty", folders[2])
    assert report.compare([one, other]).notes == ("Made with different commits of fedtail: aaaaaaaaaa, bbbbbbbbbb.",)
    assert "Made with different commits of fedtail: aaaaaaaaaa, aaaaaaaaaa-dirty." in report.compare([one, dirty]).notes
    assert report.compare([one, at(None, "unknown", folders[1])]).notes == ()


# ---- renderers


def _expected(folders, name):
    """A cell of the table, computed from the records alone."""
    numbers = [100 * _last(folder)["test"][name] for folder in folders]
    return f"{statistics.mean(numbers):.1f} ± {statistics.stdev(numbers):.1f}"


def test_text_has_the_numbers_and_says_where_they_are_from(folders):
    lines = tables.to_text(report.compare(folders)).splitlines()
    assert next(line for line in lines if line.strip().startswith("fedavg ")).split("   ")[0].strip() == "fedavg"
    row = " ".join(next(line for line in lines if line.strip().startswith("fedgrab ")).split())
    assert row.replace(tables.BEST, "") == " ".join(["fedgrab", *(_expected(folders[2:], name) for name in TEST), "2"])
    assert sum(line.strip() == "difference to fedavg" for line in lines) == 2
    text = " ".join(" ".join(lines).split())
    assert "Test set: global test set, 500 examples. Shot groups: cumulative 75/95 % of the summed local test" in text
    assert "Numbers of the last round (2), in percent, mean ± sample standard deviation over n seeds." in text
    assert (
        f"{tables.BEST}: the best of its column, and what lies within the best's own standard deviation of it." in text
    )
    assert "mean ± half the width of its 95 % t-interval. " in text
    assert "*" not in text  # two seeds
    assert "Test set: each client's matched part of the test set." in text
    assert not any("…" in line or len(line) > 120 for line in lines)


def test_markdown_is_tables_of_equal_rows(folders):
    text = tables.to_markdown(report.compare(folders))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| method | overall | balanced | head | medium | tail | macro-F1 | n |"
    cells = " | ".join(_expected(folders[:2], name) for name in TEST)
    assert table[2].replace("**", "") == f"| fedavg | {cells} | 2 |"
    assert table[4] == table[0].replace("method", "difference to fedavg")
    assert table[6].startswith("| fedgrab | ")
    assert {line.count("|") for line in table[:7]} == {9}


def test_json_holds_shares_by_seed_and_survives_a_round_trip(folders):
    table = json.loads(json.dumps(tables.to_json(report.compare(folders)), allow_nan=False))
    assert table["baseline"] == "fedavg"
    grab = table["methods"][1]
    assert (grab["label"], grab["seeds"], grab["folders"]) == ("fedgrab", [0, 1], [str(f) for f in folders[2:]])
    assert grab["by_seed"]["test.tail"] == {str(i): _last(folders[2 + i])["test"]["tail"] for i in (0, 1)}
    assert grab["columns"]["local.mean"]["mean"] == pytest.approx(
        statistics.mean(_last(f)["local"]["mean"] for f in folders[2:])
    )
    assert table["methods"][0]["difference"] is None
    difference = grab["difference"]["test.accuracy"]
    values = [_last(folders[2 + i])["test"]["accuracy"] - _last(folders[i])["test"]["accuracy"] for i in (0, 1)]
    low, high = stats.t.interval(0.95, 1, statistics.mean(values), statistics.stdev(values) / math.sqrt(2))
    assert (difference["n"], difference["low"], difference["high"]) == (2, pytest.approx(low), pytest.approx(high))


def test_csv_has_a_line_for_each_method_and_column(folders):
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(report.compare(folders)))))
    assert len(lines) == 2 * (len(TEST) + 3)
    avg, grab = (next(x for x in lines if (x["table"], x["column"], x["method"]) == ("test", "tail", name))
                 for name in ("fedavg", "fedgrab"))  # fmt: skip
    numbers = [_last(folder)["test"]["tail"] for folder in folders]
    assert float(avg["mean"]) == pytest.approx(statistics.mean(numbers[:2]), abs=1e-15)
    assert float(grab["std"]) == pytest.approx(statistics.stdev(numbers[2:]), abs=1e-15)
    assert (avg["difference"], avg["low"], avg["pairs"], grab["pairs"], grab["n"]) == ("", "", "", "2", "2")
    assert float(grab["difference"]) == pytest.approx(
        statistics.mean(numbers[2:]) - statistics.mean(numbers[:2]), abs=1e-15
    )
    values = [numbers[2] - numbers[0], numbers[3] - numbers[1]]
    half = stats.t.ppf(0.975, 1) * statistics.stdev(values) / math.sqrt(2)
    assert float(grab["high"]) - float(grab["low"]) == pytest.approx(2 * half)
    assert {x["best"] for x in lines} == {"0", "1"}


def test_latex_is_a_balanced_document(folders, tmp_path):
    ranked = _variant(folders[2], tmp_path / "ranked", algorithm__gate_base=0.2)
    text = tables.to_latex(report.compare([*folders, ranked]))
    assert text.count("{") == text.count("}")
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") for line in rows[:6]} == {7}
    assert (
        rows[1]
        .replace(r"\textbf{", "")
        .replace("}", "")
        .startswith(f"fedavg & {_expected(folders[:2], 'accuracy').replace('±', '$' + chr(92) + 'pm$')} &")
    )
    assert r"fedgrab (gate\_base=0.2)" in text
    assert r"75/95 \% of" in text
    assert r"\multicolumn{8}{l}{\emph{difference to fedavg}} \\" in text


# ---- marks


def test_marked_are_the_best_and_what_is_within_one_spread_of_it(folders, tmp_path):
    # Tail: best 0.60 with spread 0.0141; 0.59 lies within. Head: 0.59 against 0.62 with spread 0: not.
    comparison = _comparison(folders, tmp_path, tail=(0.59, 0.61, 0.58, 0.60), head=(0.62, 0.62, 0.61, 0.60))
    section = comparison.sections[0]
    best = {column.title: comparison.best(column) for column in section.columns}
    assert (best["tail"], best["head"]) == ([True, True], [True, False])
    _, grab, difference = comparison.rows(section)
    names = [column.title for column in section.columns]
    assert (grab.best[names.index("tail")], grab.best[names.index("head")]) == (True, False)
    assert not any(difference.best)
    text = " ".join(tables.to_text(comparison).split())
    assert f"{tables.BEST}62.0 ± 0.0" in text
    assert " 60.5 ± 0.7" in text
    markdown = tables.to_markdown(comparison)
    assert "| **62.0 ± 0.0** |" in markdown
    assert "| 60.5 ± 0.7 |" in markdown
    assert r"\textbf{62.0 $\pm$ 0.0}" in tables.to_latex(comparison)
    assert "test.head" not in tables.to_json(comparison)["methods"][1]["best"]


def test_of_the_spread_over_clients_the_lowest_is_the_best(folders, tmp_path):
    runs_ = []
    for folder, std in zip(folders, (0.30, 0.30, 0.10, 0.10), strict=True):
        runs_.append(_variant(folder, tmp_path / folder.name))
        records = [json.loads(line) for line in (runs_[-1] / "metrics.jsonl").read_text().splitlines()]
        records[-1]["local"].update(std=std, mean=std)
        (runs_[-1] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = report.compare(runs_)
    mean, spread, _ = comparison.sections[1].columns
    assert (comparison.best(mean), comparison.best(spread)) == ([True, False], [False, True])
    assert "(lowest spread)" in comparison.caption(comparison.sections[1])
    assert "lowest" not in comparison.caption(comparison.sections[0])


def test_one_method_or_one_seed_marks_no_more_than_the_best(folders):
    alone = report.compare(folders[:2])
    assert not any(any(row.best) for row in alone.rows(alone.sections[0]))
    assert "best" not in alone.caption(alone.sections[0])
    single = report.compare([folders[0], folders[2]])
    accuracy = [_last(folders[i])["test"]["accuracy"] for i in (0, 2)]
    assert single.best(single.sections[0].columns[0]) == [a == max(accuracy) for a in accuracy]


def test_stars_from_five_seeds_on_are_explained(folders, tmp_path):
    """Fed-GraB is .1 higher on the tail with every seed, give or take; on the head it is not."""
    found = []
    for number, folder in enumerate((folders[0], folders[2])):
        for seed in range(5):
            run = _variant(folder, tmp_path / f"{number}-{seed}", seed=seed)
            shutil.copy(folders[0] / "partition.npz", run / "partition.npz")
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            records[-1]["test"].update(tail=0.5 + number * (0.1 + 0.01 * seed), head=0.9 + number * 0.01 * (-1) ** seed)
            (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            found.append(run)
    comparison = report.compare(found)
    # 0.10 .. 0.14: mean 12 points, s = 1.58, half = 2.776 * 1.58 / sqrt(5) = 1.96
    text = tables.to_text(comparison)
    assert "+12.0 ± 2.0*" in text
    assert "+0.2 ± 1.4 " in text  # the head: s = 1.095, half 1.36
    explained = "*: the interval excludes 0; not corrected for the number of comparisons."
    assert explained in " ".join(text.split())
    assert "+12.0 ± 2.0\\*" in tables.to_markdown(comparison)
    assert "+12.0 $\\pm$ 2.0$^{*}$" in tables.to_latex(comparison)
    four = report.compare([run for run in found if not run.name.endswith("4")])
    assert "*" not in tables.to_text(four)


# ---- starts and older runs


def test_a_start_is_allowed_on_purpose_and_its_label_is_short(folders, tmp_path):
    path = "somewhere/deep/fedavg-factor=10-seed{seed}"
    started = _variant(folders[2], tmp_path / "started", start=path, rounds=1)
    with pytest.raises(ConfigError, match=r"(?s)start: \"\" .*--allow rounds --allow start"):
        report.compare([folders[0], started])
    comparison = report.compare([folders[0], folders[2], started], allow=["start", "rounds"])
    assert [m.label for m in comparison.methods] == ["fedavg", "fedgrab", "fedgrab (after fedavg-factor=10)"]
    assert any(note.startswith("Allowed to differ: start,") for note in comparison.notes)
    longer = _variant(folders[2], tmp_path / "longer", start=path)
    comparison = report.compare([folders[0], started, longer], allow=["start", "rounds"])
    assert [m.label for m in comparison.methods][1:] == [
        "fedgrab (rounds=1, after fedavg-factor=10)", "fedgrab (rounds=2, after fedavg-factor=10)"]  # fmt: skip


def test_runs_from_before_an_option_existed_have_its_default(folders, tmp_path):
    old = _variant(folders[1], tmp_path / "old")
    text = (old / "config.toml").read_text()
    older = text.replace('start = ""\n', "").replace('[algorithm.loss]\nname = "cross_entropy"\n', "")
    assert text.count("\n") - older.count("\n") == 3
    (old / "config.toml").write_text(older)
    comparison = report.compare([folders[0], old])
    assert [(m.label, m.seeds) for m in comparison.methods] == [("fedavg", (0, 1))]
    assert comparison.notes == ()


def test_a_label_says_the_loss_and_no_option_that_the_method_does_not_have(folders):
    base = runs.read(folders[0])

    def with_loss(**loss):
        return dataclasses.replace(
            base, config={**base.config, "algorithm": {**base.config["algorithm"], "loss": loss}}
        )

    focal = {"name": "focal", **config.to_dict(config.from_dict(config.Loss, {"name": "focal"}))}
    labels = [m.label for m in methods.group([base, with_loss(**focal), with_loss(**{**focal, "gamma": 7.0})])]
    assert labels == ["fedavg", "fedavg (loss=focal)", "fedavg (loss=focal, loss.gamma=7)"]


def test_one_method_has_no_differences_and_no_local_table_without_local_numbers(folders, tmp_path):
    run = _variant(folders[0], tmp_path / "global", evaluation__local=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "local"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = report.compare([run])
    assert [section.name for section in comparison.sections] == ["test"]
    assert [row.label for row in comparison.rows(comparison.sections[0])] == ["fedavg"]
    assert "Differences" not in comparison.caption(comparison.sections[0])


# ---- words


def _comparison(folders, tmp_path, **shares):
    """The four runs with made-up head and tail shares: name -> (fedavg-0, fedavg-1, fedgrab-0, fedgrab-1)."""
    for number, folder in enumerate(folders):
        run = _variant(folder, tmp_path / folder.name)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        records[-1]["test"].update({name: values[number] for name, values in shares.items()})
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return report.compare([tmp_path / folder.name for folder in folders])


@pytest.mark.parametrize(
    ("head", "tail", "verdict"),
    [
        ((0.9, 0.9, 0.8, 0.85), (0.5, 0.5, 0.6, 0.7), "The head pays for the tail."),
        ((0.8, 0.8, 0.9, 0.9), (0.5, 0.5, 0.4, 0.4), "The tail pays for the head."),
        ((0.8, 0.8, 0.9, 0.9), (0.5, 0.5, 0.6, 0.6), "Head and tail both gain."),
        ((0.8, 0.8, 0.7, 0.7), (0.5, 0.5, 0.4, 0.4), "Head and tail both lose."),
        (
            (0.8, 0.8, 0.7, 0.9),
            (0.5, 0.5, 0.4, 0.4),
            "The head changes in no direction on which the seeds agree, the tail loses.",
        ),
        ((0.8, 0.8, 0.8, 0.8), (0.5, 0.5, 0.4, 0.6), "On neither head nor tail do the seeds agree on a difference."),
    ],
)
def test_words_say_who_pays_only_if_the_seeds_agree(folders, tmp_path, head, tail, verdict):
    [text] = report.in_words(_comparison(folders, tmp_path, head=head, tail=tail))
    assert text.endswith(f" {verdict}")


def test_words_quote_the_numbers(folders, tmp_path):
    [text] = report.in_words(_comparison(folders, tmp_path, tail=(0.5, 0.6, 0.55, 0.58), head=(0.9, 0.9, 0.8, 0.8)))
    assert text.startswith("On the tail fedgrab gets 56.5 % against 55.0 % of fedavg (+1.5 points, higher in 1 of 2 seeds); "
                           "on the head 80.0 % against 90.0 % (-10.0 points, higher in 0 of 2 seeds); overall ")  # fmt: skip


def test_words_do_not_conclude_from_one_seed_or_none(folders):
    [text] = report.in_words(report.compare([folders[0], folders[2]]))
    assert text.endswith("This is a single seed: repeat with others.")
    [text] = report.in_words(report.compare([folders[0], folders[3]]))
    assert text == "fedgrab and fedavg have no seed in common, so there is no paired difference."
    [text] = report.in_words(report.compare(folders[:2]))
    assert text.startswith("fedavg gets ")
    assert text.endswith("(2 seeds).")


# ---- start-up


def test_importing_the_modules_does_not_import_matplotlib():
    code = (
        "import sys, fedtail.report, fedtail.plots, fedtail.html; assert not {'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
