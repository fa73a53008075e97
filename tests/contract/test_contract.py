"""The contract of every algorithm with the engines, in float64: see fedtail.algorithm and design section 8.1."""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import contract_problem as problem
import pytest
import torch
from contract_problem import CASES, LOOP, PROBLEMS, ROUNDS, distance, experiment, federation, form, model_of, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtail
from fedtail import config, trees
from fedtail.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from fedtail.checks.problems import fitting
from fedtail.config import Data, Evaluation, Experiment, Participation
from fedtail.data.longtail import Exponential
from fedtail.data.partition import DirichletMultinomial
from fedtail.data.plan import LocalWork
from fedtail.engines import EngineOptions, loop
from fedtail.engines.base import Sink
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.models.specs import DCGAN28, MLP
from fedtail.teachers import Trained

PARALLEL = EngineOptions(name="parallel", workers=3)
VMAP = EngineOptions(name="vmap")

# Everything on ragged clients; variants of a method (gates, optimizers) only there, but for Adam after BatchNorm.
OF = ("fedgrab-", "fedavg-", "fedopt-", "fednova-", "fedga-", "fedrs-", "lightweight-", "server_distillation-", "fedgan-",
      "effgan-", "uagan-")  # fmt: skip
VARIANTS = [case for case in CASES if case.startswith(OF) and case not in ("fedgrab-rank", "fedavg-adam")]
every_case = pytest.mark.parametrize("case", CASES)
every_problem = pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c in CASES for n in PROBLEMS if n == "ragged" or c not in VARIANTS]
)


def same(a, b):
    """Bit-equality of everything that a run leaves but its records' order of keys."""
    servers = all(trees.equal(x, y) for x, y in zip(a.servers, b.servers, strict=True))
    states = all(trees.equal(by_name(x), by_name(y)) for x, y in zip(a.states, b.states, strict=True))
    return servers and states and a.records == b.records


def by_name(states):
    """Client states as a tree."""
    return {str(number): state for number, state in sorted(states.items())}


def gap(a, b):
    """The largest difference of server states, client states and training metrics."""
    gaps = [distance(x, y) for x, y in zip(a.servers, b.servers, strict=True)]
    for x, y in zip(a.states, b.states, strict=True):
        assert x.keys() == y.keys()
        gaps += [distance(x[i], y[i]) for i in x]
    for x, y in zip(a.records, b.records, strict=True):
        assert x.keys() == y.keys()
        for part in ("train", "tune", "judge", "gather", "finetune", "server", "diagnostics", "bytes"):
            if part in x:
                assert x[part].keys() == y[part].keys()
                found, expected = (torch.cat([torch.as_tensor(v).double().flatten() for v in r[part].values()] or
                                             [torch.zeros(1)]) for r in (x, y))  # fmt: skip
                gaps.append(float((found - expected).abs().max()))
    return max(gaps)


@every_problem
def test_loop_equals_parallel_exactly(case, name):
    assert same(outcome(case, name, LOOP), outcome(case, name, PARALLEL))


@every_case
def test_loop_equals_processes_exactly(case):
    assert same(outcome(case, "ragged", LOOP), outcome(case, "ragged", EngineOptions(name="processes", workers=2)))


@every_problem
def test_donated_equals_undonated_exactly(case, name):
    assert same(outcome(case, name, LOOP), outcome(case, name, dataclasses.replace(LOOP, donate=False)))


@every_problem
def test_vmap_equals_the_loop_to_rounding_whatever_the_chunk(case, name):
    reference = outcome(case, name, LOOP)
    for chunk in (1, 2, 32) if name == "ragged" and case not in VARIANTS else (2,):
        assert gap(reference, outcome(case, name, dataclasses.replace(VMAP, chunk=chunk))) <= 1e-10


@every_problem
def test_equal_seeds_give_equal_results_and_others_do_not(case, name):
    first = outcome(case, name)
    assert same(first, outcome.__wrapped__(case, name))  # computed anew
    other = outcome(case, name, seed=1)
    assert not trees.equal(model_of(first.initial), model_of(other.initial))
    assert not trees.equal(first.servers[-1], other.servers[-1])


def warm_federation(case, name, engine):
    """A federation after one round, so that clients have states."""
    running = federation(case, name, engine)
    running.advance(running.step())
    return running


@pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c in CASES for n in ("ragged", "batchnorm") if n == "ragged" or c not in VARIANTS]
)
@pytest.mark.parametrize("engine", [LOOP, PARALLEL, VMAP], ids=lambda e: e.name)
def test_a_cohort_modifies_none_of_its_inputs(case, name, engine):
    with contextlib.closing(warm_federation(case, name, engine)) as running:
        setting = running.engine.setting
        server, trained = running.server, 0
        for phase in running.algorithm.phases(running.round, ROUNDS):
            ids = running.draw(phase)
            ctx = running.context(phase, len(ids))
            message = running.algorithm.broadcast(ctx, server)
            plans = setting.plans(ctx.round, trained, ids)
            states = {i: setting.state(ctx, message, running.states, i) for i in ids}
            orders = {str(i): torch.from_numpy(plan.order) for i, plan in plans.items()}
            inputs = (server, message, by_name(states), setting.constants, setting.task.initial, running.task.initial,
                      dict(setting.data.columns), orders)  # fmt: skip
            before = trees.clone(inputs)
            sink = Sink(list(plans), phase.reduce == "collect")
            running.engine.cohort(ctx.round, trained, message, states, plans, sink)
            assert trees.equal(inputs, before)
            total = torch.tensor(sink.total, dtype=setting.task.dtype)
            if phase.reduce == "collect":
                updates = trees.clone(tuple(sink.updates))
                server = running.algorithm.server_collect(
                    ctx, server, sink.updates, torch.tensor(sink.weights, dtype=total.dtype)
                )
                assert trees.equal(tuple(sink.updates), updates)
            else:
                mean = sink.mean()
                kept = trees.clone(mean)
                server = running.algorithm.server_update(ctx, server, mean, total)
                assert trees.equal(mean, kept)
            assert trees.equal(inputs, before)
            trained += phase.local


@pytest.mark.parametrize("case", [case for case in CASES if case not in VARIANTS])
@pytest.mark.parametrize("engine", [LOOP, PARALLEL, VMAP], ids=lambda e: e.name)
def test_the_order_of_a_cohort_does_not_matter(case, engine):
    with contextlib.closing(warm_federation(case, "ragged", engine)) as running:
        setting, phase = running.engine.setting, running.algorithm.phases(1, ROUNDS)[0]
        ids = running.draw(phase)
        ctx = running.context(phase, len(ids))
        message = running.algorithm.broadcast(ctx, running.server)
        found = []
        for order in (ids, ids[::-1], random.Random(3).sample(ids, len(ids))):
            plans = setting.plans(ctx.round, 0, order)
            sink = Sink(list(plans), phase.reduce == "collect")
            running.engine.cohort(ctx.round, 0, message, running.states, plans, sink)
            received = tuple(sink.updates) if sink.collect else sink.mean()
            found.append((received, by_name(sink.states), sink.metrics()))
    assert trees.equal(found[0], found[1])
    assert trees.equal(found[0], found[2])


@every_problem
def test_states_keep_their_form_within_a_stage(case, name):
    done = outcome(case, name)
    forms = {}
    for server, states, stage in zip(done.servers, done.states, done.stages, strict=True):
        assert forms.setdefault(stage, form(server)) == form(server)
        for state in states.values():
            assert forms.setdefault("client", form(state)) == form(state)
    assert all(leaf.dtype in (torch.float64, torch.int64) for leaf in trees.leaves(done.servers[-1]))


@every_problem
def test_records_are_plain_values(case, name):
    for record in outcome(case, name).records:
        assert json.loads(json.dumps(record)) == record


@every_problem
def test_states_survive_a_checkpoint_bit_for_bit(case, name, tmp_path):
    done = outcome(case, name)
    meta = {"round": ROUNDS, "stage": done.stages[-1], "best": -1.0, "metrics_bytes": 0, "experiment": "x"}
    snapshot = Snapshot(done.servers[-1], done.states[-1], meta)
    save_checkpoint(tmp_path / "first.safetensors", snapshot)
    back = load_checkpoint(tmp_path / "first.safetensors", "x")
    assert type(back.server) is type(snapshot.server)
    assert trees.equal(back.server, snapshot.server)
    assert back.clients.keys() == snapshot.clients.keys()
    for i, state in snapshot.clients.items():
        assert type(back.clients[i]) is type(state)
        assert trees.equal(back.clients[i], state)
    assert {k: back.meta[k] for k in meta} == meta
    backwards = dict(sorted(snapshot.clients.items(), reverse=True))
    save_checkpoint(tmp_path / "second.safetensors", back._replace(clients=backwards, meta=meta))
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


