"""The engine whose clients are real nodes: messages go out, checked replies come back, under a quorum and a deadline.

Who fails, is gone, answers nonsense or too late drops out of the phase: the mean is over the others with their own weights, and
the record of the round names the client and the reason. A client's part is a pure function of what it was sent; asking again
is harmless. A node keeps its state under a tag (see `node`), and the server names the tag of the state that it has taken over:
a result that came too late therefore never advances a client's state.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtail.algorithm import Client, Round
from fedtail.data.plan import Plan
from fedtail.engines import EngineOptions, make_engine
from fedtail.engines.base import Engine, Result, Scores, Setting, Sink, check_result
from fedtail.engines.loop import run_client
from fedtail.errors import FedtailError, TrainingError
from fedtail.evaluate import readings
from fedtail.flower import privacy, wire
from fedtail.flower.roster import LOOK, POLL, Roster
from fedtail.metrics import ShotGroups
from fedtail.personalise import Tuning
from fedtail.trees import Tree

log = logging.getLogger("fedtail")


class Order(NamedTuple):
    """What clients are asked for."""

    kind: str  # "train" or "evaluate"
    round: Round
    states: Mapping[int, Tree]
    records: dict[str, Any]  # what everyone gets alike
    read: Callable[[int, Any], Any]  # (client, records of its reply) -> what is in it, checked
    facts: Mapping[int, Mapping[str, Any]]  # what a client gets for itself
    tag: str = ""  # of the states that come of it; "": they stay the same
    fresh: bool = False  # whether clients begin without a state


class Waiting(NamedTuple):
    """A message that was not answered yet."""

    client: int
    node: int


class FlowerEngine(Engine):
    """Clients on nodes; evaluation on the server, by the engine that the experiment names."""

    name = "flower"

    def __init__(self, options: EngineOptions, setting: Setting, roster: Roster):
        super().__init__(setting)
        self.roster = roster
        self._here = make_engine(options, setting)

    def open(self) -> None:
        """Opens the server's own engine."""
        super().open()
        self._here.open()

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Evaluates on the server."""
        return self._here.map_batches(function, items)

    def close(self) -> None:
        """Closes the server's own engine."""
        self._here.close()
        super().close()

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Asks the nodes and hands checked results to the sink; those who drop out are dropped there.

        Raises:
            TrainingError: no quorum, however often it was asked for.
        """
        self.open()
        order = self._training(round, trained, message, states, plans)
        needed = math.ceil(self.roster.options.quorum * len(plans) - 1e-9)
        results, failed, waiting = dict[int, Result](), dict[int, str](), dict[str, Waiting]()
        for attempt in range(self.roster.options.attempts):
            if attempt:
                log.warning("round %d: %d of %d answered, %d are needed; asking again", round.index, len(results), len(plans),
                            needed)  # fmt: skip
            failed = self._window(order, [k for k in plans if k not in results], needed - len(results), waiting,
                                  results)  # fmt: skip
            if len(results) >= needed:
                break
        else:
            reasons = "; ".join(f"client {k}: {why}" for k, why in failed.items())
            raise TrainingError(
                f"Round {round.index}, phase {round.phase.name}: {len(results)} of {len(plans)} clients answered, the quorum "
                f"is {needed} ({reasons}). The run folder holds the state before this round; the same `flwr run` continues it."
            )
        for number, why in failed.items():
            log.warning("round %d: client %d dropped out: %s", round.index, number, why)
            sink.drop(number, why)
        options = self.roster.options
        if options.clip and not isinstance(self.setting.algorithm, Tuning):
            sums = privacy.count(self.roster.folder)
            results = privacy.privatise(results, len(plans), options.clip, options.noise)
            budget = privacy.epsilon(options.noise, sums, options.delta)
            sink.notes["privacy"] = {
                "epsilon": budget if math.isfinite(budget) else None,
                "delta": options.delta,
                "sums": sums,
            }
        for result in results.values():
            sink.add(result)

    def _training(
        self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan]
    ) -> Order:
        form, rows = self.form(round, trained, message, next(iter(plans))), self.setting.rows(round)
        keeps, sends = form.state != (), form.state != () and self.roster.options.states == "server"

        def read(number: int, content: Any) -> Result:
            expected = form._replace(client=number, examples=len(rows[number]))
            return check_result(wire.result(content, expected, sends), None, round)

        tuning = isinstance(self.setting.algorithm, Tuning)  # of a model that is judged and forgotten
        tag = f"{round.index}.{round.phase.name}" if keeps and not tuning else ""
        return Order("train", round, states, self._records(round, trained, message), read, {}, tag, tuning)

    def _records(self, round: Round, trained: int, message: Tree) -> dict[str, Any]:
        tuning = isinstance(self.setting.algorithm, Tuning)
        records = wire.ask(round, trained, message, self.roster.options.states, tuning)
        if self.roster.initial is not None:
            records["initial"] = wire.pack(self.roster.initial, "initial")
        return records

    def client_scores(
        self, round: Round, message: Tree, states: Mapping[int, Tree], groups: Sequence[ShotGroups]
    ) -> list[list[Mapping[str, Scores]]] | None:
        """Asks every node that has test examples for its scores, where the server cannot judge in its place.

        That is where test sets are the sites' own, and where states stay on the nodes. A client that does not answer before
        the deadline is left out of the means, whose entry says how many clients they are over.
        """
        if not self.roster.options.sites and self.roster.options.states == "server":
            return None
        self.open()
        self.roster.look()
        ways = len(readings(self.setting.algorithm))
        own = {k: {name: list(each) for name, each in group._asdict().items()} for k, group in enumerate(groups)}
        order = Order("evaluate", round, states, self._records(round, 0, message),
                      lambda _, content: wire.scores(content, ways), own)  # fmt: skip
        found: dict[int, Any] = {}
        clients = sorted(k for k, facts in self.roster.nodes.items() if facts.tests)
        if not clients:
            return []
        for number, why in self._window(order, clients, 0, {}, found).items():
            log.warning("round %d: client %d is not judged: %s", round.index, number, why)
        return [found.get(k, [wire.NO_SCORES] * ways) for k in range(len(groups))]

    def form(self, round: Round, trained: int, message: Tree, client: int) -> Result:
        """Returns a result of this phase, of one step on test images: what every answer must look like, whatever its values."""
        setting, data = self.setting, self.setting.data
        rows = np.arange(min(len(data.test["y"]), setting.work.batch_size))
        others = {name: torch.zeros(len(rows), *column.shape[1:], dtype=column.dtype, device=setting.task.device)
                  for name, column in data.columns.items() if name not in data.test}  # fmt: skip
        columns = {**data.test, **others}
        owners = [rows if k == client else rows[:0] for k in range(data.clients)]
        trial = dataclasses.replace(
            setting,
            data=dataclasses.replace(data, columns=columns, owners=owners, held=owners),
            work=dataclasses.replace(setting.work, steps=1, epochs=1),
        )
        plans = trial.plans(round, trained, [client])
        here = Client(*(value[0] for value in trial.clients(plans)))
        return run_client(trial, setting.task.worker("eager", False), round, here, message, {}, plans[client])

    def _window(self, order: Order, clients: Sequence[int], needed: int, waiting: dict[str, Waiting],
                results: dict[int, Any]) -> dict[int, str]:  # fmt: skip
        """Asks these clients and waits until all have answered or failed, or the deadline is over.

        A client without a node is waited for only as long as the others are no quorum; one that has a new node is asked again.

        Returns:
            Why clients failed, by client.
        """
        roster, failed = self.roster, dict[int, str]()
        end, looked = time.monotonic() + roster.options.deadline, -math.inf
        target = len(results) + needed
        while True:
            if time.monotonic() - looked >= LOOK:
                roster.look()
                looked = time.monotonic()
                for number in clients:
                    self._keep_asked(order, number, waiting, failed, results)
            for message, reply in roster.pull(waiting).items():
                self._take(order, waiting.pop(message), reply, waiting, failed, results)
            busy = {w.client for w in waiting.values()}
            absent = [k for k in clients if k not in results and k not in failed and k not in busy]
            late = time.monotonic() >= end
            if late or (not busy and (not absent or len(results) >= target)):
                slow = dict.fromkeys(sorted(busy), "no answer within the deadline")
                return failed | slow | dict.fromkeys(absent, "no node speaks for it")
            time.sleep(min(POLL, max(end - time.monotonic(), 0)))

    def _keep_asked(self, order: Order, number: int, waiting: dict[str, Waiting], failed: dict[int, str],
                    results: dict[int, Any]) -> None:  # fmt: skip
        """Asks a client that has a node and was not asked yet, or was asked on a node that it has no more."""
        if number in results or number in failed or number not in self.roster.nodes:
            return
        pending = [message for message, w in waiting.items() if w.client == number]
        if pending and waiting[pending[0]].node == self.roster.nodes[number].node:
            return
        for message in pending:
            del waiting[message]
        self._send(order, number, waiting, failed)

    def _send(self, order: Order, number: int, waiting: dict[str, Waiting], failed: dict[int, str],
              again: bool = False) -> None:  # fmt: skip
        """Asks a client, naming the state that it continues from; the state itself goes along where the node lacks it."""
        roster, app = self.roster, wire.flwr("app")
        if number not in roster.nodes:
            failed[number] = "its node is gone"
            return
        node, tag = roster.nodes[number].node, "" if again or order.fresh else roster.tag(number)
        facts = {**order.records["ask"], **order.facts.get(number, {}), "tag": tag, "client": number}
        records = dict(order.records)
        if not tag and number in order.states:
            state = order.states[number]
            facts["state_form"], records["state"] = wire.structure(state), wire.pack(state, "state")
        seconds = roster.options.deadline * roster.options.attempts
        sent = roster.send(
            node, order.kind, {**records, "ask": app.ConfigRecord(facts)}, seconds, str(order.round.index)
        )
        if sent is None:
            failed[number] = "its node is gone"
        else:
            waiting[sent] = Waiting(number, node)

    def _take(self, order: Order, asked: Waiting, reply: Any, waiting: dict[str, Waiting], failed: dict[int, str],
              results: dict[int, Any]) -> None:  # fmt: skip
        """Takes a reply: a result, a reason to do without the client, or the news that its node has lost its state."""
        number = asked.client
        if not reply.has_content():
            failed[number] = f"error {reply.error.code}: {reply.error.reason}"[:300]
            return
        if "missing" in reply.content:  # the node was started anew, or was killed before it kept what it had sent
            log.warning("client %d has lost its state%s", number, "" if number in order.states else " and begins anew")
            self._send(order, number, waiting, failed, again=True)
            return
        try:
            results[number] = order.read(number, reply.content)
        except (FedtailError, ValueError, TypeError, KeyError) as error:
            failed[number] = f"its answer is refused: {str(error).partition('. ')[0]}"[:300]
            return
        if order.tag:
            self.roster.tags[number] = (asked.node, order.tag)
