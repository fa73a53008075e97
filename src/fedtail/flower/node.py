"""A client's side: what a SuperNode runs for each message, in a process of its own.

Everything is rebuilt from the app's experiment and the node's data; only the client's state is kept, in Flower's
`Context.state`, under the tag of the phase it came of, beside the state that it began with: should the server not have got the
answer, it asks for a continuation of the earlier one.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtail import config
from fedtail.algorithm import Algorithm, Client, Context, Phase, Round
from fedtail.engines.base import Scores, Setting, one_thread
from fedtail.engines.loop import LoopEngine, run_client
from fedtail.errors import ConfigError
from fedtail.evaluate import Judge, confusion, readings
from fedtail.federation import check_device, make_task
from fedtail.flower import sites, wire
from fedtail.flower.roster import Options
from fedtail.metrics import ShotGroups, client_scores
from fedtail.seeds import Stream, generator
from fedtail.trees import Tree


class Node:
    """One client on its node.

    Args:
        folder: the app.
        run_config: the app's configuration, as the server runs it.
        node_config: the SuperNode's --node-config: `client`, its number; `data`, a site's own .npz file or folder of images;
            `share-counts`, the site's consent; `device` instead of the experiment's.
    """

    def __init__(self, folder: Path, run_config: dict[str, Any], node_config: dict[str, Any]):
        self.options, self.config = Options.of(run_config), node_config
        experiment = wire.load_experiment(folder)
        self.experiment = dataclasses.replace(experiment, device=str(node_config.get("device", experiment.device)))
        check_device(self.experiment.device)
        if type(node_config.get("client")) is not int:
            raise ConfigError(
                "the SuperNode does not say which client it is: start it with --node-config 'client=0', 1, 2, ..."
            )
        self.client: int = node_config["client"]
        path = str(node_config.get("data", ""))
        form = sites.Form.read(folder)
        self.data = sites.node_data(self.experiment, form, self.options.sites, self.client, path)

    def hello(self) -> dict[str, Any]:
        """Returns what the server may know before it asks for work."""
        counts = sites.check_site(self.experiment, self.data, self.client)
        facts = {
            "fedtail": wire.VERSION,
            "protocol": wire.PROTOCOL,
            "client": self.client,
            "examples": int(counts.sum()),
            "held": len(self.data.held[self.client]),
            "tests": len(self.data.local_tests[self.client]),
        }
        if not (self.options.sites and self.options.share_counts):
            return facts
        if self.config.get("share-counts") is not True:
            raise ConfigError("this federation asks for the number of examples of each class. A site that agrees adds "
                              "share-counts=true to its --node-config.")  # fmt: skip
        return {**facts, "counts": counts.tolist()}

    def setting(self, stage: int, initial: Any, tuning: bool = False) -> Setting:
        """Returns the setting of a stage, as the simulator makes it."""
        experiment = self.experiment
        task = make_task(experiment, self.data)
        if initial is not None:
            task = dataclasses.replace(task, initial=wire.take(initial, task.initial, "initial"))
        constants = experiment.algorithm.constants(task, generator(experiment.seed, Stream.CONSTANTS))
        task = experiment.algorithm.stage_task(task, stage)
        data, judging = experiment.algorithm.stage_data(self.data, stage), experiment.evaluation
        found = Setting(experiment.algorithm, task, data, experiment.local, experiment.seed, constants,
                        judging.local_models, judging.batch_size, judging.double_softmax)  # fmt: skip
        return judging.finetune.setting(found) if tuning else found

    def work(self, content: Any, memory: Any) -> "Work | None":
        """Returns what the client is asked to do; None if it lacks the state that it should continue from.

        Args:
            content: the server's records.
            memory: the node's `Context.state`.
        """
        asked = content["ask"]
        if asked["client"] != self.client:
            raise ConfigError(
                f"the message is for client {asked['client']}, this node speaks for client {self.client}."
            )
        setting = self.setting(asked["stage"], content.get("initial"), asked["tuning"])
        device, own = setting.task.device, type(self.experiment.algorithm).__module__
        round, trained = wire.asked(content, setting.task.dtype, device)
        shapes = {name: tuple(column.shape[1:]) for name, column in self.data.columns.items()}
        round = round._replace(columns=shapes, draws=setting.shared(round.index))
        states: dict[int, Tree] = {}
        source, key = (memory, f"state {asked['tag']}") if asked["tag"] else (content, "state")
        if key in source:
            form = memory[f"form {asked['tag']}"]["form"] if asked["tag"] else asked["state_form"]
            states[self.client] = wire.unpack(source[key], form, "state", own, device)
        elif asked["tag"]:
            return None
        return Work(
            setting, round, trained, wire.unpack(content["message"], asked["form"], "message", own, device), states
        )

    def train(self, content: Any, memory: Any) -> dict[str, Any]:
        """Does the client's part in a phase; returns the records of the answer."""
        asked = content["ask"]
        with one_thread():
            work = self.work(content, memory)
            if work is None:
                return {"missing": wire.flwr("app").ConfigRecord({"tag": asked["tag"]})}
            setting, round = work.setting, work.round
            plan = setting.plans(round, work.trained, [self.client])
            here = Client(*(value[0] for value in setting.clients(plan)))
            worker = setting.task.worker("eager", self.experiment.engine.donate)
            result = run_client(setting, worker, round, here, work.message, work.states, plan[self.client])
        if result.state != () and not asked["tuning"]:
            _keep(memory, asked["tag"], f"{round.index}.{round.phase.name}", result.state)
        return wire.answer(result, result.state != () and asked["states"] == "server")

    def evaluate(self, content: Any, memory: Any) -> dict[str, Any]:
        """Judges the generic and the personal model on the client's own test set; returns the records of the answer."""
        asked = content["ask"]
        groups = ShotGroups(*(tuple(asked[name]) for name in ShotGroups._fields))
        work = self.work(content, memory)
        if work is None:
            return {"missing": wire.flwr("app").ConfigRecord({"tag": asked["tag"]})}
        setting, data = work.setting, work.setting.data
        rows, true = data.local_tests[self.client], data.test["y"].numpy(force=True)
        with contextlib.closing(LoopEngine(setting)) as engine:
            judge = Judge(engine, work.round, setting.constants, work.message, work.states, self.experiment.evaluation,
                          np.zeros(0, np.int64))  # fmt: skip

            def scores(algorithm: Algorithm, personal: bool) -> Scores:
                [labels] = judge.each(algorithm, personal, [self.client])
                return client_scores(confusion(true[rows], labels, data.num_classes), groups)

            ways = readings(setting.algorithm).values()
            each = [{"local": scores(way, False), "personal": scores(way, way.personal)} for way in ways]
        return wire.judged(each)


