"""What a newcomer writes: a deep copy of the model, a DataLoader and an optimizer for each client; `naive.py WORKLOAD.npz`."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import serve
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

work = serve.load(sys.argv[1])
torch.set_num_threads(1)
data = TensorDataset(work.inputs(), torch.from_numpy(work.y))
loaders = [DataLoader(Subset(data, o.tolist()), work.batch_size, shuffle=True) for o in work.owners]
model = serve.network(work)


def round_of(number: int) -> None:
    """Trains the cohort, one client after another, and averages state dicts."""
    cohort = work.cohort(number)
    examples = sum(len(work.owners[i]) for i in cohort)
    states = []
    for client in cohort:
        local = copy.deepcopy(model)
        optimizer = torch.optim.SGD(local.parameters(), lr=work.lr, momentum=work.momentum)
        for x, y in loaders[client]:
            optimizer.zero_grad()
            F.cross_entropy(local(x), y).backward()
            optimizer.step()
        states.append((local.state_dict(), len(work.owners[client]) / examples))
    model.load_state_dict({k: sum(s[k] * w for s, w in states) for k in states[0][0]})


serve.play(work, round_of)
