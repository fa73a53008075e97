"""FedGA, FedLC, FedRS, FedNTD, MOON, FedDecorr and FedSAM as plain PyTorch: nn.Module, autograd, one loop a client.

Written from the formulas of the papers (and, for FedGA's "official" form, from the calibrated label under soft-label
cross-entropy); nothing of fedtail is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Terms = Callable[..., Tensor]


class Network(nn.Module):
    """One hidden layer with ReLU, and a head."""

    def __init__(self, size: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(size, hidden), nn.Linear(hidden, classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, size] -> [B, hidden]."""
        return self.hidden(x).clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, size] -> [B, classes]."""
        return self.head(self.features(x))


def log_softmax(z: Tensor) -> Tensor:
    """z - log sum exp z."""
    return z - z.logsumexp(1, keepdim=True)


def picked(values: Tensor, y: Tensor) -> Tensor:
    """values[i, y_i]."""
    return values[torch.arange(len(y)), y]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """mean_i -log p[i, y_i]."""
    return -picked(log_softmax(z), y).mean()


@dataclass
class Here:
    """What a client's loss may see beside its model and batch."""

    counts: Tensor
    broadcast: Network
    previous: Network


def fedga(model: Network, x: Tensor, y: Tensor, here: Here) -> Tensor:
    """Soft-label cross-entropy with the calibrated label: p[i, c] (1 - n_c / n_{y_i}) + [c = y_i], p without gradient."""
    z = model(x)
    n = torch.bincount(y, minlength=z.shape[1]).double()
    p = torch.exp(log_softmax(z)).detach()
    label = p * (1 - n[None, :] / n[y][:, None])
    label[torch.arange(len(y)), y] += 1
    return -(label * log_softmax(z)).sum(1).mean()


def fedga_exact(model: Network, x: Tensor, y: Tensor, here: Here) -> Tensor:
    """(1/B) sum z * stop-gradient of (p n_c / n_y - [c = y])."""
    z = model(x)
    n = torch.bincount(y, minlength=z.shape[1]).double()
    gradient = torch.exp(log_softmax(z)).detach() * n[None, :] / n[y][:, None]
    gradient[torch.arange(len(y)), y] -= 1
    return (z * gradient).sum() / len(y)


def fedlc(model: Network, x: Tensor, y: Tensor, here: Here, tau: float = 1.0) -> Tensor:
    """Cross-entropy of z_c - tau n_c^(-1/4) among the classes held."""
    held = here.counts.nonzero()[:, 0]
    z = model(x)[:, held] - tau * here.counts[held] ** -0.25
    return cross_entropy(z, (y[:, None] == held).double().argmax(1))


def fedrs(model: Network, x: Tensor, y: Tensor, here: Here, alpha: float = 0.5, soft: bool = False) -> Tensor:
    """Cross-entropy of a_c z_c."""
    a = here.counts / here.counts.max() if soft else (here.counts > 0).double()
    return cross_entropy(model(x) * (alpha + (1 - alpha) * a), y)


def fedntd(model: Network, x: Tensor, y: Tensor, here: Here, beta: float = 1.0, tau: float = 1.0) -> Tensor:
    """Cross-entropy + beta tau^2 mean KL over the wrong classes, class by class."""
    z = model(x)
    with torch.no_grad():
        teacher = here.broadcast(x)
    divergences = []
    for i, label in enumerate(y.tolist()):
        wrong = [c for c in range(z.shape[1]) if c != label]
        q_t, q = (torch.softmax(logits[i, wrong] / tau, 0) for logits in (teacher, z))
        divergences.append((q_t * (q_t.log() - q.log())).sum())
    return cross_entropy(z, y) + beta * tau**2 * torch.stack(divergences).mean()


def moon(model: Network, x: Tensor, y: Tensor, here: Here, mu: float = 5.0, tau: float = 0.5) -> Tensor:
    """Cross-entropy + mu mean -log of the softmax of two cosines."""
    h = model.features(x)
    with torch.no_grad():
        near, far = here.broadcast.features(x), here.previous.features(x)

    def similar(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-16) / tau)

    contrast = -torch.log(similar(h, near) / (similar(h, near) + similar(h, far))).mean()
    return cross_entropy(model.head(h), y) + mu * contrast


def feddecorr(model: Network, x: Tensor, y: Tensor, here: Here, beta: float = 0.1) -> Tensor:
    """Cross-entropy + beta / B times the mean of the squared entries off the diagonal of Z^T Z."""
    h = model.features(x)
    penalty = h.new_zeros(())
    if len(x) > 1:
        Z = (h - h.mean(0)) / torch.sqrt(h.var(0) + 1e-8)
        G = Z.T @ Z
        d = len(G)
        penalty = sum((G[a, b] ** 2 for a in range(d) for b in range(d) if a != b), penalty) / (d * (d - 1)) / len(x)
    return cross_entropy(model(x), y) + beta * penalty


def plain(model: Network, x: Tensor, y: Tensor, here: Here) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(x), y)


@dataclass
class Run:
    """Parameters after each round, and each client's last own model."""

    rounds: list[dict[str, Tensor]] = field(default_factory=list)
    models: dict[int, Network] = field(default_factory=dict)


def federate(
    model: Network, x: Tensor, y: Tensor, owners: Sequence[Any], rounds: Sequence[dict[int, Sequence[Any]]], terms: Terms,
    *, lr: float, momentum: float = 0.0, clip: float = math.inf, rho: float = 0.0, uniform: bool = False,
) -> Run:  # fmt: skip
    """Trains; each round maps client -> batches (row indices). rho > 0: sharpness-aware steps."""
    run, classes = Run(), model.head.out_features
    for cohort in rounds:
        mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        weights = {k: 1.0 if uniform else float(len(owners[k])) for k in cohort}
        for k, batches in cohort.items():
            counts = torch.bincount(y[owners[k]], minlength=classes).double()
            here = Here(counts, model, run.models.get(k, model))
            local = copy.deepcopy(model)
            optimizer = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for rows in batches:
                optimizer.zero_grad()
                terms(local, x[rows], y[rows], here).backward()
                if rho:
                    norm = torch.stack([p.grad.norm() for p in local.parameters()]).norm()
                    kept = [p.detach().clone() for p in local.parameters()]
                    with torch.no_grad():
                        for p in local.parameters():
                            p += rho * p.grad / (norm + 1e-12)  # a client of one class may have gradient 0
                    optimizer.zero_grad()
                    terms(local, x[rows], y[rows], here).backward()
                    with torch.no_grad():
                        for p, old in zip(local.parameters(), kept, strict=True):
                            p.copy_(old)
                nn.utils.clip_grad_norm_(local.parameters(), clip)
                optimizer.step()
            run.models[k] = local
            for name, p in local.named_parameters():
                mean[name] += weights[k] / sum(weights.values()) * p.detach()
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(mean[name])
        run.rounds.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return run
