"""Export: what is written is the run's network, and each number is what its name says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import fedtail
from fedtail import cli
from fedtail.algorithms.lightweight import Lightweight
from fedtail.data.longtail import Exponential
from fedtail.data.partition import DirichletMultinomial
from fedtail.engines import EngineOptions
from fedtail.errors import ConfigError
from fedtail.federation import Predictor
from fedtail.models import MLP, BranchCNN, Unified
from fedtail.optim import SGD, Nadam

export = pytest.importorskip("fedtail.export")

needed = [pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    experiment = fedtail.Experiment(
        rounds=2, model=MLP(hidden=(16,)), local=fedtail.LocalWork(epochs=1), engine=EngineOptions(name="loop"),
        data=fedtail.Data(longtail=Exponential(factor=10.0), partition=DirichletMultinomial(clients=3)),
    )  # fmt: skip
    list(fedtail.run(experiment, folder))
    return folder


@pytest.fixture(scope="module")
def written(run):
    return export.export(run, run / "export", calls=20)


def unified(shape):
    torch.manual_seed(0)
    return Predictor(Unified().build(shape, 10), (), ()).eval()


def test_the_onnx_file_computes_the_runs_logits_for_any_batch(run, written):
    network = fedtail.load(run)
    session = needed[1].InferenceSession(run / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    kind = session.get_inputs()[0]
    assert kind.name == "input"
    shape = kind.shape[1:]
    x = np.random.default_rng(0).integers(0, 256, (9, *shape)).astype(np.uint8)
    x = x if kind.type == "tensor(uint8)" else x.astype(np.float32)
    for part in (x, x[:1], x[:5]):
        with torch.no_grad():
            expected = network(torch.from_numpy(part)).numpy()
        np.testing.assert_allclose(session.run(["logits"], {"input": part})[0], expected, atol=1e-4)
    assert 0 <= written["difference"]["largest_of_logits"] < 1e-4
    assert written["difference"]["other_labels"] == 0


def test_the_safetensors_file_holds_the_network_by_name(run, written):
    from safetensors.torch import load_file

    found = load_file(run / "export" / "model.safetensors")
    expected = fedtail.load(run).network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in found.items())
    assert written["sizes"]["weight_file"] == (run / "export" / "model.safetensors").stat().st_size
    assert written["sizes"]["onnx_file"] == (run / "export" / "model.onnx").stat().st_size


def test_report_and_card_are_kept(run, written):
    assert json.loads((run / "export" / "report.json").read_text()) == written
    card = (run / "export" / "README.md").read_text()
    record = fedtail.read(run)
    for text in ("licence:", "dirichlet_multinomial", "after 2 of 2 rounds", "| tail |", "## Licence"):
        assert text in card, text
    accuracy = 100 * record.last["test"]["accuracy"]
    assert f"| accuracy | {accuracy:.1f} |" in card
    totals = record.counts.sum(0)
    for c, recall in enumerate(record.last["test"]["per_class_recall"]):
        assert f"| {c} | {totals[c]:,} | {100 * recall:.1f} |" in card
    for name in ("torch", "onnxruntime"):
        ms = written["latency_ms"][name]
        assert 0 < ms["median"] <= ms["p99"]


def test_sizes_of_the_papers_network():
    """14,862 parameters: 59,448 bytes, with two moments 178,344 (the paper's 0.17 MB); 568,240 multiply-adds."""
    module = unified((1, 28, 28))
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    found = export.sizes(module, image, b"abc", b"de", Nadam())
    assert found["parameters"] == 14_862
    assert found["weights"] == 59_448
    assert found["weights_with_optimizer_moments"] == 178_344
    assert found["multiply_adds_per_image"] == 568_240
    assert (found["weight_file"], found["onnx_file"]) == (3, 2)
    assert export.sizes(module, image, b"", b"", SGD(momentum=0.0))["weights_with_optimizer_moments"] == 59_448
    # in branch 2: the raw image, the scaled one, the first maps before and after ReLU (10 x 26 x 26), branch 1's scores
    assert found["peak_activations_of_one_image"] == 784 + 4 * (784 + 2 * 6_760 + 10)


@pytest.mark.parametrize(
    ("shape", "branch", "whole"), [((1, 28, 28), 283_640, 568_240), ((3, 32, 32), 554_400, 1_109_760)]
)
def test_operations_by_hand(shape, branch, whole):
    image = torch.zeros(1, *shape, dtype=torch.uint8)
    one = Predictor(BranchCNN().build(shape, 10), (), ()).eval()
    assert export.sizes(one, image, b"", b"", SGD())["multiply_adds_per_image"] == branch
    assert export.sizes(unified(shape), image, b"", b"", SGD())["multiply_adds_per_image"] == whole


def test_latency_is_median_and_percentile():
    times = iter([*[0] * 5, 1])
    found = export.latency(lambda: next(times, None), calls=40)
    assert 0 <= found["median"] <= found["p99"]


def test_the_unified_network_of_a_lightweight_run_is_exported(tmp_path):
    method = Lightweight(dual_rounds=1, unfreeze_rounds=(1,), final_rounds=0)
    experiment = fedtail.Experiment(
        rounds=3, algorithm=method, model=Unified(branch=MLP(hidden=(8,))), engine=EngineOptions(name="loop"),
        data=fedtail.Data(client_validation=0.2, partition=DirichletMultinomial(clients=2)),
    )  # fmt: skip
    list(fedtail.run(experiment, tmp_path / "run"))
    report = export.export(tmp_path / "run", tmp_path / "out", calls=5)
    assert report["difference"]["largest_of_logits"] < 1e-4
    network = fedtail.load(tmp_path / "run").network
    assert report["sizes"]["parameters"] == sum(p.numel() for p in network.parameters())


def test_the_command_and_its_errors(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "RUNS", 5)
    monkeypatch.setattr(export.export, "__defaults__", (None, "checkpoint", 5))
    cli.dispatch(["export", str(run), "--output", str(tmp_path / "here"), "--client", "1"])
    said = capsys.readouterr().out
    assert "multiply-adds of one image" in said
    assert said.rstrip().endswith(str(tmp_path / "here"))
    assert "the model of client 1" in (tmp_path / "here" / "README.md").read_text()
    with pytest.raises(ConfigError, match="the run has the clients 0 to 2"):
        cli.dispatch(["export", str(run), "--client", "3"])


def test_without_the_extra_it_says_what_to_install(run):
    code = (f"import sys; sys.modules['onnx'] = None\nfrom fedtail import export\n"
            f"from fedtail.errors import ConfigError\ntry:\n    export.export({str(run)!r}, 'x')\n"
            "except ConfigError as error:\n    print(error)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "fedtail[export]"' in done.stdout
