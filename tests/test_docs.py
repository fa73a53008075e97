"""The documentation is run and compared with the code: Python and TOML blocks, links, options, defaults, metrics."""

import dataclasses
import glob
import operator
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest

import fedtail
from fedtail import cli, config, sweep
from fedtail.algorithm import Algorithm
from fedtail.algorithms import ALGORITHMS
from fedtail.config import Experiment, from_dict, merged, resolve, to_dict
from fedtail.data.catalog import REGISTRY
from fedtail.data.longtail import LONGTAILS, LongTail
from fedtail.data.partition import PARTITIONS, Partition
from fedtail.losses import LOSSES, Loss
from fedtail.metrics import GROUP_RULES, GroupRule
from fedtail.models.specs import ModelSpec
from fedtail.optim import Optimizer
from fedtail.schedule import Schedule
from fedtail.teachers.specs import Teacher

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "algorithms").glob("*.md")])
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]


def _id(page):
    return str(page.relative_to(ROOT))


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def _sections(page):
    """The text below each heading, by the heading."""
    parts = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _rows(text):
    """The cells of all table rows, without backticks."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


# ---- blocks


def _slow_with_a_shell(page):
    return pytest.param(page, marks=pytest.mark.slow if _blocks(page, "sh") else ())


@pytest.mark.parametrize("page", [_slow_with_a_shell(p) for p in PAGES if _blocks(p, "python")], ids=_id)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("docs_" + page.stem)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    steps = re.findall(r"^```(python|toml|sh)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for number, (language, block) in enumerate(steps):
        if file := re.match(r"# (\w+\.(?:py|toml))\n", block):  # a file that the reader saves
            Path(file[1]).write_text(block)
        elif language == "python":
            exec(compile(block, f"{page.name}, block {number}", "exec"), vars(module))
        elif language == "sh":
            for line in block.splitlines():
                _shell(line)


def _shell(line):
    """Does what a line of a shell does, in this process: `fedtail VERB ...`."""
    program, *words = shlex.split(line, comments=True)
    assert program == "fedtail", line
    code = 0
    try:
        cli.dispatch([part for word in words for part in (sorted(glob.glob(word)) if "*" in word else [word])])
    except SystemExit as end:
        code = end.code
    assert not code, line


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "toml")], ids=_id)
def test_toml_blocks_are_experiments_or_sweeps(page, tmp_path):
    for block in _blocks(page, "toml"):
        if "[[row]]" in block:
            (tmp_path / "sweep.toml").write_text(block)
            assert sweep.load(tmp_path / "sweep.toml").runs
            continue
        experiment = from_dict(Experiment, merged(to_dict(Experiment()), tomllib.loads(block)))
        assert from_dict(Experiment, tomllib.loads(config.dumps(experiment))) == experiment


def test_every_algorithm_page_has_both_examples():
    for name in ALGORITHMS:
        page = ROOT / "docs" / "algorithms" / f"{name}.md"
        assert f'name = "{name}"' in "".join(_blocks(page, "toml"))
        assert resolve(Algorithm, name).__name__ in "".join(_blocks(page, "python"))


# ---- links


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=_id)
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(_anchor, _sections(file)), target


def test_all_pages_are_on_the_map():
    text = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        if page.name != "index.md":
            assert str(page.relative_to(ROOT / "docs")) in text


def test_no_page_refers_to_what_is_not_part_of_the_project():
    for page in LINKED:
        assert not re.search(r"/work|\bshared/|\bspecs/", page.read_text()), page


# ---- options

CONFIGURATION = ROOT / "docs" / "configuration.md"
PLAIN = {"Experiment": "", "data": "data.", "local": "local.", "participation": "participation.",
         "evaluation": "evaluation.", "evaluation.finetune": "evaluation.finetune.", "engine": "engine."}  # fmt: skip
POLYMORPHIC = {
    "algorithm": Algorithm,
    "algorithm.loss": Loss,
    "algorithm.optimizer": Optimizer,
    "data.longtail": LongTail,
    "data.partition": Partition,
    "model": ModelSpec,
    "teacher": Teacher,
    "schedule": Schedule,
    "evaluation.groups": GroupRule,
}
ELSEWHERE = {"algorithm.loss": (ROOT / "docs" / "losses.md", "Options")}  # the others: configuration.md, by section


def _value(cell):
    """The value of a cell of the column `default`."""
    return None if cell == "unset" else tomllib.loads(f"x = {cell}")["x"]


def _defaults(cls):
    """Each field's default as a configuration has it."""
    found = {}
    for field in dataclasses.fields(cls):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = value
    return found


def _same(cell, default, base):
    """Says whether a cell of the column `default` means a field's default."""
    if base in config.REGISTRIES:
        return from_dict(base, _value(cell)) == default
    if dataclasses.is_dataclass(default):
        return cell == "table"  # it has a section of its own
    value = _value(cell)
    return type(value) is type(to_dict(default)) and value == to_dict(default)


def _abstract(value):
    return next((base for base in config.REGISTRIES if isinstance(value, base)), None)


