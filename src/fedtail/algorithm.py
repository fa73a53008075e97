"""The one abstraction: an Algorithm is a frozen dataclass of hyper-parameters whose methods are pure functions.

It says what one client does with one batch and what the server does with the mean of what comes back. The loops over
batches, clients and rounds belong to engines, which is why the same object runs in every engine and in deployment.

Rules (each checked by the contract suite): results depend on the arguments only; arguments are not modified; no branch
on a tensor's value; no torch.autograd, torch.func or functional_call (use `sgd_step`, `ctx.task.value_and_grad` and
`ctx.task.apply`); states, messages and updates are NamedTuples or dicts of tensors; an update can be summed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtail.optim import SGD, Optimizer
from fedtail.task import Draw, Task, Variables, Worker
from fedtail.trees import Tree

Metrics = dict[str, Tensor]


class Phase(NamedTuple):
    """One pass over a cohort within a round.

    Args:
        name: what the algorithm branches on.
        cohort: "sample" (by participation) or "all".
        reduce: "mean" (the engine computes the weighted mean of the updates) or "collect" (the server gets them all).
        local: True trains for the configured local work; False goes through the client's data once, in order.
        epochs: passes over the data in the place of the configured local work; 0: that.
        split: the client's training data, or what `data.client_validation` keeps out of them (with local = False).
    """

    name: str = "train"
    cohort: Literal["sample", "all"] = "sample"
    reduce: Literal["mean", "collect"] = "mean"
    local: bool = True
    epochs: int = 0
    split: Literal["train", "validation"] = "train"


class Round(NamedTuple):
    """What a whole cohort shares: plain Python values (but for `counts`), so branching on them is fine."""

    index: int  # 0-based  # pyright: ignore[reportIncompatibleMethodOverride]
    phase: Phase
    cohort: int  # number of clients that were asked
    population: int  # number of clients in the federation
    rounds: int  # the experiment's length
    lr_scale: float = 1.0  # the schedule's factor on the optimizer's learning rate
    stage: int = 0  # see Algorithm.advance
    holders: int = 0  # number of clients that hold data: those who can take part at all
    counts: Tensor | None = None  # (classes,) the population's class counts, only if the algorithm shares_counts
    step: int = 0  # of server_step: which one of the round, 0-based
    steps: int = 0  # of server_step: how many there are in this round
    columns: Mapping[str, tuple[int, ...]] = {}
    draws: Mapping[str, Tensor] = {}  # of Algorithm.round_draws: the same for the server and all clients


class ServerWork(NamedTuple):
    """How much `server_step` is called in a round; the server's data are not augmented then.

    Args:
        batch_size: examples in a batch, >= 1; all of the server's, if it has fewer.
        steps: number of batches; -1 = one pass over the server's data.
        images: of each class that the server's data are cut to; 0 = all of them.
    """

    batch_size: int
    steps: int
    images: int = 0


class Client(NamedTuple):
    """What an algorithm may know of a client; known before training, because the plan is."""

    index: Tensor  # () int64, stable in the population  # pyright: ignore[reportIncompatibleMethodOverride]
    examples: Tensor  # () float, number of training examples
    counts: Tensor  # (classes,) float, the client's own class counts
    steps: Tensor  # () float, local steps of this phase


class Mixture(NamedTuple):
    """What images are drawn from: generators, and how many images of each class come from each."""

    shares: Tensor  # [generators, classes] >= 0, sum 1 over both; a pair that is told no class sees the sums of rows
    networks: Variables  # every tensor with a first axis of generators


class Context(NamedTuple):
    """The frozen circumstance of a call."""

    task: Worker
    round: Round
    constants: Tree
    client: Client | None  # None on the server

    @property
    def here(self) -> Client:
        """The client; raises if called on the server."""
        assert self.client is not None, "ctx.client is None on the server"
        return self.client


class Batch(NamedTuple):
    """One mini-batch: columns, an optional mask (vmap's padding) and the step's draws."""

    columns: Mapping[str, Tensor]  # each [batch, ...]
    mask: Tensor | None  # (batch,) 1 = real example; None: all are
    draws: Mapping[str, Tensor]

    @property
    def x(self) -> Tensor:
        """The inputs, [batch, ...]."""
        return self.columns["x"]

    @property
    def y(self) -> Tensor:
        """The labels, (batch,) int64."""
        return self.columns["y"]

    @property
    def size(self) -> Tensor:
        """The number of real examples, shape ()."""
        return self.x.new_tensor(len(self.y)) if self.mask is None else self.mask.sum()

    def sum(self, per_example: Tensor) -> Tensor:
        """Sums over the batch's real examples, [batch, ...] -> [...]."""
        if self.mask is None:
            return per_example.sum(0)
        return (per_example * self.mask.reshape(-1, *[1] * (per_example.dim() - 1))).sum(0)

    def mean(self, per_example: Tensor) -> Tensor:
        """Averages over the batch's real examples, [batch, ...] -> [...]."""
        return per_example.mean(0) if self.mask is None else self.sum(per_example) / self.mask.sum()


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Base of every method. Methods derive from this class only, never from one another."""

    optimizer: Optimizer = SGD()
    """What a client steps with; its state is fresh in every round."""

    columns: ClassVar[Sequence[str]] = ("x", "y")
    personal: ClassVar[bool] = False  # predict differs between clients
    needs_server_data: ClassVar[bool] = False  # without data.server an experiment is refused
    generative: ClassVar[bool] = (
        False  # trains a pair of generator and discriminator: it makes images, and predicts nothing
    )
    needs_branches: ClassVar[bool] = False  # it works on the model `unified` alone

    @property
    def shares_counts(self) -> bool:
        """Says whether the method needs the population's class counts, `ctx.round.counts`: clients reveal theirs then.

        Default: whether its option `loss` does, if it has one.
        """
        return getattr(getattr(self, "loss", None), "shares_counts", False)

    @property
    def server_columns(self) -> Sequence[str]:
        """What a batch of server data must carry; default: inputs and labels."""
        return ("x", "y")

    @property
    def needs_server_labels(self) -> bool:
        """Says whether the server's data must have labels; default: whether they are needed at all."""
        return self.needs_server_data

    @property
    def server_work(self) -> ServerWork | None:
        """Returns how much work `server_step` is called for; default None: as much as a client's, `experiment.local`."""
        return None

    def needs_start(self, rounds: int) -> bool:
        """Says whether so many rounds train no backbone, so that an experiment without `start` is refused."""
        return False

    # within a round, on one client
    @abstractmethod
    def local_init(self, ctx: Context, message: Tree, client: Tree) -> Any:
        """Returns the local state (see fedtail.local.Local) that the round starts with."""

    @abstractmethod
    def local_step(self, ctx: Context, message: Tree, client: Tree, local: Any, batch: Batch) -> tuple[Any, Metrics]:
        """Works on one batch; returns the new local state and metrics, which the engine averages over steps."""

    @abstractmethod
    def local_final(self, ctx: Context, message: Tree, client: Tree, local: Any) -> tuple[Tree, Tree]:
        """Returns (update, new client state)."""

    def weight(self, ctx: Context) -> Tensor:
        """Returns the client's weight in the mean, shape (); default: its number of examples."""
        return ctx.here.examples

    # on the server
    def constants(self, task: Task, rng: np.random.Generator) -> Tree:
        """Returns frozen tensors that server and clients share (never sent, never counted as traffic)."""
        return ()

    def init_server(self, ctx: Context, rng: np.random.Generator) -> Any:
        """Returns the server state before round 0; default: the network's initial variables."""
        return ctx.task.initial

    def broadcast(self, ctx: Context, server: Any) -> Any:
        """Returns the message to the cohort; default: the server state."""
        return server

    @abstractmethod
    def server_update(self, ctx: Context, server: Any, mean: Any, total: Tensor) -> Any:
        """Returns the new server state from the weighted mean of the updates; `total` is the weight that answered."""

    def server_collect(self, ctx: Context, server: Any, updates: Sequence[Tree], weights: Tensor) -> Any:
        """Returns the new server state from all updates of a collecting phase, in ascending client index."""
        raise TypeError(f"{type(self).__name__} declares a collecting phase but does not define server_collect.")

    def server_step(self, ctx: Context, server: Any, batch: Batch) -> tuple[Any, Metrics]:
        """Works on one batch of server data after each round; looped over them when the data have a server split."""
        return server, {}

    def advance(self, ctx: Context, server: Any, metrics: Mapping[str, Any]) -> tuple[int, Any]:
        """Called between rounds with the round's metrics; returns (stage, server state). Default: unchanged."""
        return ctx.round.stage, server

    def stage_task(self, task: Task, stage: int) -> Task:
        """Returns the task of a stage: a pure function of the first task, so that a resumed run can rebuild it."""
        return task

    def stage_data(self, data: Any, stage: int) -> Any:
        """Returns a stage's FederatedData: a pure function of the first ones. Default: the same."""
        return data

    def sent(self, ctx: Context, message: Any) -> Tree:
        """Returns what of the message travels to a client in this phase, for the count of bytes; default: all of it.

        Only what every client of the cohort has kept from an earlier phase or round may be left out.
        """
        return message

    # across rounds, on one client
    def init_client(self, ctx: Context, message: Tree, rng: np.random.Generator) -> Tree:
        """Returns a client's state before its first participation; default: none."""
        return ()

    # result
    def predict(self, ctx: Context, message: Any, client: Tree | None, x: Tensor) -> Tensor:
        """Returns logits [batch, classes] of the generic model (client None) or of a client's own; default: of `variables`."""
        return ctx.task.apply(self.variables(ctx, message, client), x, train=False)[0]

    def generators(self, ctx: Context, server: Any) -> "Mixture":
        """Returns what a generative method draws its images from."""
        raise TypeError(f"{type(self).__name__} makes no images.")

    def readings(self) -> Mapping[str, "Algorithm"]:
        """Returns the method with other settings of its prediction, by name: each evaluation judges them too."""
        return {}

    def also_judged(self, ctx: Context, server: Any) -> Mapping[str, Any]:
        """Returns messages that each evaluation judges beside the broadcast, by name (the model before the server's steps)."""
        return {}

    def variables(self, ctx: Context, message: Any, client: Tree | None) -> Variables:
        """Returns the plain network's variables, for export; default: the message itself, or its field `model`."""
        return message if isinstance(message, Variables) else message.model

    # declarations
    def draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Returns the random tensors wanted at each local step, by name."""
        return {}

    def round_draws(self, task: Task, batch_size: int) -> dict[str, Draw]:
        """Returns the random tensors that a round's server and clients share, as ctx.round.draws, by name."""
        return {}

    def phases(self, index: int, rounds: int) -> Sequence[Phase]:
        """Returns the phases of round `index`, in order; default: one training phase."""
        return (Phase(),)

    def diagnostics(self, ctx: Context, server: Any) -> Metrics:
        """Returns what the server can report of itself after a round (an estimated prior, a dual variable)."""
        return {}


def as_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Converts a draw: floating arrays to the task's dtype, integer arrays stay int64."""
    tensor = torch.from_numpy(array)
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
