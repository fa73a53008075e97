"""Early stopping: the printed log of the author's run (arXiv 2501.15547), epoch by epoch."""

import pytest
import torch

from fedtail.stopping import begin, judge

# validation accuracies of the MNIST run, epochs 1 to 16, branches 1 and 2
STAGE1 = [
    (0.9676, 0.8892), (0.9763, 0.9071), (0.9742, 0.9018), (0.9810, 0.9024), (0.9821, 0.9128), (0.9813, 0.9140),
    (0.9823, 0.8993), (0.9836, 0.9313), (0.9820, 0.9196), (0.9846, 0.9340), (0.9855, 0.9338), (0.9850, 0.9322),
    (0.9860, 0.9272), (0.9846, 0.9334), (0.9839, 0.9445), (0.9851, 0.9334),
]  # fmt: skip
PHASE_A = [0.9778, 0.9826, 0.9825, 0.9815, 0.9862, 0.9828, 0.9830, 0.9856, 0.9838, 0.9854]
PHASE_B = [0.9876, 0.9871, 0.9876, 0.9876, 0.9880, 0.9874, 0.9866, 0.9873, 0.9874, 0.9882, 0.9876]
FOLDS = [
    [0.9941, 0.9942, 0.9940, 0.9943], [0.9928, 0.9931, 0.9929, 0.9928], [0.9954, 0.9961, 0.9962, 0.9956],
    [0.9956, 0.9950, 0.9944, 0.9946], [0.9952, 0.9945, 0.9946, 0.9944], [0.9950, 0.9943, 0.9942, 0.9941],
]  # fmt: skip


def replay(log, patience, ignored=0):
    """The epochs (from 1) at which each accuracy stops, has its monitor's best, and has its highest."""
    log = [row if isinstance(row, tuple) else (row,) for row in log]
    number = len(log[0])
    watch = begin(number, torch.device("cpu"))
    stop, best, top = [None] * number, [None] * number, [None] * number
    for epoch, row in enumerate(log, 1):
        watch, highest, improved = judge(watch, torch.tensor(row, dtype=torch.float64), 0.001, ignored)
        for m in range(number):
            best[m] = epoch if improved[m] else best[m]
            top[m] = epoch if highest[m] else top[m]
            stop[m] = epoch if stop[m] is None and int(watch.wait[m]) >= patience else stop[m]
    assert watch.last.tolist() == list(log[-1])
    assert int(watch.rounds) == len(log)
    return stop, best, top


def test_stage_one_of_the_log():
    """Epoch 10 is an exact tie with epoch 8 plus .001, so branch 1 stops at 16; branch 2 has not fired."""
    assert replay(STAGE1, 5, ignored=3) == ([16, None], [11, 15], [13, 15])


def test_stage_two_of_the_log():
    assert replay(PHASE_A, 5)[:2] == ([10], [5])
    assert replay(PHASE_B, 10)[:2] == ([11], [1])
    assert replay(PHASE_B, 10)[2] == [10]  # the plain maximum is another epoch


@pytest.mark.parametrize("log", FOLDS)
def test_every_fold_stops_at_its_fourth_epoch_and_keeps_the_first(log):
    assert replay(log, 3)[:2] == ([4], [1])


def test_the_tie_is_one_in_counts_too():
    watch = begin(1, torch.device("cpu"))
    for right, improves in ((9836, True), (9846, False), (9847, True)):
        watch, _, improved = judge(watch, torch.tensor([right / 10_000], dtype=torch.float64), 0.001)
        assert bool(improved) is improves
