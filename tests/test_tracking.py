"""Trackers: TensorBoard's own reader finds what metrics.jsonl holds; MLflow by a stand-in for its client."""

import dataclasses
import json
import sys
import types

import pytest

from fedtail import tracking
from fedtail.cli import dispatch
from fedtail.config import Evaluation, Experiment
from fedtail.errors import ConfigError, TrainingError
from fedtail.experiment import resume, run
from fedtail.metrics import Thirds

SMALL = Experiment(rounds=2, evaluation=Evaluation(groups=Thirds()))


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_gets_every_number_of_metrics_jsonl(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    dispatch(["run", "--rounds", "2", "--output", str(folder), "--track", "tensorboard"])
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            found[tag.replace("/", "."), event.step] = event.tensor_proto.float_val[0]
    expected = {(k, r["round"]): v for r in written(folder) for k, v in tracking.scalars(r).items()}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)
    assert ("test.accuracy", 1) in found
    assert ("test.per_class_recall.9", 1) in found


class Client:
    """The part of mlflow.MlflowClient that is used."""

    runs: dict

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment_id, run_name):
        assert experiment_id == "7"
        identity = f"run{len(self.runs)}"
        self.runs[identity] = {"name": run_name, "params": {}, "metrics": {}, "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id, status):
        self.runs[run_id]["status"] = status

    def log_param(self, run_id, key, value):
        self.runs[run_id]["params"][key] = value

    def log_metric(self, run_id, key, value, step):
        self.runs[run_id]["metrics"][key, step] = value


def test_mlflow_gets_parameters_and_metrics_and_a_resume_continues_the_run(tmp_path, monkeypatch):
    Client.runs = {}
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    folder = tmp_path / "mine"
    rounds = tracking.track(run(SMALL, folder), SMALL, folder, ["mlflow", "mlflow"])
    next(rounds)
    rounds.close()
    assert Client.runs["run0"]["status"] == "KILLED"
    for _ in tracking.track(resume(folder), SMALL, folder, ["mlflow"]):
        assert Client.runs["run0"]["status"] == "RUNNING"
    assert list(Client.runs) == ["run0"]
    kept = Client.runs["run0"]
    assert (kept["name"], kept["status"]) == ("mine", "FINISHED")
    assert kept["params"]["algorithm.name"] == "fedavg"
    assert kept["metrics"] == {(k, r["round"]): v for r in written(folder) for k, v in tracking.scalars(r).items()}


@pytest.mark.parametrize(
    ("error", "status"), [(TrainingError, "FAILED"), (MemoryError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_mlflow_learns_how_a_run_ended(tmp_path, monkeypatch, error, status):
    Client.runs = {}
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))

    def rounds():
        yield from run(dataclasses.replace(SMALL, rounds=1))
        raise error

    with pytest.raises(error):
        list(tracking.track(rounds(), SMALL, tmp_path, ["mlflow"]))
    assert [kept["status"] for kept in Client.runs.values()] == [status]


def test_where_the_second_tracker_cannot_be_opened_the_first_is_closed(tmp_path, monkeypatch):
    Client.runs = {}
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))

    class Broken(tracking.MLflow):
        def __init__(self, experiment, folder):
            raise OSError("no space")

    monkeypatch.setitem(tracking.TRACKERS, "broken", Broken)
    with pytest.raises(OSError, match="no space"):
        tracking.track(iter(()), SMALL, tmp_path, ["mlflow", "broken"])
    assert [kept["status"] for kept in Client.runs.values()] == ["FAILED"]


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        dispatch(["run", "--output", str(folder), "--track", "tensorbord"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r'Install it: pip install "fedtail\[tracking\]"'):
        dispatch(["run", "--output", str(folder), "--track", "mlflow"])
    assert not folder.exists()


def test_tracking_changes_no_round(tmp_path, monkeypatch):
    Client.runs = {}
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    for name, names in (("a", ["mlflow"]), ("b", [])):
        assert len(list(tracking.track(run(SMALL, tmp_path / name), SMALL, tmp_path / name, names))) == 2
    for file in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
