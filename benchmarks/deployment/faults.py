"""What faults cost: `python benchmarks/deployment/faults.py` (about ten minutes on two cores).

Runs the fault tests, which kill real processes on loopback, and keeps the figures that they take. Needs Flower. Writes
benchmarks/results/faults.json and faults.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "speed"))

from machine import describe  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Runs the tests and writes the table."""
    file = RESULTS / "faults.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/test_flower_faults.py", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "FEDTAIL_FIGURES": str(file)}, check=True)
    write(json.loads(file.read_text()))


def write(found: dict[str, dict[str, float]]) -> None:
    """Writes the table; in every case the result was compared, bit for bit, with the simulator's on the same dropouts."""
    rows = [describe()["text"] + "; three or four nodes on one machine", "",
            "| fault | recovered after | calm round | finished rounds lost | rounds begun again | rounds without the client |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for fault, figures in found.items():
        took, calm = figures.get("seconds_to_recover"), figures.get("round_seconds")
        each = (f"{took:.0f} s" if took else "at once", f"{calm:.0f} s" if calm else "", figures["finished_rounds_lost"],
                figures["rounds_repeated"], figures.get("rounds_without_it", 0))  # fmt: skip
        rows.append(f"| {fault} | {' | '.join(map(str, each))} |")
    (RESULTS / "faults.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
