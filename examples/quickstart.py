"""Train FedAvg on long-tailed digits, read the scores by shot group, load the model and predict.

python examples/quickstart.py
"""

import torch

import fedtail
from fedtail.data.catalog import load as load_data

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

    model = fedtail.load(FOLDER)  # a torch.nn.Module in evaluation mode that takes raw images
    digits = load_data("digits").test
    images, labels = torch.from_numpy(digits.x[:10]), digits.y[:10]  # uint8 [10, 1, 8, 8]
    with torch.no_grad():
        predicted = model(images).argmax(1)
    print(f"true      {labels.tolist()}")
    print(f"predicted {predicted.tolist()}")


if __name__ == "__main__":
    main()
