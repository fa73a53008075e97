"""Simplex equiangular tight frames: classifiers whose class vectors have one length and lie as far apart as possible.

Zikai Xiao, Zihan Chen, Liyinglan Liu, Yang Feng, Jian Wu, Wanlu Liu, Joey Tianyi Zhou, Howard Hao Yang, Zuozhu Liu: FedLoGe:
Joint Local and Generic Federated Learning under Long-tailed Data, ICLR 2024 (arXiv 2401.08977), whose static sparse classifier
this is; the dense frame is that of Papyan, Han and Donoho, Prevalence of Neural Collapse, PNAS 2020.

    V0 = sqrt(C / (C - 1)) Q (I - 11^T / C)             Q: d x C with orthonormal columns
    V  = the kept entries of V0, moved to minimise
         sum_c (|v_c| - gamma)^2 - mean_c arccos max_{j != c} cos(v_c, v_j)        (eq. 4)
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from fedtail.errors import ConfigError
from fedtail.files import cache_folder, write_atomic

VERSION = 1  # of the construction: a change of the numbers must not meet an old cache


def simplex(classes: int, size: int, rng: np.random.Generator) -> Tensor:
    """Returns V0, float64 [size, classes]: unit columns with cosines -1 / (classes - 1), in a random direction.

    Raises:
        ConfigError: fewer features than classes, or a single class.
    """
    if size < classes or classes < 2:
        raise ConfigError(f"a simplex of {classes} classes needs as many features and two classes at least, got {size}. "
                          "Use a model with wider features.")  # fmt: skip
    q, _ = np.linalg.qr(rng.random((size, classes)))
    return torch.from_numpy(math.sqrt(classes / (classes - 1)) * (q - q.mean(1, keepdims=True)))


def objective(v: Tensor, norm: float) -> Tensor:
    """Returns J(V) of eq. (4), shape (), for columns [size, classes] and the wanted column norm."""
    lengths = v.norm(dim=0)
    cosines = (v / lengths).T @ (v / lengths)
    others = cosines.masked_fill(torch.eye(v.shape[1], dtype=torch.bool), -1.0)
    nearest = others.max(1).values.clamp(-0.99999, 0.99999)
    return (lengths - norm).square().sum() - torch.arccos(nearest).mean()


def sparse_etf(
    classes: int,
    size: int,
    *,
    sparsity: float = 0.6,
    norm: float = 0.1,
    steps: int = 10_000,
    lr: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """Returns the static sparse classifier, float32 [classes, size]; kept on disk, so that it is computed once.

    Args:
        classes: C, >= 2.
        size: d, the number of features, >= C.
        sparsity: beta in [0, 1), the share of pruned entries.
        norm: gamma > 0, the wanted norm of a class's vector.
        steps: of Adam on eq. (4), >= 0.
        lr: of Adam.
        seed: of the direction and of the pruned entries.

    Raises:
        ConfigError: fewer features than classes, or so many entries pruned that a class keeps fewer than two.
    """
    name = f"{VERSION}-{classes}-{size}-{sparsity!r}-{norm!r}-{steps}-{lr!r}-{seed}"
    file = cache_folder() / "etf" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
    if (kept := _read(file, classes, size)) is not None:
        return kept
    found = construct(classes, size, sparsity, norm, steps, lr, np.random.default_rng(seed)).T.float().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"rows": found}, {"construction": name}))
    return found


def _read(file: Path, classes: int, size: int) -> Tensor | None:
    try:
        rows = load_file(file)["rows"].clone()
    except (OSError, SafetensorError, KeyError):  # missing or damaged: it is made again
        return None
    return rows if rows.shape == (classes, size) else None


def construct(
    classes: int, size: int, sparsity: float, norm: float, steps: int, lr: float, rng: np.random.Generator
) -> Tensor:
    """Returns V, float64 [size, classes]; see `sparse_etf`."""
    start = simplex(classes, size, rng)
    pruned = math.floor(sparsity * start.numel() + 1e-9)  # beta d C is not exact in binary
    keep = torch.ones(start.numel(), dtype=torch.float64)
    keep[torch.from_numpy(rng.choice(start.numel(), pruned, replace=False))] = 0
    keep = keep.view_as(start)
    if int(keep.sum(0).min()) < 2:
        raise ConfigError(f"sparsity {sparsity} leaves a class with fewer than two of {size} entries. Lower it, or use a model "
                          "with wider features.")  # fmt: skip
    v = (start * keep).requires_grad_()
    adam = torch.optim.Adam([v], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            (v.grad,) = torch.autograd.grad(objective(v, norm), [v])
            v.grad.mul_(keep)  # no gradient, no moments, no motion: what is pruned stays zero
            adam.step()
    return v.detach() * keep


def angles(rows: Tensor) -> Tensor:
    """Returns the angles between all pairs of rows [classes, size], in degrees, (classes * (classes - 1) / 2,)."""
    unit = F.normalize(rows.double(), dim=1)
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return torch.rad2deg(torch.arccos((unit @ unit.T)[i, j].clamp(-1, 1)))
