"""The engine whose clients are nodes, on a grid without processes: the loop engine's bits, and what it does with bad nodes."""

import dataclasses
import json

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

import contract_problem as problem
import numpy as np
import torch
from flower_grid import Client, Grid, deployed
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtail import cli, trees
from fedtail.errors import CheckpointError, ConfigError, TrainingError
from fedtail.experiment import Federation, resume
from fedtail.flower import engine as flower_engine
from fedtail.flower import node as flower_node
from fedtail.flower import server, wire
from fedtail.flower.roster import Options, Roster
from fedtail.personalise import Finetune

QUICK = Options(deadline=0.3, attempts=2, quorum=0.5)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(flower_engine, "POLL", 0.01)
    monkeypatch.setattr(flower_engine, "LOOK", 0.05)


def federation(case, name="ragged", options=None):
    chosen, method = problem.PROBLEMS[name], problem.CASES[case]
    data = problem.federated(chosen.sizes, chosen.images, (*method.columns, *method.server_columns))
    experiment = problem.experiment(case, name)
    grid, roster, engine = deployed(experiment, data, options)
    roster.look()
    return Federation(experiment, data, engine=engine), grid, roster


def states(running):
    return {k: running.states[k] for k in sorted(running.states)}


@pytest.mark.parametrize("case", problem.CASES)
def test_flower_equals_loop_exactly(case):
    wanted = problem.outcome(case, "ragged")
    running, grid, _ = federation(case)
    for index in range(problem.ROUNDS):
        record = running.step()
        assert trees.equal(running.server, wanted.servers[index])
        assert states(running).keys() == wanted.states[index].keys()
        assert all(trees.equal(v, wanted.states[index][k]) for k, v in states(running).items())
        if index + 1 == problem.ROUNDS:
            record.update(running.score())
        running.advance(record)
        assert record == wanted.records[index]
    running.close()
    resent = [content for kind, _, content in grid.sent if kind == "train" and "state" in content]
    assert not resent, "a node that keeps its state is not sent it"


PERSONAL = [
    case
    for case in problem.CASES
    if problem.experiment(case, "ragged").algorithm.personal and not case.startswith("Staged")
]


@pytest.mark.parametrize("case", [*PERSONAL, "fedavg"])
def test_nodes_that_keep_their_states_judge_themselves_as_the_simulator_does(case):
    """No server holds the personal models; the means over the clients' own scores have the simulator's bits."""
    chosen = problem.PROBLEMS["ragged"]
    data = problem.federated(chosen.sizes, chosen.images)
    tests = [rows if len(own) else rows[:0] for rows, own in zip(data.local_tests, data.owners, strict=True)]
    data = dataclasses.replace(data, local_tests=tests)  # who holds nothing has no node
    experiment = problem.experiment(case, "ragged")
    grid, roster, engine = deployed(experiment, data, Options(states="node"))
    roster.look()
    wanted, running = Federation(experiment, data), Federation(experiment, data, engine=engine)
    while running.round < problem.ROUNDS:
        assert step(running) == step(wanted)
    running.round = wanted.round = problem.ROUNDS - 1
    assert running.score() == wanted.score()
    running.close()
    wanted.close()
    assert not len(running.states)
    judged = [content for kind, _, content in grid.sent if kind == "evaluate"]
    assert len(judged) == np.count_nonzero([len(rows) for rows in tests])
    assert not any("state" in content for content in judged)


@pytest.mark.parametrize("records", [
    None, RuntimeError("no memory"), {"scores": ConfigRecord({"scores": 1.0})},
    {"scores": ArrayRecord({"scores": Array(np.full((1, 2, 5), 1.5))})},
    {"scores": ArrayRecord({"scores": Array(np.zeros((2, 2, 5)))})},
], ids=["silence", "error", "kind", "range", "shape"])  # fmt: skip
def test_a_node_that_does_not_judge_is_left_out_of_the_means(records):
    running, grid, _ = federation("fedavg", options=dataclasses.replace(QUICK, states="node"))
    step(running)
    everyone = running.score()["local"]
    grid.judge = {100: records}
    others = running.score()["local"]
    running.close()
    assert (everyone["clients"], others["clients"]) == (5, 4), "of six clients one holds nothing"


