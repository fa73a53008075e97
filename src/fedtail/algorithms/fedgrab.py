"""Fed-GraB: self-adjusting gradient balancer (SGB) and direct prior analyser (DPA).

Xiao, Chen, Liu, Wang, Feng, Hao, Zhou, Wu, Yang and Liu, "Fed-GraB: Federated Long-tailed Learning with Self-Adjusting
Gradient Balancer", NeurIPS 2023 (arXiv 2310.07587).

SGB, at the client, for every class c; before the batch, from what was accumulated so far:
    e_c   = -(pos_c - neg_c)
    u_c  <- clip(u_c + Kp (e - e1) + Ki e + Kd (e - 2 e1 + e2));   e2 <- e1, e1 <- e
    rp_c  = amp(u_c), rn_c = amp(-u_c);   amp(x) = a / (1 + (a - 1) exp(-zeta x))
    a class is bypassed in the batch with probability q_c: rp_c = rn_c = 1
then, with Y one-hot and s_ic = Y_ic rp_c + (1 - Y_ic) rn_c (a constant for the gradient):
    L     = (1/B) sum_i sum_c s_ic BCE(z_ic, Y_ic),   dL/dz_ic = g_ic = s_ic (sigmoid(z_ic) - Y_ic) / B
    pos_c += sum_i Y_ic |g_ic|,  neg_c += sum_i (1 - Y_ic) |g_ic|     (classes that are not bypassed)
g is needed for the sums, so autograd is handed sum_ic z_ic g_ic, of the same gradient, and does not compute it once more.
DPA, at the server, on the rows of the aggregated classifier W:
    nu_c = ||W_c||;  pi_c = (nu_c - min nu) / sum_j (nu_j - min nu);  the prior is the mean of pi over rounds
Gates, from the prior (rank 0 = most frequent), see `gate`. What the loop is: the *global* prior decides which classes the
balancer may act on, or how often; the controller itself runs on the client's *local* sums, kept private over rounds.

Differences from the authors' code (release of November 2023): the weighted loss has exactly the gradient that their
backward hook makes; the classifier is trained (theirs is frozen at the mean of random layers: `frozen_classifier`); DPA is
used (theirs lists classes by id: `order = "class_id"`); every class has its own bypass probability (theirs counts
bypasses: `bypass_counter`); u is really clipped (`limit = 0`: never); client weights are the client's own n_k.
From the paper's idea, to make it run from scratch: no gate for the first `warm` estimates, nor while the row norms are
flat (max / min < 1.1). Not offered: the code's "class activation", which is off there, and its error 50 pos - 0.5 neg.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail.algorithm import Algorithm, Batch, Context, Metrics
from fedtail.errors import ConfigError
from fedtail.local import Local, delta, descend, sgd_step, start
from fedtail.losses import analyse, binary_cross_entropy, one_hot
from fedtail.task import Draw, Task, Variables


class Server(NamedTuple):
    """Server state."""

    model: Variables
    prior: Tensor  # (classes,) running mean of the estimates, zeros before the first
    estimates: Tensor  # () how many estimates it holds


class Message(NamedTuple):
    """Broadcast: FedAvg's and one number a class."""

    model: Variables
    prior: Tensor  # (classes,) zeros: no usable estimate, no gate


class Controller(NamedTuple):
    """Client state, private, kept over rounds; each (classes,), zeros at first."""

    positive: Tensor  # pos
    negative: Tensor  # neg
    output: Tensor  # u
    error1: Tensor  # e one batch ago
    error2: Tensor  # e two batches ago


class Gate(NamedTuple):
    """Which classes SGB leaves alone; each (classes,)."""

    bypass: Tensor  # q, probability for a batch; 1 where closed
    closed: Tensor  # bool: the state starts at zero and stays there, factors 1


def amp(x: Tensor, top: float, slope: float) -> Tensor:
    """The factor that a controller's output x stands for: increasing, 1 at x = 0, with the limits 0 and `top`."""
    return top / (1 + (top - 1) * torch.exp(-slope * x))


def gate(prior: Tensor, rule: str, base: float) -> Gate:
    """Returns the gate of a prior (classes,); an all-zero prior opens everything.

    "rank": q = base^(rank / (C - 1)); "sets": the classes that make up the first 95 % of the prior are closed;
    "sets+rank": the same, and "rank" within the rest; "ratio": q = prior / max prior; "none": q = 0.
    """
    classes, tiny = len(prior), torch.finfo(prior.dtype).tiny
    order = torch.argsort(prior, descending=True, stable=True)
    rank = torch.argsort(order)
    known, zero = prior.sum() > 0, torch.zeros_like(prior)
    share = prior[order].cumsum(0) / prior.sum().clamp(min=tiny)
    tail = (share < 0.95 - 1e-6).sum() + 1  # rank of the first tail class; 1e-6: a sum of shares may fall short of .95
    start = tail if rule == "sets+rank" else torch.zeros_like(tail)
    closed = (rank < tail) & known & rule.startswith("sets")
    if rule in ("rank", "sets+rank"):  # base^(position / (size - 1)) among the classes from `start` on; a single one: 1
        bypass = base ** ((rank - start).clamp(min=0) / (classes - 1 - start).clamp(min=1))
    else:
        bypass = prior / prior.max().clamp(min=tiny) if rule == "ratio" else zero
    return Gate(torch.where(closed, 1.0, torch.where(known, bypass.to(prior.dtype), zero)), closed)


