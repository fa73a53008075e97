"""Whether seeds, engines and checkpoints agree on what a method does."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch

from fedtail.algorithm import Algorithm
from fedtail.checkpoint import load_checkpoint, save_checkpoint
from fedtail.checks.problems import (
    LOOP,
    PARALLEL,
    VMAP,
    Outcome,
    Subject,
    difference,
    follow,
    form,
    not_finite,
    other_form,
    runs_differ,
)
from fedtail.checks.rule import GUARD, IMPURE, Broken, rule
from fedtail.engines import EngineOptions
from fedtail.trees import Tree

ROUNDING = 1e-10  # between engines that add in another order, in float64


def _rerun(subject: Subject, seed: int, algorithm: Algorithm | None = None) -> Outcome:
    with contextlib.closing(subject.federation("ragged", seed=seed, algorithm=algorithm)) as running:
        return follow(running)


@rule(
    "three rounds",
    "Clients hold unequal amounts of data: here 9, 1, 12, none, 4 and 7 examples.",
    "Mend the line that is named; a client without data is never asked, one with a single example is.",
    gate=True,
)
def three_rounds(subject: Subject) -> None:
    for index, metrics in enumerate(subject.outcome("ragged").metrics):
        if bad := not_finite(metrics):
            raise Broken(f"{bad} of round {index} is not finite.", GUARD)


@rule(
    "same seed, same result",
    "A result that its author cannot repeat is none.",
    "Look for random numbers of your own and for what a run leaves behind. " + IMPURE,
    cause="kept",
)
def same_seed(subject: Subject) -> None:
    for algorithm in (subject.algorithm, subject.fresh()):
        if found := runs_differ(subject.outcome("ragged"), _rerun(subject, 0, algorithm)):
            raise Broken(f"the same experiment, run twice: {found}.")


@rule(
    "another seed, another result",
    "The spread over seeds is what a comparison rests on; a fixed seed inside a method hides it.",
    "Use the `rng` and the draws that you are given; start from ctx.task.initial; never seed a generator yourself.",
    cause="random",
)
def other_seed(subject: Subject) -> None:
    other = _rerun(subject, seed=1)
    if not difference(subject.outcome("ragged").servers[-1], other.servers[-1]):
        raise Broken("seeds 0 and 1 end in the same server state, bit for bit.")


def agree(subject: Subject, problem: str, engine: EngineOptions, tolerance: float = 0.0) -> None:
    if found := runs_differ(subject.outcome(problem), subject.outcome(problem, engine), tolerance):
        raise Broken(f"{found} (loop engine against {engine.name}).")


@rule(
    "loop = parallel",
    "Clients that train side by side must not meet.",
    "Something is shared between clients: a tensor modified in place, an attribute, a global. " + IMPURE,
    cause="kept",
)
def parallel(subject: Subject) -> None:
    agree(subject, "ragged", PARALLEL)


@rule(
    "donated = undonated",
    "The engine overwrites local parameters in place where it may; nobody may still be reading the old ones.",
    "Keep no alias of local.variables beyond the step: clone what extra must keep (`v.clone()`), and modify nothing in place.",
    cause="in place",
)
def donated(subject: Subject) -> None:
    agree(subject, "ragged", dataclasses.replace(LOOP, donate=False))


@rule(
    "loop = vmap",
    "On a GPU a cohort is one stacked computation, in which no tensor has a value to look at and short batches are padded.",
    "Average with batch.mean(per example) and count with batch.size, never len(batch.y) or .mean(): a padded example must "
    "not count. Keep tensors: no .item(), torch.where for a branch. With Adam, rounding grows: check with "
    "--optimizer.eps 1e-4.",
    cause="read",
)
def vmap(subject: Subject) -> None:
    agree(subject, "ragged", VMAP, ROUNDING)


@rule(
    "chunk size",
    "How many clients are stacked is a matter of memory and must not show.",
    "Nothing may be summed or normalised over clients in local_*: one client's tensors only.",
    after="loop = vmap",
)
def chunk(subject: Subject) -> None:
    for chunk in (1, 2):
        agree(subject, "ragged", dataclasses.replace(VMAP, chunk=chunk), ROUNDING)


@rule(
    "stable states",
    "States are stacked, summed and restored by name; a state whose form changes has no meaning between two rounds.",
    "Make every entry in init_server or init_client, with the shape that it will have (zeros), in ctx.task.dtype. What "
    "changes with a stage belongs into `advance` and `stage_task`.",
)
def stable(subject: Subject) -> None:
    outcome = subject.outcome("ragged")
    seen: dict[str, Tree] = {}
    for index, (server, states, stage) in enumerate(zip(outcome.servers, outcome.states, outcome.stages, strict=True)):
        for what, key, tree in [
            ("the server state", f"server {stage}", server),
            *((f"the state of {n}", n, s) for n, s in states.items()),
        ]:
            first = seen.setdefault(key, tree)
            if other := other_form(first, tree):
                raise Broken(f"{what} has another form after round {index}: {other}.")
            for name, (_, dtype) in form(tree).items():
                if dtype.is_floating_point and dtype != torch.float64:
                    raise Broken(f"{what}: {name} is {str(dtype).removeprefix('torch.')} in a run in float64.",
                                 "Make tensors with dtype=ctx.task.dtype (or zeros_like, new_tensor).")  # fmt: skip


@rule(
    "resume = uninterrupted",
    "A run of hours is interrupted sooner or later.",
    "What a round leaves must be in the server state or a client state. Name states by NamedTuples of your file's top level.",
    cause="kept",
)
def resume(subject: Subject) -> None:
    with contextlib.closing(subject.warm("ragged")) as running, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_checkpoint(path, running.snapshot(0))
        snapshot = load_checkpoint(path)
    whole = subject.outcome("ragged")
    with contextlib.closing(subject.federation("ragged", algorithm=subject.fresh())) as running:
        running.restore(snapshot)
        rest = follow(running)
    late = whole._replace(servers=whole.servers[1:], states=whole.states[1:], metrics=whole.metrics[1:])
    if found := runs_differ(late, rest):
        raise Broken(f"stopped after round 0 and resumed: {found} (counted from there).")
