"""Measures fedtail against its peers and against bare PyTorch on the same work, interleaved in one run.

    python benchmarks/speed/run.py                          everything: about half an hour on two cores, downloads the peers
    python benchmarks/speed/run.py --workloads W1 --peers   one workload, without peers
    python benchmarks/speed/run.py --device cuda            G1 on a GPU: fedtail, the bare loop and pfl

Writes benchmarks/results/speed.json and speed.md. Each contestant is a process of its own (peers/*.py), peers in environments
of their own under benchmarks/speed/.env. All are started first; then, `--repeats` times, each in turn plays rounds for
`--turn` seconds while the others wait. A ratio is taken within one repeat; the table shows its median and range.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from machine import describe  # noqa: E402
from workloads import SHAPES, write  # noqa: E402

ENGINES = ("auto", "loop", "parallel", "processes", "vmap")
PEERS = ("flower", "pfl", "fluke")
OWN = {
    **{f"fedtail {engine}": ["own.py", engine, "fedavg"] for engine in ENGINES},
    "floor, 1 thread": ["floor.py", "1"],
    "floor, 2 threads": ["floor.py", "2"],
    "naive loop": ["naive.py"],
}

GOALS = {  # the best readings of prototypes that had neither metrics nor client states; W3: faster than Flower and pfl
    "W1": {"flower": 2.0, "pfl": 2.0, "naive loop": 2.5, "floor, 1 thread": 1.75, "floor, 2 threads": 1.3},
    "W2a": {"flower": 6.0, "pfl": 2.0, "naive loop": 2.2, "floor, 1 thread": 1.6, "floor, 2 threads": 1.25},
    "W2b": {"flower": 14.0, "pfl": 2.4, "naive loop": 2.6, "floor, 1 thread": 1.4, "floor, 2 threads": 1.35},
    "W3": {"flower": 1.0, "pfl": 1.0, "naive loop": 2.1, "floor, 1 thread": 2.0, "floor, 2 threads": 1.3},
    "G1": {"pfl": 20.0},
}


def environment(peer: str) -> Path:
    """Returns the Python of a peer's environment, which is made at the first call."""
    folder = HERE / ".env" / peer
    if not (folder / "complete").exists():
        print(f"making the environment of {peer} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        wanted = str(HERE / "peers" / "requirements" / f"{peer}.txt")
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "-r", wanted], check=True)
        (folder / "complete").touch()
    return folder / "bin" / "python"


