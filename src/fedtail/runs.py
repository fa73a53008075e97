"""The run folder: everything that a run leaves, readable without fedtail.

config.toml               the resolved experiment
environment.json          versions, machine, command
partition.npz             who holds what: offsets [clients + 1], examples, counts [clients, classes], test_counts,
                          newcomers (clients that never take part); held_offsets and held: with data.client_validation
metrics.jsonl             one record a round; the same seed gives the same bytes
timings.jsonl             seconds a round; not reproducible, therefore apart
checkpoint.safetensors    the latest state; best.safetensors: by validation score
initial.safetensors       the model that a run with `start` began with, so that it needs that other run no more
nodes.json                which nodes are there, where the clients are real ones (`fedtail deploy`)
.lock                     held by the process that runs it
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedtail import config
from fedtail.checkpoint import Snapshot, read_meta, save_checkpoint
from fedtail.data.federated import FederatedData
from fedtail.data.members import Members
from fedtail.errors import CheckpointError
from fedtail.files import append, write_atomic, write_error
from fedtail.metrics import GroupRule, ShotGroups
from fedtail.trees import Tree

COMPRESSED = 32 << 20  # bytes of partition arrays up to which compressing them takes less than seconds


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Returns what a reader needs to judge and repeat a run: versions, machine, command, commit."""
    packages = {name: version(name) for name in ("fedtail", "torch", "numpy", "safetensors")}
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    return {"packages": packages, "python": platform.python_version(), "platform": platform.platform(),
            "processor": processor(), "cores": os.cpu_count(), "command": list(command), "commit": commit}  # fmt: skip


def processor() -> str:
    """Returns the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def partition_arrays(data: FederatedData, newcomers: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Returns what partition.npz keeps; counts in the smallest type that holds them: a tenth for a million clients."""
    owners = Members.of(data.owners)
    counts = {
        name: each.astype(np.min_scalar_type(int(each.max(initial=0))))
        for name, each in (("counts", data.counts()), ("test_counts", data.test_counts()))
    }
    held = Members.of(data.held)
    kept_out = {"held_offsets": held.offsets, "held": held.members} if len(held.members) else {}
    return {"offsets": owners.offsets, "examples": owners.members, **counts, "newcomers": newcomers, **kept_out}