def test_tuned_models_are_those_of_the_simulator():
    """`evaluation.finetune`: the nodes tune, the server judges; their own states stay what they were."""
    case, chosen = "scaffold", problem.PROBLEMS["ragged"]
    experiment = problem.experiment(case, "ragged")
    judging = dataclasses.replace(experiment.evaluation, finetune=Finetune(epochs=1))
    experiment = dataclasses.replace(experiment, evaluation=judging, rounds=1)
    data = problem.federated(chosen.sizes, chosen.images)
    grid, roster, engine = deployed(experiment, data)
    roster.look()
    scores = []
    for running in (Federation(experiment, data), Federation(experiment, data, engine=engine)):
        step_record = running.step()
        scores.append((running.score(), step_record))
        kept = [sorted(client.memory) for client in grid.nodes.values()]
        running.close()
    assert scores[0] == scores[1]
    assert "tuned" in scores[0][0]
    assert all(key.endswith("0.train") for keys in kept for key in keys)


def test_an_experiment_that_starts_from_a_run_needs_it_on_the_server_alone():
    """The nodes' own model has other values; what they train is what the server sent them."""
    chosen = problem.PROBLEMS["ragged"]
    data = problem.federated(chosen.sizes, chosen.images)
    experiment = problem.experiment("fedprox", "ragged")
    _, roster, engine = deployed(experiment, data)
    roster.look()
    first = Federation(experiment, data).task.initial
    initial = trees.tree_map(lambda t: t * 1.5 if t.is_floating_point() else t, first)
    started = dataclasses.replace(experiment, start="a/run/that/only/the/server/has")
    wanted = Federation(started, data, initial=initial)
    found = Federation(started, data, initial=initial, engine=engine)
    roster.initial = found.task.initial
    for _ in range(2):
        assert step(found) == step(wanted)
        assert trees.equal(found.server, wanted.server)
    assert not trees.equal(found.server, problem.outcome("fedprox", "ragged").servers[1])
    found.close()
    wanted.close()


def step(running):
    record = running.step()
    running.advance(record)
    return record


def without(lost, case="scaffold", rounds=1):
    """The loop engine's federation in which these clients' results never come."""
    running = problem.federation(case, "ragged")

    class Lossy(type(running.engine)):
        def cohort(self, round, trained, message, states, plans, sink):
            for k in [k for k in plans if k in lost]:
                sink.drop(k, "lost")
            super().cohort(round, trained, message, states, {k: p for k, p in plans.items() if k not in lost}, sink)

    running.engine.__class__ = Lossy
    for _ in range(rounds):
        step(running)
    return running


def spoil(change):
    def behave(records, content):
        arrays = dict(records["update"])
        name = sorted(arrays)[0]
        arrays[name] = change(arrays[name])
        return {**records, "update": ArrayRecord(arrays)}

    return behave


def values(array, change):
    found = array.numpy().copy()
    change(found)
    return Array(found)


def poison(found):
    found.reshape(-1)[0] = np.nan


