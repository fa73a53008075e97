"""The floor: a bare PyTorch loop over the same clients, nothing around it; `floor.py WORKLOAD.npz THREADS`.

Batches are gathered beforehand, weights are one flat buffer that is reset for each client, SGD is three operations on it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import serve
import torch
from torch.nn import functional as F

work = serve.load(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
model, inputs, labels = serve.network(work), work.inputs(), torch.from_numpy(work.y).to(serve.DEVICE)
params = list(model.parameters())
flat = torch.cat([p.detach().flatten() for p in params])
grad, velocity, start, total = (torch.zeros_like(flat) for _ in range(4))
offset = 0
for p in params:
    size = p.numel()
    p.data = flat[offset : offset + size].view_as(p)
    p.grad = grad[offset : offset + size].view_as(p)
    offset += size
start.copy_(flat)


def round_of(number: int) -> None:
    """Trains the cohort, one client after another, and averages."""
    cohort = work.cohort(number)
    examples = sum(len(work.owners[i]) for i in cohort)
    rng = np.random.default_rng(number)
    total.zero_()
    for client in cohort:
        order = torch.from_numpy(rng.permutation(work.owners[client])).to(serve.DEVICE)
        flat.copy_(start)
        velocity.zero_()
        for x, y in zip(inputs[order].split(work.batch_size), labels[order].split(work.batch_size), strict=True):
            grad.zero_()
            F.cross_entropy(model(x), y).backward()
            velocity.mul_(work.momentum).add_(grad)
            flat.sub_(velocity, alpha=work.lr)
        total.add_(flat, alpha=len(order) / examples)
    start.copy_(total)


serve.play(work, round_of)
