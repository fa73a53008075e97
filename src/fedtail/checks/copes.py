"""What a method must do and cope with: train everything, the schedule, BatchNorm, Dropout, one client, one example."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedtail import generation, trees
from fedtail.algorithm import Client
from fedtail.checks.agree import ROUNDING, agree
from fedtail.checks.problems import CLASSES, CONSTANT, PARALLEL, VMAP, Subject, difference
from fedtail.checks.returns import play
from fedtail.checks.rule import Broken, rule
from fedtail.experiment import Federation
from fedtail.optim import Params
from fedtail.schedule import Cosine, Schedule
from fedtail.task import Worker
from fedtail.trees import Tree


@rule(
    "every tensor moves",
    "A parameter that no optimizer sees is the quietest of all faults: everything runs, and the model is worse.",
    "Start with `start(self.optimizer, variables)`, send it in local_final (`delta`) and put it into the new server state "
    "(`descend`). Frozen on purpose: fedtail check ... --frozen NAME, which then requires that it stays.",
)
def moves(subject: Subject) -> None:
    _moved(subject, "ragged")


def _moved(subject: Subject, problem: str) -> None:
    outcome = subject.outcome(problem)
    # a generator may live at the server alone, and never be sent
    kept = outcome.servers if subject.algorithm.generative else [()] * len(outcome.servers)
    ends = [{"states": outcome.states[i], "server": kept[i]} for i in (0, -1)]
    states = [trees.named_leaves(end) for end in ends]
    for kind in ("params", "buffers"):
        now = getattr(outcome.final, kind)
        for name, before in getattr(outcome.initial, kind).items():
            own = [k for k in states[0] if k.endswith(f"/{name}") and not torch.equal(states[0][k], states[1][k])]
            still = name in now and now[name].shape == before.shape and torch.equal(now[name], before) and not own
            frozen = name.startswith(subject.frozen) if subject.frozen else False
            if name not in now or (still and not frozen):
                what = "is not in what `variables` returns" if name not in now else "did not change in three rounds"
                raise Broken(f"{name} {what}.", BUFFERS if kind == "buffers" else "")
            if frozen and not still:
                raise Broken(f"{name} changed in three rounds, although it was said to be frozen.")
            if not bool(torch.isfinite(now[name]).all()):
                raise Broken(f"{name} is not finite after three rounds.")


BUFFERS = (
    "Return the variables that ctx.task.apply gives back from the objective (they hold the new batch statistics), and let "
    "update and server_update carry `buffers` beside `params`, as `delta` and `descend` do."
)


@rule(
    "learning-rate schedule",
    "A schedule is an option of every experiment; a method that is deaf to it is compared at another learning rate.",
    "Step with sgd_step; or give ctx.round.lr_scale to ctx.task.update as its last argument, and multiply a learning rate "
    "of your own by it.",
)
def schedule(subject: Subject) -> None:
    trains, whole = _scheduled(subject, CONSTANT)
    if trains and not difference(whole, _scheduled(subject, Cosine(warmup=1))[1]):
        raise Broken("a first round with half the learning rate (ctx.round.lr_scale is 0.5) ends like one with the whole, "
                     "bit for bit, on every client and on the server.")  # fmt: skip


class _Watched(Worker):
    """Remembers whether a gradient was taken."""

    took_gradient = False

    def value_and_grad(
        self, function: Callable[[Params], tuple[Tensor, Any]], params: Params
    ) -> tuple[Tensor, Any, Params]:
        self.took_gradient = True
        return super().value_and_grad(function, params)


def _scheduled(subject: Subject, schedule: Schedule) -> tuple[bool, Tree]:
    """Returns whether clients take gradients in the first round, and what they and the server end with."""
    ends: dict[str, Tree] = {}
    with contextlib.closing(subject.federation("ragged", schedule=schedule)) as running:
        worker = _Watched(running.engine.setting.task, "eager", donate=False)
        running.worker = worker
        for cohort, answers in play(running):
            ends |= {f"client {one.client} in {cohort.ctx.round.phase.name!r}": one.local for one in answers}
        return worker.took_gradient, {**ends, "server": running.server}


def _copes(subject: Subject, problem: str) -> None:
    for engine in (PARALLEL,) if "loop = vmap" in subject.broken else (PARALLEL, VMAP):
        agree(subject, problem, engine, 0.0 if engine is PARALLEL else ROUNDING)
    _moved(subject, problem)


@rule(
    "BatchNorm",
    "Batch statistics are buffers: they travel beside the parameters, and forgetting them is the field's commonest fault.",
    "Carry buffers beside parameters, and call the network once for each step.",
)
def batchnorm(subject: Subject) -> None:
    _copes(subject, "batchnorm")


@rule(
    "Dropout",
    "Masks are draws, made before the step and equal in every engine.",
    "Hand them on: ctx.task.apply(v, batch.x, draws=batch.draws); with train=False no mask is needed.",
    cause="random",
)
def dropout(subject: Subject) -> None:
    _copes(subject, "dropout")


@rule(
    "one client",
    "A federation may have a single member, and a cohort a single client.",
    "Divide by what answered (`total`), and never by the population minus one or a spread over clients that may be zero.",
)
def one_client(subject: Subject) -> None:
    _copes(subject, "alone")


@rule(
    "one example",
    "In a long tail somebody holds a single example: one class count is 1, the others are 0.",
    "Guard logarithms and divisions by class counts (clamp_min(1)), and take no spread over a batch.",
)
def one_example(subject: Subject) -> None:
    agree(subject, "single", PARALLEL if "loop = vmap" in subject.broken else VMAP, ROUNDING)


@rule(
    "predict",
    "Every score is counted from logits [batch, classes], of any batch, in evaluation mode.",
    "Return ctx.task.apply(..., x, train=False)[0] for a batch x, without argmax or softmax over the batch.",
)
def predict(subject: Subject) -> None:
    with contextlib.closing(subject.warm("ragged")) as running, torch.no_grad():
        if subject.algorithm.generative:
            return _draws(running)
        x = running.data.prepare(running.data.test["x"], torch.float64)
        for who, logits in _models(running):
            for part in (x[:5], x[:1]):
                z = logits(part)
                shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                if shape != (len(part), CLASSES):
                    raise Broken(f"{who} gives {shape} for {len(part)} inputs, not {(len(part), CLASSES)}.")
        running.score()  # the whole way to the metrics, each client's own model included


def _draws(running: Federation) -> None:
    """What a generative method has in the place of logits: shares of each class that sum to 1, and finite images."""
    setting = running.engine.setting
    here = (running.algorithm, setting.task, setting.constants, running.server, running.context().round, setting.seed)
    found = generation.sampler(*here)
    shares, images = found.mixture.shares, found.draw(5).images
    if shares.shape[1] != CLASSES or not torch.isclose(shares.sum(), shares.new_tensor(1.0)) or (shares < 0).any():
        raise Broken(f"the shares of `generators` are {shares.tolist()}, not [generators, {CLASSES}] >= 0 with the sum 1.",
                     "Divide what the generators count by its sum.")  # fmt: skip
    if tuple(images.shape) != (5, *setting.task.input_shape) or not bool(torch.isfinite(images).all()):
        raise Broken(f"five images have the shape {tuple(images.shape)}, or are not finite.",
                     "Return the generator's tensors with a first axis of generators.")  # fmt: skip


def _models(running: Federation) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Yields whose model is judged, and its logits as a function of inputs [batch, ...]."""
    ctx, predict = running.context(), running.algorithm.predict
    message = running.message(ctx)
    yield "the generic model", functools.partial(predict, ctx, message, None)
    if running.algorithm.personal:
        setting = running.engine.setting
        plans = setting.plans(ctx.round, 0, running.holders.tolist())
        known = setting.clients(plans)
        for row, number in enumerate(plans):  # those who have not taken part yet too
            here = ctx._replace(client=Client(*(value[row] for value in known)))
            state = setting.state(here, message, running.states, number)
            yield f"the model of client {number}", functools.partial(predict, here, message, state)


@rule(
    "each input alone",
    "A model in use gets one input, as often as one likes; scores are taken in batches of any size.",
    "Apply the model with train=False (batch statistics and Dropout are for training), and take no mean over the batch.",
    cause="random",
    after="predict",
)
def each_alone(subject: Subject) -> None:
    if subject.algorithm.generative:
        return  # there is no input but a latent, and images are made in batches of any size
    for problem, needed in (("ragged", ""), ("batchnorm", "BatchNorm"), ("dropout", "Dropout")):
        if needed in subject.broken:
            continue
        with contextlib.closing(subject.warm(problem)) as running, torch.no_grad():
            x = running.data.prepare(running.data.test["x"][:6], torch.float64)
            for who, logits in _models(running):
                together = logits(x)
                if found := difference(together, logits(x)):
                    raise Broken(f"{who}, asked twice for the same inputs, gives other logits: {found}.",
                                 "Draw and keep nothing in predict: its logits follow from its arguments alone.")  # fmt: skip
                if found := difference(together, torch.cat([logits(one) for one in x.split(1)]), ROUNDING):
                    model = f"; network with {needed}" if needed else ""
                    raise Broken(f"{who} gives an input other logits alone than among six: {found}{model}.")