BAD = {
    "nan": spoil(lambda a: values(a, poison)),
    "shape": spoil(lambda a: Array(np.zeros((2, 3)))),
    "dtype": spoil(lambda a: Array(a.numpy().astype(np.float32))),
    "cut": spoil(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-3])),
    "header": spoil(lambda a: Array(a.dtype, a.shape, a.stype, b"not numpy" + a.data)),
    "pickle": spoil(lambda a: Array("object", (1,), "pickle", b"cos\nsystem\n(S'true'\ntR.")),
    "huge": spoil(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:10] + a.data[10:].replace(b"(", b"(99999999999, ", 1))),
    "name": lambda r, c: {**r, "update": ArrayRecord({"update/other": Array(np.zeros(1))})},
    "kind": lambda r, c: {**r, "update": ConfigRecord(dict.fromkeys(r["update"], 1.0))},
    "extra": lambda r, c: {**r, "more": ConfigRecord({})},
    "none": lambda r, c: {},
    "weight": lambda r, c: {**r, "answer": ConfigRecord({**r["answer"], "weight": float("inf")})},
    "negative": lambda r, c: {**r, "answer": ConfigRecord({**r["answer"], "weight": -1.0})},
    "client": lambda r, c: {**r, "answer": ConfigRecord({**r["answer"], "client": 0})},
    "examples": lambda r, c: {**r, "answer": ConfigRecord({**r["answer"], "examples": 10**9})},
    "metric": lambda r, c: {**r, "metrics": ArrayRecord({"metrics/loss": Array(np.array(np.nan))})},
    "state": lambda r, c: {**r, "state": ArrayRecord({k: values(a, poison) for k, a in r["state"].items()})},
    "error": lambda r, c: RuntimeError("out of memory"),
    "silence": lambda r, c: None,
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_a_bad_answer_drops_its_client_and_nothing_else(how):
    running, grid, _ = federation("scaffold", options=QUICK)
    victim = running.draw(running.algorithm.phases(0, 3)[0])[-1]
    grid.behave[100 + victim] = BAD[how]
    record = running.step()
    assert list(record["train"]["dropped"]) == [str(victim)], record["train"]
    assert record["train"]["dropped"][str(victim)]
    wanted = without({victim})
    assert trees.equal(running.server, wanted.server)
    assert victim not in running.states
    assert states(running).keys() == states(wanted).keys()
    running.close()


def test_the_reasons_are_words():
    running, grid, _ = federation("fedavg", options=QUICK)
    grid.behave[101], grid.behave[102] = BAD["silence"], BAD["nan"]
    cohort = running.draw(running.algorithm.phases(0, 3)[0])
    dropped = running.step()["train"].get("dropped", {})
    running.close()
    wanted = {
        1: "no answer within the deadline",
        2: "its answer is refused: The update of client 2 in round 0 is not finite",
    }
    assert {k: v.partition(" (")[0] for k, v in dropped.items()} == {str(k): wanted[k] for k in cohort if k in wanted}


def test_without_a_quorum_the_run_stops_and_nothing_was_changed():
    running, grid, _ = federation("fedavg", options=dataclasses.replace(QUICK, quorum=1.0))
    before = trees.clone(running.server)
    for node in list(grid.nodes)[1:]:
        grid.behave[node] = BAD["error"]
    with pytest.raises(TrainingError, match=r"the quorum is .*out of memory.*the same `flwr run` continues"):
        running.step()
    assert trees.equal(running.server, before)
    assert running.round == 0
    running.close()


def test_an_error_that_passes_is_asked_for_again():
    running, grid, _ = federation("scaffold", options=dataclasses.replace(QUICK, quorum=1.0))
    failures = {node: iter([RuntimeError("for once")]) for node in grid.nodes}
    for node in grid.nodes:
        grid.behave[node] = lambda r, c, node=node: next(failures[node], r)
    record = running.step()
    assert "dropped" not in record["train"]
    assert trees.equal(running.server, problem.outcome("scaffold", "ragged").servers[0])
    running.close()


def test_a_node_that_lost_its_state_gets_the_servers():
    wanted = problem.outcome("scaffold", "ragged")
    running, grid, _ = federation("scaffold")
    step(running)
    for client in grid.nodes.values():
        client.memory.clear()
    step(running)
    assert trees.equal(running.server, wanted.servers[1])
    assert any("state" in content for kind, _, content in grid.sent if kind == "train")
    running.close()


def test_a_client_that_comes_back_on_another_node_gets_its_state():
    wanted = problem.outcome("scaffold", "ragged")
    running, grid, _ = federation("scaffold")
    step(running)
    for node in list(grid.nodes):
        old = grid.nodes.pop(node)
        grid.nodes[node + 100] = Client(old.experiment, old.data, old.client, old.options)
    step(running)
    assert trees.equal(running.server, wanted.servers[1])
    running.close()


def test_an_answer_that_came_too_late_does_not_advance_the_state():
    """The client works in round 0, the server never hears of it; in round 1 it continues from its initial state."""
    running, grid, _ = federation("scaffold", options=QUICK)
    victim = running.draw(running.algorithm.phases(0, 3)[0])[0]
    grid.behave[100 + victim] = BAD["silence"]
    step(running)
    assert any(key.startswith("state") for key in grid.nodes[100 + victim].memory)
    del grid.behave[100 + victim]
    step(running)
    wanted = without({victim}, rounds=1)
    wanted.engine.__class__ = type(wanted.engine).__bases__[0]
    step(wanted)
    assert trees.equal(running.server, wanted.server)
    running.close()


