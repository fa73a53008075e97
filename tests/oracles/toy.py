"""The toy federation of fedgrab.md 6.2 item 3: a linear head on frozen features of a long-tailed Gaussian mixture.

Run `python -m oracles.toy 3` in the folder tests to print the table of that item for seeds 0..2.
"""

from __future__ import annotations

import sys

import numpy as np

from oracles.rounds_oracle import Federation, Sgd, fedavg, fedgrab

CLASSES, DIM, CLIENTS, ROUNDS, EPOCHS, BATCH = 10, 32, 8, 20, 5, 10
SGD = Sgd(lr=0.03, momentum=0.5)
GROUPS = {"head": range(3), "middle": range(3, 6), "tail": range(6, 10)}
METHODS = ("ce", "bce", "sgb_none", "sgb_rank", "sgb_rank_warm1")


def counts(n_max: int = 500, factor: float = 100.0, classes: int = CLASSES) -> np.ndarray:
    """Class counts floor(n_max * (1 / IF)^(c / (C - 1))), [C]; the tiny addition guards exact integers."""
    return np.array([int(n_max * (1.0 / factor) ** (c / (classes - 1)) + 1e-9) for c in range(classes)])


def toy(seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    """Features [N, 32], labels [N], one index array a client (8), test features [2000, 32], test labels."""
    rng = np.random.default_rng([seed, 0])
    means = rng.normal(0.0, 0.6, (CLASSES, DIM))
    labels = np.repeat(np.arange(CLASSES), counts())
    features = np.maximum(means[labels] + rng.normal(size=(len(labels), DIM)), 0.0)
    test_labels = np.repeat(np.arange(CLASSES), 200)
    test_features = np.maximum(means[test_labels] + rng.normal(size=(len(test_labels), DIM)), 0.0)
    owner = np.zeros(len(labels), dtype=np.int64)
    for c in range(CLASSES):
        share = rng.dirichlet(np.full(CLIENTS, 0.5))
        owner[labels == c] = rng.choice(CLIENTS, size=int((labels == c).sum()), p=share)
    clients = [np.flatnonzero(owner == k) for k in range(CLIENTS)]
    return features, labels, clients, test_features, test_labels


def initial(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Default initialisation of a linear layer: W [10, 32] and b [10] uniform on +-1/sqrt(32)."""
    rng = np.random.default_rng([seed, 1])
    bound = 1.0 / np.sqrt(DIM)
    return rng.uniform(-bound, bound, (CLASSES, DIM)), rng.uniform(-bound, bound, CLASSES)


def batches(seed: int, clients: list[np.ndarray], rounds: int = ROUNDS) -> list[dict[int, list[np.ndarray]]]:
    """Shuffled batches of 10, last short batch kept, 5 epochs a round, by round and client."""
    rng = np.random.default_rng([seed, 2])
    plan: list[dict[int, list[np.ndarray]]] = []
    for _ in range(rounds):
        one: dict[int, list[np.ndarray]] = {}
        for k, own in enumerate(clients):
            one[k] = []
            for _ in range(EPOCHS):
                order = rng.permutation(own)
                one[k] += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        plan.append(one)
    return plan


def uniforms(seed: int, plan: list[dict[int, list[np.ndarray]]]) -> list[dict[int, np.ndarray]]:
    """One uniform number per round, client, step and class: [steps, 10] arrays by round and client."""
    rng = np.random.default_rng([seed, 3])
    return [{k: rng.random((len(steps), CLASSES)) for k, steps in one.items()} for one in plan]


def run(method: str, seed: int, rounds: int = ROUNDS) -> Federation:
    """Train the head by one of METHODS; "bce" is Fed-GraB with every class bypassed."""
    features, labels, clients, _, _ = toy(seed)
    W, b = initial(seed)
    plan = batches(seed, clients, rounds)
    sizes = [len(own) for own in clients]
    if method == "ce":
        return fedavg(W, b, features, labels, plan, sizes, SGD)
    if method == "bce":
        everything = [{k: np.ones((len(steps), CLASSES), dtype=bool) for k, steps in one.items()} for one in plan]
        return fedgrab(W, b, features, labels, plan, sizes, SGD, gate="none", bypass=everything)
    gate, warm = {"sgb_none": ("none", 3), "sgb_rank": ("rank", 3), "sgb_rank_warm1": ("rank", 1)}[method]
    draws = uniforms(seed, plan)
    return fedgrab(W, b, features, labels, plan, sizes, SGD, gate=gate, warm=warm, uniforms=draws)


def evaluate(W: np.ndarray, b: np.ndarray, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of argmax(x W^T + b) in per cent: all, head, middle, tail."""
    right = (features @ W.T + b).argmax(axis=1) == labels
    scores = {"all": 100.0 * float(right.mean())}
    for name, group in GROUPS.items():
        scores[name] = 100.0 * float(right[np.isin(labels, list(group))].mean())
    return scores


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def main(seeds: int) -> None:
    """Print means over seeds: accuracies, Spearman of row norms and counts after rounds 1, 2, 5, 10, 20."""
    for method in METHODS:
        scores, correlations, largest = [], [], 0.0
        for seed in range(seeds):
            _, _, _, test_features, test_labels = toy(seed)
            result = run(method, seed)
            scores.append(list(evaluate(*result.weights[-1], test_features, test_labels).values()))
            norms = [np.linalg.norm(result.weights[t - 1][0], axis=1) for t in (1, 2, 5, 10, 20)]
            correlations.append([spearman(values, counts()) for values in norms])
            largest = max([largest, *(float(np.abs(sgb.u).max()) for sgb in result.clients.values())])
        mean = " / ".join(f"{value:.1f}" for value in np.mean(scores, axis=0))
        order = " / ".join(f"{value:.2f}" for value in np.mean(correlations, axis=0))
        worst = " / ".join(f"{value:.2f}" for value in np.min(correlations, axis=0))
        print(f"{method:15s} all/head/middle/tail {mean}   Spearman {order} (worst {worst})   max|u| {largest:.1f}")
        print("   tail by seed: " + " ".join(f"{row[3]:.1f}" for row in scores))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
