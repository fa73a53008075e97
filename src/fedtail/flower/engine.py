"""The engine whose clients are real nodes: messages go out, checked results come back, under a quorum and a deadline.

Who fails, is gone, answers nonsense or too late drops out of the phase: the mean is over the others with their own weights, and
the record of the round names the client and the reason. A client's part is a pure function of what it was sent; asking again
is harmless. A node keeps its state under a tag (see `node`), and the server names the tag of the state that it has taken over:
a result that came too late therefore never advances a client's state.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedtail.algorithm import Client, Round
from fedtail.data.plan import Plan
from fedtail.engines import EngineOptions, make_engine
from fedtail.engines.base import Engine, Result, Setting, Sink, check_result
from fedtail.engines.loop import run_client
from fedtail.errors import FedtailError, TrainingError
from fedtail.flower import wire
from fedtail.flower.roster import LOOK, POLL, Roster
from fedtail.trees import Tree

log = logging.getLogger("fedtail")


class Order(NamedTuple):
    """What a cohort is asked for."""

    round: Round
    trained: int
    message: Tree
    states: Mapping[int, Tree]
    form: Result  # what an answer looks like
    records: dict[str, Any]  # what everyone gets alike

    @property
    def name(self) -> str:
        """The tag of the states that come of it."""
        return f"{self.round.index}.{self.round.phase.name}"


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
        order = self._order(round, trained, message, states, plans)
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
        for result in results.values():
            sink.add(result)

    def _order(
        self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan]
    ) -> Order:
        form = self.form(round, trained, message, next(iter(plans)))
        records = wire.ask(round, trained, message, self.roster.options.states)
        if self.roster.initial is not None:
            records["initial"] = wire.pack(self.roster.initial, "initial")
        return Order(round, trained, message, states, form, records)

    def form(self, round: Round, trained: int, message: Tree, client: int) -> Result:
        """Returns a result of this phase, of one step on test images: what every answer must look like, whatever its values."""
        setting, data = self.setting, self.setting.data
        rows = np.arange(min(len(data.test["y"]), setting.work.batch_size))
        owners = [rows if k == client else rows[:0] for k in range(data.clients)]
        trial = dataclasses.replace(
            setting,
            data=dataclasses.replace(data, columns={**data.columns, **data.test}, owners=owners, held=owners),
            work=dataclasses.replace(setting.work, steps=1, epochs=1),
        )
        plans = trial.plans(round, trained, [client])
        here = Client(*(value[0] for value in trial.clients(plans)))
        return run_client(trial, setting.task.worker("eager", False), round, here, message, {}, plans[client])

    def _window(self, order: Order, clients: Sequence[int], needed: int, waiting: dict[str, Waiting],
                results: dict[int, Result]) -> dict[int, str]:  # fmt: skip
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
                    results: dict[int, Result]) -> None:  # fmt: skip
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
        node, tag = roster.nodes[number].node, "" if again else roster.tag(number)
        facts = {**order.records["ask"], "tag": tag, "client": number}
        records = dict(order.records)
        if not tag and number in order.states:
            state = order.states[number]
            facts["state_form"], records["state"] = wire.structure(state), wire.pack(state, "state")
        seconds = roster.options.deadline * roster.options.attempts
        sent = roster.send(node, "train", {**records, "ask": app.ConfigRecord(facts)}, seconds, str(order.round.index))
        if sent is None:
            failed[number] = "its node is gone"
        else:
            waiting[sent] = Waiting(number, node)

    def _take(self, order: Order, asked: Waiting, reply: Any, waiting: dict[str, Waiting], failed: dict[int, str],
              results: dict[int, Result]) -> None:  # fmt: skip
        """Takes a reply: a result, a reason to do without the client, or the news that its node has lost its state."""
        number = asked.client
        if not reply.has_content():
            failed[number] = f"error {reply.error.code}: {reply.error.reason}"[:300]
            return
        if "missing" in reply.content:  # the node was started anew, or was killed before it kept what it had sent
            log.warning("client %d has lost its state%s", number, "" if number in order.states else " and begins anew")
            self._send(order, number, waiting, failed, again=True)
            return
        keeps = order.form.state != ()
        form = order.form._replace(client=number, examples=len(self.setting.rows(order.round)[number]))
        try:
            result = wire.result(reply.content, form, keeps and self.roster.options.states == "server")
            results[number] = check_result(result, None, order.round)
        except (FedtailError, ValueError, TypeError, KeyError) as error:
            failed[number] = f"its answer is refused: {str(error).partition('. ')[0]}"[:300]
            return
        if keeps:
            self.roster.tags[number] = (asked.node, order.name)
