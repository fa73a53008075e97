"""FedLoGe: a backbone trained against a frozen sparse simplex, one shared and one private head, realigned by their row norms.

Zikai Xiao, Zihan Chen, Liyinglan Liu, Yang Feng, Jian Wu, Wanlu Liu, Joey Tianyi Zhou, Howard Hao Yang, Zuozhu Liu: FedLoGe:
Joint Local and Generic Federated Learning under Long-tailed Data, ICLR 2024 (arXiv 2401.08977).

    V: the static sparse classifier, see `fedtail.etf` (eq. 4); theta: backbone; psi: shared head; phi_k: client k's own
    h = f_theta(x), once a batch;  sg: no gradient
    L = CE(V^T h, y) + CE(psi(sg h), y) + CE(phi_k(sg h), y)           one step on theta, psi and phi_k, each by its own term
    generic model:   psi'_c  = psi_c / |psi_c|                         (eq. 6)
    personal model:  phi'_kc = psi_c |phi_kc|                          (eq. 7), beside phi_k: logits phi'_k(h) + phi_k(h)

theta and psi travel and are averaged by numbers of examples: FedAvg's traffic. phi_k stays. V is made from the seed.

Differences from the paper: the personal model adds phi_k, as the authors' code does (`personal_head`). A row of zeros is left
as it is. A clip of the optimizer acts on theta, psi and phi_k together.
Differences from the authors' code: no bias in the frozen head and none beside normalised rows (their release keeps both:
`fixed_bias`, `bias = "keep"` with `constant = 1.7`); the generic model is the realigned one; no mask of absent classes in the
method (evaluation.label_mask gives one to every method alike); the true n_k; no fine-tuning for 0 epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtail.algorithm import Algorithm, Batch, Context, Metrics, as_tensor
from fedtail.errors import ConfigError
from fedtail.etf import sparse_etf
from fedtail.heads import feature_size, fresh_head, head_names, logits, with_head
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.optim import Params
from fedtail.task import Task, Variables
from fedtail.trees import Tree

OWN = "private."  # before the names of phi_k's parameters, beside the model's in a client's local state


@dataclass(frozen=True, kw_only=True)
class FedLoGe(Algorithm):
    """Three heads on one backbone; the generic and the personal model come out by a formula, without training."""

    sparsity: float = 0.6
    """beta in [0, 1): share of the frozen head's entries that are zero; 0.6 in the authors' code."""
    norm: float = 0.1
    """gamma > 0: length of the frozen head's rows; 0.1 in the authors' code. Decides how fast the backbone learns."""
    etf_steps: int = 10_000
    """Steps of Adam that spread the rows, >= 0; the authors' code. Made once and kept on disk."""
    etf_lr: float = 1e-4
    """Their learning rate, > 0; the authors' code."""
    fixed_bias: bool = False
    """True gives the frozen head a random frozen bias within 1 / sqrt(d), as the authors' layer has."""
    generic_head: Literal["realigned", "fixed", "raw"] = "realigned"
    """What the generic model predicts with: psi' (paper), V (the default run of the authors' code), or psi as it is."""
    personal_head: Literal["realigned+private", "realigned+raw", "raw+private", "realigned", "private"] = (
        "realigned+private"
    )
    """What a personal model predicts with: phi'_k + phi_k (authors' code), phi'_k + psi (their README), ..."""
    constant: float = 1.0
    """Length of psi' rows, > 0: 1 in the paper, 1.7 in the authors' code; matters beside a bias only."""
    bias: Literal["drop", "keep"] = "drop"
    """Whether psi' keeps psi's bias: not in the paper's formula, kept in the authors' code."""
    personal_bias: Literal["shared", "private"] = "shared"
    """Which bias phi'_k has: psi's (authors' code) or phi_k's (their README)."""

    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.etf_steps < 0:
            raise ConfigError(
                f"FedLoGe.sparsity must be in [0, 1) and etf_steps >= 0, got {self.sparsity}, {self.etf_steps}."
            )
        if min(self.norm, self.etf_lr, self.constant) <= 0:
            got = f"{self.norm}, {self.etf_lr} and {self.constant}"
            raise ConfigError(f"FedLoGe.norm, etf_lr and constant must be > 0, got {got}.")

    def constants(self, task: Task, rng: np.random.Generator) -> Params:
        """The frozen head: V^T [classes, d], and its bias where there is one."""
        size = feature_size(task, "FedLoGe")
        rows = sparse_etf(task.num_classes, size, sparsity=self.sparsity, norm=self.norm, steps=self.etf_steps, lr=self.etf_lr,
                          seed=int(rng.integers(2**31)))  # fmt: skip
        bound = size**-0.5 if self.fixed_bias else 0.0
        bias = as_tensor(rng.uniform(-bound, bound, task.num_classes), task.dtype, task.device)
        return {"weight": rows.to(task.device, task.dtype), "bias": bias}

    def init_client(self, ctx: Context, message: Variables, rng: np.random.Generator) -> Params:
        """phi_k with PyTorch's initial values, another draw for each client."""
        return fresh_head(ctx.task, rng, "FedLoGe")

    def local_init(self, ctx: Context, message: Variables, client: Params) -> Local:
        """Starts from theta, psi and the client's own head."""
        own = {OWN + name: value for name, value in client.items()}
        return start(self.optimizer, Variables({**message.params, **own}, message.buffers))

    def local_step(
        self, ctx: Context, message: Variables, client: Params, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One step on the three terms; each reaches its own part of the parameters only."""
        names = head_names(ctx.task, "FedLoGe")

        def objective(v: Variables, extra: Tree) -> Any:
            h, new = ctx.task.apply(v, batch.x, part="features", draws=batch.draws)
            outputs = {
                "fixed": F.linear(h, ctx.constants["weight"], ctx.constants["bias"]),
                "shared": logits(ctx.task, {k: v.params[k] for k in names}, h.detach()),
                "private": logits(ctx.task, {k: v.params[OWN + k] for k in names}, h.detach()),
            }
            losses = {k: batch.mean(F.cross_entropy(z, batch.y, reduction="none")) for k, z in outputs.items()}
            return sum(losses.values()), (new, extra, {f"loss_{k}": loss for k, loss in losses.items()})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx: Context, message: Variables, client: Params, local: Local) -> tuple[Variables, Params]:
        """Sends the change of theta and psi; keeps phi_k."""
        return delta(message, local.variables), {k: local.variables.params[OWN + k] for k in client}

    def server_update(self, ctx: Context, server: Variables, mean: Variables, total: Tensor) -> Variables:
        """Adds the mean change."""
        return descend(server, mean)

    def variables(self, ctx: Context, message: Variables, client: Params | None) -> Variables:
        """The network with the generic or a personal head: whatever is added up, it is one linear layer."""
        names = head_names(ctx.task, "FedLoGe")
        psi = {name: message.params[name] for name in names}
        found = self._generic(ctx, psi) if client is None else self._personal(psi, client, names)
        return with_head(message, found)

    def _generic(self, ctx: Context, psi: Params) -> Params:
        if self.generic_head == "raw":
            return psi
        weight, *bias = psi
        if self.generic_head == "fixed":
            frozen: Params = ctx.constants
            return {weight: frozen["weight"], **dict.fromkeys(bias, frozen["bias"])}
        rows = self.constant * F.normalize(psi[weight], dim=1)
        return {weight: rows, **{name: psi[name] * (self.bias == "keep") for name in bias}}

    def _personal(self, psi: Params, phi: Params, names: list[str]) -> Params:
        lengths = phi[names[0]].norm(dim=1, keepdim=True)
        realigned = {names[0]: psi[names[0]] * lengths}
        for name in names[1:]:
            realigned[name] = (psi if self.personal_bias == "shared" else phi)[name]
        heads = {"realigned": realigned, "raw": psi, "private": phi}
        parts = [heads[name] for name in self.personal_head.split("+")]
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in names}

    def readings(self) -> Mapping[str, Algorithm]:
        """The other heads, which are judged beside the chosen ones: "raw" and "fixed", or what is not the default."""
        names: tuple[Any, ...] = ("realigned", "fixed", "raw")
        return {name: replace(self, generic_head=name) for name in names if name != self.generic_head}

    def diagnostics(self, ctx: Context, server: Variables) -> Metrics:
        """The row norms of psi, (classes,): what realignment divides by."""
        return {"head_norms": server.params[head_names(ctx.task, "FedLoGe")[0]].norm(dim=1)}
