"""Client-level differential privacy of a deployment's global model: clipping and noise at the server (the Gaussian mechanism).

Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
(arXiv:1710.06963). With S the clip, z the noise multiplier and m the number of clients that were asked,

    mean = (sum over the clients k that answered of u_k min(1, S / |u_k|) + N(0, (z S)^2)) / m,

where |u_k| is the norm of everything in the update together. Every client counts the same, whatever its weight.

What is promised: for any one client, the model would be almost as likely had the client sent zeros throughout: (epsilon,
delta), for the composition of all such sums so far, each counted as if every client were in it. Nothing is gained from
sampling, because a cohort is drawn by the experiment's seed, which is no secret. T sums at multiplier z tell as much as one at
z / sqrt(T). The accountant is the package dp-accounting (the extra `privacy`).

Who is trusted: the server, which sees each update as it came. What it writes beside the model (metrics, clients' states,
numbers of examples) is not covered. The noise is the operating system's entropy, never the experiment's seed; each number is a
sum of four normals, whose rounding tells less of them (Naoise Holohan, Stefano Braghin, "Secure Random Sampling in Differential
Privacy", ESORICS 2021).
"""

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtail import trees
from fedtail.engines.base import Result
from fedtail.errors import ConfigError
from fedtail.files import write_atomic
from fedtail.trees import Tree


def accountant() -> Any:
    """Returns the package dp_accounting.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise ConfigError(
            f'clip and noise need the package dp-accounting ({error}). Install it: pip install "fedtail[privacy]"'
        ) from error


def epsilon(noise: float, sums: int, delta: float) -> float:
    """Returns the budget that so many noisy sums have used, infinite without noise.

    Args:
        noise: standard deviation over the clip.
        sums: how many.
        delta: the probability that the promise does not cover, in (0, 1).
    """
    return accountant().get_epsilon_gaussian(noise / math.sqrt(sums), delta) if noise else math.inf


def normal(size: int, entropy: Any = os.urandom) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns standard normal numbers (size,) from the operating system's entropy, each a sum of four halves (Box-Muller).

    Args:
        size: how many.
        entropy: number of bytes -> bytes.
    """
    total = np.zeros(size)
    for _ in range(4):
        uniform = (np.frombuffer(entropy(16 * size), np.uint64) >> np.uint64(11)).reshape(2, size)
        u, v = (uniform + 1.0) / 2.0**53  # in (0, 1]
        total += np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    return total / 2


def privatise(results: Mapping[int, Result], asked: int, clip: float, noise: float) -> dict[int, Result]:
    """Returns the results with equal weights, whose mean is the noisy one of this module.

    Args:
        results: of the clients that answered, by client; at least one.
        asked: number of clients that were asked, m.
        clip: largest norm of an update, S > 0.
        noise: multiplier z >= 0.

    Raises:
        ConfigError: an update holds other numbers than floating-point ones.
    """
    share = len(results) / asked  # the sink divides by who answered, which depends on the clients' data; m does not
    found: dict[int, Result] = {}
    for number in sorted(results):
        update = results[number].update
        leaves = [leaf.double() for leaf in trees.named_leaves(update).values()]
        if not all(leaf.is_floating_point() for leaf in trees.named_leaves(update).values()):
            raise ConfigError("clip: the update holds whole numbers (BatchNorm counts its batches), which cannot be noised. "
                              'Use a model with norm = "group".')  # fmt: skip
        length = math.sqrt(sum(float(leaf.square().sum()) for leaf in leaves))
        factor = share * min(1.0, clip / length if length else 1.0)
        first = noise * clip * share if not found else 0.0  # once: it is added to the sum

        def change(leaf: Tensor, factor: float = factor, first: float = first) -> Tensor:
            out = leaf.double() * factor
            if first:
                out += first * torch.from_numpy(normal(leaf.numel())).reshape(leaf.shape).to(leaf.device)
            return out.to(leaf.dtype)

        changed: Tree = trees.tree_map(change, update)
        found[number] = results[number]._replace(update=changed, weight=1.0)
    return found


def count(folder: Path | None) -> int:
    """Counts one more noisy sum in the run folder's privacy.json, before it is made, and returns how many there were.

    A round that is begun again after a fault is noised anew; both count, because the first may have been seen.
    """
    if folder is None:
        return 1
    path = folder / "privacy.json"
    sums = 1 + (json.loads(path.read_text())["sums"] if path.is_file() else 0)
    write_atomic(path, json.dumps({"sums": sums}))
    return sums