class Work(NamedTuple):
    """What a client is asked to do."""

    setting: Setting
    round: Round
    trained: int
    message: Tree
    states: dict[int, Tree]  # its own, if it is kept


def _keep(memory: Any, before: str, tag: str, state: Tree) -> None:
    """Keeps a state, and of the earlier ones the one that it came of."""
    for key in list(memory):
        if key.partition(" ")[2] != before:
            del memory[key]
    memory[f"state {tag}"] = wire.pack(state, "state")
    memory[f"form {tag}"] = wire.flwr("app").ConfigRecord({"form": wire.structure(state)})


def app(folder: Path) -> Any:
    """Returns the ClientApp of an app."""
    application = wire.flwr("clientapp").ClientApp()
    types = wire.flwr("app")

    def reply(message: Any, context: Any, work: Callable[[Node], dict[str, Any]]) -> Any:
        node = Node(folder, dict(context.run_config), dict(context.node_config))
        return types.Message(types.RecordDict(work(node)), reply_to=message)

    @application.query()
    def hello(message: Any, context: Any) -> Any:
        return reply(message, context, lambda node: {"hello": types.ConfigRecord(node.hello())})

    @application.train()
    def train(message: Any, context: Any) -> Any:
        return reply(message, context, lambda node: node.train(message.content, context.state))

    @application.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        return reply(message, context, lambda node: node.evaluate(message.content, context.state))

    del hello, train, evaluate
    return application


def check(folder: Path, client: int, data: str) -> str:
    """Says whether a site's data fit an app: form, classes, a batch to train on, and one step on it.

    Args:
        folder: the app, or the folder around its package.
        client: the client's number.
        data: the site's own data; "" in a rehearsal.

    Returns:
        What was found, with the class counts, which stay here.

    Raises:
        FedtailError: they do not fit; says why.
    """
    outer = folder if (folder / "pyproject.toml").is_file() else folder.parent
    run_config = config.read_toml(outer / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    [package] = outer.glob("*/experiment.toml")
    node = Node(package.parent, run_config, {"client": client, "data": data})
    counts = sites.check_site(node.experiment, node.data, client)
    names = sites.Form.read(package.parent).classes
    with one_thread():
        setting = node.setting(0, None)
        setting = dataclasses.replace(setting, work=dataclasses.replace(setting.work, epochs=1, steps=1))
        algorithm, worker = setting.algorithm, setting.task.worker("eager", False)
        everyone = torch.from_numpy(counts).to(setting.task.dtype) if algorithm.shares_counts else None
        here = Round(0, Phase(), 1, node.data.clients, node.experiment.rounds, 1.0, 0, 1, everyone)
        server = algorithm.init_server(
            Context(worker, here, setting.constants, None), generator(node.experiment.seed, Stream.ALGORITHM)
        )
        message = algorithm.broadcast(Context(worker, here, setting.constants, None), server)
        plan = setting.plans(here, 0, [client])
        one = Client(*(value[0] for value in setting.clients(plan)))
        run_client(setting, worker, here, one, message, {}, plan[client])
    table = "\n".join(f"  {name:24}{count:8,}" for name, count in zip(names, counts.tolist(), strict=True))
    tests = len(node.data.local_tests[client])
    more = f", {tests:,} to test on" if tests else ""
    return (f"client {client}: {counts.sum():,} examples{more} fit the experiment ({config.name_of(algorithm)}, "
            f"{len(names)} classes, inputs {list(setting.task.input_shape)}); a step was made.\n{table}")  # fmt: skip
