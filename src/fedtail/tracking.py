"""Trackers: the record of each round, as metrics.jsonl gets it, also goes to TensorBoard or MLflow (extra "tracking").

A tracker wraps the iterator of rounds and changes nothing in it:

    for result in tracking.track(fedtail.run(experiment, folder), experiment, folder, ["tensorboard"]):
        ...

Scalars keep the names of the record ("test.accuracy"); a list is written entry by entry ("train.positive_gradient.3").
After a resume the rounds since the last checkpoint are written again, with the same numbers at the same steps.
"""

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from fedtail import config
from fedtail.config import Experiment
from fedtail.errors import ConfigError, did_you_mean
from fedtail.experiment import RoundResult
from fedtail.files import write_atomic
from fedtail.methods import flatten

Status = Literal["FINISHED", "FAILED", "KILLED"]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns every number of a record by dotted name; texts and missing values are left out.

    Example:
        >>> scalars({"round": 3, "test": {"accuracy": 0.5, "test_set": "global", "per_class_recall": [1.0, None]}})
        {'round': 3.0, 'test.accuracy': 0.5, 'test.per_class_recall.0': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in flatten(record).items():
        entries = {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        found.update((k, float(v)) for k, v in entries.items() if isinstance(v, int | float))
    return found


class Tracker(ABC):
    """Where records go besides the run folder."""

    module: ClassVar[str]  # what it needs

    @abstractmethod
    def __init__(self, experiment: Experiment, folder: Path):
        """Opens it for a run."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a round."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Writes what is still waiting and how the run ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes it: FAILED by an exception, KILLED where the run was interrupted or its iterator closed early."""
        self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f'tracking with {package} needs the package {package} ({error}). Install it: pip install "fedtail[tracking]"'
        ) from error


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; look at them with `tensorboard --logdir RUNS`."""

    module = "tensorboard.summary"

    def __init__(self, experiment: Experiment, folder: Path):
        self._writer: Any = _extra(self.module).Writer(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(".", "/"), value, step=step)

    def close(self, status: Status) -> None:
        """Flushes the event file."""
        self._writer.close()


class MLflow(Tracker):
    """A run of the MLflow experiment "fedtail" on $MLFLOW_TRACKING_URI, named like the run folder; a resume continues it."""

    module = "mlflow"

    def __init__(self, experiment: Experiment, folder: Path):
        mlflow = _extra(self.module)
        self._client: Any = mlflow.MlflowClient()
        known = self._client.get_experiment_by_name("fedtail")
        where = known.experiment_id if known else self._client.create_experiment("fedtail")
        note = folder / "mlflow_run.txt"
        if note.is_file():
            self._run = note.read_text().strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(where, run_name=folder.name).info.run_id
        write_atomic(note, self._run.encode())
        for key, value in flatten(config.to_dict(experiment)).items():
            self._client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each curve."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, status: Status) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._run, status)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""By the name that `fedtail run --track` takes."""


def check(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker is unknown or its package is not installed; to be called before anything is made."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"unknown tracker {name!r}{did_you_mean(name, TRACKERS)} Known are {', '.join(TRACKERS)}."
            )
        _extra(TRACKERS[name].module)


def track(
    rounds: Iterator[RoundResult], experiment: Experiment, folder: Path, names: Sequence[str]
) -> Iterator[RoundResult]:
    """Yields the rounds unchanged and hands the record of each to the trackers.

    Args:
        rounds: from `fedtail.run` or `fedtail.resume`.
        experiment: what runs, for its parameters.
        folder: the run folder.
        names: which trackers, see TRACKERS.

    Raises:
        ConfigError: see `check`.
    """
    check(names)
    with contextlib.ExitStack() as stack:  # where one cannot be opened, those that are open are closed
        trackers = [stack.enter_context(TRACKERS[name](experiment, folder)) for name in dict.fromkeys(names)]
        return _tracked(rounds, trackers, stack.pop_all())


def _tracked(
    rounds: Iterator[RoundResult], trackers: Sequence[Tracker], stack: contextlib.ExitStack
) -> Iterator[RoundResult]:
    with stack:
        for result in rounds:
            for tracker in trackers:
                tracker.log(result.index, scalars(result.record))
            yield result
