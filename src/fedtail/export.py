"""A run's network for use elsewhere: ONNX and safetensors, what it costs, and a model card.

    model.onnx            raw inputs in (uint8 images 0..255, or float features), logits out; any batch size
    model.safetensors     its parameters and buffers by name
    report.json           sizes, parameters, operations, latency, and how far ONNX Runtime is from torch
    README.md             the model card

The packages onnx, onnxruntime and onnxscript are the extra `export`; this module alone uses them.
"""

import contextlib
import copy
import importlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedtail import costs, runs, trees
from fedtail.config import name_of
from fedtail.costs import RUNS, latency
from fedtail.engines.base import one_thread
from fedtail.errors import CheckpointError, ConfigError
from fedtail.experiment import Federation, reopen
from fedtail.files import write_atomic
from fedtail.optim import Optimizer

SAMPLE = 256  # test examples on which torch and ONNX Runtime are compared


def export(
    run: str | Path, folder: str | Path, client: int | None = None, checkpoint: str = "checkpoint", calls: int = RUNS
) -> dict[str, Any]:
    """Writes a run's network and what there is to say of it.

    Args:
        run: the run folder.
        folder: where to write; made if it is not there.
        client: None for the generic model, or a client's index.
        checkpoint: "checkpoint" (the last round) or "best" (by validation score).
        calls: timed calls of each runtime.

    Returns:
        What report.json holds.

    Raises:
        ConfigError: the extra is not installed, or there is no such client.
        CheckpointError: not a run folder, or the folder cannot be written.
    """
    onnx, runtime = _extra("onnx"), _extra("onnxruntime")
    _extra("onnxscript")  # torch's exporter writes with it
    path = Path(folder)
    with contextlib.closing(reopen(run, checkpoint)) as federation, one_thread():
        if client is not None and not 0 <= client < federation.data.clients:
            raise ConfigError(f"client {client}: the run has the clients 0 to {federation.data.clients - 1}.")
        module = federation.module(client).cpu()
        raw = federation.data.test["x"].index_select(0, torch.arange(min(SAMPLE, len(federation.data.test["y"])))).cpu()
        graph = to_onnx(module, raw[:2])
        onnx.checker.check_model(onnx.load_from_string(graph))
        weights = save({k: v.contiguous() for k, v in module.network.state_dict().items()})
        report = {
            "sizes": sizes(module, raw[:1], weights, graph, federation.algorithm.optimizer),
            **_measured(module, graph, raw, runtime, calls),
            "machine": {"processor": runs.processor(), "platform": platform.platform(), "threads": 1},
            "versions": {m.__name__: m.__version__ for m in (torch, onnx, runtime)},
        }
        card = model_card(federation, runs.read(run), report, client, checkpoint)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {error.strerror}.") from error
    for name, content in (("model.onnx", graph), ("model.safetensors", weights), ("README.md", card),
                          ("report.json", json.dumps(report, indent=1) + "\n")):  # fmt: skip
        write_atomic(path / name, content)
    return report


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'export needs the package {name} ({error}). Install it: pip install "fedtail[export]"'
        ) from error


def to_onnx(module: nn.Module, example: Tensor) -> bytes:
    """Returns a module's ONNX graph as bytes, with one input of any batch size.

    Args:
        module: in evaluation mode.
        example: an input, [2, ...].
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        with _quiet():
            torch.onnx.export(
                copy.deepcopy(module), (example,), path, input_names=["input"], output_names=["logits"], dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
            )  # fmt: skip
        return path.read_bytes()


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences what torch's exporter tells of its own insides."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def sizes(module: nn.Module, image: Tensor, weights: bytes, graph: bytes, optimizer: Optimizer) -> dict[str, int]:
    """Returns the sizes by name, in bytes but for the numbers of parameters and operations.

    Args:
        module: the network with its input scaling.
        image: one input, [1, ...].
        weights: the safetensors file.
        graph: the ONNX file.
        optimizer: whose moments `weights_with_optimizer_moments` counts.
    """
    params = {k: p.detach() for k, p in module.named_parameters()}
    moments = sum(leaf.numel() * leaf.element_size() for leaf in trees.leaves(optimizer.init(params)) if leaf.dim())
    return {
        **costs.sizes(module, image),
        "weight_file": len(weights),
        "onnx_file": len(graph),
        "weights_with_optimizer_moments": trees.num_bytes(params) + moments,
    }


def _measured(module: nn.Module, graph: bytes, raw: Tensor, runtime: Any, calls: int) -> dict[str, Any]:
    """Returns latencies of one image in torch and ONNX Runtime, each with one thread, and the difference of their logits."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    one = raw[:1].contiguous()
    feed = {"input": one.numpy()}
    with torch.no_grad():
        expected = module(raw).numpy()
        torch_ms = latency(lambda: module(one), calls)
    found = session.run(None, {"input": raw.numpy()})[0]
    return {
        "latency_ms": {
            "torch": torch_ms,
            "onnxruntime": latency(lambda: session.run(None, feed), calls),
            "calls": calls,
        },
        "difference": {
            "largest_of_logits": float(np.abs(found - expected).max()),
            "other_labels": int((found.argmax(1) != expected.argmax(1)).sum()),
            "examples": len(raw),
        },
    }


