"""Fed-GraB from its formulas: balancer (SGB), prior analyzer (DPA) and gates, one class and one number at a time.

Source of everything here: specs/fedgrab.md; section and decision numbers in the docstrings point there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GATES = ("rank", "sets", "sets+rank", "ratio", "none")


def amp(x: float, a: float = 10.0, zeta: float = 0.5) -> float:
    """Gradient factor of a controller output, in (0, a); amp(0) = 1 (section 3)."""
    return a / (1.0 + (a - 1.0) * math.exp(-zeta * x))


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Logistic function without overflow for any finite z."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def binary_cross_entropy(z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Element-wise BCE of logits z against targets 0 or 1."""
    return np.maximum(z, 0.0) - z * target + np.log1p(np.exp(-np.abs(z)))


def positional_controller(errors: np.ndarray, kp: float = 10.0, ki: float = 0.01, kd: float = 0.1) -> np.ndarray:
    """Outputs u[t] = Kp e[t] + Ki sum(e[0..t]) + Kd (e[t] - e[t-1]) with e[-1] = 0 (section 3, no clip)."""
    outputs = np.zeros(len(errors))
    total, previous = 0.0, 0.0
    for t, error in enumerate(errors):
        total += error
        outputs[t] = kp * error + ki * total + kd * (error - previous)
        previous = error
    return outputs


class Sgb:
    """The self-adjusting gradient balancer of one client (sections 2.2 and 2.3).

    Attributes:
        pos, neg: [C] accumulated absolute positive / negative logit gradients.
        u: [C] controller outputs, clipped to +-clip.
        e1, e2: [C] errors one and two batches ago.
    """

    def __init__(
        self,
        classes: int,
        kp: float = 10.0,
        ki: float = 0.01,
        kd: float = 0.1,
        a: float = 10.0,
        zeta: float = 0.5,
        clip: float = 100.0,
    ) -> None:
        self.classes = classes
        self.kp, self.ki, self.kd = kp, ki, kd
        self.a, self.zeta, self.clip = a, zeta, clip
        self.pos, self.neg, self.u, self.e1, self.e2 = (np.zeros(classes) for _ in range(5))

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the five state vectors by name."""
        return {name: getattr(self, name).copy() for name in ("pos", "neg", "u", "e1", "e2")}

    def step(
        self, z: np.ndarray, y: np.ndarray, bypass: np.ndarray, closed: np.ndarray | None = None
    ) -> tuple[float, float, np.ndarray]:
        """One training batch, in the order of section 2.3.

        Args:
            z: [B, C] logits.
            y: [B] labels.
            bypass: bool[C], classes left alone in this batch (the controller still runs).
            closed: bool[C], classes shut by the `sets` gates; they hold the zero state (decision 6).

        Returns:
            Weighted loss, unweighted loss (both: sum over classes, mean over the batch), and the gradient of the
            weighted loss on the logits, [B, C].
        """
        batch = len(y)
        shut = np.zeros(self.classes, dtype=bool) if closed is None else closed
        weighted, unweighted, gradient = 0.0, 0.0, np.zeros((batch, self.classes))
        for c in range(self.classes):
            if shut[c]:
                self.pos[c] = self.neg[c] = self.u[c] = self.e1[c] = self.e2[c] = 0.0
            else:
                self._control(c)
            left_alone = bool(shut[c] or bypass[c])
            factor_pos = 1.0 if left_alone else amp(self.u[c], self.a, self.zeta)
            factor_neg = 1.0 if left_alone else amp(-self.u[c], self.a, self.zeta)
            target = (y == c).astype(np.float64)
            weight = target * factor_pos + (1.0 - target) * factor_neg
            loss = binary_cross_entropy(z[:, c], target)
            weighted += float(np.sum(weight * loss)) / batch
            unweighted += float(np.sum(loss)) / batch
            gradient[:, c] = weight * (sigmoid(z[:, c]) - target) / batch
            if not left_alone:
                size = np.abs(gradient[:, c])
                self.pos[c] += float(np.sum(target * size))
                self.neg[c] += float(np.sum((1.0 - target) * size))
        return weighted, unweighted, gradient

    def _control(self, c: int) -> None:
        """Incremental PID update of class c from the sums before this batch (steps 1 and 2)."""
        error = -(self.pos[c] - self.neg[c])
        change = self.kp * (error - self.e1[c])
        change += self.ki * error
        change += self.kd * (error - 2.0 * self.e1[c] + self.e2[c])
        self.u[c] = min(self.clip, max(-self.clip, self.u[c] + change))
        self.e2[c] = self.e1[c]
        self.e1[c] = error


def row_norms(W: np.ndarray) -> np.ndarray:
    """Euclidean norms of the rows of W [C, d], [C]."""
    return np.array([math.sqrt(sum(float(value) ** 2 for value in row)) for row in W])


def prior_from_norms(norms: np.ndarray) -> np.ndarray:
    """Prior estimate of one round: shift the minimum to 0, divide by the sum; equal norms: uniform (section 3)."""
    shifted = norms - norms.min()
    total = shifted.sum()
    return np.full(len(norms), 1.0 / len(norms)) if total == 0.0 else shifted / total


def prior_literal(norms: np.ndarray, samples: float = 10000.0) -> np.ndarray:
    """The recipe as the official code writes it: assumed sample counts per class, [C], sum = `samples`.

    Standardise (mean, population standard deviation), shift the minimum to 0, divide by the sum, multiply.
    The norms must not all be equal.
    """
    standard = (norms - norms.mean()) / math.sqrt(((norms - norms.mean()) ** 2).mean())
    shifted = standard - standard.min()
    return shifted / shifted.sum() * samples


def is_flat(norms: np.ndarray, limit: float = 1.1) -> bool:
    """Whether max / min of the norms is below `limit` (decision 8); all zero counts as flat, one zero does not."""
    low, high = float(norms.min()), float(norms.max())
    return high == low or high < limit * low


@dataclass
class Dpa:
    """Server state of the direct prior analyzer: running mean over all estimates, how many, and the last flatness."""

    pi_bar: np.ndarray | None = None
    count: int = 0
    flat: bool = False

    def update(self, W: np.ndarray) -> None:
        """Take in the aggregated classifier of one round, W [C, d]."""
        norms = row_norms(W)
        estimate = prior_from_norms(norms)
        self.count += 1
        if self.pi_bar is None:
            self.pi_bar = estimate
        else:
            self.pi_bar = ((self.count - 1) * self.pi_bar + estimate) / self.count
        self.flat = is_flat(norms)

    def gate(
        self, kind: str, classes: int, warm: int = 3, base: float = 0.1, order: str = "dpa"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gate of the coming round: (q [C], closed bool[C]), `none` while cold or flat (decision 8).

        With order "class_id" (gate rank only) the order is given: it needs no estimate, so only `warm` delays it.
        """
        if order == "class_id":
            if kind != "rank":
                raise ValueError(f"order class_id goes with gate rank, got {kind!r}")
            given = np.arange(classes, 0, -1, dtype=np.float64)
            return gate(kind if self.count >= warm else "none", given, base)
        if self.pi_bar is None or self.count < warm or self.flat:
            return gate("none", np.full(classes, 1.0 / classes), base)
        return gate(kind, self.pi_bar, base)


