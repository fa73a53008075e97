"""A cohort as one stacked computation (torch.func.vmap): for GPUs, and for small dense models on a CPU.

Clients have unequal numbers of steps. A chunk's clients are sorted by steps; at each step only those that still have one
are run, and their rows are put back. Without batch statistics a short batch is padded (its last example repeated) and
masked; with BatchNorm, which would see the padding, clients whose batches have equal length run together, unpadded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtail import trees
from fedtail.algorithm import Batch, Client, Context, Round, as_tensor
from fedtail.data.plan import Plan
from fedtail.engines import local_models
from fedtail.engines.base import Engine, Result, Setting, Sink, check_result, remedy
from fedtail.errors import FedtailError, TrainingError
from fedtail.trees import Tree


class VmapEngine(Engine):
    """Stacks up to `chunk` clients along a first axis."""

    name = "vmap"

    def __init__(self, setting: Setting, chunk: int):
        super().__init__(setting)
        self._worker, self._eager = setting.task.worker("vmap"), setting.task.worker()
        self._chunk = chunk
        self._per_example = {name for name, draw in setting.draws.items() if draw.per_example}

    def cohort(self, round: Round, trained: int, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan],
               sink: Sink) -> None:  # fmt: skip
        """Runs chunks of clients with similar numbers of steps."""
        self.open()
        order = sorted(plans, key=lambda i: (-len(plans[i].lengths), i))
        for start in range(0, len(order), self._chunk):
            ids = order[start : start + self._chunk]
            try:
                results = self._run_chunk(round, message, states, {i: plans[i] for i in ids})
            except FedtailError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"{type(self.setting.algorithm).__name__} failed in the vmap engine in round {round.index} (clients "
                    f"{ids}): {type(error).__name__}: {error}\nA method must not branch on a tensor's value, call .item() "
                    f"or draw random numbers of its own. {remedy(error)}"
                ) from error
            for result in results:
                sink.add(result)

    def _run_chunk(
        self, round: Round, message: Tree, states: Mapping[int, Tree], plans: Mapping[int, Plan]
    ) -> list[Result]:
        setting, algorithm, ids = self.setting, self.setting.algorithm, list(plans)
        clients = setting.clients(plans)

        def ctx(client: Client) -> Context:
            return Context(self._worker, round, setting.constants, client)

        def init(client: Client, state: Tree) -> Tree:
            return algorithm.local_init(ctx(client), message, state)

        def final(client: Client, state: Tree, local: Tree) -> tuple[Tree, Tree, Tensor]:
            return *algorithm.local_final(ctx(client), message, state, local), algorithm.weight(ctx(client))

        each = [Client(*(value[row] for value in clients)) for row in range(len(ids))]
        host = torch.device("cpu")  # where client states are kept; they move to the device and back all at once
        kept = trees.stack([setting.state(ctx(c), message, states, i, host) for c, i in zip(each, ids, strict=True)])
        kept = trees.tree_map(lambda t: t.to(setting.task.device), kept)
        local = torch.vmap(init, randomness="error")(clients, kept)
        before = self._judge(round, local, ids)
        local, sums, losses = self._train(round, message, clients, kept, local, list(plans.values()))
        after = self._judge(round, local, ids)
        updates, new, weights = torch.vmap(final, randomness="error")(clients, kept, local)
        new, weights = trees.tree_map(lambda t: t.to(host), new), weights.to(host)
        results: list[Result] = []
        for position, number in enumerate(ids):
            steps = len(plans[number].lengths)
            result = Result(
                number, trees.row(updates, position), float(weights[position]), trees.row(new, position),
                {k: v[position] / steps for k, v in sums.items()}, len(setting.rows(round)[number]),
                local_models.sums(setting, each[position], before[position], after[position]),
            )  # fmt: skip
            results.append(check_result(result, losses[position, :steps] if losses is not None else None, round))
        return results

    def _judge(self, round: Round, local: Tree, ids: Sequence[int]) -> list[local_models.Judged | None]:
        """Judges each client's model, one after another; a None each where that is not wanted."""
        if not self.setting.judges(round):
            return [None for _ in ids]
        rows = (trees.row(local, position) for position in range(len(ids)))
        return [local_models.judge(self.setting, self._eager, round, row) for row in rows]

    def _train(
        self, round: Round, message: Tree, clients: Client, kept: Tree, local: Tree, plans: Sequence[Plan]
    ) -> tuple[Tree, dict[str, Tensor], Tensor | None]:
        """Runs all steps of a chunk; returns the local states, summed metrics [clients, ...] and losses [clients, steps]."""
        setting = self.setting

        def step(client: Client, state: Tree, local: Tree, columns: Tree, mask: Tensor, draws: Tree) -> Any:
            batch = Batch(columns, mask if padded else None, draws)
            return setting.algorithm.local_step(
                Context(self._worker, round, setting.constants, client), message, state, local, batch
            )

        stacked = torch.vmap(step, randomness="error")
        if setting.task.execution.compile:
            stacked = torch.compile(stacked)
        sums, rows = dict[str, Tensor](), list[tuple[int, Tensor, Tensor]]()
        for k in range(len(plans[0].lengths)):
            for live in self._groups(plans, k):
                padded = not setting.task.batch_statistics
                columns, mask, draws = self._batch([plans[i] for i in live], k, padded)
                index = torch.tensor(live, device=setting.task.device)
                whole = len(live) == len(plans)
                take = (lambda t: t) if whole else (lambda t, index=index: t.index_select(0, index))
                part = [trees.tree_map(take, tree) for tree in (clients, kept, local)]
                new, metrics = stacked(*part, columns, mask, draws)
                local = new if whole else trees.tree_map(
                    lambda old, rows, index=index: old.index_copy(0, index, rows), local, new
                )  # fmt: skip
                for name, value in metrics.items():
                    if name not in sums:
                        sums[name] = value.new_zeros((len(plans), *value.shape[1:]))
                    sums[name].index_add_(0, index, value.detach())
                if "loss" in metrics:
                    rows.append((k, index, metrics["loss"].detach()))
        if not rows:
            return local, sums, None
        losses = rows[0][2].new_zeros(len(plans), len(plans[0].lengths))
        for k, index, value in rows:
            losses[index, k] = value
        return local, sums, losses

    def _groups(self, plans: Sequence[Plan], k: int) -> list[list[int]]:
        """Returns who runs together at step k: all that have it, or one group a batch length with batch statistics."""
        live = [i for i, plan in enumerate(plans) if len(plan.lengths) > k]
        if not self.setting.task.batch_statistics:
            return [live]
        lengths = sorted({int(plans[i].lengths[k]) for i in live}, reverse=True)
        return [[i for i in live if plans[i].lengths[k] == n] for n in lengths]

    def _batch(
        self, plans: Sequence[Plan], k: int, padded: bool
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Gathers step k of these clients: columns [clients, batch, ...], mask [clients, batch], draws [clients, ...]."""
        task = self.setting.task
        lengths = np.array([plan.lengths[k] for plan in plans])
        width = int(lengths.max())
        starts = [int(plan.lengths[:k].sum()) for plan in plans]
        index = np.stack([
            np.pad(plan.order[start : start + n], (0, width - n), mode="edge")
            for plan, start, n in zip(plans, starts, lengths, strict=True)
        ])  # fmt: skip
        mask = torch.from_numpy(np.arange(width) < lengths[:, None]).to(task.device, task.dtype)
        draws = {
            name: as_tensor(np.stack([plan.draws[name][k] for plan in plans]), task.dtype, task.device)
            for name in plans[0].draws
        }
        draws = {name: v[:, :width] if name in self._per_example else v for name, v in draws.items()}
        flat = {name: v.flatten(0, 1) for name, v in draws.items() if name.startswith("augment:")}
        columns = self.setting.data.gather(
            torch.from_numpy(index.ravel()).to(task.device), task.dtype, flat, self.setting.algorithm.columns
        )
        columns = {name: value.unflatten(0, (len(plans), width)) for name, value in columns.items()}
        return columns, mask, draws

    def map_batches(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Runs them one after another."""
        self.open()
        return [function(self._worker, item) for item in items]
