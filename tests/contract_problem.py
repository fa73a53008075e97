"""Algorithms of the contract suite, on the problems of `fedtail check`.

The three algorithms use everything that no algorithm of the library uses yet: two training phases and a collecting one
(`Collecting`); an evaluating phase over everyone (`Judging`); constants, draws of its own, personal client states, server
data, a trainable subset and a change of the network between rounds (`Staged`). They are taken from this file as a user's
own, "contract_problem.py:Name".
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtail import config, trees
from fedtail.algorithm import Algorithm, Phase, as_tensor
from fedtail.algorithms import ALGORITHMS
from fedtail.checks import problems
from fedtail.checks.problems import CLASSES, LOOP, ROUNDS, federated, form
from fedtail.config import Experiment
from fedtail.engines import EngineOptions
from fedtail.experiment import Federation
from fedtail.local import delta, descend, sgd_step, start
from fedtail.losses import LOSSES, LogitAdjustment, Loss, cross_entropy, one_hot
from fedtail.optim import SGD, Adam, Nadam, Params, Partition
from fedtail.task import Draw, Task, Variables

__all__ = ["CLASSES", "LOOP", "ROUNDS", "federated", "form"]  # of the package's problems, which the tests share

FILE = Path(__file__).resolve()
PROBLEMS = {name: problem for name, problem in problems.PROBLEMS.items() if name != "single"}


class ScaledLinear(nn.Linear):
    """A linear layer with a factor for each output: what `Staged` puts in the place of the head."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map features to scaled logits."""
        return super().forward(x) * self.scale


class Collected(NamedTuple):
    """Server state of `Collecting`."""

    model: Variables
    folded: Params  # depends on the order of the updates
    largest: Params  # no mean could give it
    weight: Tensor  # ()


@dataclass(frozen=True, kw_only=True)
class Collecting(Algorithm):
    """FedAvg; then everyone trains once more and the server gets each single update."""

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Train, then collect."""
        return Phase(), Phase("gather", cohort="all", reduce="collect")

    def init_server(self, ctx, rng):
        """The model, nothing collected."""
        zeros = {k: torch.zeros_like(v) for k, v in ctx.task.initial.params.items()}
        return Collected(ctx.task.initial, zeros, trees.clone(zeros), torch.zeros((), dtype=ctx.task.dtype))

    def local_init(self, ctx, message, client):
        """Starts from the model."""
        return start(self.optimizer, message.model)

    def local_step(self, ctx, message, client, local, batch):
        """One step on the cross-entropy."""

        def objective(v, extra):
            risk, v = cross_entropy(ctx.task, v, batch)
            return risk, (v, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx, message, client, local):
        """Sends the change."""
        return delta(message.model, local.variables), client

    def server_update(self, ctx, server, mean, total):
        """FedAvg's."""
        return server._replace(model=descend(server.model, mean))

    def server_collect(self, ctx, server, updates, weights):
        """Keeps what only single updates can tell."""
        folded = {k: torch.zeros_like(v) for k, v in server.folded.items()}
        for update in updates:
            folded = {k: v / 2 + update.params[k] for k, v in folded.items()}
        largest = {k: torch.stack([u.params[k] for u in updates]).amax(0) for k in folded}
        return server._replace(folded=folded, largest=largest, weight=weights.sum())

    def predict(self, ctx, message, client, x):
        """The model's logits."""
        return ctx.task.apply(message.model, x, train=False)[0]


class Judged(NamedTuple):
    """Server state of `Judging`."""

    model: Variables
    losses: Tensor  # (population,), zero for those who hold nothing


