"""How a teacher's features F become class scores t.

Zero shot: t = s <F / |F|, Wt_c> with Wt_c = normalise(mean over prompts of normalise(text(prompt_c))).
Linear probe: t = F A^T + a, where A and a minimise mean CE + decay / 2 |A|^2 on standardised features.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.errors import TrainingError

STEPS = 500  # of L-BFGS, at most


def class_embeddings(text: Callable[[list[str]], Tensor], prompts: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Returns Wt [classes, d], rows of norm 1.

    Args:
        text: sentences to embeddings [n, d].
        prompts: sentences with {class}.
        class_names: what stands in its place.
    """
    rows: list[Tensor] = []
    for name in class_names:
        each = F.normalize(text([prompt.replace("{class}", name) for prompt in prompts]).double(), dim=-1)
        rows.append(F.normalize(each.mean(0), dim=-1))
    return torch.stack(rows).float()


def zero_shot(features: Tensor, embeddings: Tensor, scale: float) -> Tensor:
    """Returns scale * cosine of features [N, d] and class embeddings [classes, d], in [-scale, scale]."""
    return scale * F.normalize(features, dim=-1) @ embeddings.T


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns F A^T + a [N, classes]."""
    return F.linear(features, weight, bias)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation of each feature, (d,); a constant one has deviation 1."""
    wide = features.double()
    std = wide.std(0, unbiased=False)
    return wide.mean(0), torch.where(std > 1e-12, std, 1.0)


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Returns (A [classes, d], a (classes,)) of multinomial logistic regression, by L-BFGS in float64.

    Args:
        features: [N, d].
        labels: (N,) int64.
        classes: number of classes.
        decay: weight of half the squared norm of the weights of standardised features, >= 0.

    Raises:
        TrainingError: the features are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        raise TrainingError("the teacher's features are not finite. Look at its weights and preprocessing.")
    mean, std = standardisation(features)
    h = (features.double() - mean) / std
    weight = torch.zeros(classes, h.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def risk() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(h, weight, bias), labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(risk)
    a = weight.detach() / std
    return a.float(), (bias.detach() - a @ mean).float()
