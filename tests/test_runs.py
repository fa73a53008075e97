"""The run folder: what is written can be read again, and is the same wherever and whenever it is written."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtail
from fedtail import config, files, runs, trees
from fedtail.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from fedtail.errors import CheckpointError
from fedtail.experiment import reopen

QUICK = fedtail.Experiment(
    rounds=3, local=fedtail.LocalWork(epochs=1), engine=fedtail.EngineOptions(name="loop"), seed=1
)
META = {"round": 3, "stage": 0, "best": 0.1, "metrics_bytes": 17, "experiment": "abc"}


class Pair(NamedTuple):
    left: Any
    right: Any


class Swapped(NamedTuple):
    right: Any
    left: Any


def tensors():
    shapes = st.lists(st.integers(0, 3), max_size=3)
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
    return st.builds(lambda shape, dtype: (10 * torch.randn(shape)).to(dtype), shapes, dtypes)


def nodes(children):
    # Names in any order, as a network's are; tuples of more than ten, whose places sort as "10" < "2".
    return st.one_of(
        st.dictionaries(st.sampled_from(["b", "a.weight", "a.bias", "10", "9"]), children, max_size=4),
        st.lists(children, max_size=12).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Swapped, children, children),
    )


TREES = st.recursive(tensors(), nodes, max_leaves=15)


def structure(tree):
    """Kinds and names in order, with types and shapes of the leaves."""
    if isinstance(tree, torch.Tensor):
        return (tree.dtype, tree.shape)
    return (type(tree), [(name, structure(child)) for name, child in trees.items(tree)])


# ---- checkpoints


@settings(deadline=None, max_examples=60)
@given(server=TREES, client=TREES, ids=st.sets(st.integers(0, 100), max_size=4))
def test_round_trip(tmp_path_factory, server, client, ids):
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    clients = {number: trees.tree_map(lambda t: t.clone(), client) for number in ids}
    save_checkpoint(path, Snapshot(server, clients, META))
    first = path.read_bytes()
    found = load_checkpoint(path, "abc")
    # The order within dicts counts too: sums over a network's tensors are made in it.
    assert structure(found.server) == structure(server)
    assert trees.equal(found.server, server)
    assert found.clients.keys() == ids
    for state in found.clients.values():
        assert structure(state) == structure(client)
        assert trees.equal(state, client)
    assert {k: found.meta[k] for k in META} == META
    save_checkpoint(
        path, Snapshot(found.server, dict(reversed([*found.clients.items()])), {k: found.meta[k] for k in META})
    )
    assert path.read_bytes() == first


def test_views_and_shared_tensors_can_be_saved(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    state = {"transposed": base.T, "row": base[0], "same": base, "grad": base.clone().requires_grad_()}
    save_checkpoint(tmp_path / "c", Snapshot(state, {}, META))
    found = load_checkpoint(tmp_path / "c").server
    assert found["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    found["row"][0] = 7  # no longer shared
    assert found["same"][0, 0] == 0
    assert not found["grad"].requires_grad


def test_restored_client_states_own_their_memory(tmp_path):
    """Engines overwrite donated tensors: a state that were a view of all states would spread the damage."""
    save_checkpoint(tmp_path / "c", Snapshot((), {0: (torch.zeros(2),), 1: (torch.ones(2),)}, META))
    clients = load_checkpoint(tmp_path / "c").clients
    clients[0][0].fill_(9)
    assert clients[1][0].tolist() == [1, 1]
    assert len({c[0].untyped_storage().data_ptr() for c in clients.values()}) == 2


def save_sample(path):
    names = sorted("qwertyuiop", reverse=True)
    value = Pair({name: torch.arange(5.0) * i for i, name in enumerate(names)}, (torch.ones(3),))
    save_checkpoint(path, Snapshot(value, {3: value, 1: value}, META))


def test_equal_snapshots_have_equal_bytes_in_every_process(tmp_path):
    save_sample(tmp_path / "here")
    code = "import sys, pathlib, test_runs; test_runs.save_sample(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_a_state_class_that_has_changed(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c", Snapshot(Pair(torch.ones(1), ()), {}, META))
    module = sys.modules[__name__]

    class Changed(NamedTuple):
        left: Any
        middle: Any

    monkeypatch.setattr(module, "Pair", Changed)
    with pytest.raises(
        CheckpointError, match=r"Pair with the fields left, right; now it has left, middle\. Restore the"
    ):
        load_checkpoint(tmp_path / "c")
    for gone in (None, int):
        monkeypatch.setattr(module, "Pair", gone)
        with pytest.raises(
            CheckpointError, match=r"holds a test_runs:Pair, which this experiment's algorithm does not"
        ):
            load_checkpoint(tmp_path / "c")


def test_nothing_is_imported_by_a_checkpoint(tmp_path):
    """A module that is named but not loaded stays so: a checkpoint from a stranger runs no code."""
    save_checkpoint(tmp_path / "c", Snapshot(Pair(torch.ones(1), ()), {}, META))
    raw = (tmp_path / "c").read_bytes()
    name = "test_runs:Pair"
    assert "turtle" not in sys.modules
    meta = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["fedtail"]
    from safetensors.torch import load_file, save_file

    forged = json.loads(meta.replace(name, "turtle:Vec2D"))
    del forged["sha256"]
    save_file(load_file(tmp_path / "c"), tmp_path / "forged", {"fedtail": json.dumps(forged)})
    with pytest.raises(CheckpointError, match="holds a turtle:Vec2D"):
        load_checkpoint(tmp_path / "forged")
    assert "turtle" not in sys.modules


# ---- a run and its continuation


def finish(experiment, folder, after):
    """Runs, stops after so many rounds, resumes from the folder."""
    rounds = fedtail.run(experiment, folder)
    for _ in range(after):
        next(rounds)
    rounds.close()
    list(fedtail.resume(folder))


def test_a_run_from_before_an_option_existed_continues_and_continues_again(tmp_path):
    """Its configuration and the hash in its checkpoint lack the option; both stay as they are."""
    folder, whole = tmp_path / "old", tmp_path / "whole"
    list(fedtail.run(QUICK, whole))
    rounds = fedtail.run(QUICK, folder)
    next(rounds)
    rounds.close()
    table = config.to_dict(config.load(folder))
    del table["data"]["normalise"]
    (folder / "config.toml").write_text(tomli_w.dumps(table))
    old = load_checkpoint(folder / "checkpoint.safetensors")
    old.meta["experiment"] = config.fingerprint(table)
    save_checkpoint(folder / "checkpoint.safetensors", old)
    before = (folder / "config.toml").read_bytes()
    rounds = fedtail.resume(folder)
    next(rounds)
    rounds.close()
    list(fedtail.resume(folder))
    assert (folder / "config.toml").read_bytes() == before
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert trees.equal(reopen(folder).server, reopen(whole).server)
    table["local"]["epochs"] += 1
    (folder / "config.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(CheckpointError, match="belongs to another experiment"):
        reopen(folder)


CLIPPED = fedtail.SGD(lr=0.1, clip=0.3, weight_decay=0.01)


@pytest.mark.parametrize(
    "algorithm",
    [
        fedtail.FedAvg(optimizer=CLIPPED),
        fedtail.FedAvg(optimizer=fedtail.Adam(clip=0.3)),
        fedtail.FedProx(mu=1.0),
        fedtail.Scaffold(optimizer=CLIPPED),
        fedtail.FedGraB(warm=1),
    ],
    ids=lambda a: f"{type(a).__name__}-{type(a.optimizer).__name__}",
)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(tmp_path, algorithm, engine):
    experiment = dataclasses.replace(
        QUICK, algorithm=algorithm, engine=fedtail.EngineOptions(name=engine),
        participation=fedtail.Participation(fraction=0.5), local=fedtail.LocalWork(steps=3),
    )  # fmt: skip
    list(fedtail.run(experiment, tmp_path / "whole"))
    finish(experiment, tmp_path / "stopped", 2)
    for name in ("checkpoint.safetensors", "metrics.jsonl", "config.toml", "partition.npz"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_resumed_run_with_server_data_dropout_and_augmentation(tmp_path):
    experiment = dataclasses.replace(
        QUICK, model=fedtail.config.MLP(hidden=(32,), dropout=0.5), dtype="float64",
        data=fedtail.Data(server=3, validation=3, augmentation="crop_flip"),
        schedule=config.SCHEDULES["cosine"](warmup=1), evaluation=fedtail.Evaluation(every=2, keep="best"),
    )  # fmt: skip
    list(fedtail.run(experiment, tmp_path / "whole"))
    finish(experiment, tmp_path / "stopped", 1)
    for name in ("checkpoint.safetensors", "best.safetensors", "metrics.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_checkpoint_every(tmp_path):
    experiment = dataclasses.replace(QUICK, rounds=7, checkpoint_every=3, local=fedtail.LocalWork(steps=1))
    kept = []
    for _ in fedtail.run(experiment, tmp_path / "run"):
        kept.append(load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").meta["round"])
    assert kept == [0, 0, 3, 3, 3, 6, 7]  # every third, and the last


def test_the_best_checkpoint_is_the_first_of_the_highest_validation_score(tmp_path):
    experiment = dataclasses.replace(
        QUICK, rounds=6, data=fedtail.Data(validation=4), evaluation=fedtail.Evaluation(keep="best")
    )
    list(fedtail.run(experiment, tmp_path / "run"))
    scores = [r["validation"]["balanced_accuracy"] for r in runs.read(tmp_path / "run").records]
    best = load_checkpoint(tmp_path / "run" / "best.safetensors").meta
    assert best["round"] == 1 + int(np.argmax(scores))
    assert best["best"] == max(scores)
    federation = reopen(tmp_path / "run", "best")
    assert federation.score("validation")["validation"]["balanced_accuracy"] == max(scores)
    federation.close()


def test_stopping_before_the_first_round_leaves_a_run_that_can_be_resumed(tmp_path):
    fedtail.run(QUICK, tmp_path / "run")  # no round is taken
    assert runs.read(tmp_path / "run").records == []
    list(fedtail.run(QUICK, tmp_path / "whole"))
    list(fedtail.resume(tmp_path / "run"))
    name = "checkpoint.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- reading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    list(fedtail.run(dataclasses.replace(QUICK, evaluation=fedtail.Evaluation(every=2)), folder))
    return folder


def test_read(folder):
    record = runs.read(folder)
    assert record.config["algorithm"]["name"] == "fedavg"
    assert record.config["engine"]["name"] == "loop"
    assert [r["round"] for r in record.records] == [0, 1, 2]
    assert ["test" in r for r in record.records] == [False, True, True]  # every second, and the last
    assert record.last is record.records[2]
    assert record.seconds > 0
    assert record.environment["command"] == sys.argv
    federation = reopen(folder)
    assert (record.counts == federation.data.counts()).all()
    assert (record.test_counts == federation.data.test_counts()).all()
    with np.load(folder / "partition.npz") as arrays:
        owners = np.split(arrays["examples"], arrays["offsets"][1:-1])
    assert all(map(np.array_equal, owners, federation.data.owners))
    federation.close()


def test_read_a_run_that_was_killed_in_the_middle_of_a_line(folder, tmp_path):
    for name in ("config.toml", "environment.json", "partition.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    timings = (folder / "timings.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:50])
    (tmp_path / "timings.jsonl").write_bytes(b"".join(timings) + timings[0][:5])
    assert runs.read(tmp_path).records == runs.read(folder).records[:2]
    assert runs.read(tmp_path).seconds == runs.read(folder).seconds
    (tmp_path / "metrics.jsonl").write_bytes(lines[0])
    with pytest.raises(CheckpointError, match=r"has no evaluated round yet\. Continue it with `fedtail resume"):
        _ = runs.read(tmp_path).last
    (tmp_path / "metrics.jsonl").write_bytes(lines[0][:20])
    assert runs.read(tmp_path).records == []
    (tmp_path / "metrics.jsonl").write_bytes(lines[0][:20] + b"\n" + lines[1])  # no kill leaves this
    with pytest.raises(CheckpointError, match="is damaged"):
        runs.read(tmp_path)


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.toml"):
        runs.read(tmp_path)
    (tmp_path / "config.toml").write_text("rounds = 3\n")
    with pytest.raises(CheckpointError, match=r"is damaged: .*metrics"):
        runs.read(tmp_path)


# ---- a start


@pytest.fixture
def started(tmp_path, monkeypatch):
    """One of three rounds of a run that starts from another one, named relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    list(fedtail.run(dataclasses.replace(QUICK, rounds=1), "first-seed1"))
    whole = dataclasses.replace(QUICK, start="first-seed{seed}")
    list(fedtail.run(whole, "whole"))
    rounds = fedtail.run(whole, "second")
    next(rounds)
    rounds.close()
    return tmp_path


