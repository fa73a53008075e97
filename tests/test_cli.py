"""The command line as a user types it, on the embedded digits; what it refuses is in test_bad_input.py."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fedtail
from fedtail import cli, config, demo, runs
from fedtail.algorithms import ALGORITHMS
from fedtail.checkpoint import load_checkpoint
from fedtail.data import catalog, fetch, formats
from fedtail.data.partition import PARTITIONS
from fedtail.errors import DataError
from fedtail.losses import LOSSES, Loss
from fedtail.models.specs import MODELS
from fedtail.teachers import TEACHERS

QUICK = ("--local.epochs", "1", "--engine.name", "loop")
USER = '''"""Mine: FedAvg that counts its rounds.

    server   w <- w + mean change
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from fedtail import Algorithm, Variables, cross_entropy, delta, descend, sgd_step, start


class State(NamedTuple):
    """The model and a counter."""

    model: Variables
    rounds: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Mine(Algorithm):
    """FedAvg that counts its rounds."""

    speed: float = 1.0
    """Step of the server."""
    shares_counts: ClassVar[bool] = False

    def init_server(self, ctx, rng):
        return State(ctx.task.initial, torch.zeros(()))

    def local_init(self, ctx, message, client):
        return start(self.optimizer, message.model)

    def local_step(self, ctx, message, client, local, batch):
        def objective(v, extra):
            risk, new = cross_entropy(ctx.task, v, batch)
            return risk, (new, extra, {})

        return sgd_step(ctx, local, objective, self.optimizer)

    def local_final(self, ctx, message, client, local):
        return delta(message.model, local.variables), client

    def server_update(self, ctx, server, mean, total):
        return State(descend(server.model, mean, self.speed), server.rounds + 1)

    def predict(self, ctx, message, client, x):
        return ctx.task.apply(message.model, x, train=False)[0]
