"""Several methods and seeds under equal conditions, as a table of mean and spread over seeds.

python examples/compare_methods.py

The same from the shell, from two TOML files:  fedtail run fedavg.toml --seeds 0 1 2; ...; fedtail compare runs/*
"""

from dataclasses import replace

import numpy as np

import fedtail
from fedtail import Experiment
from fedtail.data.longtail import Exponential
from fedtail.data.partition import DirichletMultinomial

SGD = fedtail.SGD(lr=0.03, momentum=0.5, clip=5.0)  # the same for all
METHODS = {
    "FedAvg": fedtail.FedAvg(optimizer=SGD),
    "SCAFFOLD": fedtail.Scaffold(optimizer=SGD),
    "Fed-GraB": fedtail.FedGraB(optimizer=SGD),
}
SEEDS = (0, 1)  # a study wants three or more, and many more rounds
COLUMNS = ("accuracy", "balanced_accuracy", "head", "medium", "tail")

SETTING = Experiment(
    rounds=6,
    data=fedtail.Data(longtail=Exponential(factor=10), partition=DirichletMultinomial(clients=8, alpha=0.5)),
    local=fedtail.LocalWork(epochs=2, batch_size=10),
    evaluation=fedtail.Evaluation(every=6),
)


def last_scores(experiment: Experiment) -> dict[str, float]:
    """Returns the scores of the last round: never the best one."""
    *_, last = fedtail.run(experiment)
    return {
        **{name: last.record["test"][name] for name in COLUMNS},
        "worst tenth": last.record["local"]["worst_decile"],
    }


def main() -> None:
    """Prints one line a method."""
    for number, (name, method) in enumerate(METHODS.items()):
        scores = [last_scores(replace(SETTING, algorithm=method, seed=seed)) for seed in SEEDS]
        if number == 0:
            print(f"{'':10}" + "".join(f"{column:>20}" for column in scores[0]))
        values = {column: np.array([s[column] for s in scores]) for column in scores[0]}
        cells = [f"{100 * v.mean():.1f} +- {100 * v.std(ddof=1):.1f}" for v in values.values()]
        print(f"{name:10}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
