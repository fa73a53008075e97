"""Each example runs as a user runs it, in a folder of its own, and says what it promises; none is longer than 80 lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def _run(name, folder):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_every_example_has_a_test_here():
    assert NAMES == ["compare_methods", "new_algorithm", "own_data", "own_model", "quickstart"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_starts_with_what_it_does(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith('"""')
    assert f"python examples/{name}.py" in lines


def test_quickstart_shows_the_tail_and_predicts(tmp_path):
    out = _run("quickstart", tmp_path)
    head, _, tail = _numbers(re.search(r"^head .*$", out, re.MULTILINE)[0])
    assert tail < head - 0.1  # what long-tailed means
    assert "[126, 97, 75, 58, 45, 35, 27, 21, 16, 12]" in out  # floor(126 * 10^(-c / 9))
    true, predicted = (
        re.search(rf"^{word} +\[(.*)\]$", out, re.MULTILINE)[1].split(", ") for word in ("true", "predicted")
    )
    assert len(true) == len(predicted) == 10
    assert sum(a == b for a, b in zip(true, predicted, strict=True)) >= 6
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()


def test_own_data_makes_one_client_a_user_and_nobody_else_holds_the_rare_class(tmp_path):
    out = _run("own_data", tmp_path)
    rows = [
        [int(n) for n in re.findall(r"\d+", line)]
        for line in out.splitlines()
        if re.match(r"^\[?\[?[ \d\[\]]+$", line.strip())
    ]
    assert len(rows) == 6  # six users
    assert [sum(column) for column in zip(*rows, strict=True)] == [200, 75, 25, 10]
    assert [row[3] for row in rows] == [0, 0, 0, 10, 0, 0]  # clinic-3
    assert "FedAvg: recall" in out
    assert "FedGraB: recall" in out


def test_own_model_learns_and_loads(tmp_path):
    out = _run("own_model", tmp_path)
    scores = [_numbers(line)[-1] for line in out.splitlines() if line.startswith("round")]
    assert len(scores) == 6
    assert scores[-1] > 0.6  # chance is 0.1
    assert "(head): Linear(in_features=512, out_features=10" in out
    assert "(6): Dropout(p=0.1)" in out  # fedtail's, in the place of torch's


def test_new_algorithm_helps_the_tail(tmp_path):
    lines = _run("new_algorithm", tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["FedAvg", "BalancedSoftmax"]
    average, balanced = (_numbers(line) for line in lines)
    assert balanced[2] > average[2] + 0.05


def test_compare_methods_prints_mean_and_spread(tmp_path):
    header, *lines = _run("compare_methods", tmp_path).splitlines()
    assert header.split()[:2] == ["accuracy", "balanced_accuracy"]
    assert [line.split()[0] for line in lines] == ["FedAvg", "SCAFFOLD", "Fed-GraB"]
    for line in lines:
        assert len(re.findall(r"\d+\.\d \+- \d+\.\d", line)) == 6
