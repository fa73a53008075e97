"""`fedtail check`: sound methods pass every rule; each broken one fails the rule that it breaks, with its own remedy."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

import fedtail
from fedtail import checks, cli, config
from fedtail.algorithm import Algorithm
from fedtail.algorithms import ALGORITHMS
from fedtail.errors import ConfigError

SOUND = '''\
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fedtail import Algorithm, Variables, cross_entropy, delta, descend, sgd_step, start

SEEN = []


class State(NamedTuple):
    steps: torch.Tensor  # (), local steps in all rounds so far


@dataclass(frozen=True, kw_only=True)
class Mine(Algorithm):
    """FedAvg whose clients count their steps."""

    rate: float = 1.0
    """Step of the server."""
    # FIELD

    def init_client(self, ctx, message, rng):
        return State(torch.zeros((), dtype=ctx.task.dtype))

    def broadcast(self, ctx, server):
        return server  # BROADCAST

    def local_init(self, ctx, message, client):
        return start(self.optimizer, message)  # INIT

    def local_step(self, ctx, message, client, local, batch):
        def objective(v, extra):
            risk, new = cross_entropy(ctx.task, v, batch)
            return risk, (new, extra, {})  # OBJECTIVE

        new, metrics = sgd_step(ctx, local, objective, self.optimizer)  # STEP
        return new, metrics  # STEPPED

    def local_final(self, ctx, message, client, local):
        update = delta(message, local.variables)
        return update, State(client.steps + ctx.here.steps)  # FINAL

    def server_update(self, ctx, server, mean, total):
        return descend(server, mean, self.rate)  # SERVER

    def predict(self, ctx, message, client, x):
        return ctx.task.apply(message, x, train=False)[0]  # PREDICT
'''


def written(folder, mark="", line=""):
    """Writes the sound method, or one in which the marked line is another; returns the path."""
    text = SOUND
    if mark:
        [old] = [given for given in SOUND.splitlines() if given.endswith(f"# {mark}")]
        indent = " " * (len(old) - len(old.lstrip()))
        text = text.replace(old, textwrap.indent(textwrap.dedent(line).strip("\n"), indent))
    path = folder / "mine.py"
    path.write_text(text)
    return path


def failures(results):
    return {result.rule: result for result in results if result.status == "failed"}


def test_a_sound_method_of_ones_own_passes(tmp_path, capsys):
    path = written(tmp_path)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.dispatch(["check", f"{path}:Mine", "--rate", "0.5", "--optimizer.lr", "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"ok    {rule.name}" for rule in checks.RULES]
    assert lines[-1] == f"{path}:Mine: {len(checks.RULES)} of {len(checks.RULES)} rules hold"


def test_every_rule_has_a_name_of_its_own_a_reason_and_a_remedy():
    assert len({rule.name for rule in checks.RULES}) == len(checks.RULES) >= 20
    for rule in checks.RULES:
        assert rule.why.endswith("."), rule.name
        assert len(rule.remedy) > 40, rule.name


def test_fedavg_passes_through_the_python_door():
    results = fedtail.check(fedtail.FedAvg(server_lr=0.7))
    assert failures(results) == {}
    assert [result.rule for result in results] == [rule.name for rule in checks.RULES]
    assert {result.status for result in results} == {"passed"}


FROZEN = {"fedbabu": ("head.",)}  # on purpose
# defaults that need more than three rounds, or a larger problem
SHORT = {
    "fedloge": {"sparsity": 0.3, "etf_steps": 20},
    "crt": {"retrain_rounds": 1},
    "lightweight": {"dual_rounds": 1, "unfreeze_rounds": (1,)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n != "fedavg"])
def test_registered_methods_pass(name):
    cls = config.resolve(Algorithm, name)
    if name == "post_hoc":
        with pytest.raises(ConfigError, match="trains no backbone"):
            fedtail.check(name)
    else:
        assert failures(fedtail.check(cls(**SHORT.get(name, {})), FROZEN.get(name, ()))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Staged", "Collecting", "Judging"])
def test_methods_with_stages_phases_and_personal_models_pass(name):
    from contract_problem import FILE

    assert failures(fedtail.check(f"{FILE}:{name}")) == {}


# What breaks a rule ---------------------------------------------------------------------------------------------------

# mark, line in its place -> rule, what is seen, what to do
BROKEN = {
    "state in self": (
        "FINAL", 'object.__setattr__(self, "last", update)\nreturn update, State(client.steps + ctx.here.steps)',
        "state in values", r"self\.last changed during a round",
        r"Your state lives in self.*client state.*line \d+: object.__setattr__\(self",
    ),
    "momentum in self": (
        "SERVER",
        """
        old = getattr(self, "old", None) or mean
        object.__setattr__(self, "old", mean)
        return descend(descend(server, mean), old, 0.5)
        """,
        "same seed, same result", r"run twice: the server state after round 0: params/.* differs by",
        r"server state for the server.*line \d+: object.__setattr__\(self",
    ),
    "lost on resume": (
        "SERVER",
        """
        old = getattr(self, "old", None) if ctx.round.index else None
        object.__setattr__(self, "old", mean)
        return descend(descend(server, mean), old or mean, 0.5)
        """,
        "resume = uninterrupted", r"stopped after round 0 and resumed: the server state .* differs by",
        r"must be in the server state or a client state",
    ),
    "message in place": (
        "INIT", 'next(iter(message.params.values())).add_(0.01)\nreturn start(self.optimizer, message)',
        "inputs unmodified", r"client \d modified its inputs in round 1: message/params/\S+ differs by 0.01",
        r"Make new tensors.*line \d+: next\(iter\(message",
    ),
    "server in place": (
        "SERVER", "for key, value in mean.params.items():\n    server.params[key] += value\nreturn server",
        "inputs unmodified", r"server_update modified its inputs in round 1: message/params",
        r"Make new tensors.*line \d+: server.params\[key\] \+= value",
    ),
    "item": (
        "STEPPED", 'if metrics["loss"].item() > 1:\n    return new, metrics\nreturn new, metrics',
        "loop = vmap", r"RuntimeError.*\.item\(\).*mine\.py, line \d+, in local_step: if metrics",
        r"keep tensors; branch with torch\.where.*line \d+: if metrics\[\"loss\"\]\.item",
    ),
    "branch": (
        "OBJECTIVE", "if risk > 1:\n    risk = risk * 1\nreturn risk, (new, extra, {})",
        "loop = vmap", r"data-dependent control flow.*in objective: if risk > 1", r"branch with torch\.where",
    ),
    "padding counted": (
        "OBJECTIVE",
        """
        z, new = ctx.task.apply(v, batch.x, draws=batch.draws)
        return F.cross_entropy(z, batch.y), (new, extra, {})
        """,
        "loop = vmap", r"after round \d: \S+ differs by .* \(loop engine against vmap\)", r"Average with batch\.mean",
    ),
    "randomness": (
        "FINAL",
        """
        noise = {k: 0.1 * torch.randn(v.shape, dtype=v.dtype) for k, v in update.params.items()}
        return update._replace(params={k: v + noise[k] for k, v in update.params.items()}), client
        """,
        "no global randomness", "the global generator of torch was used",
        r"Declare a draw.*line \d+: noise = .*torch\.randn",
    ),
    "NumPy's randomness": (
        "FINAL", "return update, State(client.steps + float(np.random.rand()))",
        "no global randomness", "the global generator of NumPy was used", r"Declare a draw.*np\.random\.rand",
    ),
    "deaf to the seed": (
        "SERVER", "return Variables({k: v * 0 + ctx.round.index for k, v in server.params.items()}, server.buffers)",
        "another seed, another result", r"seeds 0 and 1 end in the same server state", r"start from ctx\.task\.initial",
    ),
    "forgotten statistics": (
        "SERVER", "return descend(server, mean, self.rate)._replace(buffers=server.buffers)",
        "BatchNorm", r"bn1\.running_mean did not change in three rounds", r"carry `buffers` beside `params`",
    ),
    "old statistics": (
        "OBJECTIVE", "return risk, (v, extra, {})",
        "BatchNorm", r"bn1\.running_mean did not change", r"Return the variables that ctx\.task\.apply gives back",
    ),
    "a number in the update": (
        "FINAL", 'return {"change": update, "steps": 3}, client',
        "summable", r"in update of client \d, steps is a int \(3\)", r"torch\.tensor\(3\.0",
    ),
    "a weight that is a number": (
        "FIELD", "def weight(self, ctx):\n    return 1.0",
        "summable", r"the weight of client \d is 1\.0, not a tensor", r"Turn numbers into tensors",
    ),
    "updates of unequal form": (
        "FINAL", "return {f'client {int(ctx.here.index)}': update}, client",
        "summable", r"clients \d and \d send updates that cannot be added: client \d/params/\S+ was float64",
        r"every client of a cohort send the same names",
    ),
    "a state that grows": (
        "FINAL", "return update, State(torch.cat([client.steps.reshape(-1), ctx.here.steps.reshape(1)]))",
        "stable states", r"the state of client \d has another form after round \d: steps was float64 of shape \(2,\)",
        r"with the shape that it will have",
    ),
    "half precision": (
        "FINAL", "return update, State((client.steps + ctx.here.steps).float())",
        "stable states", r"the state of client \d: steps is float32 in a run in float64", r"dtype=ctx\.task\.dtype",
    ),
    "the order of the cohort": (
        "FINAL",
        """
        SEEN.append(1)
        return update._replace(params={k: v / len(SEEN) for k, v in update.params.items()}), client
        """,
        "cohort order", r"clients \[.*\] and the same clients as \[.*\] give other results", r"not on who trained before",
    ),
    "a random advance": (
        "FIELD",
        """
        def advance(self, ctx, server, metrics):
            return ctx.round.stage, server._replace(params={k: v + torch.randn(v.shape) for k, v in server.params.items()})
        """,
        "no global randomness", "the global generator of torch was used", r"line \d+: return ctx\.round\.stage, .*randn",
    ),
    "an advance with a generator of its own": (
        "FIELD",
        """
        def advance(self, ctx, server, metrics):
            noise = float(np.random.default_rng().normal())
            return ctx.round.stage, server._replace(params={k: v + noise for k, v in server.params.items()})
        """,
        "deterministic", r"advance, called twice with equal arguments, returns something else: server state/params/\S+ differs",
        r"Look for random numbers of your own",
    ),
    "a random stage": (
        "FIELD",
        """
        def advance(self, ctx, server, metrics):
            SEEN.append(1)
            return len(SEEN), server
        """,
        "deterministic", r"advance, called twice with equal arguments, returns something else: stage differs by 1",
        r"server state for the server.*line \d+: SEEN\.append",
    ),
    "a negative weight": (
        "FIELD", "def weight(self, ctx):\n    return ctx.here.examples - 2",
        "finite numbers", r"the weight of client 1 in phase 'train' is -1\.", r"Return a finite weight >= 0",
    ),
    "a weight that is not a number": (
        "FIELD", "def weight(self, ctx):\n    return (ctx.here.examples - 2).log()",
        "finite numbers", r"the weight of client 1 in phase 'train' is nan\.", r"Return a finite weight >= 0",
    ),
    "a metric that is not a number": (
        "STEPPED", 'return new, {**metrics, "share": batch.sum((batch.y == 3) * 1.0).log()}',
        "finite numbers", r"the metric share of client \d in phase 'train' is not finite at local step \d\.",
        r"Guard divisions and logarithms",
    ),
    "an update that is not a number": (
        "FINAL", "return update._replace(params={k: v / 0 for k, v in update.params.items()}), client",
        "finite numbers", r"the update of client \d in phase 'train' is not finite \(first in params/\S+\)",
        r"Guard divisions and logarithms",
    ),
    "diagnostics that are not a number": (
        "FIELD",
        """
        def diagnostics(self, ctx, server):
            return {"share": torch.zeros(2) / ctx.round.index}
        """,
        "three rounds", r"diagnostics/share of round 0 is not finite", r"Guard divisions and logarithms",
    ),
    "a schedule ignored": (
        "STEP",
        "new, metrics = sgd_step(ctx._replace(round=ctx.round._replace(lr_scale=1.0)), local, objective, self.optimizer)",
        "learning-rate schedule", r"half the learning rate \(ctx\.round\.lr_scale is 0\.5\) ends like one with the whole",
        r"Step with sgd_step; or give ctx\.round\.lr_scale to ctx\.task\.update",
    ),
    "an update without the schedule": (
        "STEP",
        """
        def function(params):
            risk, (new, *_) = objective(Variables(params, local.variables.buffers), ())
            return risk, new.buffers

        value, buffers, grads = ctx.task.value_and_grad(function, local.variables.params)
        params, state = ctx.task.update(self.optimizer, grads, local.optimizer, local.variables.params)
        new, metrics = local._replace(variables=Variables(params, buffers), optimizer=state), {"loss": value}
        """,
        "learning-rate schedule", r"bit for bit, on every client and on the server", r"lr_scale to ctx\.task\.update",
    ),
    "a random predict": (
        "PREDICT", "z = ctx.task.apply(message, x, train=False)[0]\nreturn z + torch.randn(z.shape)",
        "each input alone", r"the generic model, asked twice for the same inputs, gives other logits: .* differs by",
        r"Draw and keep nothing in predict.*line \d+: return z \+ torch\.randn",
    ),
    "a predict that looks at the batch": (
        "PREDICT", "z = ctx.task.apply(message, x, train=False)[0]\nreturn z - z.mean(0)",
        "each input alone", r"the generic model gives an input other logits alone than among six: .* differs by [\d.e-]+\.$",
        r"take no mean over the batch",
    ),
    "batch statistics in predict": (
        "PREDICT", "return ctx.task.apply(message, x)[0]",
        "each input alone", r"other logits alone than among six: .* differs by .*; network with BatchNorm",
        r"Apply the model with train=False",
    ),
    "an untrained tensor": (
        "STEP",
        """
        some = [k for k in local.variables.params if k != "head.bias"]
        part = local._replace(optimizer=start(self.optimizer, local.variables, (), some).optimizer)
        new, metrics = sgd_step(ctx, part, objective, self.optimizer, trainable=some)
        new = new._replace(optimizer=local.optimizer)
        """,
        "every tensor moves", r"head\.bias did not change in three rounds", r"Frozen on purpose: fedtail check",
    ),
    "labels": (
        "PREDICT", "return ctx.task.apply(message, x, train=False)[0].argmax(1)",
        "predict", r"the generic model gives \(5,\) for 5 inputs, not \(5, 4\)", r"without argmax",
    ),
    "Dropout in predict": (
        "PREDICT", "return ctx.task.apply(message.model, x, train=False)[0]",
        "predict", r"'Variables' object has no attribute 'model' \(.*mine\.py, line \d+, in predict", r"Return ctx\.task",
    ),
    "masks forgotten": (
        "OBJECTIVE", "z, new = ctx.task.apply(v, batch.x)\nreturn risk + 0 * batch.mean(z.sum(1)), (new, extra, {})",
        "Dropout", r"mine\.py, line \d+, in objective: z, new = ctx\.task\.apply", r"draws=batch\.draws",
    ),
    "an error": (
        "FINAL", "return update, State(client.stepz)",
        "runs", r"AttributeError: 'State' object has no attribute 'stepz' \(.*mine\.py, line \d+, in local_final: return",
        r"Mend the line",
    ),
    "an option that no file can hold": (
        "FIELD", "shape: Any = torch.float32",
        "configuration", r"JSON cannot hold the options", r"a default of a plain type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_fails_the_rule_that_it_breaks(name, tmp_path):
    mark, line, rule, seen, remedy = BROKEN[name]
    path = written(tmp_path, mark, line)
    if name == "the order of the cohort":
        path.write_text(path.read_text().replace("return server  # BROADCAST", "SEEN.clear()\n        return server"))
    tested = [r for r in checks.RULES if r.gate or r.name == rule]  # all of them take seconds
    found = failures(checks.examine(f"{path}:Mine", rules=tested))
    assert list(found) == [rule]
    assert found[rule].why == next(r.why for r in checks.RULES if r.name == rule)
    assert re.search(seen, found[rule].seen, re.DOTALL), found[rule].seen
    assert re.search(remedy, found[rule].remedy), found[rule].remedy


def test_one_fault_is_reported_once(tmp_path):
    """A branch on a value breaks nothing but the stacked engine; what cannot be tested then is skipped, not failed."""
    path = written(tmp_path, "OBJECTIVE", "if risk > 1:\n    risk = risk * 1\nreturn risk, (new, extra, {})")
    results = fedtail.check(f"{path}:Mine")
    assert list(failures(results)) == ["loop = vmap"]
    assert [result.rule for result in results if result.status == "skipped"] == ["chunk size"]


def test_the_command_says_which_rule_is_broken_and_ends_with_1(tmp_path, capsys):
    path = written(tmp_path, "FINAL", "return update, State(client.stepz)")
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.dispatch(["check", f"{path}:Mine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["ok    configuration", "FAIL  runs"]
    assert [line.split()[0] for line in lines[2:-1] if line[6:10].strip()] == ["seen", "why", "mend"]
    assert lines[-1] == f"{path}:Mine: 1 of {len(checks.RULES)} rules hold; {len(checks.RULES) - 2} could not be tested"
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.dispatch(["check", f"{path}:Mine", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["algorithm"] == f"{path}:Mine"
    assert found["passed"] is False
    assert [rule["status"] for rule in found["rules"]] == ["passed", "failed"] + ["skipped"] * (len(checks.RULES) - 2)
    assert found["rules"][1].keys() == {"rule", "status", "seen", "why", "remedy"}


MOVES = [rule for rule in checks.RULES if rule.gate or rule.name == "every tensor moves"]


def test_what_is_frozen_on_purpose_must_stay(tmp_path):
    mark, line, *_ = BROKEN["an untrained tensor"]
    path = written(tmp_path, mark, line)
    assert failures(checks.examine(f"{path}:Mine", frozen=["head.bias"], rules=MOVES)) == {}
    [one] = failures(checks.examine("fedavg", frozen=["head.bias"], rules=MOVES)).values()
    assert one.seen == "head.bias changed in three rounds, although it was said to be frozen."


def test_a_class_without_its_decorator_has_no_options(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("@dataclass(frozen=True, kw_only=True)", ""))
    [one] = failures(fedtail.check(f"{path}:Mine")).values()
    assert one.rule == "configuration"
    assert "Mine is not a dataclass" in one.seen
    assert "@dataclass(frozen=True, kw_only=True)" in one.remedy


def test_what_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'fedprox'"):
        cli.dispatch(["check", "fedprocs"])
    with pytest.raises(ConfigError, match=r"comes first: fedtail check FILE\.py:Name"):
        cli.dispatch(["check", "--json", "fedavg"])
    with pytest.raises(ConfigError, match="server_lr must be > 0"):
        cli.dispatch(["check", "fedavg", "--server-lr", "0"])


def test_a_class_without_a_file_is_checked_too():
    """Typed into a prompt: there are no lines to point at."""
    code = SOUND.replace("return update, State(client.steps + ctx.here.steps)", "return update, State(client.stepz)")
    code += (
        "for r in __import__('fedtail').check(Mine()):\n    if r.status == 'failed':\n        print(r.rule, r.seen)\n"
    )
    done = subprocess.run([sys.executable], input=code, capture_output=True, text=True, check=True)
    assert done.stdout == "runs AttributeError: 'State' object has no attribute 'stepz'\n"
