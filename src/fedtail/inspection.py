"""What an experiment is, before anything is trained: who holds what, what a round costs, which engine will run it."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtail import trees
from fedtail.algorithm import Phase
from fedtail.config import Experiment, name_of
from fedtail.data.lazy import memory
from fedtail.data.members import Members
from fedtail.data.statistics import describe, holders
from fedtail.engines.choice import padded_share
from fedtail.evaluate import shot_groups
from fedtail.experiment import Federation


def inspect(experiment: Experiment) -> dict[str, Any]:
    """Returns the facts as plain values, fit for JSON.

    Raises:
        FedtailError: the experiment cannot be run; the message is the one that `fedtail run` would give.
    """
    federation = Federation(experiment)
    federation.close()
    data, work = federation.data, experiment.local
    counts, held = data.counts(), len(Members.of(data.held).members)
    steps = work.count(np.delete(Members.of(data.owners).sizes, federation.newcomers))
    groups = shot_groups(experiment.evaluation.groups, data)
    model = trees.num_bytes(federation.task.initial)
    message = trees.num_bytes(federation.algorithm.broadcast(federation.context(), federation.server))
    side_by_side = federation.experiment.engine.name in ("parallel", "processes")
    workers = experiment.engine.cores() if side_by_side else 1
    engine: dict[str, Any] = {"name": federation.experiment.engine.name, "reason": federation.reason}
    if engine["name"] == "vmap":
        engine["chunk"] = federation.experiment.engine.chunk
        cohort = [work.lengths(len(data.owners[k])) for k in federation.draw(Phase())]
        batches = federation.task.batch_statistics  # such batches are never padded
        engine["padded"] = 0.0 if batches else padded_share(cohort, engine["chunk"])
    stacked = min(engine["chunk"], federation.cohort_size) if engine["name"] == "vmap" else workers
    columns = memory([*data.columns.values(), *data.test.values()])
    return {
        "algorithm": name_of(experiment.algorithm),
        "sources": list(data.sources),
        "clients": data.clients,
        "cohort": federation.cohort_size,
        "clients_without_a_step": data.clients - len(federation.holders) - len(federation.newcomers),
        "newcomers": federation.newcomers.tolist(),
        "class_totals": counts.sum(0).tolist(),
        "counts": counts.tolist(),
        "test_counts": data.test_counts().tolist(),
        "unused_examples": len(data.columns["y"]) - len(data.validation) - len(data.server) - int(counts.sum()) - held,
        "statistics": describe(counts),
        "tail_holders": holders(counts, groups.tail),
        "shot_groups": {"rule": experiment.evaluation.groups.describe(),
                        **{k: list(v) for k, v in groups._asdict().items()}},
        "local_steps": {"min": int(steps.min()), "max": int(steps.max()), "all": int(steps.sum())},
        "parameters": sum(p.numel() for p in federation.task.initial.params.values()),
        "engine": engine,
        "bytes": {"model": model, "broadcast_to_a_client": message, "data": columns,
                  "training_state_without_activations": model * (3 * stacked + 2 * federation.cohort_size)},
    }  # fmt: skip


def to_text(facts: dict[str, Any]) -> str:
    """Returns the facts for a reader: a table of class x client (clients in columns of up to 40) and the rest in lines."""
    console = Console(width=120, markup=False, emoji=False, highlight=False)  # paths may hold brackets and colons
    statistics, engine, size = facts["statistics"], facts["engine"], facts["bytes"]
    with console.capture() as capture:
        for line in facts["sources"]:
            console.print(line)
        console.print(_counts_table(facts))
        steps = facts["local_steps"]
        idle = f"{facts['clients_without_a_step']} without a step"
        idle += f", {len(facts['newcomers'])} newcomers" if facts["newcomers"] else ""
        console.print(
            f"{statistics['examples']:,} training examples on clients, {facts['unused_examples']:,} left over\n"
            f"{facts['clients']} clients, {facts['cohort']} a round, {idle}; "
            f"{steps['all']:,} local steps if all take part ({steps['min']} to {steps['max']} a client)\n"
            f"shot groups by {facts['shot_groups']['rule']}: head {facts['shot_groups']['head']}, "
            f"medium {facts['shot_groups']['medium']}, tail {facts['shot_groups']['tail']}\n"
            f"model: {facts['parameters']:,} parameters, {size['model'] / 1e6:.2f} MB; broadcast "
            f"{size['broadcast_to_a_client'] / 1e6:.2f} MB a client; memory for data {size['data'] / 1e6:.0f} MB, for training "
            f"state {size['training_state_without_activations'] / 1e6:.0f} MB (without activations)\n"
            f"engine: {engine['name']} ({engine['reason']})" + _stacking(engine)
        )
        table = Table(title="statistics", title_justify="left", show_header=False)
        for key, value in statistics.items():
            if not isinstance(value, list):
                table.add_row(key, _short(value))
        console.print(table)
        if facts["tail_holders"]:
            console.print(_tail_table(facts["tail_holders"]))
    return capture.get().rstrip()


def _stacking(engine: dict[str, Any]) -> str:
    """Returns what the vmap engine does with a cohort; nothing for the others."""
    if "chunk" not in engine:
        return ""
    return f"; {engine['chunk']} clients at once, {engine['padded']:.0%} of the first round's rows are padding"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _counts_table(facts: dict[str, Any], most: int = 20) -> Table:
    """One row a class, one column a client (the first `most`; --json and --picture have all)."""
    clients = min(facts["clients"], most)
    cut = f" (the first {clients} of {facts['clients']} clients)" if clients < facts["clients"] else ""
    table = Table(title=f"training examples by class and client{cut}", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("class")
    table.add_column("all", justify="right")
    table.add_column("held by", justify="right")
    for k in range(clients):
        table.add_column(str(k), justify="right")
    for c, total in enumerate(facts["class_totals"][:100]):
        row = [counts[c] for counts in facts["counts"]]
        shown = [str(n) if n else "." for n in row[:clients]]
        table.add_row(str(c), str(total), str(sum(n > 0 for n in row)), *shown)
    return table


def _tail_table(tail: list[dict[str, Any]], most: int = 30, clients: int = 12) -> Table:
    """One row a tail class, the first `most` and of each the `clients` largest holders (--json has all)."""
    cut = f" (the first {most} of {len(tail)}; --json has all)" if len(tail) > most else ""
    table = Table(title=f"who holds the tail classes{cut}", title_justify="left")
    for title in ("class", "examples", "held by", "largest share"):
        table.add_column(title, justify="right")
    table.add_column("clients, most examples first")
    for row in tail[:most]:
        share = "" if row["largest_share"] is None else f"{row['largest_share']:.0%}"
        named = ", ".join(map(str, row["clients"][:clients])) + (", ..." if len(row["clients"]) > clients else "")
        table.add_row(str(row["class"]), str(row["examples"]), str(row["holders"]), share, named)
    return table