def rank(prior: np.ndarray) -> np.ndarray:
    """Position of each class in descending order of the prior, 0 = most frequent, ties by class index."""
    order = sorted(range(len(prior)), key=lambda c: (-prior[c], c))
    positions = np.zeros(len(prior), dtype=np.int64)
    for position, c in enumerate(order):
        positions[c] = position
    return positions


def shot_split(values: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """Head, middle and tail classes by cumulative share 75 % / 95 % (longtail_protocol section 3)."""
    order = sorted(range(len(values)), key=lambda c: (-values[c], c))
    total, so_far = float(sum(values)), 0.0
    first, second = None, None
    for position, c in enumerate(order):
        so_far += float(values[c])
        if first is None and so_far / total >= 0.75:
            first = position
        if second is None and so_far / total >= 0.95:
            second = position
    first = len(order) - 1 if first is None else first
    second = len(order) - 1 if second is None else second
    return order[: first + 1], order[first + 1 : second + 1], order[second + 1 :]


def gate(kind: str, prior: np.ndarray, base: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Bypass probabilities and closed classes of a gate for a given prior (section 3.1).

    Returns:
        q [C] in [0, 1] (1 for closed classes, which are always left alone) and closed, bool[C].
    """
    classes = len(prior)
    q, closed = np.zeros(classes), np.zeros(classes, dtype=bool)
    if kind == "rank":
        q = _profile(rank(prior), classes, base)
    elif kind in ("sets", "sets+rank"):
        head, middle, tail = shot_split(prior)
        for c in head + middle:
            q[c], closed[c] = 1.0, True
        if kind == "sets+rank" and tail:
            q[tail] = _profile(np.arange(len(tail)), len(tail), base)
    elif kind == "ratio":
        q = prior / prior.max()
    elif kind != "none":
        raise ValueError(f"gate must be one of {GATES}, got {kind!r}")
    return q, closed


def _profile(positions: np.ndarray, size: int, base: float) -> np.ndarray:
    """base^(position / (size - 1)) for each position; 1 for a group of one."""
    return np.array([1.0 if size == 1 else base ** (position / (size - 1)) for position in positions])