def counted_bypass(draw: Tensor, base: float) -> Tensor:
    """The authors' counter fault: class c uses the probability of the number of bypasses so far; bool (classes,)."""
    count, found = torch.zeros_like(draw[0]), list[Tensor]()
    for value in draw:
        found.append(value < base ** (count / max(len(draw) - 1, 1)))
        count = count + found[-1].to(count.dtype)
    return torch.stack(found)


@dataclass(frozen=True, kw_only=True)
class FedGraB(Algorithm):
    """Balances each class's positive and negative gradients by a controller, gated by a prior read off the classifier."""

    kp: float = 10.0
    """Proportional gain; 10 in the authors' code."""
    ki: float = 0.01
    """Integral gain; .01 in the authors' code."""
    kd: float = 0.1
    """Differential gain; .1 in the authors' code."""
    top: float = 10.0
    """Largest factor on a gradient, > 1 (a); 10 in the authors' code."""
    slope: float = 0.5
    """Slope of the factor at 0, > 0 (zeta); .5 in the authors' code, .05 and .01 for 100 classes."""
    limit: float = 100.0
    """Bound on the controller's output; 0 = none, as the authors' code in effect."""
    gate: Literal["rank", "sets", "sets+rank", "ratio", "none"] = "rank"
    """How the prior decides which classes are balanced."""
    gate_base: float = 0.1
    """Bypass probability of the rarest class under the rank gates, in (0, 1]; .1 in the authors' code."""
    warm: int = 3
    """Number of estimates before the gate acts, >= 0."""
    initial_prior: bool = False
    """Counts the classifier that training begins with as the first estimate: for a trained one, which `start` brings."""
    freeze_prior: int = 0
    """Round after which the prior is kept as it is; 0 = never."""
    order: Literal["prior", "class_id"] = "prior"
    """Source of the ranks; "class_id" (the authors' release) acts from round 0 and leaks the order of sorted classes."""
    frozen_classifier: bool = False
    """Authors' release: the classifier receives no steps. For comparison only."""
    bypass_counter: bool = False
    """Authors' release: bypass probabilities by a counter over class ids, whatever gate and prior say. For comparison only."""

    def __post_init__(self) -> None:
        if not (self.top > 1 and self.slope > 0 and self.limit >= 0):
            raise ConfigError("FedGraB needs top > 1, slope > 0, limit >= 0; got "
                              f"{self.top}, {self.slope}, {self.limit}.")  # fmt: skip
        if not (0 < self.gate_base <= 1 and self.warm >= 0 and self.freeze_prior >= 0):
            raise ConfigError("FedGraB needs gate_base in (0, 1], warm >= 0 and freeze_prior >= 0; "
                              f"got {self.gate_base}, {self.warm}, {self.freeze_prior}.")  # fmt: skip
        if self.order == "prior" and 0 < self.freeze_prior < self.warm:
            raise ConfigError(f"FedGraB.freeze_prior = {self.freeze_prior} comes before warm = {self.warm} estimates: the "
                              f"gate would never act. Use freeze_prior >= {self.warm}, or 0.")  # fmt: skip

    def draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """One uniform number a class and batch decides who is bypassed."""
        return {"bypass": Draw("uniform", (task.num_classes,))}

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Server:
        """The initial model; no estimate, or that of its classifier."""
        rows = self._rows(ctx, ctx.task.initial)
        estimates = torch.full((), float(self.initial_prior), dtype=ctx.task.dtype, device=ctx.task.device)
        return Server(ctx.task.initial, estimates * analyse(rows), estimates)

    def _rows(self, ctx: Context, model: Variables) -> Tensor:
        if ctx.task.classifier is None:
            raise ConfigError("FedGraB reads the prior off the classifier's rows, but the model has no linear layer with "
                              "one output a class. Name it in the model's attribute `classifier`.")  # fmt: skip
        return model.params[f"{ctx.task.classifier}.weight"]

    def broadcast(self, ctx: Context, server: Server) -> Message:
        """Sends the model and the prior, or zeros while the prior is not to be used."""
        if self.order == "class_id":
            return Message(server.model, torch.arange(len(server.prior), 0, -1).to(server.prior))
        norms = torch.linalg.vector_norm(self._rows(ctx, server.model), dim=1)
        usable = (server.estimates >= self.warm) & (norms.max() >= 1.1 * norms.min())
        return Message(server.model, torch.where(usable, server.prior, 0.0))

    def init_client(self, ctx: Context, message: Message, rng: np.random.Generator) -> Controller:
        """The controller at rest."""
        return Controller(*(torch.zeros_like(message.prior) for _ in Controller._fields))

    def local_init(self, ctx: Context, message: Message, client: Controller) -> Local:
        """Starts from the broadcast model and the client's own controller; a closed class starts from rest."""
        allowed = gate(message.prior, self.gate, self.gate_base)
        controller = Controller(*(torch.where(allowed.closed, 0.0, value) for value in client))
        return start(self.optimizer, message.model, (controller, allowed.bypass), self._trainable(ctx, message.model))

    def _trainable(self, ctx: Context, model: Variables) -> list[str] | None:
        if not self.frozen_classifier:
            return None
        return [name for name in model.params if not name.startswith(f"{ctx.task.classifier}.")]

    def advance_controller(self, state: Controller) -> Controller:
        """Incremental PID step on the error -(pos - neg), set-point 0."""
        error = state.negative - state.positive
        # kp (e - e1) + ki e + kd (e - 2 e1 + e2), collected by error: each operation counts beside a small model's step
        output = state.output.add(error, alpha=self.kp + self.ki + self.kd)
        output = output.sub(state.error1, alpha=self.kp + 2 * self.kd).add(state.error2, alpha=self.kd)
        output = output.clamp(-self.limit, self.limit) if self.limit else output
        return Controller(state.positive, state.negative, output, error, state.error1)

    def balance(self, state: Controller, bypass: Tensor, draw: Tensor, z: Tensor, batch: Batch) -> Any:
        """One SGB step; returns (a scalar with L's gradient, new controller, metrics, of which "loss" is L).

        z [batch, classes]; bypass, the gate's q, and draw (classes,).
        """
        alone = counted_bypass(draw, self.gate_base) if self.bypass_counter else draw < bypass
        state = self.advance_controller(state)
        factors = amp(torch.stack([state.output, -state.output]), self.top, self.slope)
        positive, negative = torch.where(alone, 1.0, factors).unbind()
        own, fixed = one_hot(batch.y, z.shape[-1], torch.bool), z.detach()
        y = own.to(z.dtype)
        scale = torch.where(own, positive, negative)  # s_ic
        slope = scale * (torch.sigmoid(fixed) - y)  # B g_ic
        gained, lost = -batch.mean(slope.clamp(max=0)), batch.mean(slope.clamp(min=0))
        new = state._replace(positive=torch.where(alone, state.positive, state.positive + gained),
                             negative=torch.where(alone, state.negative, state.negative + lost))  # fmt: skip
        per_entry = binary_cross_entropy(fixed, y)
        metrics = {"loss": batch.mean((scale * per_entry).sum(-1)), "unweighted_loss": batch.mean(per_entry.sum(-1)),
                   "positive_gradient": gained, "negative_gradient": lost}  # fmt: skip
        # g_ic is known, so autograd need not find it a second time
        return batch.mean((z * slope).sum(-1)), new, metrics

    def local_step(
        self, ctx: Context, message: Message, client: Controller, local: Local, batch: Batch
    ) -> tuple[Local, Metrics]:
        """One SGD step on the balanced loss; the controller advances exactly once."""

        def objective(v: Variables, extra: tuple[Controller, Tensor]) -> Any:
            z, v = ctx.task.apply(v, batch.x, draws=batch.draws)
            surrogate, controller, metrics = self.balance(*extra, batch.draws["bypass"], z, batch)
            return surrogate, (v, (controller, extra[1]), metrics)

        return sgd_step(ctx, local, objective, self.optimizer, trainable=self._trainable(ctx, message.model))

    def local_final(self, ctx: Context, message: Message, client: Controller, local: Local) -> Any:
        """Sends the change of the model; the controller stays with the client."""
        return delta(message.model, local.variables), local.extra[0]

    def server_update(self, ctx: Context, server: Server, mean: Variables, total: Tensor) -> Server:
        """Adds the mean change and analyses the new classifier: pi_bar <- ((t' - 1) pi_bar + pi) / t'."""
        model = descend(server.model, mean)
        if self.freeze_prior and ctx.round.index >= self.freeze_prior:
            return server._replace(model=model)
        estimates = server.estimates + 1
        prior = server.prior + (analyse(self._rows(ctx, model)) - server.prior) / estimates
        return Server(model, prior, estimates)

    def diagnostics(self, ctx: Context, server: Server) -> Metrics:
        """The estimated prior and the row norms behind it."""
        return {"prior": server.prior, "row_norms": torch.linalg.vector_norm(self._rows(ctx, server.model), dim=1)}