@every_problem
def test_every_trainable_tensor_and_every_statistic_moves(case, name):
    done = outcome(case, name)
    frozen = "head." if case == "fedgrab-release" else None
    before = done.initial
    # these servers have no model; their client 0 trains in every round
    models = (
        [s[0] for s in done.states] if case in ("fedproto", "fedmd") else [model_of(server) for server in done.servers]
    )
    for index, now in enumerate(models):
        last = index == ROUNDS - 1
        head_alone = case in ("crt", "ccvr") and last  # what they do after training
        if case.startswith("effgan") and last:  # its experts have slots of their own
            assert trees.equal(now, before)
            continue
        unfrozen = (
            {"lightweight": ("head.",), "lightweight-averaged": ("branch", "hidden.")}.get(case, ())
            if index == 1
            else ()
        )
        for key, value in now.params.items():
            trained = not (frozen and key.startswith(frozen)) and not (head_alone and not key.startswith("head."))
            if (
                unfrozen and key in before.params
            ):  # the head is new in that round, and the second classifier in `averaged`
                trained = key.startswith(unfrozen)
            old = before.params.get(key, torch.ones_like(value))  # the factor that `Staged` adds starts at one
            assert torch.equal(value, old) != trained, f"{key} in round {index}"
        for key, value in now.buffers.items():
            assert torch.equal(value, before.buffers[key]) == head_alone, f"{key} in round {index}"
        before = now


@every_case
def test_the_configuration_survives_json_and_toml(case):
    whole = experiment(case, "ragged")
    assert config.from_dict(Experiment, json.loads(json.dumps(config.to_dict(whole)))) == whole
    assert config.from_dict(Experiment, tomllib.loads(config.dumps(whole))) == whole


def resumable(case, **changes):
    """A small experiment on data that a run folder can name."""
    columns = {*CASES[case].columns, *CASES[case].server_columns}
    if "teacher" in columns:
        changes["teacher"] = Trained(probe=2, epochs=1, model=MLP(hidden=(8,)))
    data = Data(longtail=Exponential(factor=50.0), partition=DirichletMultinomial(clients=5), server=2, validation=2,
                client_validation=0.2 if CASES[case].needs_branches else 0.0)  # fmt: skip
    values = dict(
        rounds=4, algorithm=CASES[case], model=fitting(CASES[case], MLP(hidden=(12,))), data=data,
        local=LocalWork(steps=2, batch_size=8), participation=Participation(clients=3),
        evaluation=Evaluation(every=2, keep="best"), engine=LOOP,
    )  # fmt: skip
    if CASES[case].generative:  # on images of 8 x 8
        values |= {"model": DCGAN28(width=2, latent=3), "evaluation": Evaluation(every=2),
                   "local": LocalWork(steps=2, batch_size=8, min_batch=2)}  # fmt: skip
    return Experiment(**{**values, **changes})


def interrupt(whole, folder, rounds):
    """Runs the first rounds of an experiment and stops."""
    iterator = fedtail.run(whole, folder)
    for _ in range(rounds):
        next(iterator)
    iterator.close()


def assert_same_run(first, second):
    files = {p.relative_to(first) for p in first.rglob("*") if p.is_file()} - {Path("timings.jsonl")}
    assert {p.relative_to(second) for p in second.rglob("*") if p.is_file()} - {Path("timings.jsonl")} == files
    for file in files - {Path("environment.json"), Path(".lock"), Path("partition.npz")}:  # the last has a time stamp
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@every_case
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path):
    whole = resumable(case)
    assert len(list(fedtail.run(whole, tmp_path / "whole"))) == 4
    interrupt(whole, tmp_path / "parts", 2)
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes().count(b"\n") == 2
    assert [r.index for r in fedtail.resume(tmp_path / "parts")] == [2, 3]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert list(fedtail.resume(tmp_path / "parts")) == []


