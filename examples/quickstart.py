"""Train FedAvg on long-tailed digits, read the scores by shot group, load the model and predict.

python examples/quickstart.py
"""

import torch

import fedtail
from fedtail.federation import federate

FOLDER = "runs/quickstart"


def main() -> None:
    """Runs 10 rounds on 8 clients; a few seconds on a CPU."""
    experiment = fedtail.Experiment(rounds=10, algorithm=fedtail.FedAvg())  # data: digits, factor 10, 8 clients
    for result in fedtail.run(experiment, FOLDER):
        test = result.record["test"]
        print(f"round {result.index + 1:2}/{result.rounds}: accuracy {test['accuracy']:.3f}")

    record = fedtail.read(FOLDER)
    test, local = record.last["test"], record.last["local"]
    print(f"training examples of each class: {record.counts.sum(0).tolist()}")
    print(f"{test['test_set']}; groups: {test['groups']}")
    print(f"head {test['head']:.3f}   medium {test['medium']:.3f}   tail {test['tail']:.3f}")
    print(f"clients on their own test sets: mean {local['mean']:.3f}, worst tenth {local['worst_decile']:.3f}")

    model = fedtail.load(FOLDER)  # a plain torch.nn.Module in evaluation mode
    data = federate(experiment.data, experiment.seed)
    images, labels = data.test["x"][:10], data.test["y"][:10]
    with torch.no_grad():
        predicted = model(data.prepare(images, torch.float32)).argmax(1)  # prepare: scale and normalise
    print(f"true      {labels.tolist()}")
    print(f"predicted {predicted.tolist()}")


if __name__ == "__main__":
    main()