def family(pid: int) -> list[int]:
    """Returns a process and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread may end while we look
            for child in task.read_text().split():
                found += family(int(child))
    return found


class Contestant:
    """A process that plays a round when it is told to."""

    def __init__(self, python: str | Path, words: list[str], workload: Path):
        command = [str(python), str(HERE / "peers" / words[0]), str(workload), *words[1:]]
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, **quiet},
        )  # fmt: skip
        first = self._answer()
        self.first = first["seconds"]
        self.startup = time.perf_counter() - begun - self.first  # from the call of the interpreter to the first round

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.errors.seek(0)
        raise RuntimeError(self.errors.read()[-2000:])

    def signal(self, what: signal.Signals) -> None:
        """Stops or continues the process and all that it has started: Ray works a little even when nothing is asked of it."""
        for pid in family(self.process.pid):
            os.kill(pid, what)

    def turn(self, seconds: float) -> tuple[float, float]:
        """Plays rounds for so long; returns (samples a second, seconds a round). Between its turns it is stopped."""
        assert self.process.stdin
        self.signal(signal.SIGCONT)
        total = samples = rounds = 0.0
        while total < seconds:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            answer = self._answer()
            total, samples, rounds = total + answer["seconds"], samples + answer["samples"], rounds + 1
        self.signal(signal.SIGSTOP)
        return samples / total, total / rounds

    def memory(self) -> float:
        """Returns the memory in MiB of the process and all that it has started; what several share counts once (PSS)."""
        total = 0
        for pid in family(self.process.pid):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("Pss:") else 0
        return total / 1024

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin
        self.signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(name: str, own: list[str], peers: list[str], repeats: int, turn: float, folder: Path) -> dict[str, Any]:
    """Returns the readings of one workload: by contestant, or why it did not take part."""
    file = folder / f"{name}.npz"
    write(name, file)
    entries: dict[str, tuple[str | Path, list[str]]] = {label: (sys.executable, OWN[label]) for label in own}
    readings: dict[str, Any] = {}
    for peer in peers:
        try:
            entries[peer] = (environment(peer), [f"{peer}{'' if peer == 'flower' else '_'}.py"])
        except subprocess.CalledProcessError as error:
            readings[peer] = {"failed": f"its environment could not be made: {error}"}
    playing: dict[str, Contestant] = {}
    for label, (python, words) in entries.items():
        print(f"{name}: {label} starts", flush=True)
        try:
            playing[label] = Contestant(python, words, file)
            playing[label].signal(signal.SIGSTOP)
        except RuntimeError as error:
            readings[label] = {"failed": str(error)}
            print(f"{name}: {label} does not take part:\n{error}", flush=True)
    turns: dict[str, list[tuple[float, float]]] = {label: [] for label in playing}
    for repeat in range(repeats):
        for label, contestant in playing.items():
            turns[label].append(contestant.turn(turn))
        print(f"{name}: repeat {repeat + 1} of {repeats}", flush=True)
    for label, contestant in playing.items():
        speed, seconds = zip(*turns[label], strict=True)
        readings[label] = {"samples_per_second": speed, "seconds_per_round": seconds, "startup": contestant.startup,
                           "first_round": contestant.first, "memory_mib": contestant.memory()}  # fmt: skip
        contestant.close()
    return readings


def ratios(readings: dict[str, Any], of: str, to: str) -> np.ndarray[Any, Any]:
    """Returns how many times faster one contestant is than another, for each repeat."""
    return np.divide(*(readings[label]["samples_per_second"] for label in (of, to)))


def table(name: str, readings: dict[str, Any]) -> str:
    """Returns a workload's table in Markdown."""
    shape = SHAPES[name]
    head = (f"### {name}: {shape.model}, {shape.clients:,} clients of {shape.examples} images, {shape.cohort} a round, "
            f"batch {shape.batch_size}\n\n")  # fmt: skip
    rows = ["| contestant | samples / s | s / round | start-up + first round, s | memory, MiB | auto is faster by (range) |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for label, reading in readings.items():
        if "failed" in reading:
            rows.append(f"| {label} | did not take part | | | | |")
            continue
        ratio = ratios(readings, "fedtail auto", label)
        said = "" if label == "fedtail auto" else f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        rows.append(
            f"| {label} | {np.median(reading['samples_per_second']):,.0f} | {np.median(reading['seconds_per_round']):.3f} "
            f"| {reading['startup']:.1f} + {reading['first_round']:.1f} | {reading['memory_mib']:,.0f} | {said} |"
        )
    return head + "\n".join(rows) + "\n"


def summary(workloads: dict[str, Any]) -> str:
    """Returns how many times faster fedtail is than whom, with our goal, as a table in Markdown."""
    names = ["flower", "pfl", "fluke", "naive loop", "floor, 1 thread", "floor, 2 threads"]
    rows = [f"| times faster (goal) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, readings in workloads.items():
        cells = [name]
        for label in names:
            if "samples_per_second" not in readings.get(label, {}):
                cells.append("-")
                continue
            goal = GOALS.get(name, {}).get(label)
            ratio = np.median(ratios(readings, "fedtail auto", label))
            cells.append(f"{ratio:.2f}" + (f" ({goal:g})" if goal else ""))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workloads", nargs="+", choices=[*SHAPES])
    parser.add_argument(
        "--own", nargs="+", choices=[*OWN], help="of fedtail and bare PyTorch; fedtail auto must be there"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turn", type=float, default=2.0, help="seconds")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    os.environ["SPEED_DEVICE"] = args.device
    gpu = args.device != "cpu"
    workloads = args.workloads or (["G1"] if gpu else [name for name in SHAPES if name.startswith("W")])
    own = args.own or (["fedtail auto", "fedtail loop", "floor, 1 thread"] if gpu else [*OWN])
    peers = args.peers if args.peers is not None else (["pfl"] if gpu else [*PEERS])
    result = args.output / ("speed_gpu" if gpu else "speed")
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe(), "repeats": args.repeats, "turn_seconds": args.turn, "workloads": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in workloads:
            found["workloads"][name] = measure(name, own, peers, args.repeats, args.turn, Path(folder))
            result.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join([summary(found["workloads"]), *(table(*each) for each in found["workloads"].items())])
    result.with_suffix(".md").write_text(f"{time.strftime('%Y-%m-%d')}, {found['machine']['text']}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
