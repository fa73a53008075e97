"""The generator of rounds: one order of events for every algorithm and engine, and nothing of a run outside it.

A round: for each phase, draw the cohort, broadcast, run it, reduce, update the server; then server data, `advance`,
evaluation, checkpoint. Seeds are stateless, so a resumed run makes the same bits as an uninterrupted one.
"""

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtail import config, generation, runs, teaching, trees
from fedtail.algorithm import Algorithm, Context, Phase, Round
from fedtail.checkpoint import Snapshot, load_checkpoint, read_meta, save_checkpoint
from fedtail.config import Experiment
from fedtail.data.federated import FederatedData
from fedtail.data.plan import make_plan
from fedtail.drift import Drift
from fedtail.engines import EngineOptions, distributed, local_models, make_engine
from fedtail.engines.base import Engine, Setting, Sink, blame, one_thread
from fedtail.engines.choice import resolve
from fedtail.engines.loop import iterate
from fedtail.errors import CheckpointError, ConfigError, TrainingError
from fedtail.evaluate import Judge, Split, shot_groups
from fedtail.federation import Predictor, check_data, check_device, fitted, make_task, suited, takers, whole_batches
from fedtail.seeds import Stream, generator
from fedtail.states import ClientStates
from fedtail.task import Task, Variables
from fedtail.trees import Tree

log = logging.getLogger("fedtail")


class RoundResult(NamedTuple):
    """What a round yields."""

    index: int  # 0-based  # pyright: ignore[reportIncompatibleMethodOverride]
    rounds: int
    record: dict[str, Any]  # what metrics.jsonl gets
    server: Tree
    seconds: float