def test_states_that_stay_on_nodes_never_reach_the_server():
    wanted = problem.outcome("scaffold", "ragged")
    running, _, _ = federation("scaffold", options=Options(states="node"))
    for index in range(problem.ROUNDS):
        record = running.step()
        assert trees.equal(running.server, wanted.servers[index])
        running.advance(record)
    assert not len(running.states)
    running.close()


def test_a_client_without_a_node_is_dropped_when_the_others_are_a_quorum():
    running, grid, _ = federation("fedavg", options=dataclasses.replace(QUICK, deadline=60.0))
    victim = running.draw(running.algorithm.phases(0, 3)[0])[0]
    del grid.nodes[100 + victim]
    assert running.step()["train"]["dropped"] == {str(victim): "no node speaks for it"}
    running.close()


@pytest.mark.parametrize(("name", "change"), [("fedtail", "0.0.0"), ("protocol", 99), ("client", -1), ("client", 10**6),
                                              ("examples", 1.5)])  # fmt: skip
def test_a_node_that_introduces_itself_wrongly_is_refused(name, change):
    _, grid, roster = federation("fedavg")
    stranger = Client(grid.nodes[100].experiment, grid.nodes[100].data, 0, Options())
    hello = stranger.hello()
    stranger.hello = lambda: {**hello, name: change}
    roster.population = 6
    grid.nodes[900] = stranger
    roster.look()
    assert 900 in roster.refused
    assert all(facts.node != 900 for facts in roster.nodes.values())


def test_of_two_nodes_for_one_client_the_later_one_counts():
    _, grid, roster = federation("fedavg")
    grid.nodes[900] = Client(grid.nodes[100].experiment, grid.nodes[100].data, 0, Options())
    roster.look()
    assert roster.nodes[0].node == 900
    assert "node 900" in roster.refused[100]
    count = len(grid.sent)
    roster.look()
    assert len(grid.sent) == count, "it is not asked again and again"


def test_trees_come_back_bit_for_bit():
    tree = {"a": torch.arange(6.0).reshape(2, 3).T, "b": (torch.tensor(True), torch.zeros(0, 3), torch.tensor(2**40))}
    back = wire.unpack(wire.pack(tree, "t"), wire.structure(tree), "t", "", torch.device("cpu"))
    assert trees.equal(back, tree)
    assert trees.equal(wire.take(wire.pack(tree, "t"), tree, "t"), tree)


