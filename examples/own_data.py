"""Your own arrays as a federation: write one .npz file with a user column, one client a user.

python examples/own_data.py
"""

import dataclasses

import numpy as np

import fedtail
from fedtail.data.longtail import NoTail
from fedtail.data.partition import Natural
from fedtail.metrics import Cumulative
from fedtail.models import MLP

CLASSES, FEATURES = 4, 6


def write_data(path: str) -> None:
    """Writes made-up measurements: 6 users, 4 classes from frequent to rare, the rarest one held by a single user."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, FEATURES)) * 1.5
    y_train = np.repeat(np.arange(CLASSES), [200, 75, 25, 10])
    user_train = np.array([f"clinic-{u}" for u in rng.integers(6, size=len(y_train))])
    user_train[y_train == CLASSES - 1] = "clinic-3"
    y_test = np.repeat(np.arange(CLASSES), 50)  # balanced, so that every class counts the same
    np.savez(
        path,
        x_train=(centres[y_train] + rng.normal(size=(len(y_train), FEATURES))).astype(np.float32),
        y_train=y_train,
        user_train=user_train,
        x_test=(centres[y_test] + rng.normal(size=(len(y_test), FEATURES))).astype(np.float32),
        y_test=y_test,
    )


def main() -> None:
    """Trains two methods on the users' data as they are."""
    write_data("clinics.npz")
    experiment = fedtail.Experiment(
        rounds=10,
        data=fedtail.Data(name="clinics.npz", longtail=NoTail(), partition=Natural()),
        model=MLP(hidden=(32,)),
        local=fedtail.LocalWork(epochs=5, batch_size=10),
        evaluation=fedtail.Evaluation(every=10, groups=Cumulative(of="train")),  # the tail by training counts
    )
    for method in (fedtail.FedAvg(), fedtail.FedGraB()):
        folder = f"runs/clinics-{type(method).__name__}"
        for _ in fedtail.run(dataclasses.replace(experiment, algorithm=method), folder):
            pass
        test = fedtail.read(folder).last["test"]
        print(f"{type(method).__name__}: recall of each class {[round(r, 2) for r in test['per_class_recall']]}")
    print("training examples, one row a client, one column a class:")
    print(fedtail.read(folder).counts)


if __name__ == "__main__":
    main()
