"""Deployments: a real federation on loopback gives the simulator's bits."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_processes import PATIENCE, Processes, clean_environment, descendants, free_port, wait_for

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


def recipe():
    """The page's experiment and its blocks of commands, in their order."""
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    part = page[page.index("## The recipe") : page.index("The run folder is")]
    [experiment] = re.findall(r"```toml\n(.*?)```", part, flags=re.DOTALL)
    return experiment, re.findall(r"```sh\n(.*?)```", part, flags=re.DOTALL)


@pytest.mark.slow
def test_the_recipe_of_the_page_works_as_it_stands(tmp_path):
    """Every command of the page, with free ports in the place of its own: two sites, TLS, node authentication."""
    experiment, blocks = recipe()
    write, environment, superlink, connect, data, site, train = (
        block.replace("18000", str(port)) for port in [free_port()] for block in blocks
    )
    (tmp_path / "sites.toml").write_text(experiment)
    started = []

    def shell(block, name=""):
        command = ["bash", "-ec", environment + block]
        options = {"cwd": tmp_path, "env": clean_environment()}
        if not name:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
        with open(tmp_path / f"{name}.log", "wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options))
        return ""

    try:
        shell(write)
        shell(data)
        shell(superlink, "superlink")
        wait_for("the SuperLink", lambda: "running" in (tmp_path / "superlink.log").read_text().lower(), 120)
        shell(connect)
        for k in range(2):
            shell(site.replace("K=0", f"K={k}").replace("$((9094 + K))", str(free_port())), f"site{k}")
        log = shell(train)
    finally:
        for process in started:
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
    records = [
        json.loads(line) for line in (tmp_path / "federation/runs/federation/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["train"]["clients"] for r in records] == [2, 2, 2], log
    assert [r["local"]["clients"] for r in records] == [2, 2, 2], "the sites judged on test sets of their own"
    assert records[-1]["test"]["accuracy"] > 0.3
    assert "250 to test on fit the experiment (fedavg" in (tmp_path / "site1.log").read_text()
    assert "--insecure" not in "".join(blocks)