@pytest.mark.parametrize("section", PLAIN)
def test_configuration_lists_the_options_of_a_table_with_their_defaults(section):
    cls = Experiment if section == "Experiment" else type(operator.attrgetter(section)(Experiment()))
    listed = {row[0]: row[1] for row in _rows(_sections(CONFIGURATION)[section])[1:]}
    defaults = _defaults(cls)
    assert listed.keys() == {PLAIN[section] + name for name in defaults}
    for name, default in defaults.items():
        assert _same(listed[PLAIN[section] + name], default, _abstract(default)), name


@pytest.mark.parametrize("section", POLYMORPHIC)
def test_configuration_lists_the_options_of_every_name_with_their_defaults(section):
    base = POLYMORPHIC[section]
    page, heading = ELSEWHERE.get(section, (CONFIGURATION, section))
    assert section in _sections(CONFIGURATION)
    listed = {(row[0], row[1]): row[2] for row in _rows(_sections(page)[heading])[1:]}
    expected = {}
    for name in config.REGISTRIES[base]:
        expected |= {(name, option): d for option, d in _defaults(resolve(base, name)).items()} or {(name, "-"): None}
    assert listed.keys() == expected.keys()
    for (name, option), default in expected.items():
        if option != "-":
            assert _same(listed[name, option], default, _abstract(default)), (name, option)


def test_every_kind_of_option_has_a_section():
    assert set(POLYMORPHIC.values()) == set(config.REGISTRIES)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_page_lists_each_field_with_its_default(name):
    rows = _rows(_sections(ROOT / "docs" / "algorithms" / f"{name}.md")["Options"])[1:]
    defaults = _defaults(resolve(Algorithm, name))
    assert {row[0] for row in rows} == defaults.keys()
    for row in rows:
        assert _same(row[1], defaults[row[0]], _abstract(defaults[row[0]])), row[0]


def test_losses_page_has_the_equation_and_the_paper_of_every_loss():
    sections = _sections(ROOT / "docs" / "losses.md")
    assert [row[0] for row in _rows(sections["Equations"])[1 : len(LOSSES) + 1]] == list(LOSSES)
    assert {row[0] for row in _rows(sections["Sources"])[1:]} == LOSSES.keys() - {"cross_entropy"}


# ---- data, metrics, names


def test_data_page_names_every_set_long_tail_and_partition_with_its_options():
    sections = _sections(ROOT / "docs" / "data.md")
    sets = {row[0]: row[1] for row in _rows(sections["Known data sets"])[1:]}
    assert sets == {name: "{:,} / {:,}".format(*entry.sizes) for name, entry in REGISTRY.items()}
    for heading, registry in (("Long tails", LONGTAILS), ("Partitions", PARTITIONS)):
        rows = {row[0]: row for row in _rows(sections[heading])}
        for name, cls in registry.items():
            options = set(re.findall(r"\w+", rows[name][2]))
            assert options == {field.name for field in dataclasses.fields(cls)}, name


def test_data_page_gives_the_class_sizes_that_the_cut_makes():
    for name, factor, sizes, total in _rows(_sections(ROOT / "docs" / "data.md")["Long tails"])[5:]:
        largest = {"cifar10": 5000, "fashion-mnist": 6000, "digits": 126}[name]
        counts = [int(n) for n in sizes.split()]
        assert (
            counts
            == LONGTAILS["exponential"](factor=float(factor), num_max=largest).counts(np.full(10, largest)).tolist()
        )
        assert f"{sum(counts):,}" == total


def test_metrics_page_names_every_key_of_a_record():
    experiment = Experiment(
        rounds=1,
        algorithm=fedtail.FedGraB(),
        data=fedtail.Data(validation=5, server=1),
        local=fedtail.LocalWork(epochs=1, batch_size=50),
    )
    [result] = fedtail.run(experiment)
    text = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    for key, value in result.record.items():
        assert key in named
        for inner in value if isinstance(value, dict) else ():
            assert inner in named, f"{key}.{inner}"
    for rule in GROUP_RULES:
        assert rule in named


def test_every_public_name_is_on_the_index():
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "index.md").read_text()))
    assert set(fedtail.__all__) <= named


def test_contributing_names_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"test", "lint", "demo"} <= named <= targets


def test_opinions_name_every_method_that_takes_a_loss():
    text = _sections(ROOT / "docs" / "opinions.md")["Opinions"]
    [paragraph] = [p for p in text.split("\n\n") if p.startswith("**What combines, and what does not.**")]
    spelled = {"fedopt": "FedOpt", "creff": "CReFF", "crt": "cRT", "lg_fedavg": "LG-FedAvg"}
    takes = {name for name in ALGORITHMS if "loss" in {f.name for f in dataclasses.fields(resolve(Algorithm, name))}}
    named = {word.lower() for word in re.findall(r"[\w-]+", paragraph.partition("So `loss")[0])}
    assert {spelled.get(name, name).lower() for name in takes} <= named
    assert not {name for name in ALGORITHMS if name in named} - takes
