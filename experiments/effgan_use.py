"""What samples of a conditional ensemble do for the tail: FedAvg's model, tuned at the server on generated images.

    python experiments/effgan_use.py experiments/results/effgan_longtail

For each seed: FedAvg's model as it is; its logits less the log of the class counts, which needs no image (a control); tuned on
300 generated images a class (cross-entropy); and distilled on the same images from the corrected logits. It prints accuracy
overall, head, medium and tail, and what the generators cost: megabytes, beside the class counts that clients reveal.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fedtail import config, generation, runs, trees
from fedtail.evaluate import confusion, shot_groups
from fedtail.experiment import reopen
from fedtail.metrics import from_confusion

EACH, EPOCHS, LR, BATCH = 300, 5, 0.005, 50


def main():
    """Prints a row a way and the mean over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {}
    for run in sorted(folder.glob("fedavg-seed*")):
        seed = config.load(run).seed
        for way, scores in judged(run, folder / f"effgan-seed{seed}", seed).items():
            found.setdefault(way, []).append(scores)
    keys = ("accuracy", "head", "medium", "tail")
    print("| way | seeds | " + " | ".join(keys) + " |\n|---|---:|" + "---:|" * len(keys))
    for way, rows in found.items():
        cells = [np.array([100 * row[key] for row in rows]) for key in keys]
        shown = [f"{c.mean():.1f} ± {c.std(ddof=1) if len(c) > 1 else 0:.1f}" for c in cells]
        print(f"| {way} | {len(rows)} | " + " | ".join(shown) + " |")


def judged(classifier, generators, seed):
    """Scores by way for one seed."""
    federation = reopen(classifier)
    data, model = federation.data, federation.module()
    federation.close()
    sampler, whole = generation.load(generators), config.load(generators)
    images, labels = balanced(sampler)
    counts = runs.read(generators).counts
    sent = 2 * whole.rounds * len(counts) * trees.num_bytes(sampler.task.initial) / 1e6
    print(f"seed {seed}: {len(labels)} images of {len(labels.unique())} classes; generators cost about {sent:.0f} MB")
    with torch.no_grad():
        taught = torch.cat([model(part) for part in images.split(500)])
    prior = torch.from_numpy(counts.sum(0) / counts.sum()).float().log()
    ways = {
        "FedAvg": None,
        "logits less log prior": None,
        "tuned on samples": lambda z, rows: F.cross_entropy(z, labels[rows]),
        "distilled, logits less log prior": lambda z, rows: F.kl_div(
            z.log_softmax(1), (taught[rows] - prior).softmax(1), reduction="batchmean"
        ),
    }
    found = {}
    for way, loss in ways.items():
        scored = model if loss is None else tuned(model, images, loss, seed)
        shift = prior if way == "logits less log prior" else 0
        with torch.no_grad():
            parts = [(scored(part) - shift).argmax(1) for part in data.test["x"].split(500)]
        predicted = torch.cat(parts).numpy()
        table = confusion(data.test["y"].numpy(), predicted, data.num_classes)
        found[way] = from_confusion(table, shot_groups(federation.experiment.evaluation.groups, data))
    return found


def balanced(sampler):
    """Equally many images of every class that a generator makes, as uint8, and their classes."""
    shares = sampler.mixture.shares.sum(0)
    drawn = [sampler.draw(EACH, label=c) for c in range(len(shares)) if float(shares[c]) > 0]
    pixels = np.concatenate([generation.to_bytes(part.images) for part in drawn])
    return torch.from_numpy(pixels), torch.from_numpy(np.concatenate([part.labels for part in drawn]))


def tuned(model, images, loss, seed):
    """A copy of a model after some epochs of SGD on generated images."""
    import copy

    own = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(own.parameters(), LR, momentum=0.9)
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        for rows in torch.from_numpy(rng.permutation(len(images))).split(BATCH):
            optimizer.zero_grad()
            loss(own(images[rows]), rows).backward()
            optimizer.step()
    return own.eval()


if __name__ == "__main__":
    main()
