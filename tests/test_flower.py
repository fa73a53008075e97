"""Deployments: a real federation on loopback gives the simulator's bits."""

import json

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_processes import Processes

from fedtail import config, trees
from fedtail.checkpoint import load_checkpoint
from fedtail.experiment import run

EXPERIMENT = """
rounds = 3
[algorithm]
name = "{method}"
[data]
name = "digits"
partition = {{ name = "dirichlet_multinomial", clients = 3, alpha = 0.5 }}
[local]
epochs = 1
[engine]
name = "loop"
"""


def experiment(folder, method, more=""):
    path = folder / "experiment.toml"
    path.write_text(EXPERIMENT.format(method=method) + more)
    return path


def simulated(path, folder):
    for _ in run(config.load(path), folder):
        pass
    return load_checkpoint(folder / "checkpoint.safetensors"), (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedgrab", "fedloge"])
def test_three_nodes_give_the_bits_of_the_simulator(tmp_path, method):
    path = experiment(tmp_path, method)
    wanted, metrics = simulated(path, tmp_path / "simulated")
    with Processes(tmp_path, path) as federation:
        federation.superlink()
        for client in range(3):
            federation.supernode(client)
        federation.run()
        federation.wait_rounds(3)
    found = load_checkpoint(federation.run_folder / "checkpoint.safetensors")
    assert trees.equal(found.server, wanted.server)
    assert sorted(found.clients) == sorted(wanted.clients)
    assert all(trees.equal(found.clients[k], wanted.clients[k]) for k in wanted.clients)
    assert (federation.run_folder / "metrics.jsonl").read_text() == metrics
    assert len(json.loads(metrics.splitlines()[-1])) > 4
