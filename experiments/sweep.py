"""Runs a folder of experiments over seeds, several at a time, resumable; finished runs are skipped.

    python experiments/sweep.py experiments/longtail_images --match 'fashion-mnist-*' --seeds 0 1 2 --jobs 2

Each run goes to experiments/results/FOLDER/NAME-seedS. A run that was interrupted is continued bit for bit; one that
fails is reported at the end and does not end the others. `fedtail compare` prints the tables again.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def one(file: str, seed: int, folder: Path) -> None:
    """Runs or continues one experiment in this process."""
    from fedtail import config, experiment

    if folder.exists():
        rounds = experiment.resume(folder)
    else:
        rounds = experiment.run(dataclasses.replace(config.load(file), seed=seed), folder)
    for _ in rounds:
        pass


def start(file: Path, seed: int, output: Path) -> str | None:
    """Runs one experiment in a process of its own; returns its error, if any."""
    folder = output / f"{file.stem}-seed{seed}"
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--one", str(file), str(seed), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(
        f"{folder.name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    return None if done.returncode == 0 else f"{folder.name}: {done.stderr.strip().splitlines()[-1]}"


def main() -> None:
    """Parses the command line and runs everything."""
    if sys.argv[1:2] == ["--one"]:
        return one(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--match", default="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    output = Path(__file__).parent / "results" / options.folder.name
    files = sorted(options.folder.glob(f"{options.match}.toml"))
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(start, file, seed, output) for seed in options.seeds for file in files]
        errors = [job.result() for job in jobs]
    failed = [error for error in errors if error]
    print(*failed, sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
