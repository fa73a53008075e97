"""How good generated images are, from their features: Frechet distance, kernel distance, precision, coverage, modes.

Everything is in float64 and from features [N, d] or labels (N,), so that one function serves every feature network.

    Frechet distance   ||m_r - m_g||^2 + Tr C_r + Tr C_g - 2 Tr (C_r^(1/2) C_g C_r^(1/2))^(1/2)   (Heusel et al., NeurIPS 2017)
    kernel distance    unbiased MMD^2 with k(a, b) = (a.b / d + 1)^3                              (Binkowski et al., ICLR 2018)
    precision, recall  shares inside the other set's balls to the 3rd neighbour           (Kynkaanniemi et al., NeurIPS 2019)
    density, coverage  the same with balls of the real points alone, to the 5th neighbour           (Naeem et al., ICML 2020)
    classifier score   exp E_x KL(p(y|x) || p(y))                                               (Salimans et al., NeurIPS 2016)

C are population covariances (divided by N), for which a mixture's moments follow exactly from its parts' (`pooled`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
CHUNK = 500
"""Rows of a matrix of distances that are computed at once."""
RARE = 0.01
"""Share from which on a class counts as covered."""


class Moments(NamedTuple):
    """What the Frechet distance needs of a set."""

    size: int
    mean: Array  # (d,) float64
    covariance: Array  # [d, d] float64, divided by size


def moments(features: Array) -> Moments:
    """Returns mean and population covariance of features [N, d], N >= 1."""
    wide = np.asarray(features, np.float64)
    mean = wide.mean(0)
    centred = wide - mean
    return Moments(len(wide), mean, centred.T @ centred / len(wide))


def pooled(parts: Sequence[Moments]) -> Moments:
    """Returns the moments of the union of sets: C = sum_k w_k (C_k + m_k m_k^T) - m m^T with w_k = N_k / N."""
    total = sum(part.size for part in parts)
    shares = [part.size / total for part in parts]
    mean = np.sum([w * p.mean for w, p in zip(shares, parts, strict=True)], 0)
    # about the common mean: the difference of large numbers is avoided
    spread = [w * (p.covariance + np.outer(p.mean - mean, p.mean - mean)) for w, p in zip(shares, parts, strict=True)]
    return Moments(total, mean, np.sum(spread, 0))


def frechet(first: Moments, second: Moments, ridge: float = 0.0) -> float:
    """Returns the Frechet distance of two Gaussians, >= 0 up to rounding.

    Args:
        first: of one set.
        second: of the other.
        ridge: added to both diagonals; 1e-6 for features that are often exactly 0.
    """
    eye = ridge * np.eye(len(first.mean))
    a, b = first.covariance + eye, second.covariance + eye
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = root @ b @ root
    shared = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0)).sum()
    return float(((first.mean - second.mean) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared)


def kernel_distance(
    real: Array, fake: Array, rng: np.random.Generator, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """Returns mean and standard deviation of the unbiased MMD^2 over random subsets; it may be negative.

    Args:
        real: features [N, d].
        fake: features [M, d].
        rng: draws the subsets.
        subsets: how many.
        size: of a subset; no more than N and M are taken.
    """
    x, y = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    count = min(size, len(x), len(y))
    # of small sets the kernel of all pairs costs less than that of every subset
    whole = (_cubic(x, x), _cubic(y, y), _cubic(x, y)) if max(len(x), len(y)) <= 3 * count else None
    found: list[float] = []
    for _ in range(subsets):
        i, j = (rng.choice(len(rows), count, replace=False) for rows in (x, y))
        if whole is None:
            kernels = _cubic(x[i], x[i]), _cubic(y[j], y[j]), _cubic(x[i], y[j])
        else:
            kernels = tuple(k[np.ix_(a, b)] for k, a, b in zip(whole, (i, j, i), (i, j, j), strict=True))
        own = sum((k.sum() - np.trace(k)) / (count * (count - 1)) for k in kernels[:2])
        found.append(float(own - 2 * kernels[2].mean()))
    return float(np.mean(found)), float(np.std(found))


def _cubic(a: Array, b: Array) -> Array:
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def _wide(features: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, np.float64))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns Euclidean distances [len(a), len(b)] by one product of matrices, seven times as fast as by differences."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def radii(features: Array, k: int) -> Array:
    """Returns each point's distance to its k-th nearest other point of the set, (N,)."""
    x = _wide(features)
    parts = [
        _distances(part, x).topk(k + 1, 1, largest=False).values[:, -1] for part in x.split(CHUNK)
    ]  # the nearest is the point itself
    return torch.cat(parts).numpy()


