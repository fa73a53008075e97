"""Early stopping on validation accuracies, as a value: what Keras' EarlyStopping and ModelCheckpoint keep.

    best = -inf, wait = 0;  from the first considered round on:
        if current - min_delta > best:  best = current, wait = 0
        else:                           wait = wait + 1, and training stops when wait >= patience
    the highest accuracy so far, `top`, counts every round and knows no min_delta

An improvement of exactly min_delta is none. Accuracies are shares, so no count of examples is needed; what rounding adds to
their differences (below 1e-9 for fewer than a billion examples) decides nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Watch(NamedTuple):
    """What has been seen of one or several validation accuracies."""

    rounds: Tensor  # () int64, judged so far
    last: Tensor  # (m,) float64, the last round's accuracy; -1 before the first
    top: Tensor  # (m,) float64, the highest accuracy; -1 before the first
    best: Tensor  # (m,) float64, the accuracy that an improvement must exceed by more than min_delta; -1: none
    wait: Tensor  # (m,) int64, considered rounds without an improvement


def begin(number: int, device: torch.device) -> Watch:
    """Returns the watch of so many accuracies before the first round."""
    none = torch.full((number,), -1.0, dtype=torch.float64, device=device)
    zeros = torch.zeros(number, dtype=torch.int64, device=device)
    return Watch(zeros.sum(), none, none.clone(), none.clone(), zeros)


def judge(watch: Watch, accuracy: Tensor, min_delta: float, ignored: int = 0) -> tuple[Watch, Tensor, Tensor]:
    """Takes a round's accuracies.

    Args:
        watch: before the round.
        accuracy: shares in [0, 1], (m,).
        min_delta: what an improvement must exceed, >= 0.
        ignored: number of first rounds that the stopping rule does not see.

    Returns:
        (watch after the round, whether each is the highest so far, whether each is an improvement), both bool (m,).
    """
    now = accuracy.double()
    considered = watch.rounds >= ignored
    highest = now > watch.top + 1e-9
    improved = considered & ((now - min_delta - watch.best > 1e-9) | (watch.best < 0))
    wait = torch.where(improved, 0, watch.wait + considered)
    best = torch.where(improved, now, watch.best)
    return Watch(watch.rounds + 1, now, torch.where(highest, now, watch.top), best, wait), highest, improved
