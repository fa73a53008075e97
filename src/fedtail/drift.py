"""How far the clients' updates lie from their mean, from sums alone: drift, as four of the papers claim to lower it.

For the parameters' changes D_k that a cohort sends, with the weights p_k of their mean D = sum_k p_k D_k:
    distance   sqrt( sum_k p_k ||D_k - D||^2 ) = sqrt( sum_k p_k ||D_k||^2 - ||D||^2 )
    relative   distance / ||D||
    cosine     sum_k p_k <D_k, D> / (||D_k|| ||D||) = < sum_k p_k D_k / ||D_k||, D > / ||D||
Three sums over clients (the squared norm, the change, the change divided by its norm) give all of them, so a deployment
could send them too. Changes are taken as the method sends them: FedNova's are divided by its effective number of steps,
CLIMB's are multiplied with its client weights; p_k are the method's own (equal for SCAFFOLD, FedDyn and CLIMB).
"""

import torch
from torch import Tensor

from fedtail.optim import Params
from fedtail.task import Variables
from fedtail.trees import Tree, items


def change_of(update: Tree) -> Params | None:
    """Returns the parameters' changes in an update: of the first `Variables` in it; None if it has none."""
    if isinstance(update, Variables):
        return update.params or None
    if isinstance(update, Tensor):
        return None
    return next((found for _, child in items(update) if (found := change_of(child)) is not None), None)


def inner(first: Params, second: Params) -> Tensor:
    """Returns the inner product over all parameters, both float64, shape ()."""
    return torch.stack([(v * second[k]).sum() for k, v in first.items()]).sum()


class Drift:
    """Adds the three sums up, one client at a time."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._squares: Tensor | float = 0.0
        self._sum: Params = {}
        self._directions: Params = {}

    def add(self, update: Tree, weight: float) -> None:
        """Takes one client's update and its weight in the mean, >= 0."""
        found = change_of(update)
        if found is None or not weight:
            return
        change = {name: value.double() for name, value in found.items()}
        square = inner(change, change)
        norm = square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        self._weight += weight
        self._squares = self._squares + weight * square
        for name, value in change.items():
            self._sum[name] = self._sum.get(name, 0.0) + weight * value
            self._directions[name] = self._directions.get(name, 0.0) + weight / norm * value

    def sums(self) -> Tree:
        """Returns all sums as a tree of tensors; those of several objects may be added up."""
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in (self._weight, self._squares)])
        return {"numbers": numbers, "sum": self._sum, "directions": self._directions}

    def restore(self, sums: Tree) -> None:
        """Goes on from what `sums` gave."""
        self._weight, self._squares = float(sums["numbers"][0]), sums["numbers"][1]
        self._sum, self._directions = dict(sums["sum"]), dict(sums["directions"])

    def metrics(self) -> dict[str, Tensor]:
        """Returns "update_norm" (||D||), "drift_distance", "drift_relative", "drift_cosine"; nothing if nothing was added."""
        if not self._sum:
            return {}
        mean = {name: value / self._weight for name, value in self._sum.items()}
        square = inner(mean, mean)
        norm = square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        distance = (self._squares / self._weight - square).clamp(min=0).sqrt()
        cosine = inner(self._directions, mean) / self._weight / norm
        return {"update_norm": square.sqrt(), "drift_distance": distance, "drift_relative": distance / norm,
                "drift_cosine": cosine}  # fmt: skip
