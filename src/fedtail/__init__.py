"""fedtail: federated learning on long-tailed, heterogeneous data.

The public names are resolved on first use, so that `import fedtail` costs nothing and the command line answers before
torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtail.algorithm import Algorithm, Batch, Client, Context, Phase, Round
    from fedtail.algorithms.fedavg import FedAvg
    from fedtail.algorithms.fedgrab import FedGraB
    from fedtail.algorithms.fedprox import FedProx
    from fedtail.algorithms.scaffold import Scaffold
    from fedtail.checks import check
    from fedtail.config import Data, Experiment
    from fedtail.data.plan import LocalWork, Participation
    from fedtail.engines import EngineOptions
    from fedtail.errors import FedtailError
    from fedtail.evaluate import Evaluation
    from fedtail.experiment import RoundResult, load, resume, run
    from fedtail.local import Local, delta, descend, sgd_step, start
    from fedtail.losses import cross_entropy
    from fedtail.optim import SGD, Adam, Nadam
    from fedtail.personalise import Finetune
    from fedtail.runs import RunRecord, read
    from fedtail.task import Draw, Variables

__version__ = "0.1.0"

_WHERE = {
    "Adam": "optim", "Algorithm": "algorithm", "Batch": "algorithm", "Client": "algorithm", "Context": "algorithm",
    "Data": "config", "Draw": "task", "EngineOptions": "engines", "Evaluation": "evaluate", "Experiment": "config",
    "FedAvg": "algorithms.fedavg", "FedGraB": "algorithms.fedgrab", "FedProx": "algorithms.fedprox",
    "FedtailError": "errors", "Finetune": "personalise", "Local": "local", "LocalWork": "data.plan", "Nadam": "optim",
    "Participation": "data.plan", "Phase": "algorithm", "Round": "algorithm", "RoundResult": "experiment",
    "RunRecord": "runs", "SGD": "optim", "Scaffold": "algorithms.scaffold",
    "Variables": "task", "check": "checks", "cross_entropy": "losses",
    "delta": "local", "descend": "local", "load": "experiment", "read": "runs", "resume": "experiment", "run": "experiment",
    "sgd_step": "local", "start": "local",
}  # fmt: skip

__all__ = [
    "SGD", "Adam", "Algorithm", "Batch", "Client", "Context", "Data", "Draw", "EngineOptions", "Evaluation",
    "Experiment", "FedAvg", "FedGraB", "FedProx", "FedtailError", "Finetune", "Local", "LocalWork", "Nadam", "Participation",
    "Phase", "Round", "RoundResult", "RunRecord", "Scaffold", "Variables", "check", "cross_entropy", "delta", "descend", "load",
    "read", "resume", "run", "sgd_step", "start",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedtail' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedtail.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted([*__all__, "__version__"])
