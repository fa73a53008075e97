"""The geometry of features and classifiers: how near a network is to neural collapse.

Vardan Papyan, X. Y. Han, David L. Donoho: Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training,
PNAS 117 (40), 2020 (arXiv 2008.08186).

    mu_c = mean of h over class c             mu = mean of mu_c over the classes
    S_W  = mean_c of the covariance of h within class c         S_B = mean_c (mu_c - mu)(mu_c - mu)^T
    tr(S_W) / tr(S_B) -> 0                                   the features of a class become one point (NC1)
    angles between the mu_c - mu -> arccos(-1 / (C - 1))     ... as far apart as C points can be (NC2)
    angle between mu_c - mu and the classifier's row w_c -> 0                                     (NC3)

Differences from the paper: NC1 there is tr(S_W S_B^+) / C; the ratio of the traces needs no inverse of a matrix of rank C - 1
and divides into classes. Every class counts the same, however rare it is; the paper's data are balanced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ClassGeometry(NamedTuple):
    """Features by class; NaN for a class without examples, which everything below leaves out. All float64."""

    means: Tensor
    """mu_c, [classes, d]."""
    variances: Tensor
    """Mean of (h - mu_c)^2 over the class, feature by feature, [classes, d]."""

    @property
    def centred(self) -> Tensor:
        """mu_c - mu, [classes, d]."""
        return self.means - self.means.nanmean(0)

    @property
    def within(self) -> Tensor:
        """Mean of |h - mu_c|^2 over the class, (classes,); the mean is the trace of S_W."""
        return self.variances.sum(1)

    @property
    def between(self) -> Tensor:
        """|mu_c - mu|^2, (classes,); the mean is the trace of S_B."""
        return self.centred.square().sum(1)

    def spread(self, classes: Sequence[int] | None = None) -> float:
        """Returns sum_c within_c / sum_c between_c over these classes; over all (None) it is tr(S_W) / tr(S_B), NC1.

        NaN where none of the classes has an example. mu is the mean over all classes in either case.
        """
        rows = list(range(len(self.within)) if classes is None else classes)
        return float(self.within[rows].nansum() / self.between[rows].nansum())


def class_geometry(features: Tensor, labels: Tensor, classes: int) -> ClassGeometry:
    """Returns the class means and the spread around them.

    Args:
        features: h, [n, d].
        labels: int64 (n,), in 0..classes - 1.
        classes: C.
    """
    h = features.double()
    counts = torch.bincount(labels, minlength=classes).double()[:, None]
    sums = h.new_zeros(classes, h.shape[1])
    means = sums.index_add(0, labels, h) / counts
    return ClassGeometry(means, sums.index_add(0, labels, (h - means[labels]).square()) / counts)


def row_angles(first: Tensor, second: Tensor) -> Tensor:
    """Returns the angle between each row of one matrix and the same row of another, both [n, d]: degrees, float64 (n,).

    NaN for a row of zeros, which has no direction.

    Example:
        >>> row_angles(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])).round().tolist()
        [90.0, 0.0]
    """
    cosines = (_unit(first) * _unit(second)).sum(1)
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def nearest_angles(rows: Tensor) -> Tensor:
    """Returns the angle between each row [n, d] and the nearest other one: degrees, float64 (n,); NaN for a row of zeros.

    n >= 2 points are at most arccos(-1 / (n - 1)) away from their nearest: 96.4 degrees for 10.
    """
    unit = _unit(rows)
    cosines = (unit @ unit.T).fill_diagonal_(-1.0)
    nearest = cosines.nan_to_num(nan=-1.0).amax(1).clamp(-1, 1)
    return torch.rad2deg(torch.arccos(nearest)).where(~unit.isnan().any(1), torch.nan)


def _unit(rows: Tensor) -> Tensor:
    """Returns the rows with length 1, float64; NaN for a row of zeros."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True)