class Federation:
    """An experiment under way: the fixed setting and the state between two rounds."""

    def __init__(self, experiment: Experiment, data: FederatedData | None = None, initial: Variables | None = None,
                 engine: Callable[[EngineOptions, Setting], Engine] = make_engine):  # fmt: skip
        self._make = engine
        check_device(experiment.device)
        distributed.join(experiment.device)
        if experiment.algorithm.needs_start(experiment.rounds) and not experiment.start:
            rounds = f"{experiment.rounds} round{'s' if experiment.rounds > 1 else ''}"
            raise ConfigError(f"algorithm {config.name_of(experiment.algorithm)} trains no backbone in {rounds}: "
                              "name a finished run in start.")  # fmt: skip
        self.data = suited(data if data is not None else teaching.furnish(experiment), experiment.algorithm)
        self.task = make_task(experiment, self.data)
        if experiment.start:
            self.task = dataclasses.replace(self.task, initial=initial or _initial(experiment, self.task))
        self.holders, self.newcomers = takers(experiment, self.data)
        size = min(experiment.participation.size(self.data.clients - len(self.newcomers)), len(self.holders))
        self.cohort_size = size
        options, self.reason = resolve(experiment.engine, self.task, size, experiment.local.batch_size)
        experiment.evaluation.finetune.check(self.task)
        self.experiment = dataclasses.replace(experiment, engine=options)
        self.fingerprint = config.fingerprint(self.experiment)
        self.algorithm = experiment.algorithm
        check_data(experiment, self.data)
        self.counts: torch.Tensor | None = None
        if self.algorithm.shares_counts:
            totals = self.data.class_totals(without=self.newcomers.tolist())
            self.counts = torch.from_numpy(totals).to(self.task.device, self.task.dtype)
        shot_groups(experiment.evaluation.groups, self.data)  # a rule that does not fit is refused before training
        self.round, self.stage, self.best = 0, 0, -1.0
        self.traffic = {"down": 0, "up": 0}  # bytes of the round
        self.transferred = {"cumulative_down": 0, "cumulative_up": 0}
        self.states = ClientStates(experiment.engine.states_bytes())
        with one_thread(), blame("constants"):
            self.constants = self.algorithm.constants(self.task, generator(experiment.seed, Stream.CONSTANTS))
        self.engine = self._engine()
        self.worker = self.engine.setting.task.worker()
        with one_thread(), blame("init_server"):
            ctx = self.context(cohort=size)
            self.server = self.algorithm.init_server(ctx, generator(experiment.seed, Stream.ALGORITHM))
        log.info("engine %s: %s", options.name, self.reason)

    def _engine(self) -> Engine:
        task, experiment = self.algorithm.stage_task(self.task, self.stage), self.experiment
        data, judging = self.algorithm.stage_data(self.data, self.stage), experiment.evaluation
        return self._running(
            Setting(self.algorithm, task, data, experiment.local, experiment.seed, self.constants,
                    judging.local_models, judging.batch_size, judging.double_softmax)
        )  # fmt: skip

    def _running(self, setting: Setting) -> Engine:
        engine = self._make(self.experiment.engine, setting)
        return distributed.DistributedEngine(engine) if distributed.ranks() > 1 else engine

    def close(self) -> None:
        """Gives the engine's threads back."""
        self.engine.close()

    def context(self, phase: Phase = Phase(), cohort: int = 0) -> Context:
        """Returns the server's context."""
        experiment = self.experiment
        scale = experiment.schedule.scale(self.round, experiment.rounds)
        shapes = {name: tuple(column.shape[1:]) for name, column in self.data.columns.items()}
        here = Round(self.round, phase, cohort, self.data.clients, experiment.rounds, scale, self.stage, len(self.holders),
                     self.counts, columns=shapes, draws=self.engine.setting.shared(self.round))  # fmt: skip
        return Context(self.worker, here, self.constants, None)

    def restore(self, snapshot: Snapshot) -> None:
        """Continues from a checkpoint."""
        self.server, self.states = snapshot.server, ClientStates.of(snapshot.clients)
        self.round, self.best = snapshot.meta["round"], snapshot.meta["best"]
        self.transferred = snapshot.meta.get("transferred", self.transferred)  # an older run did not count
        self._set_stage(snapshot.meta["stage"])

    def _set_stage(self, stage: int) -> None:
        if stage != self.stage:
            self.stage = stage
            self.engine.close()
            self.engine = self._engine()
            self.worker = self.engine.setting.task.worker()

    def snapshot(self, metrics_bytes: int) -> Snapshot:
        """Returns what a checkpoint keeps."""
        meta = {"round": self.round, "stage": self.stage, "best": self.best, "metrics_bytes": metrics_bytes,
                "transferred": self.transferred, "experiment": self.fingerprint, "shape": list(self.task.input_shape),
                "classes": self.task.num_classes}  # fmt: skip
        return Snapshot(self.server, self.states, meta)

    def draw(self, phase: Phase) -> list[int]:
        """Returns a phase's cohort in ascending order: a function of (seed, round)."""
        if phase.cohort == "all":
            return self.holders.tolist()
        rng = generator(self.experiment.seed, Stream.COHORT, self.round)
        return sorted(self.holders[rng.choice(len(self.holders), self.cohort_size, replace=False)].tolist())

    def step(self) -> dict[str, Any]:
        """Runs one round; returns its record without scores."""
        self.engine.open()
        record: dict[str, Any] = {"round": self.round}
        trained, self.traffic = 0, {"down": 0, "up": 0}
        for phase in self.algorithm.phases(self.round, self.experiment.rounds):
            sink = self._phase(phase, trained)
            trained += phase.local
            record[phase.name] = {"clients": len(sink.answers), "examples": sink.examples,
                                  **trees.plain(sink.metrics()), **sink.facts()}  # fmt: skip
            if sink.judged != ():
                record["local_models"] = local_models.scores(sink.judged, self.data.test["y"].numpy(force=True))
        self.transferred = {f"cumulative_{k}": self.transferred[f"cumulative_{k}"] + v for k, v in self.traffic.items()}
        record["bytes"] = {**self.traffic, **self.transferred}
        if len(self.data.server):
            record["server"] = self._server_data()
        ctx = self.context()
        record["lr_scale"] = ctx.round.lr_scale
        with blame("diagnostics"):
            record["diagnostics"] = trees.plain(self.algorithm.diagnostics(ctx, self.server))
        return record

    def message(self, ctx: Context) -> Tree:
        """Returns what the server sends now."""
        with torch.no_grad(), blame("broadcast"):
            return self.algorithm.broadcast(ctx, self.server)

    def _phase(self, phase: Phase, trained: int) -> Sink:
        ids = self.draw(phase)
        ctx = self.context(phase, len(ids))
        message = self.message(ctx)
        plans = self.engine.setting.plans(ctx.round, trained, ids)
        drift = Drift() if self.experiment.evaluation.drift and phase.local else None
        sink = Sink(list(plans), phase.reduce == "collect", drift, self.experiment.engine.states_bytes())
        if not plans:  # nobody in the cohort has anything to validate on
            return sink
        self.engine.cohort(ctx.round, trained, message, self.states, plans, sink)
        total = torch.tensor(sink.total, dtype=self.task.dtype, device=self.task.device)
        with torch.no_grad(), blame("server_collect" if phase.reduce == "collect" else "server_update"):
            if phase.reduce == "collect":
                weights = torch.tensor(sink.weights, dtype=self.task.dtype, device=self.task.device)
                self.server = self.algorithm.server_collect(ctx, self.server, sink.updates, weights)
            else:
                self.server = self.algorithm.server_update(ctx, self.server, sink.mean(), total)
            sent = trees.num_bytes(self.algorithm.sent(ctx, message))
            self.traffic["down"] += len(ids) * sent  # also to who has no batch
            self.traffic["up"] += sink.sent_bytes()
        if not trees.all_finite(self.server):
            raise TrainingError(f"The server state is not finite after round {self.round}, although every update was. Lower "
                                "algorithm.server_lr or the clients' learning rate.")  # fmt: skip
        self.states.update(sink.states)
        return sink

    def _server_data(self) -> dict[str, Any]:
        """Loops `server_step` over the server's data, for as much work as the algorithm says or a client does."""
        experiment, algorithm, setting = self.experiment, self.algorithm, self.engine.setting
        if type(algorithm).server_step is Algorithm.server_step:  # it has none: the data need not be gathered
            return {}
        work, draws, rows = experiment.local, setting.draws, self.data.server
        if (own := algorithm.server_work) is not None:
            rows = self.data.server_rows(own.images)
            work = whole_batches(own, len(rows))
            draws = setting.task.draws(work.batch_size)
        plan = make_plan(experiment.seed, self.round, 0, self.data.clients, rows, work, draws)
        steps = len(plan.lengths) if own is None or own.steps else 0
        ctx, sums = self.context(Phase("server")), dict[str, torch.Tensor]()
        for step, batch in zip(range(steps), iterate(setting, plan, algorithm.server_columns), strict=False):
            with blame("server_step"):
                here = ctx._replace(round=ctx.round._replace(step=step, steps=steps))
                self.server, metrics = algorithm.server_step(here, self.server, batch)
            sums = {k: sums[k] + v if k in sums else v for k, v in metrics.items()}
        if not trees.all_finite(self.server):
            raise TrainingError(f"The server state is not finite after the server's own steps in round {self.round}. Lower "
                                "the learning rate of algorithm.server_optimizer.")  # fmt: skip
        return trees.plain({k: v / steps for k, v in sums.items()})

    def score(self, split: Split = "all") -> dict[str, Any]:
        """Judges the present model on a split; "all" is what a round is judged on: test and validation. Images are not.

        From the last round on, "all" and "test" also judge what comes of it by `evaluation.finetune`.
        """
        if self.algorithm.generative:
            return {}
        self.engine.open()
        ctx, options = self.context(cohort=self.cohort_size), self.experiment.evaluation
        with torch.no_grad(), blame("also_judged"):
            beside = self.algorithm.also_judged(ctx, self.server)
        found = Judge(self.engine, ctx.round, self.constants, self.message(ctx), self.states, options, self.newcomers,
                      beside).scores(split)  # fmt: skip
        if options.finetune.epochs and self.round + 1 >= self.experiment.rounds and split in ("all", "test"):
            found.update(self._tuned())
        return found

    def _tuned(self) -> dict[str, Any]:
        """Judges the generic model after each client has tuned it."""
        options = self.experiment.evaluation
        with contextlib.closing(self._running(options.finetune.setting(self.engine.setting))) as engine:
            engine.open()
            return Judge(engine, self.context().round, (), self.variables(), {}, options, self.newcomers).tuned()

    def advance(self, record: dict[str, Any]) -> None:
        """Lets the algorithm move between rounds, then counts the round."""
        self.engine.open()
        with torch.no_grad(), blame("advance"):
            stage, self.server = self.algorithm.advance(self.context(), self.server, record)
        self.round += 1
        self._set_stage(stage)

    def variables(self, client: int | None = None) -> Variables:
        """Returns the plain network's variables: of the generic model, or of a client's."""
        ctx = self.context()
        with torch.no_grad(), one_thread():
            message = self.message(ctx)
            state = None if client is None else self.engine.setting.state(ctx, message, self.states, client)
            return self.algorithm.variables(ctx, message, state)

    def module(self, client: int | None = None) -> Predictor:
        """Returns the trained network with its input scaling, in evaluation mode."""
        variables = self.variables(client)
        module = copy.deepcopy(self.engine.setting.task.module)
        known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        module.load_state_dict({k: v for k, v in {**variables.params, **variables.buffers}.items() if k in known})
        return Predictor(module, self.data.mean, self.data.std).eval()


