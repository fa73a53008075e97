"""A comparison's tables as text, Markdown, LaTeX, CSV and plain values."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from fedtail.report import Comparison, Row, Summary

BEST = "\u2022"
"""Stands before the best numbers of a column where there is no bold."""


def to_text(comparison: Comparison) -> str:
    """Returns the tables for a terminal, without colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    console = Console(file=file, width=200, color_system=None)
    for section in comparison.sections:
        table = Table(title=section.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("method")
        for title in (*(column.title for column in section.columns), "n"):
            table.add_column(title, justify="right")
        rows = comparison.rows(section)
        differences = _differences(comparison, rows)
        for row in (row for row in rows if not row.difference):
            cells = [(BEST if best else "") + cell for cell, best in zip(row.cells, row.best, strict=True)]
            table.add_row(*(Text(cell) for cell in (row.label, *cells, str(row.n))))
        if differences:
            table.add_section()
            table.add_row(Text(f"difference to {comparison.methods[0].label}"), end_section=True)
        for row in differences:
            table.add_row(*(Text(cell) for cell in (row.label, *row.cells, str(row.n))))
        console.print(table)
        console.print(Text(comparison.caption(section, BEST) + "\n"), width=100)
    for note in comparison.notes:
        console.print(Text(note), width=100)
    return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").splitlines())


def _differences(comparison: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of differences, without the baseline's name, which stands above them."""
    suffix = f" - {comparison.methods[0].label}"
    return [row._replace(label=row.label.removesuffix(suffix)) for row in rows if row.difference]


def to_markdown(comparison: Comparison) -> str:
    """Returns the tables as Markdown."""
    parts: list[str] = []
    for section in comparison.sections:
        rows = comparison.rows(section)
        titles = [*(column.title for column in section.columns), "n"]
        blocks = [("method", [row for row in rows if not row.difference]),
                  (f"difference to {comparison.methods[0].label}", _differences(comparison, rows))]  # fmt: skip
        parts.append(f"**{section.title}**")
        for first, members in blocks:
            lines = [_markdown_row([first, *titles]), "|---|" + "---:|" * len(titles)]
            for row in members:
                cells = [f"**{cell}**" if best else cell for cell, best in zip(row.cells, row.best, strict=True)]
                lines.append(_markdown_row([row.label, *(c.replace("*", "\\*") if row.difference else c for c in cells),
                                            str(row.n)]))  # fmt: skip
            if members:
                parts.append("\n".join(lines))
        parts.append(comparison.caption(section).replace(" *:", " \\*:"))
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$",
})  # fmt: skip


def to_latex(comparison: Comparison) -> str:
    """Returns the tables for LaTeX; they need the package booktabs."""
    parts = [r"% \usepackage{booktabs}"]
    for section in comparison.sections:
        rows = comparison.rows(section)
        titles = ["method", *(column.title for column in section.columns), "$n$"]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{section.title}. {_latex(comparison.caption(section))}}}",
                 rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", r"\toprule", _latex_row(titles), r"\midrule"]  # fmt: skip
        lines += [_latex_cells(row) for row in rows if not row.difference]
        if differences := _differences(comparison, rows):
            title = f"difference to {_latex(comparison.methods[0].label)}"
            lines += [r"\midrule", rf"\multicolumn{{{len(titles)}}}{{l}}{{\emph{{{title}}}}} \\"]
            lines += [_latex_cells(row) for row in differences]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join([*parts, *(f"% {note}" for note in comparison.notes)]) + "\n"


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def _latex_cells(row: Row) -> str:
    cells = [_latex(cell) for cell in row.cells]
    if row.difference:
        cells = [cell.replace("-", "$-$").replace("*", "$^{*}$") if cell != "-" else cell for cell in cells]
    marked = [rf"\textbf{{{cell}}}" if best else cell for cell, best in zip(cells, row.best, strict=True)]
    return _latex_row([_latex(row.label), *marked, str(row.n)])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


CSV = ("table", "column", "method", "mean", "std", "n", "best", "difference", "low", "high", "pairs")
"""Header of `to_csv`."""


def to_csv(comparison: Comparison) -> str:
    """Returns one line for each column of each method; what there is not is empty.

    Accuracies are shares in [0, 1], not percent; drift, cosine and rounds (table "course") are what their names say.
    `difference`, the ends `low` and `high` of its 95 % t-interval and the number of `pairs` are those to the first method.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV)
    for section in comparison.sections:
        for column in section.columns:
            for method, best in zip(comparison.methods, comparison.best(column), strict=True):
                numbers = comparison.summary(method, column.key)
                difference = comparison.difference(method, column.key)
                other = method != comparison.methods[0]
                writer.writerow([section.name, column.key.partition(".")[2], method.label, numbers.mean, numbers.std, numbers.n,
                                 int(best), *((difference.mean, *(difference.interval or (None, None)), difference.n)
                                              if other else (None,) * 4)])  # fmt: skip
    return file.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as plain values, in the units of `to_csv`."""
    base = comparison.methods[0]
    columns = [column for section in comparison.sections for column in section.columns]
    best = {column.key: comparison.best(column) for column in columns}
    return {
        "captions": {section.name: comparison.caption(section) for section in comparison.sections},
        "notes": list(comparison.notes),
        "baseline": base.label,
        "methods": [
            {
                "label": m.label,
                "seeds": list(m.seeds),
                "folders": [str(run.folder) for run in m.runs],
                "columns": {c.key: comparison.summary(m, c.key)._asdict() for c in columns},
                "by_seed": {c.key: {str(seed): v for seed, v in m.values(c.key).items()} for c in columns},
                "best": [c.key for c in columns if best[c.key][number]],
                "difference": {c.key: _with_interval(comparison.difference(m, c.key)) for c in columns}
                if m != base
                else None,
            }
            for number, m in enumerate(comparison.methods)
        ],
    }


def _with_interval(summary: Summary) -> dict[str, Any]:
    low, high = summary.interval or (None, None)
    return {**summary._asdict(), "low": low, "high": high}
