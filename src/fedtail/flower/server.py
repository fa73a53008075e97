"""The server's side: the simulator's generator of rounds, whose cohorts are nodes, in the main function of a ServerApp.

The run folder is that of any run: a checkpoint after each round, metrics.jsonl, and what `fedtail evaluate`, `compare` and
`report` read. Where it exists already, the run continues from its last round.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtail import config, teaching
from fedtail.algorithm import Algorithm
from fedtail.config import Experiment
from fedtail.data.federated import FederatedData
from fedtail.engines import EngineOptions
from fedtail.engines.base import Engine, Setting
from fedtail.errors import CheckpointError, ConfigError
from fedtail.experiment import Federation, RoundResult, reopen, rounds_of, start
from fedtail.flower import privacy, sites, wire
from fedtail.flower.engine import FlowerEngine
from fedtail.flower.roster import Options, Roster
from fedtail.metrics import Explicit

log = logging.getLogger("fedtail")


def refuse(experiment: Experiment, options: Options) -> None:
    """Raises ConfigError for an experiment that these options cannot deploy."""
    evaluation, algorithm = experiment.evaluation, experiment.algorithm
    name = config.name_of(algorithm)
    if evaluation.finetune.epochs and (options.sites or options.states == "node"):
        raise ConfigError("evaluation.finetune is judged at the server, on models that the clients tuned: set epochs = 0, or "
                          "rehearse with --states server.")  # fmt: skip
    if options.clip:
        privacy.accountant()
        if any(
            p.reduce == "collect"
            for index in range(experiment.rounds)
            for p in algorithm.phases(index, experiment.rounds)
        ):
            raise ConfigError(f"{name} collects single updates, which no noise on their sum covers: set clip = 0.")
        if type(algorithm).advance is not Algorithm.advance:
            raise ConfigError(
                f"{name} decides between rounds by metrics, which the noise does not cover: set clip = 0."
            )
        if options.share_counts or algorithm.shares_counts:
            raise ConfigError("shared class counts are not covered by clip and noise: use a method that needs none.")
    if not options.sites:
        return
    if algorithm.shares_counts and not options.share_counts:
        raise ConfigError(f"{name} needs the number of examples of each class over all sites. If the sites agree to tell the "
                          "server theirs: fedtail deploy --share-counts.")  # fmt: skip
    if experiment.data.server_from or {*algorithm.columns, *algorithm.server_columns} & {*teaching.TEACHER}:
        raise ConfigError("sites with data of their own: teachers and data.server_from are only for a rehearsal.")
    if evaluation.local_models:
        raise ConfigError("sites do not have the global test set: set evaluation.local_models = 0.")
    if not isinstance(evaluation.groups, Explicit) and not (
        evaluation.groups.counts_of == "train" and options.share_counts
    ):
        raise ConfigError('the server does not know how many examples the classes have: name the shot groups, evaluation.groups'
                          ' = { name = "explicit", ... }, or take those of the training data (thirds, oltr) with '
                          '--share-counts.')  # fmt: skip
    if experiment.participation.newcomers:
        raise ConfigError("sites with data of their own: participation.newcomers is only for a rehearsal. Set it to 0.")


def known_sites(path: Path, options: Options, roster: Roster) -> sites.Holdings:
    """Returns what the sites hold: by the folder of the run that continues, else by what its nodes say.

    Raises:
        ConfigError: a site is missing when the run begins.
    """
    if (path / "partition.npz").is_file():
        return sites.Holdings.read(path)
    roster.gather(lambda: len(roster.nodes) == options.sites, options.wait)
    missing = [k for k in range(options.sites) if k not in roster.nodes]
    if missing:
        refused = "".join(f" Node {node} was refused: {why}" for node, why in roster.refused.items())
        raise ConfigError(f"{len(missing)} of {options.sites} sites did not come within {options.wait:g} s, the first is "
                          f"client {missing[0]}: a run begins with all of them.{refused}")  # fmt: skip
    found = [roster.nodes[k] for k in range(options.sites)]
    counts = {facts.client: facts.counts for facts in found if facts.counts}
    return sites.Holdings([facts.examples for facts in found], [facts.held for facts in found], counts)


def open_run(experiment: Experiment, options: Options, roster: Roster) -> tuple[Federation, Iterator[RoundResult]]:
    """Returns the federation of a deployment and its rounds: new, or continued where its run folder exists.

    Raises:
        CheckpointError: the folder belongs to another experiment.
        ConfigError: see `refuse` and `known_sites`.
    """
    refuse(experiment, options)
    path = Path(options.run)
    data: FederatedData | None = None
    if options.sites:
        roster.population = options.sites
        data = sites.server_data(experiment, known_sites(path, options, roster))

    def engine(engine_options: EngineOptions, setting: Setting) -> Engine:
        return FlowerEngine(engine_options, setting, roster)

    if not path.exists():
        federation = Federation(experiment, data, engine=engine)
        rounds = start(federation, path)
    else:
        before = config.load(path)
        alike = dataclasses.replace(before, engine=experiment.engine)
        if config.fingerprint(_bare(alike)) != config.fingerprint(_bare(experiment)):
            raise CheckpointError(f"{path} holds another experiment than this app. Name another folder: flwr run . NAME -c "
                                  "'run=\"runs/another\"'")  # fmt: skip
        federation = reopen(path, data=data, engine=engine)
        rounds = rounds_of(federation, path)
    roster.population, roster.folder = federation.data.clients, path
    roster.initial = federation.task.initial if experiment.start else None
    return federation, rounds


def reopen_sites(path: Path, checkpoint: str, split: str) -> Federation:
    """Returns the federation of a run on sites, to judge it on what the server has: the sites' own tests are not here.

    Raises:
        ConfigError: the split is "train".
    """
    if split == "train":
        raise ConfigError(f"the training data of {path} are not here: its clients had data of their own.")
    experiment = config.load(path)
    found = reopen(path, checkpoint, data=sites.server_data(experiment, sites.Holdings.read(path)))
    judging = dataclasses.replace(found.experiment.evaluation, local=False)
    found.experiment = dataclasses.replace(found.experiment, evaluation=judging)
    return found


def _bare(experiment: Experiment) -> Experiment:
    """Returns the experiment without what may differ between two starts of one deployment: where its data lie."""
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, folder=""))


def serve(folder: Path, grid: Any, run_config: dict[str, Any]) -> None:
    """Runs an app's experiment to its last round."""
    options = Options.of(run_config)
    roster = Roster(grid, options)
    federation, rounds = open_run(wire.load_experiment(folder), options, roster)
    took_up = federation.round
    log.info("rounds %d to %d of %s in %s", took_up + 1, federation.experiment.rounds,
             config.name_of(federation.algorithm), Path(options.run).resolve())  # fmt: skip
    expected = set(federation.holders.tolist())
    roster.gather(
        lambda: expected <= roster.nodes.keys(), 0 if took_up == federation.experiment.rounds else options.wait
    )
    begun = time.monotonic()
    for result in rounds:
        scores = result.record.get("test", {})
        text = f", accuracy {scores['accuracy']:.4f}" if scores else ""
        train = result.record.get("train", {})
        lost = f", dropped: {', '.join(train['dropped'])}" if "dropped" in train else ""
        log.info("round %d/%d: %s clients in %.1f s%s%s", result.index + 1, result.rounds, train.get("clients", 0),
                 result.seconds, text, lost)  # fmt: skip
    log.info("done in %.1f s: %s", time.monotonic() - begun, Path(options.run).resolve())


def app(folder: Path) -> Any:
    """Returns the ServerApp of an app."""
    application = wire.flwr("serverapp").ServerApp()

    @application.main()
    def main(grid: Any, context: Any) -> None:
        handler = logging.StreamHandler()  # for fedtail alone: what Flower sends its logs with would log each sending
        handler.setFormatter(logging.Formatter("fedtail: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        serve(folder, grid, dict(context.run_config))

    del main
    return application
