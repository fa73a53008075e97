"""Who is there: which node of Flower's speaks for which client, and the exchange of messages with them under a deadline."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedtail.config import from_dict
from fedtail.errors import ConfigError
from fedtail.files import write_atomic
from fedtail.flower.wire import PROTOCOL, VERSION, flwr

log = logging.getLogger("fedtail")

POLL = 0.5  # seconds between two looks for replies
LOOK = 5.0  # seconds between two looks for new nodes, while one is missed


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a deployment copes with nodes: keys of the app's configuration, which `flwr run -c "key=value"` overrides."""

    run: str = "runs/deployed"
    """The run folder, on the machine of the SuperLink; a relative path starts where that was started."""
    quorum: float = 0.5
    """Share of a cohort, in (0, 1], that must answer; with fewer the round is asked for again, then the run stops."""
    deadline: float = 3600.0
    """Seconds that a cohort has, > 0; who has not answered then is left out of the round."""
    attempts: int = 3
    """How often a round may pass its deadline without a quorum before the run stops, >= 1."""
    wait: float = 600.0
    """Seconds to wait for all clients before the first round, >= 0."""
    states: str = "server"
    """Where clients' states are kept: "server" (in its checkpoint, too) or "node" (they never leave, and die with the node)."""
    sites: int = 0
    """Number of sites with data of their own; 0: a rehearsal on the experiment's partition."""
    share_counts: bool = False
    """Whether sites tell the server how many examples of each class they hold."""
    clip: float = 0.0
    """Client-level differential privacy (see flower.privacy): largest norm of an update, >= 0; 0: none of it."""
    noise: float = 0.0
    """Standard deviation of the noise on the sum of the clipped updates, over `clip`, >= 0."""
    delta: float = 1e-5
    """Probability that the privacy budget of the metrics does not cover, in (0, 1); below 1 / number of clients."""

    def __post_init__(self) -> None:
        if not (
            0 < self.quorum <= 1 and self.deadline > 0 and self.attempts >= 1 and self.wait >= 0 and self.sites >= 0
        ):
            raise ConfigError("deploy: quorum must be in (0, 1], deadline > 0, attempts >= 1, wait and sites >= 0; got "
                              f"{self.quorum}, {self.deadline}, {self.attempts}, {self.wait} and {self.sites}.")  # fmt: skip
        if not (
            0 <= self.clip < math.inf
            and 0 <= self.noise < math.inf
            and 0 < self.delta < 1
            and (self.clip or not self.noise)
        ):
            raise ConfigError("deploy: clip and noise must be >= 0, delta in (0, 1), and noise needs a clip; got "
                              f"{self.clip}, {self.noise} and {self.delta}.")  # fmt: skip
        if self.states not in ("server", "node"):
            raise ConfigError(f'deploy: states must be "server" or "node", got {self.states!r}.')

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Options":
        """Returns the options in an app's flat configuration, whose keys have dashes."""
        table = {k.replace("-", "_"): v for k, v in config.items()}
        return from_dict(cls, {k: v for k, v in table.items() if k in cls.__dataclass_fields__}, "deploy")


class Facts(NamedTuple):
    """What a node says of its client."""

    node: int
    client: int
    examples: int  # that it trains on
    held: int  # that it keeps out of its training, for validation
    tests: int  # of its own test set
    counts: tuple[int, ...]  # of each class; () where the site does not share them


