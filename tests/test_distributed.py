"""Two ranks of torchrun on the CPU: the same run as one process, and what happens when one of them is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtail import runs

COMMON = [
    "--local.epochs", "1", "--data.partition.clients", "5", "--evaluation.drift", "--evaluation.local_models", "1",
    "--participation.fraction", "0.8",
    "--engine.name", "loop", "--dtype", "float64",
]  # fmt: skip


def command(*words, ranks=2):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [*(start if ranks > 1 else [sys.executable, "-m"]), "fedtail", *map(str, words)]


def run(*words, ranks=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words, ranks=ranks), capture_output=True, text=True, timeout=240, env=environment)


def numbers(folder):
    """All numbers of the run's records, by path."""
    text = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, f"{path}/{key}")
        elif isinstance(value, list):
            for number, below in enumerate(value):
                walk(below, f"{path}/{number}")
        else:
            found[path] = value

    walk(text, "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["scaffold", "creff"])
def test_two_ranks_are_one_process_to_rounding(tmp_path, algorithm):
    words = ["run", "--rounds", 2, "--algorithm.name", algorithm, *COMMON]
    for name, ranks in (("one", 1), ("two", 2)):
        done = run(*words, "--output", tmp_path / name, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("run folder") <= 1  # one rank reports
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for path, value in one.items():
        assert two[path] == (pytest.approx(value, rel=1e-7, abs=1e-9) if isinstance(value, float) else value), path
    first, second = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert any(key.startswith("clients/") for key in first) == (algorithm == "scaffold")
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_more_ranks_than_clients_is_refused(tmp_path):
    done = run("run", "--rounds", 1, *COMMON, "--participation.clients", 1, "--output", tmp_path / "run")
    assert done.returncode != 0
    assert "cannot be split over 2 ranks" in done.stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_resume_continues_it(tmp_path):
    folder = tmp_path / "run"
    words = ["run", "--rounds", 25, *COMMON, "--output", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command(*words), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 1:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_text()
        if found := re.search(r"\0RANK=(\d)", variables):
            ranks[found[1]] = int(child)
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "fedtail resume" in errors or "SIGKILL" in errors
    before = runs.rounds_done(folder)
    assert 1 <= before < 25
    done = run("resume", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.rounds_done(folder) == 25
    whole = run(*words[:-1], tmp_path / "whole")
    assert whole.returncode == 0
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
