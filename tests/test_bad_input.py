"""Whatever a user gets wrong ends with a message that says what, where, what was got and what to do; nothing is lost."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fedtail
from fedtail import cli, config, runs, trees
from fedtail.checkpoint import load_checkpoint
from fedtail.errors import CheckpointError
from fedtail.experiment import reopen, rounds_of
from fedtail.federation import federate

QUICK = fedtail.Experiment(
    rounds=3, local=fedtail.LocalWork(epochs=1), engine=fedtail.EngineOptions(name="loop"), seed=5
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has an empty working directory and an empty cache of data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "cache"))


@pytest.fixture
def fail(capsys, monkeypatch):
    """Runs the command line, which must fail; returns its message in one line, without the frame of tyro's."""

    def run(*arguments, code=1):
        monkeypatch.setattr(sys, "argv", ["fedtail", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert caught.value.code == code, out + err
        assert "Traceback" not in out + err
        return re.sub(r"[│╭╮╰╯─\s]+", " ", err + out)

    return run


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    list(fedtail.run(QUICK, folder))
    return folder


@pytest.fixture
def finished(_finished, tmp_path):
    """A complete run of three rounds."""
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


@pytest.fixture
def stopped(tmp_path):
    """The same run, stopped after its first round."""
    folder = tmp_path / "stopped"
    rounds = fedtail.run(QUICK, folder)
    next(rounds)
    rounds.close()
    return folder


def contents(folder):
    """Everything in a folder but the lock and the timings."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (".lock", "timings.jsonl")}


def complete(folder, like):
    """Resumes a run; its result must be that of an undisturbed one."""
    list(fedtail.resume(folder))
    for name in ("checkpoint.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (like / name).read_bytes()


def has(message, *parts):
    for part in parts:
        assert part in message, message


# ---- names and options


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("rnu", ["unknown verb 'rnu'", "did you mean 'run'?", "resume"]),
        ("data gte mnist", ["unknown verb 'data gte'", "did you mean 'data get'?"]),
        ("run --algorithm.name fedgrap", ["unknown algorithm 'fedgrap'", "did you mean 'fedgrab'?", "scaffold"]),
        ("run --algorithm.name", ["unknown algorithm ''", "fedprox"]),
        ("run --algorithm.name nets.py:Mine", ["there is no file", "nets.py", "'nets.py:Mine'"]),
        ("run --algorithm.optimizer.name adamm", ["unknown optimizer 'adamm'", "did you mean 'adam'?"]),
        ("run --model.name resnet9", ["unknown model 'resnet9'", "did you mean 'resnet", "lenet"]),
        ("run --model.name nets.py:Mine", ["'nets.py:Mine'", "there is no file"]),
        ("run --data.name fashion_mnist", ["unknown data set 'fashion_mnist'", "ean 'fashion-mnist'?", "cifar10"]),
        ("run --data.partition.name dirichlet_multi", ["unknown partition", "did you mean 'dirichlet_multinomial'?"]),
        ("run --data.longtail.name exp", ["unknown longtail 'exp'", "exponential, step"]),
        ("run --schedule.name cosin", ["unknown schedule 'cosin'", "did you mean 'cosine'?"]),
        ("run --evaluation.groups.name third", ["unknown groups 'third'", "did you mean 'thirds'?"]),
        ("show fedproks", ["unknown algorithm 'fedproks'", "did you mean 'fedprox'?"]),
        ("data get minst", ["unknown data set 'minst'", "ean 'mnist'?"]),
        ("run nothing.toml", ["cannot read the experiment nothing.toml", "No such file"]),
        ("run --rounds 3 mine.toml", ["mine.toml: the experiment comes first", "fedtail run mine.toml"]),
        ("resume nothing", ["nothing is not a run folder", "config.toml", "fedtail run"]),
        ("evaluate nothing", ["nothing is not a run folder"]),
        ("run --rounds 0", ["rounds and checkpoint_every >= 1", "got 0, 0, 1"]),
        ("run --seeds 0 -1", ["seed must be >= 0", "got -1"]),
        ("run --evaluation.keep best", ['evaluation.keep = "best" needs a validation split', "data.validation"]),
        ("run --model.name lenet", ["lenet needs images of at least 16 x 16", "got 8 x 8", "Use model mlp"]),
        (
            "run --algorithm.name scaffold --algorithm.optimizer.name adam",
            ["Scaffold.optimizer must be sgd without nesterov", "got Adam("],
        ),
        (
            "run --data.partition.name dirichlet_proportional --data.partition.clients 60",
            ["dirichlet_proportional cannot give each of 60 clients 10 examples, there are 512", "Use clients <= "],
        ),
        ("run --data.partition.name iid --data.partition.clients 5000", ["data.partition: iid", "Use clients <= 512"]),
        ("run --data.partition.name natural", ["natural needs a column that names the user", "got none"]),
        ("run --data.longtail.factor 1000", ["data.longtail: exponential with factor 1000", "Use factor <= "]),
        ("run --data.longtail.num-max 500", ["num_max 500 wants", "Use num_max <= "]),
        ("run --data.validation 200", ["200 validation examples of class", "Use at most "]),
        (
            "run --local.min-batch 11 --local.batch-size 11 --data.partition.clients 512",
            ["leave no client with a batch", "Lower local.min_batch"],
        ),
    ],
)
def test_messages(fail, tmp_path, arguments, parts):
    has(fail(*arguments.split()), *parts)
    assert not list(tmp_path.iterdir())  # no run folder, no scratch


@pytest.mark.parametrize(
    ("arguments", "parts"),  # refused by tyro, which ends with code 2
    [
        ("run --roundz 3", ["Unrecognized options: --roundz, 3", "--rounds INT"]),
        ("run --algorithm.mu 0.1", ["Unrecognized options: --algorithm.mu"]),
        ("run --rounds three", ["Error parsing --rounds", "'three'"]),
        ("run --seeds a", ["Error parsing --seeds", "['a']"]),
        ("run --participation.fraction 0", ["fraction must be in (0, 1]", "got 0.0"]),
        ("run --dtype float16", ["'float16'", "--dtype", "('float32', 'float64')"]),
        ("resume", ["Missing from fedtail resume", "the run folder"]),
        ("evaluate run --split foo", ["'foo'", "('test', 'validation', 'train')"]),
        ("list algo", ["'algo'", "'algorithms'"]),
        ("plot pie run", ["'pie'", "'partition'"]),
        ("data add mnist", ["Missing from fedtail data add", "PATH"]),
    ],
)
def test_messages_of_flags(fail, tmp_path, arguments, parts):
    has(fail(*arguments.split(), code=2), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[local\nepochs = 3", ["is not valid TOML", "line 1"]),
        ("rounds = 3\nrounds = 4", ["is not valid TOML"]),
        ('rounds = "3"', ["rounds must be of type int, got '3'"]),
        ("rounds = 3.0", ["rounds must be of type int, got 3.0"]),
        ("rounds = true", ["rounds must be of type int, got True"]),
        ("seed = 2026-01-01", ["seed must be of type int"]),
        ("rounds = -1", ["rounds and checkpoint_every >= 1", "-1"]),
        ("round = 3", ["unknown option 'round'", "did you mean 'rounds'?"]),
        ("[local]\nepoch = 3", ["unknown option 'local.epoch'", "did you mean 'epochs'?"]),
        ("[local]\nepochs = 0", ["epochs and batch_size must be >= 1", "got 0, 10, 0"]),
        ("[local]\nmin_batch = 11", ["local.min_batch must be in [1, batch_size = 10], got 11"]),
        ("[algorithm]\nnam = 'fedprox'", ["unknown option 'algorithm.nam'", "did you mean 'name'?"]),
        ("[algorithm]\nname = 3", ["algorithm: the key `name` must be a string, got 3", "fedgrab"]),
        ("[algorithm]\nname = 'fedprox'\nmuu = 1", ["unknown option 'algorithm.muu'", "did you mean 'mu'?"]),
        ("[algorithm]\nname = 'fedprox'\nmu = -1", ["FedProx.mu must be in [0, inf), got -1"]),
        ("algorithm = 'fedprox'", ["algorithm must be a table, got 'fedprox'"]),
        ("[[algorithm]]\nname = 'fedprox'", ["algorithm must be a table, got [{"]),
        ("[model]\nhidden = 64", ["model.hidden must be a list, got 64", "Write [64]"]),
        ("[model]\nhidden = [64, 'a']", ["model.hidden[1] must be of type int, got 'a'"]),
        ("[model]\nhidden = [0]", ["MLP.hidden must hold widths in [1, inf)"]),
        ("[model]\nname = 'm.py:N'\noptions = 3", ["model.options must be a table, got 3"]),
        ("[data.partition]\nalpha = 0.0", ["DirichletMultinomial.alpha must be in (0, inf), got 0.0"]),
        ("[data.longtail]\nfactor = 0.5", ["Exponential.factor must be in [1, inf), got 0.5"]),
        ("[data]\naugmentation = 'cutout'", ["data.augmentation must be one of 'none'", "got 'cutout'"]),
        ("[data]\nvalidation = -1", ["data.validation and data.server must be >= 0, got -1"]),
        ("[participation]\nfraction = 0.0", ["fraction must be in (0, 1]", "got 0.0"]),
        ("[participation]\nfraction = nan", ["fraction must be in (0, 1]", "got nan"]),
        ("[engine]\nname = 'lop'", ["engine.name must be one of", "'loop'", "got 'lop'"]),
        ("[evaluation]\nkeep = 'best'", ['evaluation.keep = "best" needs a validation split']),
        ("[schedule]\nname = 'step'\nfactor = 0", ["factor in (0, 1]", "got 100 and 0"]),
        ("[evaluation.groups]\nname = 'explicit'\nhead = [0, 0]", ["Explicit: class 0 stands twice"]),
        ("[algorithm.optimizer]\nlr = 0.0", ["SGD.lr must be > 0, got 0.0"]),
    ],
)
def test_messages_of_files(fail, tmp_path, text, parts):
    Path("mine.toml").write_text(text)
    for verb in ("run", "inspect"):
        has(fail(verb, "mine.toml"), "mine.toml", *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_groups_that_do_not_fit_the_data_are_refused_before_training(fail):
    Path("mine.toml").write_text("[evaluation.groups]\nname = 'explicit'\nhead = [0, 1]\nmedium = [2]\ntail = [10]")
    has(fail("run", "mine.toml"), "the data have the classes 0..9", "not in a group: [3, 4", "not in the data: [10]")


def test_a_file_that_is_no_text(fail):
    Path("mine.toml").write_bytes(b"rounds = 3 \xff\xfe")
    has(fail("run", "mine.toml"), "mine.toml is not a text file in UTF-8", "byte 11")


def test_broken_algorithm_file(fail):
    Path("mine.py").write_text("import fedtail\nclass Mine(fedtail.Algorithm:\n    pass\n")
    has(fail("run", "--algorithm.name", "mine.py:Mine"), "mine.py could not be run", "SyntaxError")
    Path("other.py").write_text("class Mine: pass\n")
    has(fail("run", "--algorithm.name", "other.py:Mine"), "other.py has no Algorithm named 'Mine'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:x", "gpu"])
def test_device_that_is_not_there(fail, tmp_path, device):
    has(fail("run", "--device", device), f"device '{device}'", "Use device = 'cpu'")
    assert not list(tmp_path.iterdir())


# ---- data


def idx(path, shape, data):
    path.write_bytes(bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes() + data)


def test_missing_data_set(fail, tmp_path):
    (tmp_path / "cache").mkdir()
    message = fail("run", "--data.name", "mnist")
    has(message, "data set 'mnist' is not on this machine", str(tmp_path / "cache" / "mnist"), "fedtail data get mnist")
    message = fail("run", "--data.name", "mnist", "--data.folder", "else")
    has(message, "else/mnist", "fedtail data add mnist PATH")
    assert not (tmp_path / "runs").exists()


def test_truncated_data_set(fail, tmp_path):
    folder = tmp_path / "cache" / "mnist"
    folder.mkdir(parents=True)
    idx(folder / "train-images-idx3-ubyte", (60_000, 28, 28), bytes(1000))
    idx(folder / "train-labels-idx1-ubyte", (60_000,), bytes(60_000))
    idx(folder / "t10k-images-idx3-ubyte", (10, 28, 28), bytes(7840))
    idx(folder / "t10k-labels-idx1-ubyte", (10,), bytes(10))
    message = fail("run", "--data.name", "mnist")
    # 16 bytes of header and 60,000 * 28 * 28 pixels
    has(message, "train-images-idx3-ubyte", "got 1016 bytes", "expected 47040016", "fedtail data get mnist")
    assert not (tmp_path / "runs").exists()


def test_files_of_one_s_own(fail, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 4)), np.arange(60) % 3
    mine = ("run", "--data.name", "mine.npz")
    has(fail(*mine), "mine.npz: there is no such file")
    np.savez("mine.npz", x=x, label=y)
    has(fail(*mine), "mine.npz: no array 'y'", "Found: x, label")
    np.savez("mine.npz", X=x, y=y)
    has(fail(*mine), "mine.npz: no array 'x_train'", "Found: X, y", "or x and y")
    x[7, 2] = np.nan
    np.savez("mine.npz", x=x, y=y)
    has(fail(*mine), "mine.npz", "got nan in row", "column 2", "Fill or drop such rows")
    np.savez("mine.npz", x=rng.random((60, 4)), y=y + 1)
    has(fail(*mine), "mine.npz", "labels run from 1 to 3", "Renumber")
    np.savez("mine.npz", x=np.array([{}, {}], object), y=np.arange(2))
    has(fail(*mine), "mine.npz", "pickles) are never opened")
    Path("mine.npz").write_text("x,y\n1,2\n")
    has(fail(*mine), "mine.npz (8 bytes): no readable .npz file")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.npz"]


# ---- run folders and checkpoints


def test_a_run_folder_is_never_overwritten(fail, finished):
    before = contents(finished)
    message = fail("run", "--rounds", 1, "--output", finished)
    has(message, f"{finished} exists already and is not overwritten", f"fedtail resume {finished}", "--output")
    empty = Path("empty")
    empty.mkdir()
    has(fail("run", "--rounds", 1, "--output", empty), "exists already")
    assert contents(finished) == before
    assert not list(empty.iterdir())


def test_output_that_cannot_be_written(fail, tmp_path):
    Path("file").write_text("mine")
    for place in ("file/run", "file/a/run"):
        message = fail("run", "--rounds", 1, "--output", place)
        has(message, f"cannot write {place}", "Check the path and the folder's permissions, then try again")
        assert "resume" not in message  # there is nothing to resume
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert Path("file").read_text() == "mine"


def test_pictures_and_reports_that_cannot_be_written(fail, finished, tmp_path):
    for verb in (("report", finished), ("plot", "curves", finished)):
        has(fail(*verb, "--output", "nodir/x.png"), "cannot write nodir/x.png", "there is no folder nodir")
        (tmp_path / "x.png").mkdir(exist_ok=True)
        has(fail(*verb, "--output", "x.png"), "cannot write x.png", "try again")
    has(fail("plot", "curves", finished, "--output", "x.gif"), "x.gif", "must be .png or .svg, got '.gif'")
    has(fail("inspect", "--picture", "nodir/x.png"), "cannot write nodir/x.png")


def test_a_config_that_was_changed_after_the_run_began(fail, finished):
    path = finished / "config.toml"
    original = path.read_text()
    path.write_text(original.replace("lr = 0.03", "lr = 0.04"))
    before = contents(finished)
    for verb in ("resume", "evaluate"):
        message = fail(verb, finished)
        has(message, "checkpoint.safetensors belongs to another experiment", "the configuration was changed", "Restore")
    path.write_text(original.replace("rounds = 3", "rounds = 30"))
    has(fail("resume", finished), "belongs to another experiment")
    path.write_text(original.replace("rounds", "round"))
    has(fail("resume", finished), "config.toml: unknown option 'round'")
    path.write_text("# a comment changes nothing\n" + original)
    assert reopen(finished).round == 3
    assert {k: v for k, v in contents(finished).items() if k != "config.toml"} == {
        k: v for k, v in before.items() if k != "config.toml"
    }


def test_truncated_checkpoints(finished, fail):
    path = finished / "checkpoint.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged .* Restore it from a copy"):
            load_checkpoint(path)
    has(fail("resume", finished), "is damaged", "start the run anew in another folder")
    has(fail("evaluate", finished), "is damaged")
    path.write_text("this is no checkpoint\n" * 100)
    has(fail("resume", finished), "is damaged")
    path.unlink()
    has(fail("resume", finished), "there is no checkpoint", "fedtail run")
    has(fail("evaluate", finished, "--checkpoint", "best"), "best.safetensors", 'evaluation.keep = "best"')


def test_a_flipped_bit_is_noticed(finished):
    path = finished / "checkpoint.safetensors"
    whole = path.read_bytes()
    expected = load_checkpoint(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    noticed, places = 0, [*range(8), *rng.sample(range(8, header), 400), *rng.sample(range(header, len(whole)), 100)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            noticed += 1
        else:  # nothing that was said has changed
            assert trees.equal(found.server, expected.server), place
            assert found.meta | expected.meta == found.meta, place
    assert noticed >= 0.9 * len(places)


def test_a_checkpoint_that_is_not_ours(finished, fail):
    from safetensors.torch import save_file

    path = finished / "checkpoint.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    has(fail("resume", finished), "is damaged or not fedtail's")
    save_file({"x": torch.zeros(3)}, path, {"fedtail": json.dumps({"format": 99})})
    has(fail("resume", finished), "has format 99", "Use a matching version")


def test_a_checkpoint_from_another_round_s_metrics(finished, fail):
    path = finished / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    message = fail("resume", finished)
    has(message, "metrics.jsonl has", f"the checkpoint expects {len(whole)}", "records are missing", "Restore")
    assert path.read_bytes() == b"".join(lines[:2])
    path.unlink()
    has(fail("resume", finished), "metrics.jsonl has 0 bytes", "records are missing")


def test_damaged_run_folders(finished, fail):
    path = finished / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"round": 1', b'"round": 1'))
    has(fail("compare", finished), f"the run folder {finished} is damaged", "Restore it from a copy")
    path.write_bytes(whole)
    for name in ("environment.json", "partition.npz", "timings.jsonl"):
        content = (finished / name).read_bytes()
        for bad in (None, b"", content[: len(content) // 2], b"x" * 50 + b"\n"):
            if name == "timings.jsonl" and bad is not None and not bad.startswith(b"x"):
                continue  # a file of whole lines: fewer of them do no harm
            (finished / name).unlink() if bad is None else (finished / name).write_bytes(bad)
            has(fail("compare", finished), f"the run folder {finished} is damaged")
        (finished / name).write_bytes(content)
    assert len(runs.read(finished).records) == 3


def test_resuming_a_complete_run_changes_nothing(finished, monkeypatch, capsys):
    before = contents(finished)
    monkeypatch.setattr(sys, "argv", ["fedtail", "resume", str(finished)])
    cli.main()
    assert "is complete: all 3 rounds are done" in capsys.readouterr().out
    assert contents(finished) == before


def test_two_processes_on_one_run(stopped, finished, fail):
    ours = fedtail.resume(stopped)
    next(ours)
    before = contents(stopped)
    has(fail("resume", stopped), f"another process is running {stopped}", "Wait for it, or stop it first")
    assert contents(stopped) == before
    ours.close()
    complete(stopped, finished)


def test_a_run_that_went_on_while_we_opened_it(stopped, finished):
    """Another process takes the run to its end between our reading of the checkpoint and our lock."""
    federation = reopen(stopped)
    complete(stopped, finished)
    list(rounds_of(federation, stopped))
    assert contents(stopped) == contents(finished)


def test_a_lock_that_cannot_be_made(stopped, fail):
    (stopped / ".lock").unlink()
    (stopped / ".lock").mkdir()
    has(fail("resume", stopped), f"cannot write {stopped / '.lock'}", "Check the path and the folder's permissions")


# ---- a full disk


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process may become larger; the error is the one of a disk quota (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit(stopped, finished, fail):
    before = contents(stopped)
    size = (stopped / "checkpoint.safetensors").stat().st_size
    for limit in (size // 2, size - 1):
        with file_size_limit(limit):
            message = fail("resume", stopped)
        has(message, f"cannot write {stopped / 'checkpoint.safetensors'}: File too large", "Free some space")
        has(message, f"continue with `fedtail resume {stopped}`", "what was saved before is untouched")
        after = contents(stopped)
        assert after.pop("metrics.jsonl").startswith(before["metrics.jsonl"])
        assert after == {k: v for k, v in before.items() if k != "metrics.jsonl"}  # and no temporary file
    with file_size_limit(size // 2):
        message = fail("run", "--rounds", 1, "--output", "new")
    has(message, "cannot write new: File too large", "Free some space, then try again")
    assert not [p.name for p in Path().iterdir() if "new" in p.name]
    complete(stopped, finished)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield place
    # Lazily: tensors of a checkpoint are maps of its file, and may live until the next garbage collection.
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk, stopped, finished, fail):
    folder = Path(shutil.copytree(stopped, small_disk / "run"))
    saved = (folder / "checkpoint.safetensors").read_bytes()
    filler = small_disk / "filler"
    for kib in (0, 4, 8, 24):  # what is left: for nothing; for a log's next page; for a part of a checkpoint
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
        os.truncate(filler, filler.stat().st_size - 1024 * kib)
        message = fail("resume", folder)
        has(message, f"cannot write {folder}", "No space left on device", "Free some space", f"fedtail resume {folder}")
        has(fail("run", "--rounds", 1, "--output", small_disk / "new"), "cannot write", "No space left", "try again")
        filler.unlink()
        assert (folder / "checkpoint.safetensors").read_bytes() == saved
        assert sorted(p.name for p in small_disk.iterdir()) == ["run"]
        assert not list(folder.glob(".c*"))
    complete(folder, finished)
    assert len(runs.read(folder).records) == 3


def test_half_a_line_of_timings_does_no_harm(stopped, finished):
    """What a full disk took of a line must not merge with the next one."""
    with open(stopped / "timings.jsonl", "a") as file:
        file.write('{"round": 1, "seco')
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"round": 1, "tra')
    assert len(runs.read(stopped).records) == 1
    complete(stopped, finished)
    assert runs.read(stopped).seconds > 0


# ---- training


@pytest.mark.parametrize("engine", ["loop", "parallel", "vmap"])
def test_a_loss_that_is_not_finite(fail, engine):
    arguments = ("--rounds", 4, "--local.epochs", 1, "--algorithm.optimizer.lr", 1e6, "--engine.name", engine)
    message = fail("run", *arguments, "--output", "run")
    match = re.search(r"The loss is (nan|inf) on client (\d) in round (\d), at local step (\d+)", message)
    assert match, message
    has(message, "Lower algorithm.optimizer.lr", "algorithm.optimizer.clip")
    before = contents(Path("run"))
    assert load_checkpoint(Path("run/checkpoint.safetensors")).meta["round"] == int(match[3])
    again = fail("resume", "run")
    has(again, f"in round {match[3]}, at")
    assert engine == "parallel" or match[0] in again  # whose client fails first is a matter of time there
    assert contents(Path("run")) == before


def test_the_first_step_is_named(fail):
    """Two clients, each with the example x = 1e30, one with the label 0 and one with 1: one is predicted wrongly.

    Its loss at step 0 is finite, about 1e30 |w_0 - w_1|; the gradient is +-1e30, and with lr = 1e10 the weights overflow
    float32: the loss at step 1 is not finite. The other client's loss and gradient are 0.
    """
    x = np.array([[1e30], [1e30]])
    np.savez("mine.npz", x_train=x, y_train=np.arange(2), x_test=x, y_test=np.arange(2))
    Path("mine.toml").write_text(
        "[data]\nname = 'mine.npz'\nlongtail = {name = 'none'}\npartition = {name = 'iid', clients = 2}\n"
        "[model]\nhidden = []\n[algorithm.optimizer]\nlr = 1e10\n"
    )
    message = fail("run", "mine.toml", "--output", "run")
    data = federate(config.load("mine.toml").data, 0)
    predicted = fedtail.load("run")(torch.tensor([[1e30]])).argmax()
    [wrong] = [i for i, rows in enumerate(data.owners) if data.columns["y"][rows] != predicted]
    has(message, f"on client {wrong} in round 0, at local step 1.")


def test_control_c(finished, tmp_path):
    """A real process, a real SIGINT in mid-run; both engines of a CPU have the same bits, here the one with threads."""
    what = ("--rounds", 30, "--local.epochs", 1, "--engine.name", "parallel", "--engine.workers", 2)
    folder, whole = tmp_path / "a run", tmp_path / "whole"
    command = [sys.executable, "-m", "fedtail", "run", *map(str, what), "--output", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in itertools.count():
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes().count(b"\n") >= 3:
                break
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    [line] = [line for line in err.splitlines() if line.startswith("stopped after")]
    match = re.fullmatch(
        r"stopped after (\d+) of 30 rounds, (\d+) are saved\. Continue with: fedtail resume (.+)", line
    )
    assert match, line
    assert match[3] == f"'{folder}'"  # quoted, as the shell needs it
    done = load_checkpoint(folder / "checkpoint.safetensors").meta["round"]
    assert 2 <= int(match[2]) <= int(match[1]) <= done < 30
    list(fedtail.resume(folder))
    options = fedtail.EngineOptions(name="parallel", workers=2)
    list(fedtail.run(fedtail.Experiment(rounds=30, local=fedtail.LocalWork(epochs=1), engine=options), whole))
    for name in ("checkpoint.safetensors", "metrics.jsonl", "config.toml"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_the_reader_of_our_output_went_away():
    """`fedtail list | head -0`: no traceback, and the code that the shell gives for SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fedtail", "list"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