@dataclass(frozen=True, kw_only=True)
class Judging(Algorithm):
    """Before each round everyone reports its loss in a slot of a vector; worse clients then train with more weight."""

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Judge, then train."""
        return Phase("judge", cohort="all", local=False), Phase()

    def init_server(self, ctx, rng):
        """The model, no losses yet."""
        return Judged(ctx.task.initial, torch.zeros(ctx.round.population, dtype=ctx.task.dtype))

    def init_client(self, ctx, message, rng):
        """How often the client has trained: a bare tensor of integers."""
        return torch.zeros((), dtype=torch.int64)

    def _slot(self, ctx, message):
        return (torch.arange(len(message.losses)) == ctx.here.index).to(message.losses.dtype)

    def local_init(self, ctx, message, client):
        """Sums while judging, a local state while training."""
        if ctx.round.phase.name == "judge":
            zero = torch.zeros((), dtype=ctx.task.dtype)
            return {"sum": zero, "count": zero.clone()}
        return start(self.optimizer, message.model)

    def local_step(self, ctx, message, client, local, batch):
        """Judges a batch, or trains on it."""
        if ctx.round.phase.name == "judge":
            z, _ = ctx.task.apply(message.model, batch.x, train=False)
            each = F.cross_entropy(z, batch.y, reduction="none")
            return {"sum": local["sum"] + batch.sum(each), "count": local["count"] + batch.size}, {
                "judged": batch.mean(each)
            }

        def objective(v, extra):
            risk, v = cross_entropy(ctx.task, v, batch)
            return risk * (1 + (message.losses * self._slot(ctx, message)).sum()), (v, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx, message, client, local):
        """Sends the loss in the client's own slot, or the change."""
        if ctx.round.phase.name == "judge":
            return {"losses": self._slot(ctx, message) * local["sum"] / local["count"]}, client
        return delta(message.model, local.variables), client + 1

    def weight(self, ctx):
        """Every judge counts the same."""
        return torch.ones_like(ctx.here.examples) if ctx.round.phase.name == "judge" else ctx.here.examples

    def server_update(self, ctx, server, mean, total):
        """Keeps the losses, or adds the mean change."""
        if ctx.round.phase.name == "judge":
            return server._replace(losses=mean["losses"] * total)
        return server._replace(model=descend(server.model, mean))

    def predict(self, ctx, message, client, x):
        """The model's logits."""
        return ctx.task.apply(message.model, x, train=False)[0]

    def diagnostics(self, ctx, server):
        """The losses."""
        return {"losses": server.losses}


class StagedServer(NamedTuple):
    """Server state of `Staged`."""

    model: Variables
    batches: Tensor  # () int64, batches of server data seen


class Personal(NamedTuple):
    """Client state of `Staged`."""

    bias: Tensor  # (classes,)
    seen: Tensor  # () int64


@dataclass(frozen=True, kw_only=True)
class Staged(Algorithm):
    """Trains the head alone in round 0; then the head gets a factor a class and everything is trained."""

    personal = True

    def constants(self, task: Task, rng: np.random.Generator):
        """An offset of the logits that nobody learns."""
        return {"offset": as_tensor(rng.normal(size=task.num_classes), task.dtype, task.device)}

    def draws(self, task: Task, batch_size: int):
        """Noise on each input, and classes whose offset counts in this batch."""
        noise = Draw("normal", (batch_size, *task.input_shape), per_example=True)
        return {"noise": noise, "chosen": Draw("bernoulli", (task.num_classes,), p=0.7)}

    def init_server(self, ctx, rng):
        """The model."""
        return StagedServer(ctx.task.initial, torch.zeros((), dtype=torch.int64))

    def init_client(self, ctx, message, rng):
        """A random bias."""
        bias = as_tensor(rng.normal(size=ctx.task.num_classes), ctx.task.dtype, ctx.task.device)
        return Personal(bias, torch.zeros((), dtype=torch.int64))

    def trainable(self, ctx):
        """Names of the parameters that learn in the present stage."""
        return ctx.task.stages[-1] if ctx.round.stage == 0 else [name for group in ctx.task.stages for name in group]

    def local_init(self, ctx, message, client):
        """The model, and the client's own state as what is advanced batch by batch."""
        return start(self.optimizer, message.model, client, self.trainable(ctx))

    def local_step(self, ctx, message, client, local, batch):
        """One step with noise, offset and bias; the bias moves too."""

        def objective(v, extra):
            z, v = ctx.task.apply(v, batch.x + 0.1 * batch.draws["noise"], draws=batch.draws)
            z = z + ctx.constants["offset"] * batch.draws["chosen"] + extra.bias
            wrong = torch.softmax(z.detach(), -1) - one_hot(batch.y, z.shape[-1], z.dtype)
            own = Personal(extra.bias - 0.1 * batch.mean(wrong), extra.seen + 1)
            risk = batch.mean(F.cross_entropy(z, batch.y, reduction="none"))
            return risk, (v, own, {"error": batch.mean(wrong.abs()), "anchor": (extra.bias - client.bias).abs().sum()})

        return sgd_step(ctx, local, objective, self.optimizer, trainable=self.trainable(ctx))

    def local_final(self, ctx, message, client, local):
        """Sends the change of what was trained; keeps the bias."""
        old, new = message.model.params, local.variables
        change = {k: new.params[k] - old[k] for k in self.trainable(ctx)}
        return Variables(change, new.buffers), local.extra

    def server_update(self, ctx, server, mean, total):
        """Adds the mean change where there is one."""
        params = {k: v + mean.params[k] if k in mean.params else v for k, v in server.model.params.items()}
        return server._replace(model=Variables(params, mean.buffers))

    def server_step(self, ctx, server, batch):
        """A small step on server data."""
        model, optimizer = server.model, SGD(lr=0.01, momentum=0.0)

        def function(params):
            z, _ = ctx.task.apply(Variables(params, model.buffers), batch.x, train=False)
            return batch.mean(F.cross_entropy(z, batch.y, reduction="none")), ()

        value, _, grads = ctx.task.value_and_grad(function, model.params)
        params, _ = ctx.task.update(optimizer, grads, optimizer.init(model.params), model.params)
        return StagedServer(model._replace(params=params), server.batches + 1), {"loss": value}

    def advance(self, ctx, server, metrics):
        """After round 0 the head gets its factors."""
        assert metrics["round"] == ctx.round.index
        if ctx.round.index:
            return ctx.round.stage, server
        scale = torch.ones(ctx.task.num_classes, dtype=ctx.task.dtype)
        return 1, server._replace(model=server.model._replace(params={**server.model.params, "head.scale": scale}))

    def stage_task(self, task: Task, stage: int) -> Task:
        """The network with the new head."""
        if stage == 0:
            return task
        module = copy.deepcopy(task.module)
        module.head = ScaledLinear(module.head.in_features, module.head.out_features).to(task.dtype)
        scale = torch.ones(task.num_classes, dtype=task.dtype)
        initial = Variables({**task.initial.params, "head.scale": scale}, task.initial.buffers)
        stages = (*task.stages[:-1], (*task.stages[-1], "head.scale"))
        return dataclasses.replace(task, module=module, initial=initial, stages=stages)

    def predict(self, ctx, message, client, x):
        """The generic logits, or with the client's bias."""
        z = ctx.task.apply(message.model, x, train=False)[0]
        return z if client is None else z + client.bias