def _inside(points: Array, centres: Array, radius: Array) -> tuple[Array, Array]:
    """Returns how many balls hold each point, and for each ball whether it holds one."""
    p, c, r = _wide(points), _wide(centres), torch.from_numpy(radius)
    holders, held = torch.zeros(len(p)), list[Tensor]()
    for part, own in zip(c.split(CHUNK), r.split(CHUNK), strict=True):
        within = _distances(part, p) < own[:, None]
        holders += within.sum(0)
        held.append(within.any(1))
    return holders.numpy(), torch.cat(held).numpy()


def precision_recall(real: Array, fake: Array, k: int = 3) -> dict[str, float]:
    """Returns "precision", the share of fakes inside a real point's ball, and "recall", the other way round."""
    inside_real, _ = _inside(fake, real, radii(real, k))
    inside_fake, _ = _inside(real, fake, radii(fake, k))
    return {"precision": float((inside_real > 0).mean()), "recall": float((inside_fake > 0).mean())}


def density_coverage(real: Array, fake: Array, k: int = 5) -> dict[str, float]:
    """Returns "density", real balls a fake lies in, over k, and "coverage", the share of real balls that hold a fake."""
    holders, held = _inside(fake, real, radii(real, k))
    return {"density": float(holders.mean() / k), "coverage": float(held.mean())}


def nearest(points: Array, others: Array) -> Array:
    """Returns each point's distance to the nearest of the others, (N,); exactly 0 for a point that is among them."""
    where = _wide(others)
    parts = [torch.cdist(part, where, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
             for part in _wide(points).split(CHUNK)]  # fmt: skip
    return torch.cat(parts).numpy()


def modes(labels: Array, target: Array) -> dict[str, float]:
    """Returns how the classes of generated images compare with a target.

    Args:
        labels: (N,) classes that a classifier gives them.
        target: (classes,) >= 0, counts or shares; empty classes are taken as 1e-6, since KL would be infinite.

    Returns:
        "modes": classes with a share of .01 or more; "mode_kl": KL(shares, target); "mode_distance": total variation.
    """
    share = np.bincount(labels, minlength=len(target)) / len(labels)
    wanted = (target / target.sum()).clip(min=1e-6)
    wanted = wanted / wanted.sum()
    some = share > 0
    divergence = float((share[some] * np.log(share[some] / wanted[some])).sum())
    return {"modes": float((share >= RARE).sum()), "mode_kl": divergence,
            "mode_distance": float(np.abs(share - target / target.sum()).sum() / 2)}  # fmt: skip


def purity(labels: Array, makers: Array, held: Array) -> Array:
    """Returns for each generator the share of its images that fall into classes of its client.

    Args:
        labels: (N,) classes that a classifier gives the images.
        makers: (N,) int64, the client whose generator made each.
        held: [clients, classes] class counts.

    Returns:
        (clients,), NaN where a generator made no image.
    """
    found = np.full(len(held), np.nan)
    for k in np.unique(makers):
        found[k] = (held[k, labels[makers == k]] > 0).mean()
    return found


def classifier_score(probabilities: Array, splits: int = 10) -> tuple[float, float]:
    """Returns mean and standard deviation over splits of exp E_x KL(p(y|x) || p(y)), in [1, classes].

    Args:
        probabilities: [N, classes], rows sum to 1; cut into consecutive splits, so shuffle before.
        splits: how many, <= N.
    """
    found: list[float] = []
    for part in np.array_split(np.asarray(probabilities, np.float64), splits):
        whole = part.mean(0, keepdims=True)
        ratio = np.where(part > 0, part / np.where(whole > 0, whole, 1), 1)
        found.append(float(np.exp((part * np.log(ratio)).sum(1).mean())))
    return float(np.mean(found)), float(np.std(found))
