"""Three rounds of each method on a tiny network, kept as numbers: a refactoring must not move them.

If a change is meant to move them, write them anew: FEDTAIL_GOLDEN=write pytest tests/golden
"""

import json
import os
from pathlib import Path

import pytest
import torch
from contract_problem import CASES, ROUNDS, outcome

from fedtail import trees

HERE = Path(__file__).parent
KEPT = [case for case in CASES if case not in ("collecting", "judging", "staged")]


def numbers(tree):
    return {name: leaf.double().flatten().tolist() for name, leaf in trees.named_leaves(tree).items()}


def trajectory(case):
    done = outcome(case, "ragged")
    return {
        "rounds": ROUNDS,
        "loss": [record["train"]["loss"] for record in done.records if "train" in record],  # CCVR's last round has none
        "test": done.records[-1].get("test", {}).get("per_class_recall", []),  # a GAN predicts nothing
        "server": numbers(done.servers[-1]),
        "clients": {str(i): numbers(state) for i, state in sorted(done.states[-1].items())},
    }


def compare(found, kept, where=""):
    if isinstance(kept, dict):
        assert list(found) == list(kept), where
        for key, value in kept.items():
            compare(found[key], value, f"{where}/{key}")
    else:
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64), rtol=1e-9, atol=1e-9,
            msg=lambda text: f"{where}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_trajectory(case):
    path, found = HERE / f"{case}.json", trajectory(case)
    if os.environ.get("FEDTAIL_GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip(f"wrote {path}")
    assert path.is_file(), "no numbers are kept yet: FEDTAIL_GOLDEN=write pytest tests/golden"
    compare(found, json.loads(path.read_text()))


def test_no_trajectory_is_left_over():
    assert {path.stem for path in HERE.glob("*.json")} == set(KEPT)
