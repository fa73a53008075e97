"""Flags of the verbs that take a whole experiment, beside the experiment's own."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train an experiment: a TOML file, a run folder (the same experiment again), or nothing (digits)."""

    file: tyro.conf.Suppress[str] = ""
    seeds: tuple[int, ...] = ()
    """Several seeds, one run each; overrides --seed."""
    output: Path | None = None
    """The run folder (with --seeds: the folder of the run folders); default: under runs/."""
    track: tuple[str, ...] = ()
    """Also hand each round's record to these: tensorboard, mlflow."""
    experiment: Annotated[Any, tyro.conf.arg(name="")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train every row of a sweep with every seed; what is done is skipped, what was stopped is continued."""

    seeds: tuple[int, ...] = ()
    """Instead of the file's seeds."""
    jobs: int | None = None
    """Runs at a time, instead of the file's number; 0: one per core."""
    output: Path | None = None
    """The folder of the run folders, instead of the file's."""
    match: str = "*"
    """Only rows whose names match this pattern (and those that they start from)."""
    dry_run: bool = False
    """List the runs and how far they are; train nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print who holds what and what a round costs; nothing is trained."""

    file: tyro.conf.Suppress[str] = ""
    json: bool = False
    """Print JSON."""
    picture: Path | None = None
    """Also draw the partition into this .png or .svg file."""
    experiment: Annotated[Any, tyro.conf.arg(name="")] = None
