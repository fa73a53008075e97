"""A run that is killed (SIGKILL) at any moment and resumed ends with the very bytes of one that was left alone.

Starting Python and importing torch takes seconds, so most kills hit children of a driver process (this file, run as a
script): it imports fedtail once, then forks a child for every life of a run. Some kills hit the real command line.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedtail
from fedtail import runs
from fedtail.config import Data, Evaluation, Experiment, Participation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of a fork")

EQUAL = ("checkpoint.safetensors", "best.safetensors", "metrics.jsonl", "config.toml", "partition.npz")
OWN = {*EQUAL, "environment.json", "timings.jsonl", ".lock"}

# The moments at which a life ends: (function of the standard library that writing goes through, before or after its
# effect). "half" writes half of the bytes into the temporary file first.
INSTANTS = [
    ("mkstemp", "after"),
    ("fdopen", "half"),
    ("fsync", "before"),
    ("fsync", "after"),
    ("chmod", "after"),
    ("replace", "before"),
    ("replace", "after"),
    ("rename", "before"),
    ("rename", "after"),
    ("truncate", "before"),
    ("truncate", "after"),
]


def experiment(algorithm, checkpoint_every):
    """Client states, partial participation, a validation split; rounds of a few hundredths of a second.

    Clipping makes the bits depend on the order in which a state lists its tensors. The rate is so high that SCAFFOLD
    is best after its third round: a resumed run that forgets the best score writes another best.safetensors.
    """
    method = {"scaffold": fedtail.Scaffold, "fedgrab": fedtail.FedGraB}[algorithm]
    return Experiment(
        seed=5,
        rounds=7,
        algorithm=method(optimizer=fedtail.SGD(lr=4.0, clip=0.5)),
        data=Data(validation=5),
        local=fedtail.LocalWork(epochs=1),
        participation=Participation(fraction=0.5),
        evaluation=Evaluation(keep="best"),
        engine=fedtail.EngineOptions(name="loop"),
        checkpoint_every=checkpoint_every,
    )


# ---- the driver process


def die_at(function, when, count):
    """Makes this process kill itself at the count-th call (from 1) of a function."""
    import tempfile

    owner = tempfile if function == "mkstemp" else os
    original, calls = getattr(owner, function), 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != count:
            return original(*args, **kwargs)
        if when == "half":
            return Half(original(*args, **kwargs))
        if when == "after":
            original(*args, **kwargs)
        die()

    setattr(owner, function, wrapped)


def live(folder, what, instant=None, delay=None):
    """Forks a child that runs or resumes; returns True if it ended by itself, False if it was killed."""
    child = os.fork()
    if not child:
        code = 3
        try:
            if instant is not None:
                die_at(*instant)
            for _ in fedtail.resume(folder) if folder.exists() else fedtail.run(what, folder):
                pass
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # a child that has ended waits for us as a zombie: this cannot hit a stranger
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, f"a life of {folder} ended with an error"
    return True


def drive(root, algorithm, checkpoint_every, seed, timed):
    """Runs once undisturbed, and several times with kills; prints the number of kills by kind.

    Every life of root/killed ends at another instant, then `timed` and more lives at random times. Whenever the run is
    complete it is put aside and begun again.
    """
    import torch

    torch.set_num_threads(1)  # no thread pool may exist when this process forks
    rng = random.Random(seed)
    what = experiment(algorithm, checkpoint_every)
    begin = time.perf_counter()
    assert live(root / "whole", what)
    seconds = time.perf_counter() - begin
    folder, kills = root / "killed", {"instant": 0, "time": 0}

    def killed(**how):
        if live(folder, what, **how):
            folder.rename(root / f"complete-{len(list(root.iterdir()))}")
            return False
        return True

    instants = [(*moment, rng.randint(1, 5)) for moment in INSTANTS]
    # In a resumed life the calls are of best.safetensors, if there is a new one, and of checkpoint.safetensors, in turn.
    instants += [("replace", when, count) for when in ("before", "after") for count in (1, 2, 3, 4)]
    for instant in rng.sample(instants, len(instants)):
        kills["instant"] += killed(instant=instant)
    for _ in range(4 * timed):
        if kills["time"] < timed:
            kills["time"] += killed(delay=rng.uniform(0, 0.7 * seconds))
    assert live(folder, what)
    print(json.dumps(kills))


# ---- the tests


def start(root, *arguments):
    """Starts the driver; returns the number of kills by kind."""
    done = subprocess.run(
        [sys.executable, __file__, str(root), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal_runs(root):
    """Every run folder in `root` has the bytes of root/whole and nothing in it that is not a run's own."""
    whole = root / "whole"
    folders = [folder for folder in root.iterdir() if not folder.name.startswith(".")]
    assert root / "killed" in folders
    for folder in folders:
        for name in EQUAL:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), f"{folder / name} differs"
        assert {path.name for path in folder.iterdir()} == OWN, folder  # temporary files of killed writes are gone
        record = runs.read(folder)  # every line of metrics.jsonl and timings.jsonl is whole
        assert [r["round"] for r in record.records] == list(range(7))
    # What a kill left before the folder existed has a name that nobody takes for a run.
    assert all(left.name.startswith(".killed.") for left in root.glob(".*"))


def test_killed_at_the_instants_of_writing(tmp_path):
    kills = start(tmp_path, "scaffold", 1, 1, 0)
    assert kills["instant"] >= 12  # of 19: a life that has fewer calls of the function ends by itself
    assert_equal_runs(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "checkpoint_every", "seed"),
    [("scaffold", 1, 11), ("scaffold", 3, 12), ("fedgrab", 1, 13), ("fedgrab", 3, 14)],
)
def test_killed_at_random_moments(tmp_path, algorithm, checkpoint_every, seed):
    kills = start(tmp_path, algorithm, checkpoint_every, seed, 6)
    assert kills["instant"] >= 8
    assert kills["time"] == 6
    assert_equal_runs(tmp_path)


COMMAND = (
    "--rounds 7 --algorithm.name fedgrab --data.validation 5 --evaluation.keep best --local.epochs 1 "
    "--participation.fraction 0.5 --engine.name loop --checkpoint-every 3"
)


def fedtail_process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fedtail", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process):
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.slow
def test_the_command_line_killed(tmp_path):
    rng = random.Random(21)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with fedtail_process("run", *COMMAND.split(), "--output", whole) as process:
        process.communicate()
        assert process.returncode == 0

    def lines():
        path = killed / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else -1

    kills = 0
    # In start-up; as soon as the folder stands; after two rounds (no checkpoint since round 0); after five (one of 3).
    for rounds in (None, 0, 2, 5):
        verb = ("resume", killed) if killed.exists() else ("run", *COMMAND.split(), "--output", killed)
        with fedtail_process(*verb) as process:
            if rounds is None:
                time.sleep(rng.uniform(0.2, 1.5))
            else:
                wait_for(lambda rounds=rounds: lines() >= rounds, process)
                time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    with fedtail_process("resume", killed) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert_equal_runs(tmp_path)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