def test_a_run_needs_the_one_that_it_started_from_no_more(started, monkeypatch):
    first = started / "first-seed1"
    with contextlib.closing(reopen(first)) as before, contextlib.closing(reopen(started / "second")) as running:
        assert trees.equal(running.task.initial, before.variables())
    monkeypatch.chdir(started.parent)
    shutil.rmtree(first)
    assert len(list(fedtail.resume(started / "second"))) == 2
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (started / "second" / name).read_bytes() == (started / "whole" / name).read_bytes()
    x = torch.zeros(1, 1, 8, 8)
    assert torch.equal(fedtail.load(started / "second")(x), fedtail.load(started / "whole")(x))


def test_a_run_without_its_initial_model_falls_back_on_the_other_run(started):
    """As runs were kept before."""
    (started / "second" / "initial.safetensors").unlink()
    assert len(list(fedtail.resume("second"))) == 2
    assert (started / "second/metrics.jsonl").read_bytes() == (started / "whole/metrics.jsonl").read_bytes()
    shutil.rmtree("first-seed1")
    with pytest.raises(CheckpointError, match=r"first-seed1 is not a run folder"):
        reopen("second")


def test_an_initial_model_that_is_damaged_or_not_needed(started):
    assert not (started / "first-seed1" / "initial.safetensors").exists()
    path = started / "second" / "initial.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match=r"initial\.safetensors is damaged"):
        reopen("second")


