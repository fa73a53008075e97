"""The reference engine: one client after another, one batch after another, plain PyTorch speed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtail.algorithm import Batch, Client, Context, Round, as_tensor
from fedtail.data.plan import Plan
from fedtail.engines import local_models
from fedtail.engines.base import Engine, Result, Setting, Sink, check_result, remedy
from fedtail.errors import FedtailError, TrainingError
from fedtail.task import Worker
from fedtail.trees import Tree

GATHER = 1024  # examples that are gathered and prepared at once: large enough to be cheap, small enough for the cache
VALUES = 1 << 22  # of inputs that are gathered at once: fewer examples where one is large, but a batch at least


def iterate(setting: Setting, plan: Plan, wanted_columns: Sequence[str] = ()) -> Any:
    """Yields the plan's batches; examples are gathered, augmented and prepared for many steps at once.

    Args:
        setting: what stays the same.
        plan: whose batches.
        wanted_columns: what a batch carries; empty: the algorithm's columns.
    """
    task, data = setting.task, setting.data
    draws = {name: as_tensor(value, task.dtype, task.device) for name, value in plan.draws.items()}
    wanted = setting.draws
    order = torch.from_numpy(plan.order).to(task.device)
    most = min(GATHER, VALUES // math.prod(task.input_shape))
    step, offset = 0, 0
    while step < len(plan.lengths):
        last, count = step, 0
        while last < len(plan.lengths) and (last == step or count + plan.lengths[last] <= most):
            count += int(plan.lengths[last])
            last += 1
        lengths = [int(n) for n in plan.lengths[step:last]]
        flat = {
            name: torch.cat([value[step + i, :n] for i, n in enumerate(lengths)])
            for name, value in draws.items()
            if name.startswith("augment:")
        }
        columns = data.gather(
            order[offset : offset + count], task.dtype, flat, wanted_columns or setting.algorithm.columns
        )
        parts = {name: value.split(lengths) for name, value in columns.items()}
        for i, n in enumerate(lengths):
            cut = {k: v[step + i, :n] if wanted[k].per_example else v[step + i] for k, v in draws.items()}
            yield Batch({name: value[i] for name, value in parts.items()}, None, cut)
        step, offset = last, offset + count


def run_client(
    setting: Setting,
    worker: Worker,
    round: Round,
    client: Client,
    message: Tree,
    states: Mapping[int, Tree],
    plan: Plan,
) -> Result:
    """Runs one client's phase from its plan; the node of a real deployment calls this very function.

    Args:
        setting: what stays the same.
        worker: this thread's.
        round: the circumstance.
        client: whom it is about.
        message: the broadcast.
        states: kept client states by index; without one the client starts with its initial state.
        plan: what the client does.
    """
    algorithm, step, stage = setting.algorithm, -1, "init_client"
    ctx = Context(worker, round, setting.constants, client)
    number = int(client.index)
    try:
        state = setting.state(ctx, message, states, number)
        stage = "local_init"
        local = algorithm.local_init(ctx, message, state)
        if worker.donate:
            worker.protect((message, state, setting.constants, setting.task.initial))
            local = worker.own(local)
        before = local_models.judge(setting, worker, round, local)
        stage, sums, losses = "local_step", dict[str, Tensor](), list[Tensor]()
        for step, batch in enumerate(iterate(setting, plan)):  # noqa: B007 (named in the error)
            local, metrics = algorithm.local_step(ctx, message, state, local, batch)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            if "loss" in metrics:
                losses.append(metrics["loss"])
        judged = local_models.sums(setting, client, before, local_models.judge(setting, worker, round, local))
        stage = "local_final"
        update, state = algorithm.local_final(ctx, message, state, local)
        weight = float(algorithm.weight(ctx))
    except FedtailError:
        raise
    except Exception as error:
        where = f" at step {step} " if stage == "local_step" else " "
        raise TrainingError(f"Client {number} failed in {stage}{where}of round {round.index}: {type(error).__name__}: {error} "
                            f"{remedy(error)}") from error  # fmt: skip
    means = {name: value / len(plan.lengths) for name, value in sums.items()}
    result = Result(number, update, weight, state, means, len(setting.rows(round)[number]), judged)
    return check_result(result, torch.stack(losses) if losses else None, round)


class LoopEngine(Engine):
    """One client at a time in the calling thread; the reference for all others."""

    name = "loop"

    def __init__(self, setting: Setting, donate: bool = True):
        super().__init__(setting)
        self._worker = setting.task.worker("eager", donate)

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Runs the clients in ascending index."""
        self.open()
        clients = self.setting.clients(plans)
        for position, number in enumerate(plans):
            client = Client(*(value[position] for value in clients))
            sink.add(run_client(self.setting, self._worker, round, client, message, states, plans[number]))

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs them one after another."""
        self.open()
        return [function(self._worker, item) for item in items]
