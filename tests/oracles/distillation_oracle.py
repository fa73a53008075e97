"""Distillation as plain PyTorch: nn.Module, autograd, torch.optim and its scheduler; written from the formulas alone.

L = lam_kd T^2 mean_i KL(softmax(t_i / T) || softmax(z_i / T)) + lam_feat mean_i (1 - cos(P h_i, f_i)) + lam_ce CE(z, y)
"""

import copy

import torch
from torch import nn


def divergence(z, t, temperature):
    """T^2 times the mean over rows of sum_c a_c (log a_c - log b_c), a = softmax(t / T), b = softmax(z / T)."""
    total = 0.0
    for z_row, t_row in zip(z, t, strict=True):
        a = torch.exp(t_row / temperature - torch.logsumexp(t_row / temperature, 0))
        log_a = t_row / temperature - torch.logsumexp(t_row / temperature, 0)
        log_b = z_row / temperature - torch.logsumexp(z_row / temperature, 0)
        total = total + (a * (log_a - log_b)).sum()
    return temperature**2 * total / len(z)


def angle_loss(h, projector, f):
    """The mean of 1 - cos(P h, f)."""
    total = 0.0
    for h_row, f_row in zip(h, f, strict=True):
        u = projector @ h_row
        total = total + 1 - (u @ f_row) / (u.norm() * f_row.norm())
    return total / len(h)


def server_steps(net, batches, *, kd=1.0, feat=0.0, ce=0.0, temperature=2.0, projector=None, optimizer="adam", lr=1e-3,
                 clip=0.0, cosine=True):  # fmt: skip
    """Trains a network [with .features and .head] in training mode on (x, y, t, f) batches; returns (network, projector)."""
    net = copy.deepcopy(net).train()
    params = list(net.parameters())
    if projector is not None:
        projector = nn.Parameter(projector.clone())
        params.append(projector)
    solver = torch.optim.Adam(params, lr=lr) if optimizer == "adam" else torch.optim.SGD(params, lr=lr, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(solver, T_max=len(batches)) if cosine else None
    for x, y, t, f in batches:
        solver.zero_grad()
        h = net.features(x)
        z = net.head(h)
        loss = kd * divergence(z, t, temperature)
        if feat:
            loss = loss + feat * angle_loss(h, projector, f)
        if ce:
            loss = loss + ce * nn.functional.cross_entropy(z, y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        solver.step()
        if scheduler is not None:
            scheduler.step()
    return net, projector


def ensemble(nets, x):
    """The mean of the networks' logits in evaluation mode."""
    with torch.no_grad():
        return sum(net.eval()(x) for net in nets) / len(nets)


def client(net, batches, *, lam, temperature, lr, momentum):
    """Trains a network on CE + lam T^2 KL over (x, y, t) batches by SGD."""
    net = copy.deepcopy(net).train()
    solver = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    for x, y, t in batches:
        solver.zero_grad()
        z = net(x)
        (nn.functional.cross_entropy(z, y) + lam * divergence(z, t, temperature)).backward()
        solver.step()
    return net


def towards(net, images, consensus, size, *, lr, momentum):
    """Steps of SGD in evaluation mode on the mean squared difference of scores and consensus, batch by batch."""
    net = copy.deepcopy(net).eval()
    solver = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    for first in range(0, len(images), size):
        solver.zero_grad()
        ((net(images[first : first + size]) - consensus[first : first + size]) ** 2).mean().backward()
        solver.step()
    return net