@pytest.mark.parametrize("engine", [PARALLEL, VMAP], ids=lambda e: e.name)
def test_rounds_since_the_last_checkpoint_are_repeated(engine, tmp_path):
    whole = resumable("staged", engine=engine, checkpoint_every=2)
    list(fedtail.run(whole, tmp_path / "whole"))
    interrupt(whole, tmp_path / "parts", 3)
    assert [r.index for r in fedtail.resume(tmp_path / "parts")] == [2, 3]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_another_process_resumes_a_users_own_algorithm(tmp_path):
    whole = resumable("staged")
    list(fedtail.run(whole, tmp_path / "whole"))
    interrupt(whole, tmp_path / "parts", 2)
    code = f"import fedtail; list(fedtail.resume({str(tmp_path / 'parts')!r}))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_gathering_many_steps_at_once_changes_nothing(name, monkeypatch):
    reference = outcome("staged", name)
    monkeypatch.setattr(loop, "GATHER", 6)  # a batch and a half
    assert same(reference, outcome.__wrapped__("staged", name))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 5), st.integers(1, 5),
    st.integers(0, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["staged", "fedgrab-rank", "collecting"]),
)  # fmt: skip
@settings(max_examples=12)
def test_engines_agree_on_any_sizes_and_any_work(sizes, batch, least, steps, chunk, images, case):
    """Clients, batches and chunks of any size: padding, grouping and left-out batches never show."""
    work = LocalWork(epochs=2, steps=steps, batch_size=batch, min_batch=min(least, batch))
    model = PROBLEMS["batchnorm" if images else "dropout"].model
    found = []
    for engine in (LOOP, PARALLEL, dataclasses.replace(VMAP, chunk=chunk)):
        whole = Experiment(rounds=2, algorithm=CASES[case], model=model, dtype="float64", engine=engine, local=work)
        data = problem.federated(sizes, images)
        if not any(len(work.lengths(size)) for size in sizes):
            with pytest.raises(ConfigError, match="leave no client with a batch"):
                Federation(whole, data)
            return
        with contextlib.closing(Federation(whole, data)) as running:
            for _ in range(2):
                running.advance(running.step())
            found.append((running.server, by_name(running.states)))
    assert trees.equal(found[0], found[1])
    assert distance(found[0], found[2]) <= 1e-10


def test_phases_of_a_round_are_separate():
    """Two training phases of a round have their own cohorts, batches and draws; both are recorded."""
    with contextlib.closing(federation("collecting", "ragged")) as running:
        record = running.step()
        assert record["train"]["clients"] == 4
        assert record["gather"]["clients"] == 5  # everyone but the client without data
        setting, here = running.engine.setting, running.context().round
        first, second = (setting.plans(here, trained, [0])[0] for trained in (0, 1))
        assert first.lengths.tolist() == second.lengths.tolist()
        assert first.order.tolist() != second.order.tolist()
        assert float(running.server.weight) == 33  # 9 + 1 + 12 + 4 + 7 examples


def test_an_evaluating_phase_sees_each_example_once():
    """`Judging`: the loss in a client's slot is the mean over its data at the broadcast model, recomputed here."""
    with contextlib.closing(federation("judging", "dropout")) as running:
        setting, model = running.engine.setting, running.server.model
        running.step()
        for i, owned in enumerate(setting.data.owners):
            rows = setting.data.gather(torch.from_numpy(owned), torch.float64, {}, ("x", "y"))
            expected = 0.0
            if len(owned):
                z, _ = running.worker.apply(model, rows["x"], train=False)
                expected = float(torch.nn.functional.cross_entropy(z, rows["y"]))
            assert float(running.server.losses[i]) == pytest.approx(expected, abs=1e-12)
        assert all(int(count) == 1 for count in running.states.values() if int(count))
        assert sum(int(count) for count in running.states.values()) == 4  # the cohort of the training phase


def test_stages_constants_server_data_and_personal_scores():
    done = outcome("staged", "ragged")
    assert done.stages == [0, 1, 1]
    assert "head.scale" not in done.servers[0].model.params
    assert "head.scale" in done.servers[1].model.params
    assert int(done.servers[-1].batches) == ROUNDS * 2 * 2  # 8 examples in batches of 4, 2 epochs
    assert done.records[-1]["server"]["loss"] > 0
    assert done.records[-1]["personal"]["clients"] == done.records[-1]["local"]["clients"] == 6
    with (
        contextlib.closing(federation("staged", "ragged")) as one,
        contextlib.closing(federation("staged", "ragged", seed=1)) as other,
    ):
        assert form(one.constants) == {"offset": ((problem.CLASSES,), torch.float64)}
        assert not trees.equal(one.constants, other.constants)


def test_a_trainable_subset_leaves_the_rest_alone():
    """`Staged` trains the head alone in round 0: what clients send holds nothing else, and the rest stays bit for bit."""
    with contextlib.closing(federation("staged", "batchnorm")) as running:
        setting, phase = running.engine.setting, running.algorithm.phases(0, ROUNDS)[0]
        ctx = running.context(phase, 1)
        plans = setting.plans(ctx.round, 0, [0])
        sink = Sink([0])
        running.engine.cohort(ctx.round, 0, running.server, {}, plans, sink)
        mean = sink.mean()
        assert sorted(mean.params) == ["head.bias", "head.weight"]
        new = running.algorithm.server_update(ctx, running.server, mean, torch.tensor(1.0))
        for key, value in new.model.params.items():
            assert torch.equal(value, running.server.model.params[key]) != key.startswith("head."), key