def _initial(experiment: Experiment, task: Task) -> Variables:
    """Returns the generic model of the finished run that an experiment starts from."""
    path = Path(experiment.start.replace("{seed}", str(experiment.seed)))
    with contextlib.closing(reopen(path)) as before:
        done, rounds = before.round, before.experiment.rounds
        found = before.variables()
    if done < rounds:
        raise ConfigError(f"start: {path} has {done} of {rounds} rounds. Finish it with `fedtail resume {path}`.")
    return fitted(task, found, path, experiment)


def run(experiment: Experiment, folder: str | Path | None = None) -> Iterator[RoundResult]:
    """Runs an experiment.

    Everything that can be wrong with the experiment is checked before this returns; training happens as the rounds are
    taken from the iterator.

    Args:
        experiment: what to run.
        folder: where to keep the run (it must not exist); None keeps nothing.

    Returns:
        An iterator over RoundResult.

    Raises:
        FedtailError: see fedtail.errors.

    Example:
        >>> from fedtail.config import Experiment
        >>> for result in run(Experiment(rounds=1)):
        ...     print(result.index, sorted(result.record["test"])[:2])
        0 ['accuracy', 'balanced_accuracy']
    """
    return start(Federation(experiment), folder)


def start(federation: Federation, folder: str | Path | None) -> Iterator[RoundResult]:
    """Makes the run folder of a new federation and returns its rounds."""
    path = None if folder is None or distributed.rank() else Path(folder)
    if path is not None:
        try:
            initial = federation.task.initial if federation.experiment.start else None
            partition = runs.partition_arrays(federation.data, federation.newcomers)
            runs.create(path, federation.experiment, partition, federation.snapshot(0), initial)
        except BaseException:
            federation.close()
            raise
    return rounds_of(federation, path)


