"""What travels: trees of tensors as Flower's ArrayRecords, and strict reading of what a stranger sent.

Arrays travel in NumPy's format without pickle. The server never reads more than it expects: names, dtypes and shapes of a reply
are known before it is opened (see `engine.FlowerEngine.form`). A node learns the structure of the server's message from
the message: it holds names of NamedTuples that the node's own experiment has already defined, no code.
"""

import importlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedtail import config, trees
from fedtail.algorithm import Phase, Round
from fedtail.checkpoint import describe, rebuild
from fedtail.config import Experiment
from fedtail.engines.base import Result, Scores
from fedtail.errors import ConfigError, TrainingError
from fedtail.metrics import ShotGroups
from fedtail.trees import Tree

PROTOCOL = 1
"""Changes when a node and a server of different fedtail versions would not understand each other."""
VERSION = version("fedtail")
SCORES = ("accuracy", "macro_f1", *ShotGroups._fields)
"""What a node says of a model, see `metrics.client_scores`."""
NO_SCORES: Mapping[str, Scores] = {"local": dict.fromkeys(SCORES), "personal": dict.fromkeys(SCORES)}
OWN = re.compile(r"fedtail_user_[0-9a-f]{12}")  # see userfile.user_module: the path differs between machines


def flwr(module: str) -> Any:
    """Returns a module of Flower's.

    Raises:
        ConfigError: Flower is not installed.
    """
    try:
        return importlib.import_module(f"flwr.{module}")
    except ImportError as error:
        raise ConfigError(
            f'a deployment needs the package flwr ({error}). Install it: pip install "fedtail[flower]"'
        ) from error


def load_experiment(folder: Path) -> Experiment:
    """Reads an app's experiment; classes in files of one's own are looked for beside it."""
    table = config.read_toml(folder / "experiment.toml")
    for node in (table["algorithm"], table["model"]):
        if ".py:" in node["name"]:
            node["name"] = str(folder / node["name"])
    return config.from_dict(Experiment, config.merged(config.to_dict(Experiment()), table))


# Trees -----------------------------------------------------------------------------------------------------------------


def pack(tree: Tree, name: str) -> Any:
    """Returns a tree's leaves as an ArrayRecord, by their path below `name`."""
    app = flwr("app")
    leaves = trees.named_leaves(tree, name)
    return app.ArrayRecord({key: app.Array(t.detach().cpu().contiguous().numpy()) for key, t in leaves.items()})


def structure(tree: Tree) -> str:
    """Returns a tree's structure as text; the module of a user's own file is named alike on all machines."""
    return OWN.sub("OWN", json.dumps(describe(tree)))


def unpack(record: Mapping[str, Any], form: str, name: str, own: str, device: torch.device) -> Tree:
    """Returns a tree from the server.

    Args:
        record: the ArrayRecord.
        form: what `structure` returned.
        name: as given to `pack`.
        own: the module of the user's own algorithm here; "" where it is one of fedtail's.
        device: where to.
    """
    leaves = {key: read(array).to(device) for key, array in record.items()}
    return rebuild(json.loads(form.replace("OWN:", f"{own}:")), leaves, name)


