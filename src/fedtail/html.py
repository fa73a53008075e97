"""A comparison as one page that needs nothing else: tables, pictures, what was run, on what, and how to repeat it."""

import base64
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtail import overview, plots
from fedtail.data.statistics import describe
from fedtail.drawing import render, write
from fedtail.methods import Method, Section, distinct, flatten, own, settings, show
from fedtail.report import Comparison, compare, in_words
from fedtail.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #444; } tbody tr + tr > * { border-top: 1px solid #e3e3e3; }
.numbers td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers thead th + th { text-align: right; } .numbers th, .facts th { font-weight: 600; }
tr.difference > * { color: #444; font-style: italic; } .wide { overflow-x: auto; }
.caption, figcaption { color: #444; font-size: .87rem; max-width: 48rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.6rem; align-items: start; }
figure { margin: 0; } figure img { width: 100%; max-width: 30rem; height: auto; }
pre { background: #f5f5f5; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .87rem; }
code { overflow-wrap: anywhere; font-size: .87rem; }
@media print { body { font-size: 10pt; max-width: none; margin: 0; } .figures { grid-template-columns: 1fr 1fr; }
  figure, table, pre, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide { overflow: visible; }
  .numbers th, .numbers td { padding: .2rem .35rem; font-size: 8.5pt; } }
"""

DEFINITIONS = {
    "overall": "share of the test examples that the global model predicts right.",
    "balanced": "mean recall of the classes; every class counts the same.",
    "head, medium, tail": "accuracy on the test examples of the group's classes. {groups}",
    "macro-F1": "mean over the classes of F1 = 2 TP / (2 TP + FP + FN), for each class that occurs in truth or prediction.",
    "mean": "a client's accuracy on its own local test set, averaged over the clients; every client counts the same.",
    "spread": "standard deviation of that accuracy over the clients, in percentage points.",
    "worst decile": "mean accuracy of the tenth of the clients that fare worst (at least one client).",
    "local test set": "a part of the global test set with the client's own mix of classes; local test sets may overlap.",
    "tuned": "the global model after a client has trained it further on its own data, by evaluation.finetune.",
    "newcomers": "clients that hold data but never took part; they are left out of everything else about local test sets.",
    "recall": "share of a class's test examples that are predicted right.",
    "±": "sample standard deviation over the seeds (divided by n - 1); of a difference, half the width of the 95 % t-interval "
    "of its mean over the seeds.",
}


def report(
    folders: Sequence[str | Path],
    path: str | Path,
    command: str,
    title: str = "Federated learning on long-tailed data",
    allow: Sequence[str] = (),
) -> Comparison:
    """Writes the page for these runs: one file, without links, scripts or further files. Equal runs give equal bytes.

    Args:
        folders: finished run folders; the method of the first is the baseline.
        path: the page, for example report.html; it is replaced if it exists.
        command: what the reader types to make the runs and this page again.
        title: the page's heading.
        allow: see `fedtail.report.compare`.

    Returns:
        The comparison that the page shows.

    Raises:
        ConfigError: the runs cannot be compared, or the page's folder does not exist.
        CheckpointError: a folder is not a run folder, or the page cannot be written.
    """
    comparison = compare(folders, allow)
    runs = [run for method in comparison.methods for run in method.runs]
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in in_words(comparison)),
        "<h2>Numbers</h2>", *(_table(comparison, section) for section in comparison.sections),
        *(f'<p class="caption">{escape(note)}</p>' for note in comparison.notes),
        "<h2>Pictures</h2>", f'<div class="figures">{"".join(_pictures(comparison.methods, runs))}</div>',
        "<h2>What was run</h2>", _facts(_experiment(comparison.methods, runs)),
        "<h2>How to repeat it</h2>", f"<pre>{escape(command)}</pre>", _facts(_machine(runs)),
        "<h3>The runs</h3>", _facts((run.folder.name, f"<code>{escape(_command(run))}</code>") for run in runs),
        "<h2>What the numbers mean</h2>", _facts(_definitions(runs)),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
    write(path, page + "\n".join(body) + "\n</body></html>\n")
    return comparison


def _table(comparison: Comparison, section: Section) -> str:
    titles = ["method", *(column.title for column in section.columns), "n"]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in titles)
    rows: list[str] = []
    for row in comparison.rows(section):
        texts = (
            f"<b>{escape(cell)}</b>" if best else escape(cell) for cell, best in zip(row.cells, row.best, strict=True)
        )
        cells = "".join(f"<td>{text}</td>" for text in (*texts, str(row.n)))
        kind = ' class="difference"' if row.difference else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(row.label)}</th>{cells}</tr>')
    return (
        f'<h3>{escape(section.title)}</h3><div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="caption">{escape(comparison.caption(section))}</p>'
    )  # fmt: skip


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names and facts; the facts are HTML already."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{fact}</td></tr>' for name, fact in rows)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _pictures(methods: Sequence[Method], runs: Sequence[RunRecord]) -> list[str]:
    """Returns the figures that the runs' records allow."""
    first = runs[0]
    known = [
        _picture(plots.classes(runs), "Recall of each class on the global test set, most frequent class left; shaded: the "
                 f"shot groups of seed {first.config['seed']}."),
        _picture(plots.curves(runs), "The course of training. The tables hold the last round."),
    ]  # fmt: skip
    if len(methods) > 1 and any(run.last["test"][name] is not None for run in runs for name, _, _ in overview.GROUPS):
        known.insert(
            0, _picture(overview.groups(runs), "Head, medium and tail of the global test set, the best tail on top.")
        )
    if any("local" in run.last for run in runs):
        known.append(
            _picture(plots.clients(runs), "Every client judged on its own local test set; mean over the seeds.")
        )
    known.append(_picture(plots.partition(first.counts), f"Who holds what with seed {first.config['seed']}."))
    for method in methods:
        run = method.runs[0]
        where = f"{method.label}, seed {run.config['seed']}"
        if any("prior" in record.get("diagnostics", {}) for record in run.records):
            text = "the server's estimate of the class shares, read off the classifier, beside the true shares."
            known.append(_picture(plots.prior(run), f"{where}: {text}"))
        if any("positive_gradient" in record.get("train", {}) for record in run.records):
            text = "how each class's positive gradient compares with its negative one, mean over the clients."
            known.append(_picture(plots.balance(run), f"{where}: {text}"))
    return known


def _picture(figure: "Figure", caption: str) -> str:
    code = base64.b64encode(render(figure, "svg")).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{code}"><figcaption>{text}</figcaption></figure>'


def _node(table: Mapping[str, Any]) -> str:
    """Returns a part of a configuration in words: its name and its values."""
    values = [f"{key.replace('.', ' ')} {show(value)}" for key, value in flatten(table).items() if key != "name"]
    return ": ".join(part for part in (str(table.get("name", "")), ", ".join(values)) if part)


def _each(runs: Sequence[RunRecord], text: Callable[[RunRecord], str]) -> str:
    """Returns the different texts of the runs, escaped."""
    return "<br>".join(escape(one) for one in distinct(text(run) for run in runs))


def _experiment(methods: Sequence[Method], runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns what was run; where allowed differences exist, every variant."""
    rows = [
        ("Data", _each(runs, lambda run: run.config["data"]["name"])),
        ("Training examples", _each(runs[:1], _sizes)),
        ("Long tail", _each(runs, lambda run: _node(run.config["data"]["longtail"]))),
        ("Partition", _each(runs, lambda run: _node(run.config["data"]["partition"]))),
        ("Clients", _each(runs[:1], _clients)),
        ("Augmentation", _each(runs, lambda run: run.config["data"]["augmentation"])),
        ("Model", _each(runs, lambda run: _node(run.config["model"]))),
        ("Optimizer", _each(runs, lambda run: _node(run.config["algorithm"]["optimizer"]))),
        ("Local work", _each(runs, lambda run: _node(run.config["local"]))),
        ("Participation", _each(runs, lambda run: _node(run.config["participation"]))),
        ("Schedule", _each(runs, lambda run: _node(run.config["schedule"]))),
        ("Rounds", _each(runs, lambda run: str(run.config["rounds"]))),
    ]
    for method in methods:
        table = flatten(method.runs[0].config)
        values = settings(table, (key for key in table if own(key) and key != "algorithm.name"))
        seeds = ", ".join(map(str, method.seeds))
        rows.append((method.label, escape(f"{', '.join(values) or 'no hyper-parameters of its own'}; seeds {seeds}")))
    return rows


def _sizes(run: RunRecord) -> str:
    totals = run.counts.sum(0)
    return (f"{totals.sum()} in {len(totals)} classes, the largest {totals.max()}, the smallest {totals.min()} "
            f"(seed {run.config['seed']})")  # fmt: skip


def _clients(run: RunRecord) -> str:
    known = describe(run.counts)
    sizes, held = known["sizes"], known["classes_per_client"]
    return (f"{known['clients']}, with {sizes['min']} to {sizes['max']} examples (median {sizes['median']:g}) of "
            f"{held['min']} to {held['max']} classes (seed {run.config['seed']})")  # fmt: skip


def _machine(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns versions and machine, as the runs wrote them down."""

    def versions(run: RunRecord) -> str:
        packages = {**run.environment["packages"], "Python": run.environment["python"]}
        return ", ".join(f"{name} {version}" for name, version in packages.items())

    def machine(run: RunRecord) -> str:
        known = run.environment
        return f"{known['processor']}, {known['cores']} cores, {known['platform']}"

    def work(run: RunRecord) -> str:
        return f"{run.config['engine']['name']}, {run.config['dtype']} on {run.config['device']}"

    return [
        ("Versions", _each(runs, versions)),
        ("Commit", _each(runs, lambda run: run.environment["commit"] or "not known")),
        ("Machine", _each(runs, machine)),
        ("Engine", _each(runs, work)),
    ]


def _command(run: RunRecord) -> str:
    return shlex.join(run.environment["command"])


def _definitions(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    rules = "; ".join(distinct(run.last["test"]["groups"] for run in runs))
    groups = f"Which classes are in which group: {rules}."
    said = [name for name in DEFINITIONS if name not in ("tuned", "newcomers") or any(name in run.last for run in runs)]
    return [(name, escape(DEFINITIONS[name].format(groups=groups))) for name in said]