@pytest.mark.parametrize(
    "options", [{"quorum": 0.0}, {"quorum": 1.5}, {"deadline": 0.0}, {"attempts": 0}, {"states": "disk"}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="deploy: "):
        Options(**options)


def test_options_come_from_flat_keys():
    assert Options.of({"quorum": 1, "share-counts": True, "other": 3}) == Options(quorum=1.0, share_counts=True)


def sites_app(folder, method):
    """An app on two sites with data of their own, one with test data, and all these data as one federation."""
    from fedtail.data.catalog import load
    from fedtail.data.federated import FederatedData
    from fedtail.federation import hold_out

    digits = load("digits")
    parts, tests = [np.arange(0, 400, 3), np.arange(1, 200)], [np.arange(40), np.zeros(0, np.int64)]
    for k, (rows, own) in enumerate(zip(parts, tests, strict=True)):
        test = {"x_test": digits.test.x[own], "y_test": digits.test.y[own]} if len(own) else {}
        np.savez(folder / f"site{k}.npz", x_train=digits.train.x[rows], y_train=digits.train.y[rows], **test)
    model = 'model = { name = "unified", branch = { name = "mlp", hidden = [8] } }\n' if method == "lightweight" else ""
    (folder / "experiment.toml").write_text(
        f'rounds = 3\nalgorithm = {{ name = "{method}" }}\nengine = {{ name = "loop" }}\nlocal = {{ epochs = 1 }}\n{model}'
        'data = { client_validation = 0.25 }\n[evaluation]\ngroups = { name = "thirds" }\n'
    )
    cli.dispatch(["deploy", str(folder / "experiment.toml"), str(folder / "app"), "--sites", "2", "--share-counts"])
    rows, ends = np.concatenate(parts), np.cumsum([0, *map(len, parts)])
    columns = {"x": torch.from_numpy(digits.train.array[rows]), "y": torch.from_numpy(digits.train.y[rows])}
    test = {"x": torch.from_numpy(digits.test.array), "y": torch.from_numpy(digits.test.y)}
    # each site draws what it holds out among its own rows, counted from 0
    owners, held = hold_out([np.arange(len(part)) for part in parts], 0.25, 0)
    owners, held = ([part + end for part, end in zip(each, ends[:-1], strict=True)] for each in (owners, held))
    whole = FederatedData(columns, owners, test, tests, 10, digits.mean, digits.std, held=held)
    return folder / "app" / "fedtail_app", whole


def site(app, options, folder, client):
    config = {"client": client, "data": str(folder / f"site{client}.npz"), "share-counts": True}
    found = flower_node.Node(app, {"sites": 2, "share-counts": True}, config)
    found.memory = RecordDict()
    return found


@pytest.mark.parametrize("method", ["fedgrab", "fedloge", "lightweight"])
def test_sites_train_as_one_federation_and_continue_after_a_stop(tmp_path, method, capsys):
    app, whole = sites_app(tmp_path, method)
    experiment = wire.load_experiment(app)
    wanted = Federation(experiment, whole)
    kept = []
    while wanted.round < 3:
        record = wanted.step()
        record.update(wanted.score())
        wanted.advance(record)
        kept.append(record)
    wanted.close()
    options = Options(run=str(tmp_path / "run"), sites=2, share_counts=True)
    found = []
    for steps in (1, 2):  # the second time as a new ServerApp, to new nodes
        roster = Roster(Grid([site(app, options, tmp_path, k) for k in (1, 0)]), options)
        running, rounds = server.open_run(experiment, options, roster)
        found += [next(rounds).record for _ in range(steps)]
        rounds.close()
    assert trees.equal(running.server, wanted.server)
    assert all(trees.equal(running.states[k], wanted.states[k]) for k in wanted.states)
    for record in kept:
        for scores in (record, *record.get("readings", {}).values()):
            for kind in {"local", "personal"} & scores.keys():
                scores[kind]["test_set"] = "each client's own test set"
    assert found == kept
    assert found[-1]["local"]["clients"] == 1
    with pytest.raises(
        CheckpointError, match=r"clients of other sizes .* Continue a deployment on sites with `flwr run`"
    ):
        next(resume(tmp_path / "run"))  # the simulator would train on other data
    with pytest.raises(ConfigError, match="are not here: its clients had data of their own"):
        cli.dispatch(["evaluate", str(tmp_path / "run"), "--split", "train"])
    capsys.readouterr()
    cli.dispatch(["evaluate", str(tmp_path / "run"), "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["test"] == found[-1]["test"]
    assert scores.keys() <= {"test", "readings"}, "no scores on data that are not the sites'"


def test_a_run_on_sites_begins_with_all_of_them(tmp_path):
    app, _ = sites_app(tmp_path, "fedavg")
    options = Options(run=str(tmp_path / "run"), sites=2, share_counts=True, wait=0.0)
    with pytest.raises(ConfigError, match=r"1 of 2 sites did not come within 0 s, the first is client 1"):
        server.open_run(wire.load_experiment(app), options, Roster(Grid([site(app, options, tmp_path, 0)]), options))


def test_a_run_folder_of_another_experiment_is_refused(tmp_path):
    app, _ = sites_app(tmp_path, "fedavg")
    options = Options(run=str(tmp_path / "run"), sites=2, share_counts=True)

    def begin(experiment):
        nodes = [site(app, options, tmp_path, k) for k in range(2)]
        return server.open_run(experiment, options, Roster(Grid(nodes), options))

    experiment = wire.load_experiment(app)
    begin(experiment)[0].close()
    with pytest.raises(CheckpointError, match="holds another experiment than this app"):
        begin(dataclasses.replace(experiment, rounds=9))