@dataclass
class Roster:
    """The nodes of a deployment, for as long as the ServerApp lives."""

    grid: Any
    options: Options
    nodes: dict[int, Facts] = field(default_factory=dict[int, Facts])  # by client
    population: int = 1 << 31
    initial: Any = None  # the model that an experiment with `start` begins with: nodes do not have that run
    tags: dict[int, tuple[int, str]] = field(default_factory=dict[int, tuple[int, str]])
    """Node and tag of the state that the server has taken over last, by client."""
    refused: dict[int, str] = field(default_factory=dict[int, str])  # nodes that may not take part, and why
    folder: Path | None = None
    """Where nodes.json tells who is there, for `fedtail watch`."""
    _asked: dict[str, int] = field(default_factory=dict[str, int])  # messages that ask a node who it is
    _told: str = ""

    def tag(self, client: int) -> str:
        """Returns the tag of the state that a client's present node should have; "": none."""
        node, tag = self.tags.get(client, (0, ""))
        return tag if node == self.nodes[client].node else ""

    def send(self, node: int, kind: str, records: Mapping[str, Any], seconds: float, group: str) -> str | None:
        """Sends a message; returns its id, None where Flower did not take it (the node is gone)."""
        app = flwr("app")
        content = app.RecordDict(dict(records))
        [found] = self.grid.push_messages([app.Message(content, node, kind, ttl=seconds, group_id=group)]) or [None]
        return found or None

    def pull(self, ids: Iterable[str]) -> dict[str, Any]:
        """Returns the replies that are there, by the id of the message that they answer."""
        wanted = list(ids)
        return {m.metadata.reply_to_message_id: m for m in self.grid.pull_messages(wanted)} if wanted else {}

    def look(self) -> None:
        """Asks nodes that are new who they are, takes in what was answered and forgets nodes that are gone."""
        online = set(self.grid.get_node_ids())
        self.nodes = {client: facts for client, facts in self.nodes.items() if facts.node in online}
        self.refused = {node: why for node, why in self.refused.items() if node in online}
        known = {facts.node for facts in self.nodes.values()} | set(self._asked.values()) | set(self.refused)
        app = flwr("app")
        for node in sorted(online - known):
            asked = self.send(node, "query", {"hello": app.ConfigRecord({"protocol": PROTOCOL})}, 600.0, "hello")
            if asked is not None:
                self._asked[asked] = node
        for number, reply in self.pull(self._asked).items():
            self._meet(self._asked.pop(number), reply)
        self._asked = {number: node for number, node in self._asked.items() if node in online}
        self._tell()

    def _tell(self) -> None:
        """Keeps nodes.json as things are; node numbers are text, too long for a browser's numbers."""
        if self.folder is None:
            return
        there = [{"client": k, "examples": f.examples, "node": str(f.node)} for k, f in sorted(self.nodes.items())]
        refused = [{"node": str(node), "why": why} for node, why in sorted(self.refused.items())]
        text = json.dumps({"expected": self.population, "nodes": there, "refused": refused}, indent=1)
        if text != self._told:
            write_atomic(self.folder / "nodes.json", text)
            self._told = text

    def _meet(self, node: int, reply: Any) -> None:
        if reply.has_error():
            if node in set(self.grid.get_node_ids()):
                self._refuse(node, reply.error.reason)
            return
        try:
            hello = dict(reply.content["hello"])
            if hello["fedtail"] != VERSION or hello["protocol"] != PROTOCOL:
                raise ValueError(f"it has fedtail {hello['fedtail']}, the server {VERSION}")
            counts = tuple(hello.get("counts", []))
            numbers = [hello[name] for name in ("client", "examples", "held", "tests")]
            facts = Facts(node, *numbers, counts=counts)
            if not all(type(n) is int and n >= 0 for n in (*facts[1:-1], *counts)):
                raise ValueError("client, examples, held, tests and counts must be whole numbers >= 0")
            if facts.client >= self.population:
                raise ValueError(f"it speaks for client {facts.client}; there are {self.population}, counted from 0")
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(node, f"its answer to the first question is wrong: {error}")
            return
        before = self.nodes.get(facts.client)
        if before is not None:
            self._refuse(before.node, f"node {node}, which came later, speaks for client {facts.client}")
        self.nodes[facts.client] = facts
        log.info("node %d speaks for client %d (%d examples)", node, facts.client, facts.examples)

    def _refuse(self, node: int, why: str) -> None:
        self.refused[node] = why
        log.warning("node %d is refused: %s", node, why)

    def gather(self, done: Callable[[], bool], seconds: float) -> None:
        """Looks for nodes until `done()` or for so many seconds."""
        end = time.monotonic() + seconds
        self.look()
        while not done() and time.monotonic() < end:
            time.sleep(1)
            self.look()
