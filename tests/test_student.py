"""A teacher beside its student: costs that can be counted by hand, accuracies, the command and its words."""

import json

import pytest
import torch
from torch import nn

import fedtail
from fedtail import cli, config, costs, report, student
from fedtail.algorithms.server_distillation import ServerDistillation
from fedtail.config import Data, Experiment
from fedtail.data.longtail import NoTail
from fedtail.data.plan import LocalWork
from fedtail.errors import ConfigError
from fedtail.models.specs import MLP
from fedtail.teachers import Trained, UserTeacher


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "data"))
    experiment = Experiment(
        rounds=2, algorithm=ServerDistillation(), teacher=Trained(model=MLP(hidden=(64, 32)), probe=20, epochs=5),
        model=MLP(hidden=(16,)), data=Data(server=10, longtail=NoTail()), local=LocalWork(epochs=1),
    )  # fmt: skip
    list(fedtail.run(experiment, tmp_path / "run"))
    return tmp_path / "run"


def test_costs_of_a_small_network_are_those_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(3 * 36, 5)).eval()
    x = torch.zeros(1, 2, 8, 8)
    found = costs.sizes(net, x)
    assert found["parameters"] == 2 * 3 * 9 + 3 * 36 * 5 + 5
    assert found["weights"] == 4 * found["parameters"]
    assert found["multiply_adds_per_image"] == 2 * 3 * 9 * 36 + 3 * 36 * 5
    # the input, the maps (flattened in place) and the scores live at once
    assert 4 * (128 + 108 + 5) <= found["peak_activations_of_one_image"] <= 4 * (128 + 2 * 108 + 5 + 545)


def test_latency_is_the_median_of_calls(monkeypatch):
    times = iter([0, 5_000_000, 10_000_000, 11_000_000, 20_000_000, 23_000_000])  # 5, 1 and 3 ms
    monkeypatch.setattr(costs.time, "perf_counter_ns", lambda: next(times))
    assert costs.latency(lambda: None, 3)["median"] == 3


def test_teacher_and_student_of_a_run(run):
    found = student.compare(run, calls=2)
    teacher, small = found["teacher"]["sizes"], found["student"]["sizes"]
    assert (found["teacher"]["name"], found["student"]["name"]) == ("trained", "mlp")
    assert small["parameters"] == 65 * 16 + 17 * 10
    assert small["multiply_adds_per_image"] == 64 * 16 + 16 * 10
    assert teacher["parameters"] == 65 * 64 + 65 * 32 + 33 * 10
    assert teacher["multiply_adds_per_image"] >= 64 * 64 + 64 * 32 + 32 * 10
    last = fedtail.read(run).last
    assert found["student"]["accuracy"] == last["test"]["accuracy"]
    assert found["student"]["rounds"] == 2
    assert 0.5 < found["teacher"]["accuracy"] <= 1
    assert 0 <= found["teacher"]["entropy_nats"] <= 2.31  # log 10
    assert found["teacher"]["latency_ms"]["torch"]["median"] > 0
    text = student.to_text(found)
    assert f"{teacher['parameters']:,}" in text
    assert "student after 2 rounds" in text
    assert json.loads(json.dumps(found)) == found


def test_fitting_a_teachers_head_is_none_of_its_costs(tmp_path, monkeypatch):
    """Pixels as features: what one image costs is the head alone, 64 x 10."""
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("def pixels(x):\n    return x.flatten(1)\n")
    teacher = UserTeacher(target="net.py:pixels", head="linear_probe", probe=5)
    (tmp_path / "exp.toml").write_text(config.dumps(Experiment(teacher=teacher)))
    found = student.compare(tmp_path / "exp.toml", calls=1)["teacher"]
    assert found["sizes"]["multiply_adds_per_image"] == 64 * 10
    assert found["accuracy"] > 0.5


def test_the_command_takes_a_run_or_an_experiment(run, capsys, tmp_path):
    cli.dispatch(["teacher", str(run), "--calls", "1"])
    assert "multiply-adds of one image" in capsys.readouterr().out
    (tmp_path / "exp.toml").write_text(config.dumps(config.load(run)))
    cli.dispatch(["teacher", str(tmp_path / "exp.toml"), "--calls", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["student"]["rounds"] == 0
    (tmp_path / "none.toml").write_text("rounds = 1\n")
    with pytest.raises(ConfigError, match="has no teacher"):
        student.compare(tmp_path / "none.toml")


def test_a_comparison_shows_the_model_before_the_servers_steps(run):
    comparison = report.compare([run])
    assert any("before the server" in section.title for section in comparison.sections)
    before = fedtail.read(run).last["readings"]["before"]["test"]["accuracy"]
    assert comparison.methods[0].values("before.accuracy") == {0: before}
