"""Every head's accuracy in the runs of a sweep, mean and spread over seeds: `python experiments/readings.py FOLDER`.

A method with several heads keeps one reading for each in its records (FedLoGe: the frozen classifier, the trained head and the
trained head realigned). Prints two Markdown tables of the last round, in per cent: the global test set by shot group, and the
clients' own test sets. Methods come in the order of their names; runs that are not finished are named and left out.
"""

import json
import statistics
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

GLOBAL = ("accuracy", "head", "medium", "tail")
LOCAL = ("mean", "worst_decile", "head", "medium", "tail")
Found = dict[tuple[str, str], list[dict[str, float]]]


def last(folder: Path) -> dict[str, Any] | None:
    """Returns the last record of a finished run, None of another."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rounds = tomllib.loads((folder / "config.toml").read_text())["rounds"]
    return json.loads(lines[-1]) if len(lines) == rounds else None


def heads(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the readings of a record by name; the method's own answer has no name."""
    return {"": record, **record.get("readings", {})}


def collect(folder: Path) -> tuple[Found, Found]:
    """Returns by (method, head) one row a seed: on the global test set, and on the clients' own by each model."""
    everywhere, own = defaultdict(list), defaultdict(list)
    for run in sorted(folder.glob("*-seed*")):
        record = last(run)
        if record is None:
            print(f"{run.name} is not finished", file=sys.stderr)
            continue
        method = run.name.rsplit("-seed", 1)[0]
        for head, reading in heads(record).items():
            everywhere[method, head].append({name: reading["test"][name] for name in GLOBAL})
            own[method, f"{head} generic".strip()].append({name: reading["local"][name] for name in LOCAL})
        if "personal" in record:
            own[method, "personal"].append({name: record["personal"][name] for name in LOCAL})
    return everywhere, own


def table(found: Found, names: tuple[str, ...], what: str) -> str:
    """Returns rows as Markdown: mean and, from two seeds on, the standard deviation over seeds."""
    lines = [f"| method | {what} | seeds | " + " | ".join(name.replace("_", " ") for name in names) + " |",
             "|---|---|---|" + "---|" * len(names)]  # fmt: skip
    for (method, head), rows in found.items():
        cells = []
        for name in names:
            values = [100 * row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {method} | {head or '-'} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    everywhere, own = collect(Path(sys.argv[1]))
    print(table(everywhere, GLOBAL, "head") + "\n\n" + table(own, LOCAL, "model"))


if __name__ == "__main__":
    main()
