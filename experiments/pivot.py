r"""Methods down, the settings of a sweep across, a Markdown table a column: for sweeps with a grid.

    python experiments/pivot.py experiments/results/fedga_mnist experiments/results/fedga_mnist_one_class \
        --columns test.accuracy test.mean_abs_log_ea --difference test.accuracy

A setting is what stands between row and seed in a run folder's name ("alpha=0.05"), or the sweep's folder where nothing does.
Columns are those of `fedtail compare`, by their key in the records (docs/metrics.md), and the course's: course.rounds_to_0.8.
Cells: mean ± sample standard deviation over seeds of the last round; differences: to the first method, paired over seeds,
mean ± half the 95 % t-interval; changes: of a number of the clients' own models by local training. Bold: the best of its
setting, and what lies within the best's own standard deviation of it.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import fedtail
from fedtail.methods import Column
from fedtail.report import Comparison, Summary, compare

RUN = re.compile(r"(?P<row>.+?)(?:-(?P<setting>[^-]+=.+))?-seed\d+")


def settings(sweeps: Sequence[Path]) -> dict[str, Comparison]:
    """Returns the finished runs of sweeps, compared setting by setting; names those that are not finished."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for sweep in sweeps:
        for run in sorted(sweep.glob("*-seed*")):
            record = fedtail.read(run)
            if len(record.records) == record.config["rounds"]:
                found[_parts(run)[1] or sweep.name].append(run)
            else:
                print(f"{run} is not finished: it is left out", file=sys.stderr)
    return {setting: compare(runs) for setting, runs in found.items()}


def _parts(run: Path) -> tuple[str, str]:
    """Returns a run's row and setting."""
    found = RUN.fullmatch(run.name)
    return (found["row"], found["setting"] or "") if found else (run.name, "")


def cells(comparison: Comparison, key: str, baseline: str, kind: str) -> dict[str, str]:
    """Returns a table's cells by row of the sweep."""
    methods = {_parts(method.runs[0].folder)[0]: method for method in comparison.methods}
    comparison = Comparison((methods[baseline], *(m for row, m in methods.items() if row != baseline)))
    columns = {column.key: column for section in comparison.sections for column in section.columns}
    column = columns.get(f"{key}_after" if kind == "change" else key, Column(key, key, key))
    best = dict(zip(comparison.methods, comparison.best(column), strict=True))
    texts: dict[str, str] = {}
    for row, method in methods.items():
        if kind == "difference":
            found = comparison.difference(method, key)
        elif kind == "change":
            pairs = zip(method.values(f"{key}_after").values(), method.values(f"{key}_before").values(), strict=True)
            found = Summary.of([None if a is None or b is None else a - b for a, b in pairs])
        else:
            found = comparison.summary(method, key)
        text = found.text(len(method.runs), kind == "difference", column.scale, column.digits)
        texts[row] = f"**{text}**" if best[method] and not kind else text
    return texts


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--columns", nargs="*", default=["test.accuracy"], help="keys of the columns")
    parser.add_argument(
        "--difference", nargs="*", default=[], help="keys of columns shown as difference to the baseline"
    )
    parser.add_argument("--change", nargs="*", default=[], help="shown is KEY_after - KEY_before, over local training")
    parser.add_argument("--baseline", default="fedavg", help="the row that differences are taken to")
    arguments = parser.parse_args()
    found = settings(arguments.sweeps)
    tables = [(key, "") for key in arguments.columns]
    tables += [(key, "difference") for key in arguments.difference] + [(key, "change") for key in arguments.change]
    for key, kind in tables:
        by_setting = [cells(comparison, key, arguments.baseline, kind) for comparison in found.values()]
        rows = dict.fromkeys([arguments.baseline, *(row for texts in by_setting for row in texts)])
        print(
            f"\n{key}", {"difference": f"against {arguments.baseline}", "change": "after - before"}.get(kind, ""), "\n"
        )
        for line in (["method", *found], ["---", *["---:"] * len(found)]):
            print(f"| {' | '.join(line)} |")
        for row in rows:
            if not (kind == "difference" and row == arguments.baseline):
                print(f"| {' | '.join([row, *(texts.get(row, '') for texts in by_setting)])} |")


if __name__ == "__main__":
    main()
