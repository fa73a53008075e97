"""Sweeps: the file, the runs, and what happens when they are stopped, killed, or fail."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtail import FedAvg, FedGraB, FedProx, cli, config, runs, sweep, workers
from fedtail.algorithms.climb import CLIMB
from fedtail.data.longtail import Exponential, NoTail
from fedtail.data.partition import IID, DirichletEqualSize
from fedtail.errors import CheckpointError, ConfigError
from fedtail.experiment import run as begin
from fedtail.losses import Focal
from fedtail.optim import SGD, Adam

HEAD = """
seeds = [0, 1]
jobs = 2
output = "out"
[base]
rounds = 2
local = { epochs = 1 }
[base.algorithm.optimizer]
name = "sgd"
lr = 0.05
"""
ROWS = """
[[row]]
name = "fedavg"
algorithm = { name = "fedavg" }
[[row]]
name = "fedprox"
algorithm = { name = "fedprox", mu = 0.1 }
[[row]]
name = "tuned"
start = "fedavg"
rounds = 1
algorithm = { name = "fedprox", mu = 0.5, optimizer = { lr = 0.05 } }
"""
BARE = ROWS.replace("optimizer = {", 'optimizer = { name = "sgd",')  # without HEAD there is no name to keep
NAMES = ["fedavg", "fedprox", "tuned"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="table.toml"):
    Path(name).write_text(text)
    return Path(name)


def command(*words, cwd=None):
    return subprocess.Popen([sys.executable, "-m", "fedtail", "run", *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True)  # fmt: skip


def bytes_of(folder):
    """The final state of every run, by its name."""
    return {
        path.parent.name: (path.read_bytes(), (path.parent / "metrics.jsonl").read_bytes())
        for path in sorted(Path(folder).glob("*/checkpoint.safetensors"))
    }


# ---- the file


def test_rows_are_laid_over_the_base():
    plan = sweep.load(write(HEAD + ROWS))
    assert [run.name for run in plan.runs] == [f"{name}-seed{seed}" for seed in (0, 1) for name in NAMES]
    assert [run.folder for run in plan.runs[:2]] == [Path("out/fedavg-seed0"), Path("out/fedprox-seed0")]
    first, prox, tuned = (run.experiment for run in plan.runs[:3])
    assert (first.rounds, first.local.epochs, first.engine.name) == (2, 1, "loop")
    assert config.name_of(prox.algorithm) == "fedprox"
    assert (prox.algorithm.mu, prox.algorithm.optimizer.lr) == (0.1, 0.05)  # the common optimizer stays
    assert (tuned.rounds, tuned.algorithm.optimizer.lr, first.start) == (1, 0.05, "")
    assert tuned.start == "out/fedavg-seed{seed}"  # the same for every seed
    assert [run.needs for run in plan.runs[:3]] == ["", "", "fedavg-seed0"]
    assert [run.experiment.seed for run in plan.runs] == [0, 0, 0, 1, 1, 1]
    heavy = sweep.load(write(HEAD + "momentum = 0.9\n" + ROWS.replace("lr = 0.05", "lr = 0.01"))).runs[2].experiment
    assert (heavy.algorithm.optimizer.lr, heavy.algorithm.optimizer.momentum) == (0.01, 0.9)  # a row may change a part


def test_the_file_s_defaults_and_the_command_line_s_choices():
    file = write('[[row]]\nname = "a"\n[[row]]\nname = "b"\nstart = "a"\n[[row]]\nname = "c"\n')
    plan = sweep.load(file)
    assert (plan.jobs, plan.runs[0].folder) == (0, Path("runs/table/a-seed0"))
    plan = sweep.load(file, seeds=[4], jobs=3, output=Path("else"), match="b")
    assert plan.jobs == 3
    assert [run.folder for run in plan.runs] == [Path("else/a-seed4"), Path("else/b-seed4")]  # b starts from a
    auto = sweep.load(write('[base.engine]\nname = "auto"\n[[row]]\nname = "a"\n'))
    assert auto.runs[0].experiment.engine.name == "auto"


def test_a_grid_is_a_product_and_starts_stay_in_their_cell():
    grid = '[grid]\n"data.longtail.factor" = [10.0, 50.0]\n"algorithm.optimizer.lr" = [0.1, 0.01]\n'
    plan = sweep.load(write(HEAD.replace("[0, 1]", "[0]") + grid + ROWS))
    cells = ["factor=10-lr=0.1", "factor=10-lr=0.01", "factor=50-lr=0.1", "factor=50-lr=0.01"]
    assert [run.name for run in plan.runs] == [f"{row}-{cell}-seed0" for row in NAMES for cell in cells]
    last = plan.runs[-1]
    assert (last.experiment.data.longtail.factor, last.experiment.algorithm.optimizer.lr) == (50.0, 0.01)
    assert last.experiment.start == "out/fedavg-factor=50-lr=0.01-seed{seed}"
    assert last.needs == "fedavg-factor=50-lr=0.01-seed0"
    # Two data sets are two tables; two learning rates are compared in one.
    done = {run.name for run in plan.runs}
    assert [(title, len(found)) for title, found in sweep.tables(plan, done)] == [("factor=10", 6), ("factor=50", 6)]
    members = sweep.tables(plan, done)[1][1]
    assert sweep.allowed(members) == ["start", "rounds", "algorithm.optimizer.lr"]
    assert sweep.command(members).startswith(
        "fedtail compare out/fedavg-factor=50-lr=0.1-seed0 out/fedavg-factor=50-lr=0.01"
    )


def test_a_grid_of_classes():
    file = write('[grid]\n"data.partition.name" = ["iid", "shards"]\nmodel = [{ name = "mlp" }]\n[[row]]\nname = "a"\n')
    assert [run.name for run in sweep.load(file).runs] == [
        "a-partition=iid-model=mlp-seed0",
        "a-partition=shards-model=mlp-seed0",
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_cell_classes_come_first_whatever_the_order(order):
    keys = ['"data.partition.clients" = [3]', '"data.partition.name" = ["iid"]',
            '"algorithm.optimizer.beta1" = [0.5]', '"algorithm.optimizer" = [{ name = "adam" }]',
            '"algorithm.mu" = [0.5]', '"algorithm.name" = ["fedprox"]']  # fmt: skip
    [run] = sweep.load(write("[grid]\n" + "\n".join(keys[::order]) + '\n[[row]]\nname = "a"\n')).runs
    assert run.experiment.data.partition == IID(clients=3)
    assert run.experiment.algorithm == FedProx(mu=0.5, optimizer=Adam(beta1=0.5))


def test_rows_and_cells_keep_of_the_base_what_their_algorithm_has():
    base = HEAD.replace("[0, 1]", "[0]") + '[base.algorithm.loss]\nname = "focal"\ngamma = 1.0\n'
    expected = [FedAvg(loss=Focal(gamma=1.0), optimizer=SGD(lr=0.05)), FedGraB(optimizer=SGD(lr=0.05))]
    rows = "".join(f'[[row]]\nname = "{name}"\nalgorithm = {{ name = "{name}" }}\n' for name in ("fedavg", "fedgrab"))
    grid = '[grid]\n"algorithm.name" = ["fedavg", "fedgrab"]\n[[row]]\nname = "a"\n'
    for text in (base + rows, base + grid):
        assert [run.experiment.algorithm for run in sweep.load(write(text)).runs] == expected
    # A name that is there already changes nothing, as with --data.longtail.name.
    text = '[base.data.longtail]\nfactor = 50.0\n[grid]\n"data.longtail.name" = ["exponential", "none"]\n[[row]]\nname = "a"\n'
    assert [run.experiment.data.longtail for run in sweep.load(write(text)).runs] == [
        Exponential(factor=50.0),
        NoTail(),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[base]\nalgorithm = "fedprox"\n' + BARE, r"base: algorithm must be a table, got 'fedprox'"),
        ('[base]\ndata = "mnist"\n[[row]]\nname = "a"\ndata = { server = 1 }\n', "base: data must be a table, got 'mnist'"),
        ('[base]\nalgorithm = { optimizer = "sgd" }\n[[row]]\nname = "a"\nalgorithm = { name = "fedprox" }\n',
         "row 'a': algorithm.optimizer must be a table, got 'sgd'"),
        ('[[row]]\nname = "a"\nalgorithm = { name = 3 }\n', "row 'a': algorithm: the key `name` must be a string, got 3"),
        ('[grid]\n"algorithm.name" = ["fedprox"]\n[[row]]\nname = "a"\nalgorithm = "fedavg"\n',
         "row 'a', algorithm=fedprox: algorithm must be a table, got 'fedavg'"),
        ('[grid]\nmodel = [{ name = "mlp" }, { name = "lenet" }]\n"model.name" = ["mlp"]\n[[row]]\nname = "a"\n',
         r"row 'a', model=lenet, model=mlp: this is the same experiment as model=mlp, model=mlp: model makes no difference to "
         r"this row\. Take one of the two out of the grid"),
        ('[grid]\nrounds = [3, 3]\n' + BARE, "rounds=3: this is the same experiment as rounds=3: their values are equal"),
        ('[grid]\n"algorithm.mu" = [0.1]\nalgorithm = { mu = [0.5] }\n' + BARE,
         r"grid: 'algorithm\.mu' stands there twice, with dots and as a table"),
        (BARE.replace("[[row]]", "[[rows]]"), r"unknown option 'rows'; did you mean 'row'\?"),
        ("[base]\nrounds = 3\n", "option 'row' is missing, and has no default"),
        (BARE + "seed = [0]\n", r"row 'tuned': 'seed' has no place there"),
        ("sedes = [0]\n" + BARE, r"unknown option 'sedes'; did you mean 'seeds'\?"),
        ("seeds = [1, 1]\n" + BARE, r"different integers >= 0; got 3 rows and the seeds \[1, 1\]"),
        ("seeds = []\n" + BARE, "seeds must not be empty"),
        ("seeds = 3\n" + BARE, "seeds must be a list"),
        ("jobs = -1\n" + BARE, "jobs must be >= 0, got -1"),
        ("row = []\n", "got 0 rows"),
        ("row = 3\n", "row must be a list"),
        ('[[row]]\nalgorithm = { name = "fedavg" }\n', r"row 1: `name` must be letters.*got None"),
        ('[[row]]\nname = "a/b"\n', r"row 1: `name` must be.*got 'a/b'"),
        (BARE + '[[row]]\nname = "fedavg"\n', "two rows are named 'fedavg'"),
        ('[[row]]\nname = "a"\nalgorithm = { name = "fedprocks" }\n', r"row 'a': unknown algorithm 'fedprocks'"),
        (BARE.replace("mu = 0.5", "muu = 0.5"), r"row 'tuned': unknown option 'algorithm.muu'; did you mean 'mu'\?"),
        (BARE.replace("mu = 0.5", "mu = -1.0"), r"row 'tuned': .*mu"),
        ("[base]\nruonds = 3\n" + BARE, r"row 'fedavg': unknown option 'ruonds'; did you mean 'rounds'\?"),
        (BARE.replace('"fedavg"\nrounds', '"fedaverage"\nrounds'), r"row 'tuned': start names no row, got 'fedaverage'; did"),
        ('[[row]]\nname = "a"\nstart = "b"\n[[row]]\nname = "b"\nstart = "a"\n', r"row 'a': start goes .*: a from b from a"),
        ('[grid]\n"rounds" = 3\n' + BARE, "grid: 'rounds' must be a list of values, got 3"),
        ('[grid]\nseed = [3]\n' + BARE, "grid: 'seed' has no place there"),
        ('[grid]\n"data.longtail.factr" = [3.0]\n' + BARE, r"row 'fedavg', factr=3: unknown option 'data.longtail.factr'; did"),
        ('[grid]\n"data.longtail.factor" = [3.0, 3.00000001]\n' + BARE, "two runs would have the folder"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_before_anything_is_trained(text, message):
    file = write(text)
    with pytest.raises(ConfigError, match=rf"(?s)^table\.toml: .*{message}"):
        sweep.load(file)


def test_what_is_a_sweep():
    assert sweep.is_sweep(write(ROWS))
    assert not sweep.is_sweep(write("rounds = 3\n"))
    assert not sweep.is_sweep(write("not TOML"))
    assert not sweep.is_sweep(Path("missing.toml"))
    assert sweep.is_sweep(write(ROWS.replace("[[row]]", "[[rows]]")))  # so that the message is about sweeps
    with pytest.raises(
        ConfigError, match=r"other\.toml is a sweep, not one experiment\. `fedtail run other\.toml --dry-run`"
    ):
        cli.dispatch(["inspect", str(write(ROWS, "other.toml"))])
    with pytest.raises(ConfigError, match="no row matches 'fedopt'"):
        sweep.load(write(ROWS), match="fedopt")


# ---- what is there already


def test_states(capsys):
    text = '[base]\nrounds = 2\nlocal = { epochs = 1 }\n[[row]]\nname = "a"\n[[row]]\nname = "b"\nstart = "a"\n'
    file = write("seeds = [0, 1]\n" + text)
    plan = sweep.load(file)
    list(begin(plan.runs[0].experiment, plan.runs[0].folder))
    half = begin(plan.runs[2].experiment, plan.runs[2].folder)
    next(half)
    half.close()
    assert sweep.states(plan) == {"a-seed0": "done", "b-seed0": "missing", "a-seed1": "partial", "b-seed1": "missing"}
    cli.dispatch(["run", str(file), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "done     runs/table/a-seed0"
    assert lines[3] == "missing  runs/table/b-seed1  (starts from a-seed1)"
    assert not Path("runs/table/.sweep").exists()
    # A published run keeps no checkpoint: then its records say that it is done.
    (plan.runs[0].folder / "checkpoint.safetensors").unlink()
    assert sweep.states(plan)["a-seed0"] == "done"
    # Killed after the last record was written and before the checkpoint: the checkpoint counts.
    records = (plan.runs[0].folder / "metrics.jsonl").read_text()
    (plan.runs[2].folder / "metrics.jsonl").write_text(records)
    assert sweep.states(plan)["a-seed1"] == "partial"
    # The engine may be another one, the rounds may not.
    sweep.states(sweep.load(write(text.replace("[base]\n", '[base]\nengine = { name = "parallel" }\n'))))
    with pytest.raises(ConfigError, match=r"runs/table/a-seed0 holds another experiment: rounds is 2 there and 3 here"):
        sweep.states(sweep.load(write(text.replace("rounds = 2", "rounds = 3"))))
    Path("runs/table/b-seed0").mkdir()
    with pytest.raises(ConfigError, match="b-seed0 exists and is not a run folder"):
        sweep.states(plan)


def test_a_start_is_compared_as_a_folder(tmp_path, monkeypatch):
    file = write('[base]\nlocal = { epochs = 1 }\n[[row]]\nname = "a"\n[[row]]\nname = "b"\nstart = "a"\n')
    run = sweep.load(file, output=Path("runs/x")).runs[1]
    run.folder.mkdir(parents=True)

    def states(**changes):
        (tmp_path / run.folder / "config.toml").write_text(config.dumps(dataclasses.replace(run.experiment, **changes)))
        return {sweep.state(sweep.load(file, output=output).runs[1]) for output in outputs}

    file, outputs = file.resolve(), [Path("runs/x"), Path("./runs/../runs/x"), tmp_path / "runs/x"]
    for start in ("runs/x/a-seed{seed}", "./runs/x/a-seed{seed}", f"{tmp_path}/runs/x/a-seed{{seed}}"):
        assert states(start=start) == {"partial"}
    for start in ("", "runs/y/a-seed{seed}", "runs/x/c-seed{seed}", "x/runs/x/a-seed{seed}"):
        with pytest.raises(ConfigError, match='b-seed0 holds another experiment: start is "'):
            states(start=start)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    outputs = [Path("../runs/x"), tmp_path / "runs/x"]
    for start in ("runs/x/a-seed{seed}", f"{tmp_path}/runs/x/a-seed{{seed}}"):  # the first: from where it was begun
        assert states(start=start) == {"partial"}


ONE = 'seeds = [0]\n[base]\nrounds = 2\nlocal = {{ epochs = 1 }}\n[[row]]\nname = "a"\nalgorithm = {{ {} }}\n'
SOUND, CHANGED = ONE.format('name = "fedavg"'), ONE.format('name = "fedprox"')


def test_a_folder_without_a_finished_round_may_be_replaced():
    [run] = sweep.load(write(SOUND)).runs
    [changed] = sweep.load(write(CHANGED)).runs
    begin(run.experiment, run.folder).close()  # failed in its first round: a checkpoint of round 0, no record
    assert [sweep.state(run), sweep.state(changed)] == ["missing", "missing"]
    with runs.locked(run.folder), pytest.raises(CheckpointError, match="another process is running"):
        sweep.clear(changed)
    assert run.folder.exists()
    sweep.clear(changed)
    assert list(run.output.iterdir()) == []
    sweep.clear(changed)  # nothing there: nothing to do
    # An algorithm that cannot even be read any more does not matter either.
    begin(run.experiment, run.folder).close()
    file = run.folder / "config.toml"
    file.write_text(file.read_text().replace('"fedavg"', '"gone"'))
    assert sweep.state(run) == "missing"


@pytest.mark.parametrize("kept", ["records", "part of a record", "checkpoint", "best", "foreign"])
def test_a_folder_that_holds_anything_of_a_round_is_never_removed(kept):
    [run] = sweep.load(write(SOUND)).runs
    [changed] = sweep.load(write(CHANGED)).runs
    rounds = begin(run.experiment, run.folder)
    if kept in ("records", "checkpoint"):
        next(rounds)
    rounds.close()
    records = run.folder / "metrics.jsonl"
    if kept == "checkpoint":
        records.write_text("")
    elif kept == "records":
        (run.folder / "checkpoint.safetensors").unlink()
    elif kept == "part of a record":
        records.write_text('{"rou')
    elif kept == "best":
        (run.folder / "best.safetensors").touch()
    else:
        (run.folder / "config.toml").unlink()
    with pytest.raises(ConfigError, match="is not a run folder" if kept == "foreign" else "holds another experiment"):
        sweep.state(changed)
    before = sorted(run.folder.iterdir())
    sweep.clear(changed)
    assert [path for path in sorted(run.folder.iterdir()) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_a_damaged_run_costs_its_own_table_only(capsys):
    plan = sweep.load(
        write(SOUND.replace("rounds = 2", "rounds = 1") + '[grid]\n"data.longtail.factor" = [5.0, 10.0]\n')
    )
    for run in plan.runs:
        list(begin(run.experiment, run.folder))
    damaged = plan.runs[0].folder
    (damaged / "metrics.jsonl").write_text("nonsense\n")
    (damaged / "timings.jsonl").write_text("nonsense\n")
    assert workers.clock(damaged) == workers.Clock(0, 0.0, 0)
    workers._print_tables(plan, {run.name for run in plan.runs})
    out, err = capsys.readouterr()
    assert f"no table: the run folder {damaged} is damaged" in err
    first, second = out.split("==== factor=10\n")
    assert "overall" not in first
    assert "overall" in second
    assert [line for line in out.splitlines() if line.startswith("fedtail")] == [
        f"fedtail compare {run.folder}" for run in plan.runs
    ]


def test_an_interrupt_lists_what_failed_before(monkeypatch, capsys):
    def work(pool):
        pool._fail("a-seed0", "no such file")
        raise KeyboardInterrupt

    monkeypatch.setattr(workers._Pool, "work", work)
    with pytest.raises(SystemExit) as end:
        workers.main(write(SOUND))
    assert end.value.code == 130
    said = "stopped: 0 of 1 runs are done. The same command continues.\n\n1 of 1 runs failed:\n  a-seed0: no such file"
    assert capsys.readouterr().err.strip() == said


def test_the_experiments_of_this_repository(monkeypatch):
    """The results that are published belong to the sweeps that say so."""
    root = Path(__file__).parents[1] / "experiments"
    monkeypatch.chdir(root.parent)  # what they say is relative to the repository
    found = set()
    for file in sorted(root.glob("*.toml")):
        if sweep.is_sweep(file) and sweep.load(file).output.parent == Path("experiments/results"):
            name = sweep.load(file).output.name
            plan = sweep.load(file)
            found |= {f"{name}/{run}" for run, state in sweep.states(plan).items() if state == "done"}
    kept = {config.parent for config in (root / "results").glob("*/*/config.toml")}
    assert {f"{folder.parent.name}/{folder.name}" for folder in kept} <= found


def test_the_presets_for_the_settings_of_fedga():
    """Its table: learning rate and rounds by alpha, CLIMB's dual learning rate and tolerance, model; the rest is common.

    A file's rounds are the most of its cells: the records of the earlier rounds are there, as the learning rate is constant.
    """
    alphas = (10.0, 1.0, 0.5, 0.1, 0.05)
    table = {
        "mnist": ("MLP", (0.1,) * 5, (100,) * 5, (2.0, 0.01)),
        "cifar10": ("LeNet", (0.1,) * 5, (300, 300, 400, 400, 600), (0.1, 0.1)),
        "svhn": ("LeNet", (0.3, 0.3, 0.3, 0.1, 0.1), (200, 200, 300, 600, 600), (0.5, 0.1)),
        "cifar100": ("ResNet20", (0.1,) * 5, (500, 500, 600, 700, 900), (0.5, 0.001)),
        "tiny_imagenet": ("ResNet20", (0.3,) * 5, (500, 500, 600, 900, 1100), (0.5, 0.1)),
    }
    root, found = Path(__file__).parents[1] / "experiments", set()
    for file in sorted(root.glob("fedga_protocol_*.toml")):
        plan = sweep.load(file)
        longest: dict[float, int] = {}
        for experiment in (run.experiment for run in plan.runs):
            data, step = experiment.data, experiment.algorithm.optimizer
            model, rates, rounds, climb = table[data.name]
            place = alphas.index(data.partition.alpha)
            assert (type(experiment.model).__name__, step.lr) == (model, rates[place]), file
            assert (step.momentum, step.weight_decay, step.clip, data.normalise) == (0.0, 0.0, 5.0, False)
            assert (data.partition.clients, experiment.participation.clients) == (100, 10)
            assert (experiment.local.epochs, experiment.local.batch_size) == (2, 64)
            assert isinstance(data.partition, DirichletEqualSize)
            if isinstance(experiment.algorithm, CLIMB):
                assert (experiment.algorithm.lr_dual, experiment.algorithm.eps) == climb
            longest[data.partition.alpha] = rounds[place]
            assert experiment.rounds >= rounds[place]
            found.add((data.name, data.partition.alpha, experiment.seed, type(experiment.algorithm).__name__))
        assert {run.experiment.rounds for run in plan.runs} == {max(longest.values())}
    methods = ("FedAvg", "FedProx", "CLIMB", "FedRL", "FedNTD", "FedGA")
    assert found == {*itertools.product(table, alphas, range(5), methods)}


# ---- the estimate


def test_the_estimate_goes_by_row():
    plan = sweep.load(write(HEAD + ROWS))
    pool = workers._Pool(plan, dict.fromkeys((run.name for run in plan.runs), "missing"))
    assert pool.remaining() is None
    pool.todo = [run for run in pool.todo if run.experiment.seed]
    pool.clocks["fedavg-seed0"] = workers.Clock(2, 6.0, 2)
    pool.clocks["fedprox-seed0"] = workers.Clock(2, 10.0, 2)
    pool.clocks["fedprox-seed1"] = workers.Clock(1, 5.0, 1)
    # Left for seed 1: fedavg 2 rounds of 3 s, fedprox 1 of 5, tuned a whole run (6, 10 and 10 s are known); on two cores.
    assert pool.remaining() == pytest.approx((6 + 5 + 26 / 3) / 2)


# ---- what stands at the end


def test_a_sweep_of_generators_names_the_command_that_judges_them(capsys):
    text = 'seeds = [0, 1]\noutput = "out"\n[base]\nrounds = 2\n[[row]]\nname = "gan"\nalgorithm = { name = "fedgan" }'
    plan = sweep.load(write(text + '\nmodel = { name = "dcgan28", width = 4 }'))
    workers._print_tables(plan, {"gan-seed0", "gan-seed1"})
    assert capsys.readouterr() == ("fedtail quality out/gan-seed0\nfedtail quality out/gan-seed1\n", "")


# ---- training: real processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of three rows and two seeds, run without interruption: its folder and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    (root / "table.toml").write_text(HEAD + ROWS)
    process = command("table.toml", cwd=root)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return root, out, err


@pytest.mark.slow
def test_a_sweep_prints_its_progress_its_table_and_the_command(whole):
    root, out, err = whole
    assert [runs.rounds_done(root / "out" / f"{name}-seed{seed}") for seed in (0, 1) for name in NAMES] == [2, 2, 1] * 2
    assert "6 runs, 0 of them done, 2 at a time, in out\n" in err
    assert re.search(
        r"^\w+-seed1: done after 0:\d\d:\d\d; 6 of 6 runs, .* elapsed, about 0:00:00 left$", err, re.MULTILINE
    )
    assert err.index("fedavg-seed0: done") < err.index("tuned-seed0: begins")
    labels = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert {"fedavg", "fedprox (mu=0.1)", "fedprox (mu=0.5, after fedavg)"} <= {*labels}
    assert out.endswith(
        "\nfedtail compare out/fedavg-seed{0,1} out/fedprox-seed{0,1} out/tuned-seed{0,1} --allow start rounds\n"
    )
    assert 'Allowed to differ: start, "" (out/fedavg-seed0) and "out/fedavg-seed{seed}" (out/tuned-seed0).' in " ".join(
        out.split()
    )
    assert "Allowed to differ: rounds, 2 (out/fedavg-seed0) and 1" in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_is_continued_to_the_same_bytes(whole, tmp_path, blow):
    root, out, _ = whole
    write(HEAD + ROWS)
    process = command("table.toml")
    until = time.monotonic() + 120
    while not list(Path("out").glob("fed*-seed0/checkpoint.safetensors")):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(blow)
    _, err = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL}.get(blow, 130)
    assert len(bytes_of("out")) < 6
    if blow != signal.SIGKILL:
        assert re.search(r"stopped: \d of 6 runs are done\. The same command continues\.\n", err)
        for log in Path("out/.sweep").glob("*.log"):  # nobody works on them any more
            with open(log, "ab") as file:
                assert workers._locked(file), log
    again = command("table.toml")
    text, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert text == out
    assert bytes_of("out") == bytes_of(root / "out")


@pytest.mark.slow
def test_a_failing_row_ends_neither_the_others_nor_silently(tmp_path):
    bad = '[[row]]\nname = "bad"\ndata = { name = "missing.npz" }\n[[row]]\nname = "after"\nstart = "bad"\n'
    write(HEAD.replace("[0, 1]", "[0]") + bad + ROWS[: ROWS.index('[[row]]\nname = "tuned"')])
    process = command("table.toml")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert {path.name for path in Path("out").iterdir()} == {".sweep", "fedavg-seed0", "fedprox-seed0"}
    assert "fedtail compare out/fedavg-seed0 out/fedprox-seed0" in out
    end = err[err.index("2 of 4 runs failed:") :]
    assert re.search(r"bad-seed0: .*missing\.npz.* \(log: out/\.sweep/bad-seed0\.log\)", end)
    assert "after-seed0: was not begun: it starts from bad-seed0, which failed" in end
    # Done runs are not touched again.
    stamp = os.stat("out/fedavg-seed0/checkpoint.safetensors").st_mtime_ns
    write(HEAD.replace("[0, 1]", "[0]") + ROWS)
    again = command("table.toml", "--match", "fed*")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "begins" not in err
    assert os.stat("out/fedavg-seed0/checkpoint.safetensors").st_mtime_ns == stamp


@pytest.mark.slow
def test_a_row_that_failed_in_its_first_round_can_be_mended():
    wild = ONE.format('name = "fedavg", optimizer = { name = "sgd", lr = 1e30 }')
    process = command(str(write(wild)))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert Path("runs/table/a-seed0/config.toml").is_file()
    process = command(str(write(SOUND)))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "a-seed0: begins" in err
    assert config.load("runs/table/a-seed0").algorithm == FedAvg()
    assert "fedtail compare runs/table/a-seed0" in out