'''


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTAIL_DATA", str(tmp_path / "cache"))


@pytest.fixture
def say(capsys):
    """Runs a verb in this process; returns what it printed."""

    def run(*arguments):
        capsys.readouterr()
        cli.dispatch([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders of FedAvg and Fed-GraB with two seeds each, and of FedAvg on a milder tail; two rounds."""
    root = tmp_path_factory.mktemp("three")
    quick = ["run", "--rounds", "2", *QUICK, "--data.validation", "5", "--evaluation.keep", "best"]
    cli.dispatch([*quick, "--seeds", "0", "1", "--output", str(root)])
    cli.dispatch([*quick, "--seeds", "0", "1", "--output", str(root), "--algorithm.name", "fedgrab"])
    cli.dispatch([*quick, "--output", str(root / "milder"), "--data.longtail.factor", "5"])
    return root


def stop_after_one(folder):
    """Begins what `fedtail run --rounds 3 QUICK` does, and stops after its first round."""
    options = fedtail.EngineOptions(name="loop")
    rounds = fedtail.run(fedtail.Experiment(rounds=3, local=fedtail.LocalWork(epochs=1), engine=options), folder)
    next(rounds)
    rounds.close()


def of(three, method):
    return [three / f"digits-{method}-seed{seed}" for seed in (0, 1)]


# ---- run, resume, evaluate


def test_run_without_a_file(say):
    text = say("run", "--rounds", 2, *QUICK)
    assert "digits: 512 training examples on 8 clients, 8 a round; 2 rounds" in text
    assert "test: global test set, 500 examples" in text
    assert "shot groups: cumulative 75/95 %" in text
    assert text.endswith("run folder: runs/digits-fedavg-seed0\n")
    record = runs.read("runs/digits-fedavg-seed0")
    assert record.config == config.to_dict(config.load("runs/digits-fedavg-seed0"))
    assert (record.config["rounds"], record.config["local"]["epochs"]) == (2, 1)
    assert [r["round"] for r in record.records] == [0, 1]
    assert record.environment["packages"].keys() >= {"fedtail", "torch", "numpy"}
    # The scores that were printed are those of the last record.
    assert f"{100 * record.last['test']['accuracy']:.1f}" in text
    assert f"{100 * record.last['local']['worst_decile']:.1f}" in text


def test_names_and_options_in_any_order(say):
    say("run", "--rounds", 1, "--algorithm.mu", 0.5, *QUICK, "--algorithm.name", "fedprox", "--output", "a")
    say("run", "--algorithm.name=fedprox", "--rounds=1", "--algorithm.mu=0.5", *QUICK, "--output", "b")
    assert Path("a/config.toml").read_text() == Path("b/config.toml").read_text()
    table = tomllib.loads(Path("a/config.toml").read_text())
    assert table["algorithm"]["name"] == "fedprox"
    assert table["algorithm"]["mu"] == 0.5
    assert Path("a/metrics.jsonl").read_bytes() == Path("b/metrics.jsonl").read_bytes()


def test_every_part_can_be_named(say):
    words = (
        "--algorithm.name fedgrab --algorithm.gate none --algorithm.optimizer.name adam --algorithm.optimizer.lr 0.002 "
        "--data.longtail.name step --data.longtail.factor 4 --data.partition.name shards --data.partition.clients 5 "
        "--model.name resnet8 --model.norm group --schedule.name cosine --schedule.warmup 1 "
        "--evaluation.groups.name thirds --evaluation.groups.of train --data.server 2 --dtype float64"
    )
    flags = words.split()
    say("inspect", *flags)
    text = say("run", "--rounds", 1, *QUICK, *flags, "--local.batch-size", 32, "--output", "run")
    assert "thirds of the classes by training counts" in text
    experiment = config.load("run")
    assert experiment.algorithm.optimizer.lr == 0.002
    assert (experiment.data.partition.clients, experiment.data.longtail.factor) == (5, 4.0)
    assert (experiment.schedule.warmup, experiment.dtype) == (1, "float64")


def test_seeds(say, three):
    for seed, folder in enumerate(of(three, "fedavg")):
        assert config.load(folder).seed == seed
    first, second = (runs.read(folder).counts for folder in of(three, "fedavg"))
    assert (first != second).any()
    text = say("run", "--rounds", 1, *QUICK, "--seeds", 3, 3)  # a name that is taken is not taken again
    assert "run folder: runs/digits-fedavg-seed3\n" in text
    assert "run folder: runs/digits-fedavg-seed3-2\n" in text


def test_run_from_a_file_and_from_a_run_folder(say):
    Path("mild.toml").write_text('rounds = 1\n[data.longtail]\nname = "step"\nfactor = 3.0\n[local]\nepochs = 1\n')
    assert "run folder: runs/mild-seed4" in say("run", "mild.toml", "--seed", 4)
    experiment = config.load("runs/mild-seed4")
    assert (experiment.seed, experiment.data.longtail.factor, experiment.local.epochs) == (4, 3.0, 1)
    assert "run folder: again" in say("run", "runs/mild-seed4", "--output", "again")
    for name in ("config.toml", "metrics.jsonl", "checkpoint.safetensors"):
        assert Path("again", name).read_bytes() == Path("runs/mild-seed4", name).read_bytes()


def test_run_of_data_at_a_path(say, tmp_path):
    rng = np.random.default_rng(0)
    place = tmp_path / "else" / "my.data.npz"
    place.parent.mkdir()
    np.savez(place, x=rng.random((80, 4)), y=np.arange(80) % 2, user=np.arange(80) % 5)
    flags = ("--data.name", place, "--data.longtail.name", "none", "--data.partition.name", "natural")
    assert "run folder: runs/my.data-fedavg-seed0" in say("run", "--rounds", 1, *QUICK, *flags)
    assert [p.name for p in place.parent.iterdir()] == ["my.data.npz"]  # runs go under runs/, not beside the data
    assert len(runs.read("runs/my.data-fedavg-seed0").counts) == 5


def test_resume(say):
    say("run", "--rounds", 3, *QUICK, "--output", "whole")
    stop_after_one("half")
    text = say("resume", "half")
    assert "run folder: half" in text
    for name in ("config.toml", "metrics.jsonl", "checkpoint.safetensors"):
        assert Path("half", name).read_bytes() == Path("whole", name).read_bytes()
    assert say("resume", "half") == "half is complete: all 3 rounds are done.\n"


def test_evaluate(say, three):
    folder = of(three, "fedgrab")[0]
    record = runs.read(folder).last
    scores = json.loads(say("evaluate", folder, "--json"))
    assert scores == {name: record[name] for name in ("test", "local")}
    validation = json.loads(say("evaluate", folder, "--split", "validation", "--json"))
    assert validation == {"validation": record["validation"]}
    train = json.loads(say("evaluate", folder, "--split", "train", "--json"))["train"]
    assert train["test_set"].startswith("training examples of all clients")
    text = say("evaluate", folder)
    assert f"{100 * record['test']['balanced_accuracy']:.1f}" in text
    best = max(r["validation"]["balanced_accuracy"] for r in runs.read(folder).records)
    of_best = json.loads(say("evaluate", folder, "--split", "validation", "--checkpoint", "best", "--json"))
    assert of_best["validation"]["balanced_accuracy"] == best


# ---- inspect, list, show


def test_inspect(say, tmp_path):
    before = list(tmp_path.iterdir())
    text = say("inspect", "--data.partition.clients", 30)
    assert "the first 20 of 30 clients" in text
    assert "30 clients, 30 a round" in text
    facts = json.loads(say("inspect", "--participation.fraction", 0.5, "--json"))
    counts = np.array(facts["counts"])
    assert (facts["clients"], facts["cohort"]) == (len(counts), 4) == (8, 4)
    # floor(126 * 10^(-c/9)): 126 is the smallest class of the 1,297 training digits
    assert facts["class_totals"] == counts.sum(0).tolist() == [126, 97, 75, 58, 45, 35, 27, 21, 16, 12]
    assert facts["parameters"] == 64 * 128 + 128 + 128 * 10 + 10
    assert facts["bytes"]["broadcast_to_a_client"] == facts["bytes"]["model"] == 4 * facts["parameters"]
    # batches of 10, five epochs: every client makes 5 * ceil(n / 10) steps
    assert facts["local_steps"]["all"] == int((5 * -(-counts.sum(1) // 10)).sum())
    tail = facts["tail_holders"]
    assert [row["class"] for row in tail] == facts["shot_groups"]["tail"]
    for row in tail:
        assert row["clients"] == sorted(np.flatnonzero(counts[:, row["class"]]), key=lambda k: -counts[k, row["class"]])
        assert row["largest_share"] == counts[:, row["class"]].max() / row["examples"]
    assert facts["unused_examples"] == 0
    assert "who holds the tail classes" in text
    rotated = say("inspect", "--data.partition.name", "rotated_tails", "--data.longtail.name", "none", "--json")
    assert json.loads(rotated)["unused_examples"] == 1297 - np.sum(json.loads(rotated)["counts"])
    assert list(tmp_path.iterdir()) == before
    json.loads(say("inspect", "--json", "--picture", "split.png"))  # the picture's path goes elsewhere
    assert Path("split.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_a_path_as_it_is(say):
    """Brackets would be rich's markup, words between colons its emoji."""
    path = Path("a [bold] :dog: [/x]") / "set.npz"
    path.parent.mkdir(parents=True)
    labels = np.arange(40) % 4
    np.savez(path, x=np.zeros((40, 3)), y=labels)
    assert say("inspect", "--data.name", path, "--data.longtail.name", "none").startswith(f"{path} (")


def test_inspect_tells_the_double_traffic_of_scaffold(say):
    facts = json.loads(say("inspect", "--algorithm.name", "scaffold", "--json"))
    assert facts["bytes"]["broadcast_to_a_client"] == 2 * facts["bytes"]["model"]


@pytest.mark.parametrize(
    ("what", "known"),
    [
        ("algorithms", ALGORITHMS),
        ("losses", LOSSES),
        ("models", MODELS),
        ("teachers", TEACHERS),
        ("datasets", catalog.REGISTRY),
        ("partitions", PARTITIONS),
    ],
)
def test_list(say, what, known):
    lines = say("list", what).splitlines()
    assert [line.split()[0] for line in lines] == list(known)
    assert all(len(line.split()) > 2 for line in lines)  # a name and words


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_show(say, name):
    text = say("show", name)
    default = {"lightweight": "Nadam()"}.get(name, "Adam(lr=0.0002, beta1=0.5)" if name.endswith("gan") else "SGD()")
    assert f"optimizer           {default}" in text
    assert re.search(r"(?i)differences? from", text) or name == "fedavg", "what differs from the paper"
    algorithm = config.resolve(config.Algorithm, name)
    for field in dataclasses.fields(algorithm):
        assert re.search(rf"^  {field.name} +\S", text, re.MULTILINE), field.name


@pytest.mark.parametrize("name", list(LOSSES))
def test_show_a_loss(say, name):
    text = say("show", name)
    if name in ALGORITHMS:  # its page comes first
        text = text.partition(f"The loss {name}, for other algorithms:\n\n")[2]
    loss = config.resolve(Loss, name)
    assert text.startswith(inspect.getdoc(loss))
    assert "Differences from" in text or name == "cross_entropy", "what differs from the paper"
    table = text.splitlines()[len(inspect.getdoc(loss).splitlines()) + 2 :]
    reveals = [line for line in table if line.startswith("Clients reveal their class counts: ")]
    assert len(reveals) == (name in ("fedir", "ldam", "logit_adjustment"))
    table = table[: len(table) - len(reveals)]
    assert [line.split()[0] for line in table] == [field.name for field in dataclasses.fields(loss)]


def test_show_lists_what_an_algorithm_of_one_s_own_inherits(say):
    Path("child.py").write_text(
        "from dataclasses import dataclass\nfrom fedtail import FedProx\n\n\n@dataclass(frozen=True, kw_only=True)\n"
        'class Child(FedProx):\n    speed: float = 2.0\n    """How fast."""\n    mu: float = 0.5\n'
    )
    table = [line.split(maxsplit=2) for line in say("show", "child.py:Child").splitlines() if line.startswith("  ")]
    assert [line[:2] for line in table] == [
        ["optimizer", "SGD()"], ["loss", "CrossEntropy()"], ["mu", "0.5"], ["speed", "2.0"]
    ]  # fmt: skip
    assert table[2][2].startswith("Weight of the proximal term")


def test_an_algorithm_of_one_s_own(say):
    Path("mine.py").write_text(USER)
    text = say("show", "mine.py:Mine")
    assert text.startswith("Mine: FedAvg that counts its rounds.")
    assert re.search(r"speed +1\.0 +Step of the server\.", text)
    assert "shares_counts" not in text  # a declaration, no option
    say("run", "--rounds", 2, *QUICK, "--algorithm.name", "mine.py:Mine", "--algorithm.speed", 0.5, "--output", "own")
    assert tomllib.loads(Path("own/config.toml").read_text())["algorithm"]["name"] == "mine.py:Mine"
    snapshot = load_checkpoint(Path("own/checkpoint.safetensors"))
    assert float(snapshot.server.rounds) == 2
    assert "run folder: runs/digits-mine-seed0" in say("run", "--rounds", 1, *QUICK, "--algorithm.name", "mine.py:Mine")
    json.loads(say("evaluate", "own", "--json"))


# ---- data


def idx(path, array):
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.fixture
def tiny_mnist(monkeypatch, tmp_path):
    """A folder of IDX files, and a catalogue that says this is what mnist is."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, n in (("train", 60), ("t10k", 20)):
        idx(folder / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)).astype(np.uint8))
        idx(folder / f"{name}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    train, test = formats.read_idx_folder(folder)
    entry = catalog.REGISTRY["mnist"]
    hashes = (*entry.format.hashes(train), *entry.format.hashes(test))
    tiny = dataclasses.replace(entry, sizes=(60, 20), sha256=hashes)
    monkeypatch.setitem(catalog.REGISTRY, "mnist", tiny)
    return folder


def test_data_add_and_get(say, tiny_mnist, tmp_path):
    cache = tmp_path / "cache" / "mnist"
    assert say("data", "add", "mnist", tiny_mnist).strip() == str(cache)
    assert sorted(p.name for p in cache.iterdir()) == sorted(formats.IDX_NAMES)
    text = say("data", "get", "mnist")  # found in the cache: no network
    assert "complete and checked" in text
    assert text.strip().endswith(str(cache))
    assert "mnist: 60 training" in say(
        "run", "--rounds", 1, *QUICK, "--data.name", "mnist", "--data.longtail.name", "none"
    )
    assert "digits" in say("data", "get", "digits")


def test_data_add_of_other_files(say, tiny_mnist, tmp_path):
    with open(tiny_mnist / "t10k-labels-idx1-ubyte", "r+b") as file:
        file.seek(8)
        file.write(b"\7")
    with pytest.raises(DataError, match=r"test labels.*data get mnist"):
        cli.dispatch(["data", "add", "mnist", str(tiny_mnist)])
    assert not (tmp_path / "cache" / "mnist").exists()


# ---- compare, plot, report


def test_compare(say, three):
    both = (*of(three, "fedavg"), *of(three, "fedgrab"))
    text = say("compare", *both)
    accuracy = [100 * runs.read(folder).last["test"]["accuracy"] for folder in of(three, "fedgrab")]
    assert f"{np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f}" in text
    assert "|" in say("compare", *both, "--format", "markdown")
    table = json.loads(say("compare", *both, "--format", "json"))
    numbers = table["methods"][1]["columns"]["test.accuracy"]
    assert numbers["mean"] == pytest.approx(np.mean(accuracy) / 100)
    assert numbers["n"] == 2


def test_compare_refuses_runs_that_differ_in_more_than_the_method(say, three):
    runs_of = (three / "milder", of(three, "fedgrab")[0])
    with pytest.raises(
        config.ConfigError, match=r"(?s)data\.longtail\.factor: .*--allow data\.longtail\.factor"
    ) as caught:
        say("compare", *runs_of)
    assert "5.0" in str(caught.value)
    assert "10.0" in str(caught.value)
    assert "longtail" in say("compare", *runs_of, "--allow", "data.longtail")
    with pytest.raises(config.ConfigError, match=r"the same experiment"):
        say("compare", of(three, "fedavg")[0], of(three, "fedavg")[0])
    stop_after_one("half")
    with pytest.raises(config.ConfigError, match=r"half has 1 of 3 rounds.*fedtail resume half"):
        say("compare", "half")


@pytest.mark.parametrize("kind", ["partition", "classes", "curves", "prior", "balance", "clients"])
def test_plot(say, three, kind):
    folders = of(three, "fedgrab") if kind in ("prior", "balance") else (*of(three, "fedavg"), *of(three, "fedgrab"))
    assert say("plot", kind, *folders) == f"{kind}.png\n"
    assert Path(f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    say("plot", kind, *folders, "--output", "own.svg")
    assert "<svg" in Path("own.svg").read_text()


def test_plot_of_what_a_method_does_not_have(say, three):
    for kind in ("prior", "balance"):
        with pytest.raises(config.ConfigError, match="fedgrab"):
            say("plot", kind, of(three, "fedavg")[0])
    with pytest.raises(config.ConfigError, match="at least one run folder"):
        say("plot", "curves")


def test_report(say, three):
    both = (*of(three, "fedavg"), *of(three, "fedgrab"))
    assert say("report", *both) == "report.html\n"
    page = Path("report.html").read_text()
    assert "fedtail report " in page
    assert page.count("<img") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "")  # self-contained
    assert "https://" not in page
    assert not re.search(r"<(script|link)\b", page)


# ---- demo


def test_demo_without_fashion_mnist(say, monkeypatch):
    def unreachable(name, log=print, progress=None):
        raise DataError(f"data set {name!r} could not be obtained:\n  official address: no route")

    monkeypatch.setattr(fetch, "get", unreachable)
    text = say("demo", "--rounds", 2, "--output", "show")
    assert "data set 'fashion-mnist' could not be obtained" in text
    assert "the demo runs on the embedded DIGITS instead" in text
    assert "not those of the README" in text
    folders = [Path("show", f"digits-{name}-seed0") for name in demo.METHODS]
    assert [len(runs.read(folder).records) for folder in folders] == [2, 2]
    assert (runs.read(folders[0]).counts == runs.read(folders[1]).counts).all()  # the same split
    page = Path("show/report.html").read_text()
    assert "digits" in page
    stamps = [(folder / "checkpoint.safetensors").stat().st_mtime_ns for folder in folders]
    assert "report.html" in say("demo", "--rounds", 2, "--output", "show")  # again: nothing is trained twice
    assert [(folder / "checkpoint.safetensors").stat().st_mtime_ns for folder in folders] == stamps


def test_demo_that_was_stopped_is_continued(say, monkeypatch):
    monkeypatch.setattr(demo, "setting", lambda: demo.DIGITS)
    from fedtail import experiment

    original, calls = experiment.Federation.step, []

    def step(self):
        calls.append(self.round)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(experiment.Federation, "step", step)
    with pytest.raises(SystemExit) as caught:
        say("demo", "--rounds", 2, "--output", "show")
    assert caught.value.code == 130
    say("demo", "--rounds", 2, "--output", "show")
    assert calls == [0, 1, 1, 0, 1]  # FedAvg: round 0, the interrupted round, the same again; Fed-GraB
    assert Path("show/report.html").exists()


# ---- the process


def test_help(say):
    text = say()
    for verb in (*cli.FREE, *(v for v in cli.TYPED if not v.startswith("data"))):
        assert re.search(rf"^  {verb}\b", text, re.MULTILINE), verb
    assert say("--help") == say("-h") == say("help") == say("data", "--help") == text
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", say("--version"))


@pytest.mark.parametrize("verb", [*cli.FREE, *cli.TYPED])
def test_help_of_every_verb(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        cli.dispatch([*verb.split(), "--help"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert f"usage: fedtail {verb}" in text
    if verb in cli.FREE:
        assert "optimizer.lr FLOAT" in text  # check: without "algorithm.", as it is about nothing else
        assert "Learning rate, > 0" in text


def test_help_and_list_are_fast_and_light():
    """Neither torch nor matplotlib is imported: in a process of its own."""
    code = (
        "import sys\nfrom fedtail import cli\n"
        "for words in [['--help'], ['list'], ['list', 'models'], ['list', 'partitions'], ['list', 'datasets'], "
        "['list', 'losses'], ['show', 'fedgrab'], ['show', 'ldam'], ['--version']]:\n    cli.dispatch(words)\n"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    assert done.stdout.splitlines()[-1] == "[]"
    assert seconds < 5  # 0.5 on an idle machine, where `import torch` alone takes 2


def test_a_terminal_without_unicode(tmp_path):
    """What cannot be shown becomes "?", in a real process: no traceback."""
    code = (
        "import sys\nfrom fedtail import cli\nsys.argv = ['fedtail', 'show', 'fedprox']\ncli.main()\nprint('\\u00b1')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(b"?")
