"""What a method is and what it returns: a dataclass of options, trees of tensors, updates that can be added, numbers."""

import contextlib
import json
import math
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fedtail import config, trees
from fedtail.algorithm import Client, Context
from fedtail.checks.problems import Cohort, Subject, cohorts, not_finite, other_form, reduce, serve
from fedtail.checks.rule import GUARD, Broken, rule
from fedtail.engines.base import Result
from fedtail.engines.loop import iterate
from fedtail.experiment import Federation
from fedtail.trees import Tree


@rule(
    "configuration",
    "A run is repeated and resumed from its configuration, so the fields must be all that there is.",
    "Decorate the class with @dataclass(frozen=True, kw_only=True) and give every option an annotated field with a "
    "default of a plain type (number, string, bool, tuple) or one of fedtail's own.",
    gate=True,
)
def configuration(subject: Subject) -> None:
    cls, algorithm = type(subject.algorithm), subject.algorithm
    if "__dataclass_params__" not in vars(cls):
        raise Broken(f"{cls.__name__} is not a dataclass: its annotated fields are no options.")
    whole = config.Experiment(algorithm=algorithm)
    table = config.to_dict(whole)
    for form, there_and_back in (
        ("JSON", lambda: json.loads(json.dumps(table))),
        ("TOML", lambda: tomllib.loads(config.dumps(whole))),
    ):
        try:
            back = there_and_back()
        except TypeError as error:
            raise Broken(f"{form} cannot hold the options: {error}.") from error
        if back["algorithm"] != table["algorithm"]:
            raise Broken(f"the options come back from {form} as {back['algorithm']}, they were {table['algorithm']}.")
    if subject.fresh() != algorithm:
        raise Broken(f"the options come back as {subject.fresh()}, they were {algorithm}.")


class Answer(NamedTuple):
    """What one client returned, before any engine looked at it."""

    client: int
    local: Tree
    metrics: tuple[Any, ...]  # of each step
    update: Tree
    state: Tree
    weight: Any


def answer(running: Federation, cohort: Cohort, number: int) -> Answer:
    """Calls an algorithm's methods for one client, as the loop engine does."""
    setting, algorithm = running.engine.setting, running.algorithm
    client = Client(*(value[list(cohort.plans).index(number)] for value in setting.clients(cohort.plans)))
    ctx: Context = cohort.ctx._replace(client=client)
    state, metrics = cohort.states[number], list[Any]()
    local = algorithm.local_init(ctx, cohort.message, state)
    for batch in iterate(setting, cohort.plans[number]):
        local, found = algorithm.local_step(ctx, cohort.message, state, local, batch)
        metrics.append(found)
    update, state = algorithm.local_final(ctx, cohort.message, state, local)
    return Answer(number, local, tuple(metrics), update, state, algorithm.weight(ctx))


def play(running: Federation) -> Iterator[tuple[Cohort, list[Answer]]]:
    """Yields each phase of the present round with what its clients answer; the server then moves on."""
    for cohort in cohorts(running):
        answers, sink = [answer(running, cohort, number) for number in cohort.plans], cohort.sink()
        yield cohort, answers
        for one in answers:
            sink.add(Result(one.client, one.update, float(one.weight), one.state, {}, 0))
        serve(running, cohort, sink, reduce(cohort, sink))


def _stray(tree: Any, path: str = "") -> str:
    """Returns the first thing in a tree that is no tensor, "" if there is none."""
    if isinstance(tree, Tensor):
        return ""
    if not isinstance(tree, dict | tuple):
        return f"{path or 'it'} is a {type(tree).__name__} ({tree!r:.40})"
    found = (_stray(child, f"{path}/{name}".lstrip("/")) for name, child in trees.items(tree))
    return next((stray for stray in found if stray), "")


@rule(
    "runs",
    "A method that raises cannot be compared with anything.",
    "Mend the line that is named; `fedtail show fedavg` and examples/new_algorithm.py show what each method returns.",
    gate=True,
)
def runs(subject: Subject) -> None:
    with contextlib.closing(subject.federation("ragged")) as running:
        cohort = next(cohorts(running))
        for number in cohort.plans:
            answer(running, cohort, number)


@rule(
    "summable",
    "The engine adds updates and stacks states without knowing the method; so could secure aggregation.",
    "Turn numbers into tensors (torch.tensor(3.0, dtype=ctx.task.dtype)), None into (), lists into tuples or NamedTuples, "
    "and let every client of a cohort send the same names and shapes.",
    gate=True,
)
def summable(subject: Subject) -> None:
    with contextlib.closing(subject.federation("ragged")) as running:
        for cohort, answers in play(running):
            _require("the server state", running.server)
            _require("broadcast's message", cohort.message)
            for one in answers:
                _trees(one)
                if not cohort.collects and (other := other_form(answers[0].update, one.update)):
                    both = f"{answers[0].client} and {one.client}"
                    raise Broken(f"clients {both} send updates that cannot be added: {other}.")
        _require("the server state", running.server)


def _trees(one: Answer) -> None:
    who = f"of client {one.client}"
    for step, metrics in enumerate(one.metrics):
        _require(f"the metrics {who} at local step {step}", metrics)
    for what in ("local", "update", "state"):
        _require(f"{what} {who}", getattr(one, what))
    if not isinstance(one.weight, Tensor) or one.weight.shape != ():
        raise Broken(f"the weight {who} is {one.weight!r:.60}, not a tensor of shape ().")
    if not trees.leaves(one.update):
        raise Broken(f"the update {who} holds no tensor.")


def _require(what: str, tree: Any) -> None:
    if stray := _stray(tree):
        raise Broken(f"in {what}, {stray}; only NamedTuples, tuples and dicts of tensors can be summed and stacked.")


@rule(
    "finite numbers",
    "A negative weight makes the mean lie outside of what was averaged, and one NaN spoils every average that it enters.",
    GUARD,
    gate=True,
)
def finite(subject: Subject) -> None:
    with contextlib.closing(subject.federation("ragged")) as running:
        for cohort, answers in play(running):
            for one in answers:
                who, weight = f"client {one.client} in phase {cohort.ctx.round.phase.name!r}", float(one.weight)
                if not 0 <= weight < math.inf:
                    raise Broken(f"the weight of {who} is {weight:g}.",
                                 "Return a finite weight >= 0; a signed factor belongs into the update.")  # fmt: skip
                for step, metrics in enumerate(one.metrics):
                    if bad := not_finite(metrics):
                        raise Broken(f"the metric {bad} of {who} is not finite at local step {step}.")
                if bad := not_finite(one.update):
                    raise Broken(f"the update of {who} is not finite (first in {bad}).")
