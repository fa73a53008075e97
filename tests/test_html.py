import dataclasses
import re
from html.parser import HTMLParser

import pytest

import fedtail
from fedtail import Experiment, FedGraB, FedProx, LocalWork, html, report
from fedtail.config import Data, Evaluation
from fedtail.data.longtail import NoTail
from fedtail.engines import EngineOptions
from fedtail.errors import ConfigError
from fedtail.metrics import OLTR

EXPERIMENT = Experiment(rounds=2, local=LocalWork(epochs=1), engine=EngineOptions(name="loop"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """FedAvg and Fed-GraB without a gate on digits, two seeds each."""
    root = tmp_path_factory.mktemp("runs")
    found = []
    for algorithm in (EXPERIMENT.algorithm, FedGraB(gate="none")):
        for seed in (0, 1):
            found.append(root / f"{type(algorithm).__name__}-{seed}")
            list(fedtail.run(dataclasses.replace(EXPERIMENT, algorithm=algorithm, seed=seed), found[-1]))
    return found


class _Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    html.report(folders, path, "fedtail run <x>.toml --seeds 0 1 && fedtail report 'a & b'", title="A <b>title")
    return path


def test_page_is_self_contained_and_well_formed(page):
    parsed = _Page(page.read_text())
    assert parsed.open == []
    assert parsed.addresses
    assert all(address.startswith("data:image/") for address in parsed.addresses)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"https?:|@import|url\(", page.read_text())


def test_page_holds_words_tables_pictures_facts_and_command(page, folders):
    parsed = _Page(page.read_text())
    text = " ".join(parsed.text)
    comparison = report.compare(folders)
    assert "A <b>title" in parsed.text
    assert "fedtail run <x>.toml --seeds 0 1 && fedtail report 'a & b'" in parsed.text
    for row in [row for section in comparison.sections for row in comparison.rows(section)]:
        assert {row.label, *row.cells} <= set(parsed.text)
    for part in (*report.in_words(comparison), *comparison.notes, *map(comparison.caption, comparison.sections)):
        assert part in parsed.text
    assert (
        parsed.tags.count("img") == 7
    )  # groups, classes, curves, clients, partition, and Fed-GraB's prior and balance
    for part in ("digits", "exponential: factor 10", "dirichlet_multinomial: clients 8, alpha 0.5", "sgd: lr 0.03",
                 "epochs 1", "gate=none", "seeds 0, 1", "512 in 10 classes", "torch 2", "loop, float32 on cpu",
                 "macro-F1", "F1 = 2 TP", "cumulative 75/95 % of the summed local test counts"):  # fmt: skip
        assert part in text, part


def test_page_of_runs_without_a_tail(tmp_path):
    """Every class of digits has more than 100 training examples where nothing is cut: head is all there is."""
    whole = dataclasses.replace(
        EXPERIMENT, rounds=1, data=Data(longtail=NoTail()), evaluation=Evaluation(groups=OLTR(), local=False)
    )
    for mu in (0.0, 0.1):
        list(fedtail.run(dataclasses.replace(whole, algorithm=FedProx(mu=mu)), tmp_path / f"{mu}"))
    html.report([tmp_path / "0.0", tmp_path / "0.1"], tmp_path / "report.html", "x")
    parsed = _Page((tmp_path / "report.html").read_text())
    assert parsed.tags.count("img") == 4  # groups, classes, curves, partition


def test_page_of_equal_runs_has_equal_bytes(page, folders, tmp_path):
    again = tmp_path / "again.html"
    html.report(folders, again, "fedtail run <x>.toml --seeds 0 1 && fedtail report 'a & b'", title="A <b>title")
    assert again.read_bytes() == page.read_bytes()


def test_page_needs_a_folder_and_comparable_runs(folders, tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        html.report(folders[:1], tmp_path / "missing" / "report.html", "x")
    other = tmp_path / "other"
    list(fedtail.run(dataclasses.replace(EXPERIMENT, rounds=1), other))
    with pytest.raises(ConfigError, match=r"rounds: 2 .* and 1 "):
        html.report([folders[0], other], tmp_path / "report.html", "x")
    assert not (tmp_path / "report.html").exists()
    html.report([folders[0], other], tmp_path / "report.html", "x", allow=["rounds"])
    assert "Allowed to differ: rounds, 2" in (tmp_path / "report.html").read_text()
