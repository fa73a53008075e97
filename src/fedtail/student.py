"""A teacher beside its student: what each costs to run, and how often each is right on the balanced test set."""

import contextlib
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtail import config, costs, runs
from fedtail.config import name_of
from fedtail.engines.base import one_thread
from fedtail.errors import ConfigError
from fedtail.evaluate import confusion, shot_groups
from fedtail.experiment import Federation, reopen
from fedtail.metrics import from_confusion
from fedtail.teachers.specs import NoTeacher
from fedtail.teaching import Teaching

CALLS = 50  # timed calls, unless told otherwise


class _Asked(nn.Module):
    """A teacher as one module, from raw images to class scores."""

    def __init__(self, teach: Teaching):
        super().__init__()
        self.teach, self.network = teach, teach.loaded.module

    def forward(self, x: Tensor) -> Tensor:
        return self.teach.scores(self.teach.raw(x))


def compare(path: str | Path, calls: int = CALLS) -> dict[str, Any]:
    """Returns the costs and the accuracy of a run's teacher and student.

    Args:
        path: a run folder, or an experiment's TOML file, whose student is untrained.
        calls: timed calls of each.

    Raises:
        ConfigError: the experiment has no teacher.
    """
    place = Path(path)
    trained = place.is_dir()
    experiment = config.load(place)
    if isinstance(experiment.teacher, NoTeacher):
        raise ConfigError(f"{place} has no teacher: set teacher.name.")
    federation = reopen(place) if trained else Federation(experiment)
    with contextlib.closing(federation), one_thread():
        teach = Teaching(experiment, federation.data)
        scores = federation.score("test")
        image = federation.data.test["x"].index_select(0, torch.zeros(1, dtype=torch.int64)).cpu()
        student = federation.module().cpu()
        found = {
            "teacher": {"name": name_of(experiment.teacher), **_costs(_Asked(teach), image, calls),
                        **_judged(teach, federation)},
            "student": {"name": name_of(experiment.model), **_costs(student, image, calls), **_kept(scores["test"]),
                        "rounds": federation.round},
            "test_set": scores["test"]["test_set"], "groups": scores["test"]["groups"], "calls": calls,
            "machine": {"processor": runs.processor(), "platform": platform.platform(), "threads": 1},
        }  # fmt: skip
    return found


def _costs(module: nn.Module, image: Tensor, calls: int) -> dict[str, Any]:
    with torch.no_grad():
        module(image)  # what is made at the first use (a teacher's head) does not count
        return {
            "sizes": costs.sizes(module, image),
            "latency_ms": {"torch": costs.latency(lambda: module(image), calls)},
        }


def _judged(teach: Teaching, federation: Federation) -> dict[str, Any]:
    """Returns the teacher's scores on the test set, and the mean entropy of its class probabilities there, in nats."""
    data = federation.data
    true = data.test["y"].numpy(force=True)
    t = teach.scores(teach.ask(data.test["x"], np.arange(len(true))))
    p = torch.softmax(t.double(), 1)
    counts = confusion(true, t.argmax(1).numpy(force=True), data.num_classes)
    groups = shot_groups(federation.experiment.evaluation.groups, data)
    return {**_kept(from_confusion(counts, groups)), "entropy_nats": float(-torch.xlogy(p, p).sum(1).mean())}


def _kept(scores: dict[str, Any]) -> dict[str, Any]:
    names = ("accuracy", "balanced_accuracy", "head", "medium", "tail", "per_class_recall")
    return {name: scores[name] for name in names}


ROWS = {
    "parameters": "parameters", "multiply_adds_per_image": "multiply-adds of one image",
    "weights": "bytes of weights", "peak_activations_of_one_image": "peak activations of one image, bytes",
}  # fmt: skip


def to_text(found: dict[str, Any]) -> str:
    """Returns a comparison as lines: teacher, student, how many times larger the teacher's number is."""
    teacher, student = found["teacher"], found["student"]
    lines = [f"{'':38}{'teacher':>18}{'student':>18}{'ratio':>10}",
             f"{'':38}{teacher['name']:>18}{student['name']:>18}"]  # fmt: skip
    for key, words in ROWS.items():
        a, b = teacher["sizes"][key], student["sizes"][key]
        lines.append(f"{words:38}{a:>18,}{b:>18,}{_ratio(a, b):>10}")
    for key, words in (("median", "latency in torch, median, ms"), ("p99", "latency, 99th percentile, ms")):
        a, b = (one["latency_ms"]["torch"][key] for one in (teacher, student))
        lines.append(f"{words:38}{a:>18.3f}{b:>18.3f}{_ratio(a, b):>10}")
    for key in ("accuracy", "balanced_accuracy", "head", "medium", "tail"):
        a, b = teacher[key], student[key]
        lines.append(f"{key.replace('_', ' ') + ', percent':38}{_percent(a):>18}{_percent(b):>18}")
    where = found["machine"]["processor"] or found["machine"]["platform"]
    lines += [f"entropy of the teacher's probabilities {teacher['entropy_nats']:.2f} nats; {found['test_set']}; shot groups: "
              f"{found['groups']}",
              f"one image, one thread, {found['calls']} calls on {where}; student after {student['rounds']} rounds",
    ]  # fmt: skip
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.1f}" if b else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
