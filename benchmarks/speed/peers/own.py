"""fedtail as a user has it: a run folder with the metrics of every round and a checkpoint after each.

`own.py WORKLOAD.npz ENGINE ALGORITHM`. There is no evaluation before the last round, which is not reached: the peers have none.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import serve
from workloads import experiment_of, rounds_of

path = Path(sys.argv[1])
work = serve.load(path)
with tempfile.TemporaryDirectory() as folder:
    rounds = rounds_of(experiment_of(path.stem, *sys.argv[2:]), work, Path(folder) / "run")
    serve.play(work, lambda _: next(rounds))