# ---- writing


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    assert path.stat().st_mode & 0o777 == 0o644

    def interrupt(*_):
        raise KeyboardInterrupt

    for function in ("fsync", "chmod", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                files.write_atomic(path, "new")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    files.write_atomic(path, b"new")
    assert path.read_text() == "new"


def test_who_holds_the_lock_clears_away_what_killed_writes_left(tmp_path):
    stale = tmp_path / ".checkpoint.safetensors.x1y2"
    stale.write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    with runs.locked(tmp_path):
        assert not stale.exists()
        stale.write_text("being written")
        with pytest.raises(CheckpointError, match="another process is running"), runs.locked(tmp_path):
            pass
        assert stale.exists()  # it is the holder's
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_truncate_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nthr")
    (tmp_path / "timings.jsonl").write_text("1\n2\n3")
    runs.truncate_metrics(tmp_path, 8)
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\n"
    assert (tmp_path / "timings.jsonl").read_text() == "1\n2\n"
    with pytest.raises(CheckpointError, match="has 8 bytes, the checkpoint expects 9: records are missing"):
        runs.truncate_metrics(tmp_path, 9)
    for name in ("metrics.jsonl", "timings.jsonl"):
        (tmp_path / name).unlink()
    runs.truncate_metrics(tmp_path, 0)  # a run of no rounds needs no records
    assert (tmp_path / "metrics.jsonl").read_text() == ""
