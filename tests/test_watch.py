"""`fedtail watch`: what the page is told of a run, who is told, and the page itself in a real browser."""

import contextlib
import html
import http.client
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

from fedtail import cli, watch
from fedtail.config import Data, Experiment
from fedtail.data.longtail import Exponential
from fedtail.errors import CheckpointError, ConfigError
from fedtail.experiment import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<img src="x" onerror="document.title=1"> & </script>'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    for _ in run(Experiment(rounds=3, data=Data(longtail=Exponential(factor=20))), folder):
        pass
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy with two of its three rounds, one of them without client 5, and a deployment's nodes."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    records[1]["train"]["dropped"] = {"5": EVIL}
    records[1]["diagnostics"] = {"odd": float("nan")}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:2]))
    (copy / "third.json").write_text(json.dumps(records[2]) + "\n")
    nodes = [{"client": k, "examples": 10, "node": str(2**63 + k)} for k in range(7)]
    known = {"expected": 8, "nodes": nodes, "refused": [{"node": "77", "why": EVIL}]}
    (copy / "nodes.json").write_text(json.dumps(known))
    return copy


def next_round(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write((folder / "third.json").read_text())


@contextlib.contextmanager
def serving(folder):
    with watch.serve(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def test_classes_come_by_frequency_with_group_and_recall(folder):
    state = watch.state(folder)
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with np.load(folder / "partition.npz") as arrays:
        totals = arrays["counts"].astype(int).sum(0)
    assert [c["examples"] for c in state["classes"]] == sorted(totals, reverse=True)
    assert all(c["examples"] == totals[c["class"]] for c in state["classes"])
    assert all(c["recall"] == record["test"]["per_class_recall"][c["class"]] for c in state["classes"])
    groups = [c["group"] for c in state["classes"]]
    assert groups == sorted(groups, key=["head", "medium", "tail"].index)
    assert set(groups) == {"head", "medium", "tail"}


def test_rounds_carry_scores_and_dropouts_and_the_json_has_no_nan(folder):
    state = watch.state(folder)
    assert (state["done"], state["rounds"], state["method"], state["clients"]) == (2, 3, "fedavg", 8)
    first, second = state["course"]
    assert first["dropped"] == {}
    assert second["dropped"] == {"5": EVIL}
    assert {*watch.SCORES, "loss", "local"} <= first.keys()
    assert state["last"]["diagnostics.odd"] is None
    json.dumps(state, allow_nan=False)


def test_where_no_counts_are_shared_classes_come_by_group(folder):
    table = (folder / "config.toml").read_text()
    start = table.index("[evaluation.groups]")
    end = table.find("\n[", start + 1)
    groups = '[evaluation.groups]\nname = "explicit"\nhead = [4, 5, 6]\nmedium = [0, 1, 2, 3]\ntail = [7, 8, 9]\n'
    (folder / "config.toml").write_text(table[:start] + groups + table[end if end > 0 else len(table) :])
    with np.load(folder / "partition.npz") as arrays:
        changed = {**arrays, "counts": np.zeros_like(arrays["counts"])}
    np.savez(folder / "partition.npz", **changed)
    found = watch.state(folder)["classes"]
    assert [c["class"] for c in found] == [4, 5, 6, 0, 1, 2, 3, 7, 8, 9]
    assert {c["examples"] for c in found} == {None}


def test_only_what_is_new_is_sent(folder):
    with serving(folder) as port:
        first = json.loads(get(port, "/state")[1])
        seen = first["stamp"].replace(" ", "+")
        assert json.loads(get(port, f"/state?{seen}")[1]).keys() == {"now"}
        next_round(folder)
        assert json.loads(get(port, f"/state?{seen}")[1])["done"] == 3


def test_only_this_machine_is_answered_and_only_these_pages(folder):
    with serving(folder) as port:
        assert get(port, "/state", Host="evil.example")[0] == 403, "a foreign name that was made to point here"
        assert get(port, "/state", Host=f"evil.example:{port}")[0] == 403
        assert get(port, "/state", Host=f"localhost:{port}")[0] == 200
        for path in ("/config.toml", "/../config.toml", "/watch.html"):
            assert get(port, path)[0] == 404
        status, page, headers = get(port, "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=\"?http", page), "nothing comes from elsewhere"


def test_a_run_that_is_damaged_meanwhile_is_told_to_the_page(folder):
    with serving(folder) as port:
        (folder / "config.toml").unlink()
        assert "is not a run folder" in json.loads(get(port, "/state")[1])["error"]


def test_what_is_no_run_and_a_port_that_is_taken_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        cli.dispatch(["watch", str(tmp_path)])
    with serving(folder) as port, pytest.raises(ConfigError, match=f"port {port} cannot be used"):
        cli.dispatch(["watch", str(folder), "--port", str(port)])
    with pytest.raises(ConfigError, match="port 99999 cannot be used"):
        watch.serve(folder, 99999)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_browser_shows_the_run_and_the_next_round_when_it_comes(folder, tmp_path, monkeypatch):
    honest, asked = watch.state, []

    def state(path):
        found = honest(path)
        if not asked:  # the page has the first two rounds; now comes the third
            next_round(folder)
        asked.append(1)
        return found

    with serving(folder) as port:
        monkeypatch.setattr(watch, "state", state)
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{port}/"]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(asked) >= 2
    body = dom[dom.index("<body>") : dom.index("<script>")]
    text = html.unescape(re.sub(r"<[^>]+>", " ", body))
    assert "<title>3/3 fedavg: fedtail</title>" in dom
    assert re.search(r'id="trouble"[^>]*hidden', body), "the page has no fault"
    assert "fedavg on digits" in text
    assert "complete" in text
    last = json.loads((folder / "third.json").read_text())["test"]
    for name in ("accuracy", "balanced_accuracy", "head", "medium", "tail", "macro_f1"):
        assert f"{100 * last[name]:.1f} %" in text
    assert body.count('class="recall"') == 10
    assert body.count("<polyline") >= 8  # five accuracies, the loss, mean and worst decile over clients
    assert "7 of 8 clients have a node; 1 refused" in text
    assert str(2**63 + 6) in text
    assert text.count(EVIL) == 2, "a reason is text, never markup"
    assert "<img" not in body