def read(array: Any, like: Tensor | None = None) -> Tensor:
    """Returns the tensor of one array.

    Args:
        array: a Flower Array.
        like: a tensor of the dtype and shape that it must have; None: any.

    Raises:
        ValueError: it is damaged, or another one.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"an array of the kind {array.stype!r} instead of numpy.ndarray")
    stream = io.BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array in another version of NumPy's format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError(f"an array of {dtype}, not of numbers in C order")
    if like is not None and (shape, dtype) != (tuple(like.shape), np.dtype(str(like.dtype).removeprefix("torch."))):
        raise ValueError(
            f"{dtype} {list(shape)} instead of {str(like.dtype).removeprefix('torch.')} {list(like.shape)}"
        )
    values = np.frombuffer(stream.getbuffer()[stream.tell() :], dtype)
    # a copy in torch's own memory: other alignments may change the last bits of what is computed
    return torch.tensor(values.reshape(shape))


def take(record: Mapping[str, Any], form: Tree, name: str) -> Tree:
    """Returns a tree of exactly this form from a reply.

    Raises:
        ValueError: a name is missing or unknown, or an array is damaged, of another dtype or of another shape.
    """
    wanted = trees.named_leaves(form, name)
    if wanted.keys() != record.keys():
        odd = sorted(wanted.keys() ^ record.keys())
        raise ValueError(f"{name}: the arrays are others than expected, the first is {odd[0]!r}")
    found = iter([_named(key, record[key], leaf) for key, leaf in wanted.items()])
    return trees.tree_map(lambda leaf: next(found).to(leaf.device), form)


def _named(key: str, array: Any, like: Tensor) -> Tensor:
    try:
        return read(array, like)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: {error}") from error


# Messages --------------------------------------------------------------------------------------------------------------


def ask(round: Round, trained: int, message: Tree, states: str, tuning: bool = False) -> dict[str, Any]:
    """Returns the records that ask a client for its part in a phase.

    Args:
        round: the circumstance.
        trained: number of earlier training phases in this round.
        message: the broadcast.
        states: "server" if clients shall send their new states along.
        tuning: whether the phase is that of `evaluation.finetune`.
    """
    app = flwr("app")
    facts = {"index": round.index, "cohort": round.cohort, "population": round.population, "rounds": round.rounds,
             "lr_scale": float(round.lr_scale), "stage": round.stage, "holders": round.holders, "trained": trained,
             "phase": round.phase.name, "phase_cohort": round.phase.cohort, "reduce": round.phase.reduce,
             "local": round.phase.local, "split": round.phase.split, "epochs": round.phase.epochs,
             "states": states, "tuning": tuning, "protocol": PROTOCOL}  # fmt: skip
    records = {"ask": app.ConfigRecord({**facts, "form": structure(message)}), "message": pack(message, "message")}
    if round.counts is not None:
        records["counts"] = pack(round.counts, "counts")
    return records


def asked(content: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> tuple[Round, int]:
    """Returns (round, trained) of what `ask` made."""
    a = content["ask"]
    if a["protocol"] != PROTOCOL:
        raise ConfigError(
            f"the server speaks protocol {a['protocol']}, this node {PROTOCOL}. Install the same fedtail."
        )
    counts = read(content["counts"]["counts"]).to(device, dtype) if "counts" in content else None
    phase = Phase(a["phase"], a["phase_cohort"], a["reduce"], a["local"], a["epochs"], a["split"])
    round = Round(a["index"], phase, a["cohort"], a["population"], a["rounds"], a["lr_scale"], a["stage"], a["holders"],
                  counts)  # fmt: skip
    return round, a["trained"]


def answer(result: Result, state: bool) -> dict[str, Any]:
    """Returns a client's result as records, with its new state where the server wants it."""
    app = flwr("app")
    numbers = {"client": result.client, "weight": result.weight, "examples": result.examples}
    records = {"answer": app.ConfigRecord(numbers), "update": pack(result.update, "update"),
               "metrics": pack(result.metrics, "metrics")}  # fmt: skip
    if result.judged != ():
        records["judged"] = pack(result.judged, "judged")
    return {**records, "state": pack(result.state, "state")} if state else records


def result(content: Mapping[str, Any], form: Result, state: bool) -> Result:
    """Returns the result in a reply, if it has exactly the expected form.

    Args:
        content: the records.
        form: a result of this client in this phase, of which only the client, the examples, names, dtypes and shapes count.
        state: whether a new state was asked for.

    Raises:
        ValueError: a record or an array is missing, unknown, damaged, or of another type or shape.
        TrainingError: the update, the weight, a metric or the state is not finite.
    """
    wanted = {"answer", "update", "metrics", *(["state"] if state else []), *(["judged"] if form.judged != () else [])}
    if set(content.keys()) != wanted:
        raise ValueError(f"the records are {', '.join(sorted(content.keys()))} instead of {', '.join(sorted(wanted))}")
    numbers = dict(content["answer"])
    kinds = {"client": int, "weight": float, "examples": int}
    if {k: type(v) for k, v in numbers.items()} != kinds:
        raise ValueError("answer: it must hold client, weight and examples, and nothing else")
    if (numbers["client"], numbers["examples"]) != (form.client, form.examples):
        raise ValueError(f"answer: client {numbers['client']} with {numbers['examples']} examples, expected client "
                         f"{form.client} with {form.examples}")  # fmt: skip
    kept = take(content["state"], form.state, "state") if state else ()
    if not trees.all_finite(kept):
        raise TrainingError("the new state is not finite")
    metrics = cast("dict[str, Tensor]", take(content["metrics"], form.metrics, "metrics"))
    if not trees.all_finite(metrics):
        raise TrainingError("a metric is not finite")
    judged = take(content["judged"], form.judged, "judged") if form.judged != () else ()
    if not trees.all_finite(judged):
        raise TrainingError("what it says of its own model is not finite")
    update = take(content["update"], form.update, "update")
    return Result(form.client, update, numbers["weight"], kept, metrics, form.examples, judged)


def judged(ways: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """Returns a client's scores for each way to predict as records; None travels as NaN."""
    table = [
        [[math.nan if s[name] is None else s[name] for name in SCORES] for s in (w["local"], w["personal"])]
        for w in ways
    ]
    return {"scores": pack(torch.tensor(table, dtype=torch.float64), "scores")}


def scores(content: Mapping[str, Any], ways: int) -> list[dict[str, Scores]]:
    """Returns the scores in a reply to "evaluate", for each way to predict.

    Raises:
        ValueError: they are not of this form, or a score is no share.
    """
    if set(content.keys()) != {"scores"}:
        raise ValueError(f"the records are {', '.join(sorted(content.keys()))} instead of scores")
    table = cast("Tensor", take(content["scores"], torch.zeros(ways, 2, len(SCORES), dtype=torch.float64), "scores"))
    if bool(((table < 0) | (table > 1)).any()):
        raise ValueError("scores: one is not in [0, 1]")
    rows = [
        [{n: None if math.isnan(v) else v for n, v in zip(SCORES, s, strict=True)} for s in way]
        for way in table.tolist()
    ]
    return [{"local": local, "personal": personal} for local, personal in rows]