def resume(folder: str | Path) -> Iterator[RoundResult]:
    """Continues a run to its last round, bit for bit as if it had never stopped.

    Raises:
        CheckpointError: no run, a damaged checkpoint, or one of another experiment.
    """
    return rounds_of(reopen(folder), Path(folder))


def reopen(folder: str | Path, checkpoint: str = "checkpoint", **given: Any) -> Federation:
    """Returns a run's federation (with what else it is given) in the state of a checkpoint ("checkpoint" or "best")."""
    path = Path(folder)
    if not (path / "config.toml").is_file():
        raise CheckpointError(f"{path} is not a run folder: it has no config.toml. `fedtail run` makes one.")
    experiment = config.load(path)
    check_device(experiment.device)
    belongs = config.fingerprint(config.read_toml(path / "config.toml")), experiment.device
    snapshot = load_checkpoint(path / f"{checkpoint}.safetensors", *belongs, experiment.engine.states_bytes())
    kept = path / "initial.safetensors"  # an older run with `start` has none and needs the run that it starts from
    initial: Any = load_checkpoint(kept, *belongs).server if kept.is_file() else None
    federation = Federation(experiment, initial=initial, **given)
    federation.restore(snapshot)
    federation.fingerprint = belongs[0]
    return federation


def load(folder: str | Path, client: int | None = None, checkpoint: str = "checkpoint") -> Predictor:
    """Returns a run's model, ready to predict: raw images (uint8, or float in 0..1) or features in, logits out.

    Args:
        folder: the run.
        client: None for the generic model, or a client's index.
        checkpoint: "checkpoint" (the last round) or "best" (by validation score).
    """
    federation = reopen(folder, checkpoint)
    federation.close()
    return federation.module(client)


def rounds_of(federation: Federation, path: Path | None) -> Iterator[RoundResult]:
    """Yields the federation's remaining rounds, keeping each in the run folder."""
    experiment = federation.experiment
    path = None if distributed.rank() else path  # one process writes
    with contextlib.closing(federation), runs.locked(path) if path else contextlib.nullcontext():
        size = 0
        if path is not None:
            runs.check_clients(path, federation.data)
            file, limit = path / "checkpoint.safetensors", experiment.engine.states_bytes()
            latest = read_meta(file)
            if latest["round"] != federation.round:  # another process went on before we had the lock
                federation.restore(load_checkpoint(file, device=experiment.device, limit=limit))
            size = latest["metrics_bytes"]
            runs.truncate_metrics(path, size)
        while federation.round < experiment.rounds:
            start = time.perf_counter()
            record = federation.step()
            last = federation.round + 1 == experiment.rounds
            if last or (federation.round + 1) % experiment.evaluation.every == 0:
                record.update(federation.score())
                if path is not None and federation.algorithm.generative:
                    setting, here = federation.engine.setting, federation.context().round
                    generation.round_picture(path, setting, federation.server, here)
            federation.advance(record)
            seconds = time.perf_counter() - start
            if path is not None:
                size = runs.log_metrics(path, record, {"round": record["round"], "seconds": round(seconds, 4)})
                _keep(federation, path, record, size, last)
            yield RoundResult(record["round"], experiment.rounds, record, federation.server, seconds)


def _keep(federation: Federation, path: Path, record: dict[str, Any], size: int, last: bool) -> None:
    """Writes the round's checkpoints; the best one first, so that the latest never names a best that is not there."""
    experiment = federation.experiment
    if experiment.evaluation.keep == "best" and "validation" in record:
        score = record["validation"]["balanced_accuracy"]
        if score > federation.best:
            federation.best = score
            save_checkpoint(path / "best.safetensors", federation.snapshot(size))
    if last or federation.round % experiment.checkpoint_every == 0:
        save_checkpoint(path / "checkpoint.safetensors", federation.snapshot(size))
