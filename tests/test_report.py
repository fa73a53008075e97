import dataclasses
import json
import shutil
import statistics
import subprocess
import sys

import pytest

import fedtail
from fedtail import Experiment, FedAvg, FedGraB, FedProx, LocalWork, config, methods, report, runs
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
    ("values", "n", "sign", "text"),
    [
        ([0.5, 0.6], 2, "", "55.0 ± 7.1"),  # sample standard deviation: 0.1 / sqrt(2)
        ([0.5, None], 2, "", "50.0 (n=1)"),
        ([None], 1, "", "-"),
        ([0.012], 1, "+", "+1.2"),
        ([-0.0001], 1, "+", "+0.0"),
        ([-0.012, -0.014], 2, "+", "-1.3 ± 0.1"),
    ],
)
def test_cells(values, n, sign, text):
    assert Summary.of(values).text(n, sign) == text


# ---- who is who


def test_label_names_only_hyper_parameters_in_which_runs_of_an_algorithm_differ(folders, tmp_path):
    ranked = _variant(folders[2], tmp_path / "ranked", algorithm__gate="rank")
    assert [m.label for m in report.compare(folders).methods] == ["fedavg", "fedgrab"]
    labels = [m.label for m in report.compare([*folders, ranked]).methods]
    assert labels == ["fedavg", "fedgrab (gate=none)", "fedgrab"]  # rank is the default


def test_hyper_parameters_that_no_label_says_are_noted(folders, tmp_path):
    assert "fedgrab: not its defaults are gate=none, warm=0." in report.compare(folders).notes
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
    assert methods.defaults("fedprox")["algorithm.mu"] == FedProx().mu


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
    for text in (report.to_text(comparison), report.to_markdown(comparison)):
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


# ---- renderers


def _expected(folders, name):
    """A cell of the table, computed from the records alone."""
    numbers = [100 * _last(folder)["test"][name] for folder in folders]
    return f"{statistics.mean(numbers):.1f} ± {statistics.stdev(numbers):.1f}"


def test_text_has_the_numbers_and_says_where_they_are_from(folders):
    lines = report.to_text(report.compare(folders)).splitlines()
    assert next(line for line in lines if line.strip().startswith("fedavg ")).split("   ")[0].strip() == "fedavg"
    row = " ".join(next(line for line in lines if line.strip().startswith("fedgrab ")).split())
    assert row == " ".join(["fedgrab", *(_expected(folders[2:], name) for name in TEST), "2"])
    text = " ".join(" ".join(lines).split())
    assert "Test set: global test set, 500 examples. Shot groups: cumulative 75/95 % of the summed local test" in text
    assert "Numbers of the last round (2), in percent, mean ± sample standard deviation over n seeds." in text
    assert "Test set: each client's matched part of the test set." in text
    assert not any("…" in line or len(line) > 120 for line in lines)


def test_markdown_is_a_table_of_equal_rows(folders):
    text = report.to_markdown(report.compare(folders))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| method | overall | balanced | head | medium | tail | macro-F1 | n |"
    assert table[2] == "| " + " | ".join(["fedavg", *(_expected(folders[:2], name) for name in TEST), "2"]) + " |"
    assert table[4].startswith("| fedgrab - fedavg | ")
    assert {line.count("|") for line in table[:5]} == {9}


def test_json_holds_shares_by_seed_and_survives_a_round_trip(folders):
    table = json.loads(json.dumps(report.to_json(report.compare(folders)), allow_nan=False))
    assert table["baseline"] == "fedavg"
    grab = table["methods"][1]
    assert (grab["label"], grab["seeds"], grab["folders"]) == ("fedgrab", [0, 1], [str(f) for f in folders[2:]])
    assert grab["by_seed"]["test.tail"] == {str(i): _last(folders[2 + i])["test"]["tail"] for i in (0, 1)}
    assert grab["columns"]["local.mean"]["mean"] == pytest.approx(
        statistics.mean(_last(f)["local"]["mean"] for f in folders[2:])
    )
    assert table["methods"][0]["difference"] is None
    assert grab["difference"]["test.accuracy"]["n"] == 2


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