def own(name: str) -> type:
    """Returns an algorithm of this file as fedtail loads a user's own."""
    return config.user_class(f"{FILE}:{name}")


GATES = ("rank", "sets", "sets+rank", "ratio", "none")
PLAIN = SGD(lr=0.1, momentum=0.5)


def _cases() -> dict[str, Algorithm]:
    found: dict[str, Algorithm] = {}
    for name in ALGORITHMS:
        cls = config.resolve(Algorithm, name)
        if name == "fedgrab":
            found.update({f"{name}-{gate}": cls(optimizer=PLAIN, gate=gate, warm=1) for gate in GATES})
            found[f"{name}-release"] = cls(
                optimizer=PLAIN,
                order="class_id",
                frozen_classifier=True,
                bypass_counter=True,
                limit=0.0,
                freeze_prior=1,
            )
        elif name == "post_hoc":
            continue  # it trains nothing and needs a finished run: tests/algorithms/test_classifiers.py
        elif name == "crt":
            found[name] = cls(optimizer=PLAIN, retrain_rounds=1)
        elif name == "ccvr":
            found[name] = cls(optimizer=PLAIN, per_class=7, retrain_steps=3)
        elif name == "creff":
            found[name] = cls(optimizer=PLAIN, features_per_class=3, match_steps=2, retrain_steps=3)
        elif name == "fedloge":  # four features for four classes: a dense frame
            found[name] = cls(optimizer=PLAIN, sparsity=0.0, norm=0.5, etf_steps=3)
        elif name == "fedgan":  # eps 1e-4, as below
            adam = Adam(lr=0.02, beta1=0.5, eps=1e-4)
            found[name] = cls(optimizer=adam)
            found[f"{name}-persistent"] = cls(optimizer=adam, persist_optimizer=True)
            found[f"{name}-kl"] = cls(optimizer=PLAIN, weighting="kl")
        elif name == "effgan":
            found[name] = cls(optimizer=Adam(lr=0.02, beta1=0.5, eps=1e-4))
            found[f"{name}-none"] = cls(optimizer=PLAIN, finetune_epochs=0, weights="uniform")
            found[f"{name}-longer"] = cls(optimizer=PLAIN, finetune_epochs=3, weights="classes")
        elif name == "mdgan":
            found[name] = cls(optimizer=Adam(lr=0.02, beta1=0.5, eps=1e-4), swap_every=2)
        elif name == "uagan":
            found.update({f"{name}-{how}": cls(optimizer=PLAIN, aggregate=how) for how in ("odds", "max", "soft")})
        elif name == "climb":  # weights that move within three rounds
            found[name] = cls(optimizer=PLAIN, lr_dual=30.0, eps=0.1, period=2)
        elif name == "lightweight":  # both stages within three rounds
            short = {"dual_rounds": 1, "unfreeze_rounds": (1,)}
            found[name] = cls(optimizer=PLAIN, final=PLAIN, **short)
            nadam = Nadam(lr=0.01, eps=1e-4)
            found[f"{name}-averaged"] = cls(
                optimizer=nadam, moments="averaged", schedule="notebook", heads="first", **short
            )
        else:
            found[name] = cls(optimizer=PLAIN)
    found["fedmd"] = config.resolve(Algorithm, "fedmd")(optimizer=PLAIN, public_batches=2, public_batch=3)
    avg = config.resolve(Algorithm, "fedavg")
    # eps 1e-4: where a gradient is nearly 0, Adam scales its rounding up
    found["fedavg-adam"] = avg(optimizer=Adam(lr=0.01, eps=1e-4, weight_decay=0.01, clip=1.0), server_lr=0.7)
    found["fedavg-adamw"] = avg(optimizer=Adam(lr=0.01, eps=1e-4, weight_decay=0.1, decoupled=True))
    found["fedavg-nesterov"] = avg(optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.5))
    opt = config.resolve(Algorithm, "fedopt")
    found.update({f"fedopt-{server}": opt(optimizer=PLAIN, server=server) for server in ("avgm", "yogi", "adagrad")})
    distillation = config.resolve(Algorithm, "server_distillation")
    terms = distillation(optimizer=PLAIN, lam_kd=0.5, lam_feat=0.7, lam_ce=0.3, server_steps=3, server_batch=5,
                         server_optimizer=SGD(lr=0.05), server_cosine=False)  # fmt: skip
    found["server_distillation-terms"] = terms
    found["server_distillation-alone"] = dataclasses.replace(terms, clients=False, lam_feat=0.0)
    found["fednova-proximal"] = config.resolve(Algorithm, "fednova")(optimizer=SGD(lr=0.1, momentum=0.0), mu=0.7)
    ga = config.resolve(Algorithm, "fedga")
    found["fedga-exact"] = ga(optimizer=PLAIN, form="exact", counts="client", strength=0.7, weights="size")
    found["fedrs-soft"] = config.resolve(Algorithm, "fedrs")(optimizer=PLAIN, soft=True)
    found["fedavg-partition"] = avg(optimizer=Partition(parts={"": PLAIN, "head": Adam(lr=0.01, eps=1e-4)}))
    for name in LOSSES:
        if name != "cross_entropy":
            found[f"fedavg-{name}"] = avg(optimizer=PLAIN, loss=config.resolve(Loss, name)())
    found["fedavg-estimated"] = avg(optimizer=PLAIN, loss=LogitAdjustment(prior="estimated"))
    return found | {name.lower(): own(name)(optimizer=PLAIN) for name in ("Collecting", "Judging", "Staged")}


