"""Deployments under faults, each a real one: killed processes, nodes that hang, lie or are strangers."""

import json
import statistics
import textwrap
import time

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_processes import Processes, figures, wait_for
from test_flower import experiment, simulated

from fedtail import config, trees
from fedtail.checkpoint import load_checkpoint
from fedtail.experiment import Federation

pytestmark = pytest.mark.slow

# What a node of a stranger's does to its own fedtail, by the environment variable EVIL.
EVIL = """
import os, sys
if os.environ.get("EVIL") and any("flwr-clientapp" in word for word in sys.orig_argv):
    import time
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from fedtail.flower import node

    honest, how = node.Node.train, os.environ["EVIL"]

    def train(self, content, memory):
        if how == "hangs":
            time.sleep(100_000)
        records = honest(self, content, memory)
        arrays = dict(records["update"])
        name = sorted(arrays)[0]
        values = arrays[name].numpy().copy()
        if how == "nan":
            values.reshape(-1)[0] = np.nan
            arrays[name] = Array(values)
        else:
            arrays[name] = Array(arrays[name].dtype, arrays[name].shape, arrays[name].stype, arrays[name].data[:-5])
        return {**records, "update": ArrayRecord(arrays)}

    node.Node.train = train
"""


def records(federation):
    return [json.loads(line) for line in (federation.run_folder / "metrics.jsonl").read_text().splitlines()]


def expected(path, dropped):
    """The simulator's checkpoint where in round i the clients dropped[i] never answer."""
    running = Federation(config.load(path))

    class Lossy(type(running.engine)):
        def cohort(self, round, trained, message, states, plans, sink):
            lost = dropped[round.index]
            for k in lost:
                sink.drop(k, "lost")
            super().cohort(round, trained, message, states, {k: p for k, p in plans.items() if k not in lost}, sink)

    running.engine.__class__ = Lossy
    while running.round < running.experiment.rounds:
        running.advance(running.step())
    running.close()
    return running


def same_as(federation, running):
    found = load_checkpoint(federation.run_folder / "checkpoint.safetensors")
    assert trees.equal(found.server, running.server)
    assert sorted(found.clients) == sorted(running.states)
    assert all(trees.equal(found.clients[k], running.states[k]) for k in running.states)


def test_a_killed_serverapp_and_a_killed_superlink_lose_nothing(tmp_path):
    path = experiment(tmp_path, "scaffold")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 5"))
    _, metrics = simulated(path, tmp_path / "simulated")
    with Processes(tmp_path, path) as federation:
        federation.superlink()
        for client in range(3):
            federation.supernode(client)
        federation.run()
        federation.wait_rounds(1)
        for what in ("ServerApp", "SuperLink"):
            before = federation.rounds()
            if what == "ServerApp":
                [server] = federation.children("superlink", "flwr-serverapp")
                federation.end(server)
            else:
                federation.kill("superlink")
            done, begun = federation.rounds(), time.monotonic()
            if what == "SuperLink":
                federation.superlink()
            federation.run()
            federation.wait_rounds(done + 1)
            took = time.monotonic() - begun
            assert done >= before
            figures(f"{what} killed in a round", seconds_to_recover=took, round_seconds=statistics.median(federation.seconds()),
                    finished_rounds_lost=before - min(before, done), rounds_repeated=1, same_as_undisturbed=True)  # fmt: skip
        federation.wait_rounds(5)
    same_as(federation, expected(path, [[]] * 5))
    assert (federation.run_folder / "metrics.jsonl").read_text() == metrics


def test_a_node_killed_in_a_round_drops_out_and_comes_back(tmp_path):
    path = experiment(tmp_path, "scaffold")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 6"))
    with Processes(tmp_path, path) as federation:
        federation.superlink()
        for client in range(3):
            federation.supernode(client)
        federation.run()
        federation.wait_rounds(1)
        wait_for("client 2's next work", lambda: federation.children("node2", "flwr-clientapp"))
        federation.kill("node2")
        begun = time.monotonic()
        federation.wait_rounds(2)
        took = time.monotonic() - begun
        federation.supernode(2)
        begun = time.monotonic()
        wait_for("client 2's work on its new node", lambda: federation.children("node2", "flwr-clientapp"))
        back = time.monotonic() - begun
        federation.wait_rounds(6)
    dropped = [[int(k) for k in r["train"].get("dropped", {})] for r in records(federation)]
    assert dropped[0] == []
    assert dropped[1] == [2]
    assert dropped[5] == [], "the node came back"
    same_as(federation, expected(path, dropped))
    calm = [s for s, lost in zip(federation.seconds(), dropped, strict=True) if not lost]
    figures("node killed in a round", seconds_to_recover=took, round_seconds=statistics.median(calm),
            finished_rounds_lost=0, rounds_repeated=0, rounds_without_it=sum(map(bool, dropped)),
            seconds_until_it_works_again=back, same_as_without_it=True)  # fmt: skip


def test_nodes_that_hang_or_lie_drop_out(tmp_path):
    path = experiment(tmp_path, "scaffold")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 1").replace("clients = 3", "clients = 4"))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "sitecustomize.py").write_text(textwrap.dedent(EVIL))
    with Processes(tmp_path, path, "--quorum", "0.25", "--deadline", "150") as federation:
        federation.superlink()
        federation.supernode(0)
        poisoned = f"{tmp_path / 'evil'}:{federation.env['PYTHONPATH']}"
        for client, how in ((1, "nan"), (2, "cut"), (3, "hangs")):
            federation.supernode(client, EVIL=how, PYTHONPATH=poisoned)
        federation.run()
        federation.wait_rounds(1)
    [record] = records(federation)
    reasons = record["train"]["dropped"]
    assert "not finite" in reasons["1"]
    assert "its answer is refused: update/" in reasons["2"]
    assert reasons["3"] == "no answer within the deadline"
    assert record["train"]["clients"] == 1
    same_as(federation, expected(path, [[1, 2, 3]]))
    figures("one node hangs, one sends NaN, one a cut array", seconds_to_recover=federation.seconds()[0], deadline=150,
            finished_rounds_lost=0, rounds_repeated=0, rounds_without_it=1, same_as_without_it=True)  # fmt: skip


def test_tls_and_a_node_that_is_not_registered(tmp_path):
    path = experiment(tmp_path, "fedavg")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 1"))
    with Processes(tmp_path, path, "--wait", "45", tls=True) as federation:
        federation.superlink()
        for client in (0, 1):
            federation.flwr("supernode", "register", f"keys/client-{client}.pub", "fedtail")
        for client in range(3):
            federation.supernode(client)
        federation.run()
        federation.wait_rounds(1)
        stranger = federation.log("node2")
        assert federation.started["node2"].poll() is not None or "SuperNode ID" not in stranger, stranger
    [record] = records(federation)
    assert record["train"]["dropped"] == {"2": "no node speaks for it"}
    same_as(federation, expected(path, [[2]]))
    figures(
        "node with an unknown key", refused=True, finished_rounds_lost=0, rounds_repeated=0, same_as_without_it=True
    )