def create(folder: Path, experiment: config.Experiment, partition: dict[str, np.ndarray[Any, Any]],
           snapshot: Snapshot, initial: Tree | None = None) -> None:  # fmt: skip
    """Makes a run folder, complete with the checkpoint of round 0 and the initial model if given, or leaves nothing.

    Raises:
        CheckpointError: the folder exists already or cannot be written.
        ConfigError: the algorithm was not defined in a file, so that a later process could not find it.
    """
    name = str(config.name_of(experiment.algorithm))
    if name not in config.ALGORITHMS and ".py:" not in name:
        raise config.ConfigError(f"the algorithm {name} cannot be kept in a run folder: it is not defined in a file. "
                                 "Move its class to a .py file, or run without a folder.")  # fmt: skip
    if folder.exists():
        raise CheckpointError(f"{folder} exists already and is not overwritten. Continue it with `fedtail resume {folder}`, "
                              "or choose another folder with --output.")  # fmt: skip
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        write_atomic(scratch / "config.toml", config.dumps(experiment))
        write_atomic(scratch / "environment.json", json.dumps(environment(sys.argv), indent=1))
        small = sum(array.nbytes for array in partition.values()) <= COMPRESSED
        with open(scratch / "partition.npz", "wb") as file:
            (np.savez_compressed if small else np.savez)(file, **partition)  # type: ignore[arg-type]
        (scratch / "metrics.jsonl").touch()
        (scratch / "timings.jsonl").touch()
        if initial is not None:
            save_checkpoint(scratch / "initial.safetensors", Snapshot(initial, {}, snapshot.meta))
        save_checkpoint(scratch / "checkpoint.safetensors", snapshot)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except (OSError, CheckpointError) as error:  # the latter: `write_atomic`'s, about a file of the scratch folder
        raise write_error(folder, cast("OSError", error.__cause__ or error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds the run folder, so that two processes never write one run; the lock ends with the process.

    Whoever holds it removes the temporary files of writes that were killed.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        yield
        return
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise write_error(folder / ".lock", error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another process is running {folder}. Wait for it, or stop it first.") from error
        for stale in folder.glob(".*.safetensors.*"):
            stale.unlink(missing_ok=True)
        yield


def same_clients(folder: Path, data: FederatedData) -> bool:
    """Says whether the run began on clients of these sizes, and not on the sites of a deployment or on other files.

    Args:
        folder: the run; where it cannot be read, whoever reads it is told.
        data: what the clients have now.
    """
    try:
        with open(folder / "partition.npz", "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return np.array_equal(arrays["offsets"], Members.of(data.owners).offsets)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return True


def check_clients(folder: Path, data: FederatedData) -> None:
    """Raises CheckpointError where `same_clients` says no."""
    if not same_clients(folder, data):
        raise CheckpointError(f"{folder} began on clients of other sizes than the data here give. Continue a deployment "
                              "on sites with `flwr run`, and any other run on its own data.")  # fmt: skip


def truncate_metrics(folder: Path, size: int) -> None:
    """Cuts metrics.jsonl back to the bytes that the checkpoint knows of, and timings.jsonl to whole lines.

    What a round left behind whose process was killed, or whose disk was full, goes.

    Raises:
        CheckpointError: metrics.jsonl has fewer bytes, or the files cannot be written.
    """
    path, timings = folder / "metrics.jsonl", folder / "timings.jsonl"
    have = path.stat().st_size if path.exists() else 0
    if have < size:
        raise CheckpointError(f"{path} has {have} bytes, the checkpoint expects {size}: records are missing. "
                              "Restore the file from a copy, or start the run anew in another folder.")  # fmt: skip
    try:
        for log in (path, timings):
            log.touch()
        os.truncate(path, size)
        os.truncate(timings, timings.read_bytes().rfind(b"\n") + 1)
    except OSError as error:
        raise write_error(path, error) from error


def log_metrics(folder: Path, record: dict[str, Any], seconds: dict[str, Any]) -> int:
    """Appends a round's record and its timings; returns the size of metrics.jsonl."""
    append(folder / "timings.jsonl", json.dumps(seconds) + "\n")
    return append(folder / "metrics.jsonl", json.dumps(record) + "\n")


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read: what reports and pictures are made of."""

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]  # metrics.jsonl
    counts: np.ndarray[Any, Any]  # int64 [clients, classes]
    test_counts: np.ndarray[Any, Any]  # int64 [clients, classes], the local test sets'
    environment: dict[str, Any]
    seconds: float  # spent in rounds

    @property
    def last(self) -> dict[str, Any]:
        """The last evaluated round's record."""
        evaluated = [r for r in self.records if "test" in r]
        if not evaluated and len(self.records) == self.config["rounds"]:
            raise CheckpointError(f"{self.folder} is of a method that makes images and predicts nothing: it has no scores. "
                                  f"Judge the images with `fedtail quality {self.folder}`.")  # fmt: skip
        if not evaluated:
            raise CheckpointError(
                f"{self.folder} has no evaluated round yet. Continue it with `fedtail resume {self.folder}`."
            )
        return evaluated[-1]

    @property
    def groups(self) -> ShotGroups:
        """Head, medium and tail, by the rule of the run's configuration."""
        rule: GroupRule = config.from_dict(GroupRule, self.config["evaluation"]["groups"], "evaluation.groups")
        return rule.split((self.test_counts if rule.counts_of == "local_test" else self.counts).sum(0))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a last line without its end is one that a killed process was writing."""
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def rounds_done(folder: Path) -> int:
    """Returns how many rounds a run has behind it: its checkpoint's; its records' where no checkpoint was kept.

    A checkpoint that cannot be read counts as none done: whoever resumes the run is told what is wrong with it.
    """
    path = folder / "checkpoint.safetensors"
    try:
        if path.exists():
            return read_meta(path)["round"]
        records = _lines(folder / "metrics.jsonl")
        return records[-1]["round"] + 1 if records else 0
    except (CheckpointError, KeyError, TypeError, ValueError, OSError):
        return 0


def read(folder: str | Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        CheckpointError: it is not a run folder, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no config.toml. `fedtail run` makes one.")
    try:
        records, timings = _lines(folder / "metrics.jsonl"), _lines(folder / "timings.jsonl")
        with open(folder / "partition.npz", "rb") as file, np.load(file, allow_pickle=False) as arrays:
            counts, test_counts = (arrays[name].astype(np.int64) for name in ("counts", "test_counts"))
        known = json.loads((folder / "environment.json").read_text())
        table = config.to_dict(config.load(folder))
        seconds = sum(t["seconds"] for t in timings)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"the run folder {folder} is damaged: {error}. Restore it from a copy, or repeat the run in another folder."
        ) from error
    return RunRecord(folder, table, records, counts, test_counts, known, seconds)
