"""Kept client states: the same whether they are in memory or on the disk."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from contract_problem import federated
from torch import Tensor

from fedtail import EngineOptions, Experiment, LocalWork, Scaffold, trees
from fedtail.checkpoint import load_checkpoint, save_checkpoint
from fedtail.engines.base import Sink
from fedtail.experiment import Federation
from fedtail.states import ClientStates


class Kept(NamedTuple):
    head: dict[str, Tensor]
    age: Tensor


def state(client, rows=10):
    rng = torch.Generator().manual_seed(client)
    head = {
        "weight": torch.randn(rows, 3, generator=rng),
        "bias": torch.randn(rows, dtype=torch.float64, generator=rng),
    }
    return Kept(head, torch.tensor(client))


SIZE = trees.num_bytes(state(0))


def test_beyond_the_limit_states_lie_on_the_disk_and_come_back_bit_for_bit():
    states = ClientStates(limit=3 * SIZE)
    for client in range(20):
        states[client] = state(client)
        assert states.in_memory <= 3 * SIZE
    assert sorted(states) == list(range(20))
    assert len(states) == 20
    for client in range(20):
        assert type(states[client]) is Kept
        assert trees.equal(states[client], state(client))
    assert states.in_memory == 3 * SIZE


def test_a_spilled_state_can_be_replaced():
    states = ClientStates(limit=SIZE)
    for client in (0, 1, 0, 2):
        states[client] = state(client)
    states[0] = state(7)
    assert trees.equal(states[0], state(7))
    assert sorted(states) == [0, 1, 2]
    assert states.in_memory == SIZE


def test_whoever_was_never_written_is_not_there():
    states = ClientStates()
    assert 3 not in states
    with pytest.raises(KeyError):
        states[3]


def test_the_files_go_with_the_object():
    states = ClientStates(limit=0)
    states[0], states[1] = state(0), state(1)
    file = states._file(0)
    assert file.exists()
    del states
    assert not file.exists()


def test_the_new_states_of_a_cohort_are_bounded_too():
    experiment = Experiment(rounds=1, algorithm=Scaffold(), local=LocalWork(epochs=1, batch_size=4),
                            engine=EngineOptions(name="loop"))  # fmt: skip
    with contextlib.closing(Federation(experiment, federated((6, 4, 8), images=False))) as running:
        ctx = running.context()
        plans = running.engine.setting.plans(ctx.round, 0, range(3))
        sinks = [Sink(list(plans)), Sink(list(plans), limit=0)]
        for sink in sinks:
            running.engine.cohort(ctx.round, 0, running.message(ctx), {}, plans, sink)
    whole, bounded = (sink.states for sink in sinks)
    assert bounded.in_memory == trees.num_bytes(whole[0])  # the one that was written last
    assert all(trees.equal(bounded[k], whole[k]) for k in range(3))


def test_a_run_is_the_same_with_its_states_on_the_disk(tmp_path):
    """SCAFFOLD's control variates beyond the limit; also through a checkpoint, which is read state by state."""
    ended = []
    for limit in (4096, 0):
        experiment = Experiment(rounds=3, algorithm=Scaffold(), local=LocalWork(epochs=1, batch_size=4), dtype="float64",
                                engine=EngineOptions(name="loop", states_mib=limit))  # fmt: skip
        running = Federation(experiment, federated((6, 4, 8), images=False))
        for _ in range(2):
            running.advance(running.step())
        save_checkpoint(tmp_path / "c", running.snapshot(0))
        back = load_checkpoint(tmp_path / "c", limit=limit << 20)
        assert (back.clients.in_memory < trees.num_bytes(dict(enumerate(back.clients.values())))) == (limit == 0)
        running.restore(back)
        running.advance(running.step())
        ended.append((running.server, {str(k): v for k, v in sorted(running.states.items())}))
        running.close()
    assert trees.equal(ended[0], ended[1])