CASES = _cases()


def experiment(case: str, problem: str, engine: EngineOptions = LOOP, seed: int = 0) -> Experiment:
    """Returns the experiment of a case; its data are replaced by the problem's."""
    return problems.experiment(CASES[case], problem, engine, seed)


def federation(case: str, problem: str, engine: EngineOptions = LOOP, seed: int = 0) -> Federation:
    """Returns a federation that is ready for round 0."""
    chosen = PROBLEMS[problem]
    columns = (*CASES[case].columns, *CASES[case].server_columns)
    return Federation(experiment(case, problem, engine, seed), federated(chosen.sizes, chosen.images, columns))


class Outcome(NamedTuple):
    """What a run leaves: the server state and the client states after each round, and the records."""

    servers: list[Any]
    states: list[dict[int, Any]]
    records: list[dict[str, Any]]
    stages: list[int]  # the stage that each round was in
    initial: Variables


@functools.cache
def outcome(case: str, problem: str, engine: EngineOptions = LOOP, seed: int = 0) -> Outcome:
    """Runs a case on a problem; the last record holds scores."""
    running = federation(case, problem, engine, seed)
    found = Outcome([], [], [], [], running.engine.setting.task.initial)
    try:
        for index in range(ROUNDS):
            found.stages.append(running.stage)
            record = running.step()
            found.servers.append(running.server)
            found.states.append(dict(running.states))
            if index + 1 == ROUNDS:
                record.update(running.score())
            running.advance(record)
            found.records.append(record)
    finally:
        running.close()
    return found


def distance(first: Any, second: Any) -> float:
    """Returns the largest absolute difference between two trees of the same form."""
    a, b = trees.named_leaves(first), trees.named_leaves(second)
    assert a.keys() == b.keys()
    gaps = [(x.double() - b[k].double()).abs().max() for k, x in a.items() if x.numel()]
    return float(torch.stack(gaps).max()) if gaps else 0.0


def model_of(server: Any) -> Variables:
    """Returns the network's variables in a server state."""
    return server if isinstance(server, Variables) else server.model