def to_text(report: dict[str, Any]) -> str:
    """Returns a report as lines."""
    size, ms, gap = report["sizes"], report["latency_ms"], report["difference"]
    lines = [
        f"parameters                        {size['parameters']:,}",
        f"multiply-adds of one image        {size['multiply_adds_per_image']:,}",
        f"weight file                       {_bytes(size['weight_file'])} (ONNX: {_bytes(size['onnx_file'])})",
        f"weights with optimizer moments    {_bytes(size['weights_with_optimizer_moments'])}",
        f"peak activations of one image     {_bytes(size['peak_activations_of_one_image'])}",
        *(f"latency in {name + ':':13} median {ms[name]['median']:.3f} ms, 99th percentile {ms[name]['p99']:.3f} ms"
          for name in ("torch", "onnxruntime")),
        f"largest difference of the logits  {gap['largest_of_logits']:.2g} over {gap['examples']} test examples, "
        f"{gap['other_labels']} other labels",
    ]  # fmt: skip
    return "\n".join(lines)


def _bytes(number: int) -> str:
    return f"{number:,} bytes = {number / 2**20:.2f} MiB"


def model_card(
    federation: Federation, record: runs.RunRecord, report: dict[str, Any], client: int | None, checkpoint: str
) -> str:
    """Returns the model card as Markdown: data, split, metrics by class and shot group, costs, licence.

    Args:
        federation: of the run.
        record: the run folder.
        report: what `export` measured.
        client: whose network it is; None: the generic one.
        checkpoint: "checkpoint" or "best".
    """
    experiment, data = federation.experiment, federation.data
    known = [r for r in record.records[: federation.round] if "test" in r]
    whose = "the generic model" if client is None else f"the model of client {client}"
    when = " (the best by validation)" if checkpoint == "best" else ""
    machine = report["machine"]["processor"] or report["machine"]["platform"]
    parts = {
        f"# {name_of(experiment.model)} trained by {name_of(experiment.algorithm)}": [
            f"This is {whose} of a federation, after {federation.round} of {experiment.rounds} rounds{when}.",
            f"Input: {_kind(data.test['x'])} of shape {[int(n) for n in data.test['x'].shape[1:]]}, any batch.",
            f"Output: a logit for each of {data.num_classes} classes.",
        ],
        "## Data": [
            *(f"- {source}" for source in data.sources),
            f"- seed {experiment.seed}; {data.clients} clients, {int(record.counts.sum()):,} training examples",
            f"- kept out for validation: {experiment.data.client_validation:g} of each client's examples, "
            f"{experiment.data.validation} images a class at the server",
        ],
        "## Metrics": _metrics(known[-1], record)
        if known and client is None
        else ["Not here: the records of the run judge the generic model." if known else "No round was evaluated."],
        "## Costs": ["```", to_text(report), "```", "", f"Measured with one thread on {machine}."],
        "## Licence": [
            "Of the weights: not stated; whoever publishes them says so here. Data sets keep their licences, see Data."
        ],
        "## Limits": [
            "Trained and judged on the data above and on nothing else; an input of another kind still gets a class.",
            "Shot groups and class counts are those of the split of this run.",
        ],
    }
    return "\n\n".join(f"{title}\n\n" + "\n".join(lines) for title, lines in parts.items()) + "\n"


def _kind(x: Any) -> str:
    return "uint8 images, 0 to 255," if x.dtype == torch.uint8 else f"{str(x.dtype).removeprefix('torch.')} features"


def _metrics(last: dict[str, Any], record: runs.RunRecord) -> list[str]:
    """Returns the last evaluated round's numbers as tables."""
    test = last["test"]
    rows = [(name, test[name]) for name in ("accuracy", "balanced_accuracy", "macro_f1", "head", "medium", "tail")]
    totals = record.counts.sum(0)
    return [
        f"Round {last['round'] + 1}, {test['test_set']}; shot groups: {test['groups']}.",
        "",
        "| metric | percent |",
        "|---|---:|",
        *(f"| {name.replace('_', ' ')} | {_percent(value)} |" for name, value in rows),
        "",
        "| class | training examples | recall, percent |",
        "|---|---:|---:|",
        *(f"| {c} | {totals[c]:,} | {_percent(recall)} |" for c, recall in enumerate(test["per_class_recall"])),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
