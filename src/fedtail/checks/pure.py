"""Whether a method is a pure function: nothing drawn, kept or overwritten behind the engine's back."""

import contextlib
import copy
import dataclasses
from typing import Any

import torch

from fedtail import trees
from fedtail.checks.problems import LOOP, Cohort, Subject, by_name, cohorts, difference, reduce, serve
from fedtail.checks.returns import answer
from fedtail.checks.rule import IMPURE, Broken, rule
from fedtail.checks.source import outside, random_state
from fedtail.experiment import Federation
from fedtail.trees import Tree


@rule(
    "no global randomness",
    "Whoever draws from a global generator changes every later draw, and no engine or machine repeats the result.",
    "Declare a draw (`draws`) and take it from batch.draws; in init_server, init_client and constants use the `rng` given.",
    cause="random",
)
def no_global_randomness(subject: Subject) -> None:
    before = random_state()
    _first_round(subject)
    after = random_state()
    if changed := [name for name in before if before[name] != after[name]]:
        raise Broken(f"the global generator of {' and of '.join(changed)} was used during a round.")


def _first_round(subject: Subject, seed: int = 0) -> None:
    with contextlib.closing(subject.federation("ragged", seed=seed)) as running:
        _advanced(running, running.step())


@rule(
    "state in values",
    "A checkpoint, another process and a stacked cohort see what methods return, and nothing else.",
    "Your state lives in self, the class or the module: put it into the client state (init_client, local_final), the "
    "server state or local.extra.",
    cause="kept",
)
def state_in_values(subject: Subject) -> None:
    before = subject.outside
    _first_round(subject, seed=2)  # other values than those that earlier rules may have left
    after = outside(subject.algorithm)
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        raise Broken(f"{', '.join(changed)} changed during a round.")


@rule(
    "inputs unmodified",
    "A message is shared by the whole cohort: who writes into it trains on what another client left there.",
    "Make new tensors: `a + b` in the place of `a.add_(b)` or `a += b`, a new dict in the place of `d[key] = ...`.",
    cause="in place",
)
def inputs_unmodified(subject: Subject) -> None:
    for donate in (True, False):
        with contextlib.closing(subject.warm("ragged", dataclasses.replace(LOOP, donate=donate))) as running:
            for cohort in cohorts(running):
                _watch(running, cohort)


def _watch(running: Federation, cohort: Cohort) -> None:
    """Runs a cohort and the server; looks at the inputs after each client and after the server."""
    inputs = {
        "message": cohort.message, "states": by_name(cohort.states), "server state": running.server,
        "constants": running.engine.setting.constants, "initial model": running.task.initial,
    }  # fmt: skip
    before, sink = trees.clone(inputs), cohort.sink()
    for number, plan in cohort.plans.items():
        one, phase = {number: plan}, cohort.ctx.round
        running.engine.cohort(phase, cohort.trained, cohort.message, cohort.states, one, sink)
        if found := difference(before, inputs):
            raise Broken(f"client {number} modified its inputs in round {phase.index}: {found}.")
    received = reduce(cohort, sink)
    kept = trees.clone(received)
    serve(running, cohort, sink, received)
    if found := difference(before, inputs) or difference(kept, received):
        method = "server_collect" if cohort.collects else "server_update"
        raise Broken(f"{method} modified its inputs in round {cohort.ctx.round.index}: {found}.")


@rule(
    "deterministic",
    "The result must be a function of the arguments: engines call methods in any order and any number of times.",
    "Look for random numbers of your own, and for anything that a call leaves behind. " + IMPURE,
    cause="kept",
)
def deterministic(subject: Subject) -> None:
    with contextlib.closing(subject.federation("ragged")) as running:
        cohort = next(cohorts(running))
        for number in cohort.plans:
            first, second = (answer(running, cohort, number) for _ in range(2))
            for what in ("update", "state"):
                if found := difference(getattr(first, what), getattr(second, what)):
                    raise Broken(f"client {number}, asked twice with equal arguments, returns another {what}: {found}.")
        record = running.step()
        if found := difference(_advanced(running, record), _advanced(running, record)):
            raise Broken(f"advance, called twice with equal arguments, returns something else: {found}.")


def _advanced(running: Federation, record: dict[str, Any]) -> Tree:
    """Returns what `advance` makes of a round's record."""
    with torch.no_grad():
        stage, server = running.algorithm.advance(running.context(), running.server, copy.deepcopy(record))
    return {"stage": torch.tensor(stage), "server state": server}


@rule(
    "cohort order",
    "The order of clients is an accident of the machine; results that hang on it cannot be repeated.",
    "A client's result may depend on its own arguments only, not on who trained before it. " + IMPURE,
    cause="kept",
)
def cohort_order(subject: Subject) -> None:
    with contextlib.closing(subject.warm("ragged")) as running:
        cohort = next(cohorts(running))
        ids, first = list(cohort.plans), None
        for order in (ids, ids[::-1], ids[1:] + ids[:1]):
            sink, plans = cohort.sink(), {i: cohort.plans[i] for i in order}
            message = running.message(cohort.ctx)  # as before each cohort
            running.engine.cohort(cohort.ctx.round, cohort.trained, message, running.states, plans, sink)
            found: Tree = {"received": reduce(cohort, sink), "states": by_name(sink.states)}
            if first is not None and (seen := difference(first, found)):
                raise Broken(f"clients {ids} and the same clients as {order} give other results: {seen}.")
            first = found
