import dataclasses
import io
import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import fedtail
from fedtail import Experiment, FedAvg, FedGraB, LocalWork, config, drawing, overview, plots, runs
from fedtail.engines import EngineOptions
from fedtail.errors import ConfigError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real runs: Fed-GraB on digits, two seeds, two rounds, and FedAvg with one seed."""
    root = tmp_path_factory.mktemp("runs")
    experiment = Experiment(rounds=2, local=LocalWork(epochs=1), engine=EngineOptions(name="loop"))
    for name, algorithm, seed in (("grab0", FedGraB(), 0), ("grab1", FedGraB(), 1), ("avg0", FedAvg(), 0)):
        list(fedtail.run(dataclasses.replace(experiment, algorithm=algorithm, seed=seed), root / name))
    return [runs.read(root / name) for name in ("grab0", "grab1", "avg0")]


def _made_up(classes, clients=40, methods=4, seeds=3, rounds=20, factor=100):
    """Runs with the form of real ones and made-up numbers: `methods` methods, all with prior and gradients."""
    totals = np.floor(6000 * factor ** (-np.arange(classes) / max(classes - 1, 1))).astype(int)
    found = []
    for method, seed in itertools.product(range(methods), range(seeds)):
        rng = np.random.default_rng([classes, method, seed])
        counts = np.stack([rng.multinomial(n, rng.dirichlet(np.full(clients, 0.5))) for n in totals], 1)
        table = config.to_dict(Experiment(seed=seed, rounds=rounds, algorithm=FedGraB(top=2.0 + method)))
        found.append(runs.RunRecord(Path(f"{method}-{seed}"), table, [_record(rng, t, classes) for t in range(rounds)],
                                    counts, counts // 2, {}, 1.0))  # fmt: skip
    return found


def _record(rng, number, classes):
    share = rng.random(4)
    scores = dict(zip(("accuracy", "head", "medium", "tail"), share.tolist(), strict=True))
    return {
        "round": number,
        "train": {"loss": 1.0 / (number + 1), "positive_gradient": rng.random(classes).tolist(),
                  "negative_gradient": rng.random(classes).tolist()},
        "diagnostics": {"prior": rng.dirichlet(np.ones(classes)).tolist()},
        "test": {**scores, "per_class_recall": rng.random(classes).tolist()},
        "local": {"mean": 0.8, "std": 0.1, "worst_decile": 0.5},
    }  # fmt: skip


def _texts(figure):
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]


def _png(figure):
    return np.asarray(Image.open(io.BytesIO(drawing.render(figure, "png"))).convert("RGB"))


def _drawn(figure):
    """The boxes, in dots, of all texts that a reader sees."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = []
    children = [child for parent in figure.axes for child in parent.child_axes]
    for axes in [*figure.axes, *children]:
        shown = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            shown += [
                text for t in ticks if low <= t.get_loc() <= high for text in (t.label1, t.label2) if text.get_visible()
            ]
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in shown if t.get_text().strip()]
    named = [text for legend in figure.legends for text in (*legend.get_texts(), legend.get_title())]
    boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in named if t.get_text().strip()]
    if figure.get_suptitle():
        boxes.append((figure.get_suptitle(), figure._suptitle.get_window_extent(renderer)))
    return boxes


def _assert_legible(figure):
    """Nothing overlaps, nothing is cut off, and at the width of a column no letter is smaller than 6 points."""
    boxes = _drawn(figure)
    assert len(boxes) >= 5
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= -1, f"{text!r} is cut off"
        assert box.y0 >= -1, f"{text!r} is cut off"
        assert box.x1 <= width + 1, f"{text!r} is cut off"
        assert box.y1 <= height + 1, f"{text!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        inside = min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
        assert not inside, f"{one!r} and {other!r} overlap"
    assert figure.get_figwidth() <= 8.7 / 2.54
    assert min(t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()) >= 6


PICTURES = {
    "partition": lambda found: plots.partition(found[0].counts),
    "classes": plots.classes,
    "groups": overview.groups,
    "curves": plots.curves,
    "clients": plots.clients,
    "prior": lambda found: plots.prior(found[0]),
    "balance": lambda found: plots.balance(found[0]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_real_runs_are_legible(digits, name):
    _assert_legible(PICTURES[name](digits))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("classes", [10, 100])
def test_pictures_of_many_clients_and_classes_are_legible(name, classes):
    _assert_legible(PICTURES[name](_made_up(classes)))


@pytest.mark.parametrize(("classes", "clients"), [(10, 8), (10, 100), (100, 8), (100, 100), (20, 20), (21, 1)])
def test_partitions_of_any_size_are_legible(classes, clients):
    _assert_legible(plots.partition(_made_up(classes, clients=clients, methods=1, seeds=1)[0].counts))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_the_smallest_federation_are_legible(name):
    _assert_legible(PICTURES[name](_made_up(2, clients=1, methods=1, seeds=1, rounds=1, factor=1)))


@pytest.mark.parametrize("name", ["classes", "groups", "curves", "clients"])
def test_long_labels_and_many_methods_are_legible(name):
    found = _made_up(10, methods=9, seeds=1)
    for run in found:
        run.config["algorithm"].update(name="fedgrab", order="class_id", gate="sets+rank", frozen_classifier=True)
    found[0].config["algorithm"].update(order="prior", gate="rank", frozen_classifier=False)
    _assert_legible(PICTURES[name](found))


# ---- what is drawn


def test_partition_shows_each_cell_and_the_totals():
    counts = np.array([[1, 100, 0], [3, 0, 10]])  # classes 0, 1, 2 have 4, 100, 10 examples
    cells, bars, holders, sizes, _ = plots.partition(counts).axes
    image = cells.images[0].get_array()
    assert image.filled(-1).tolist() == [[100, -1], [-1, 10], [1, 3]]
    assert [t.get_text() for t in cells.get_yticklabels()] == ["1", "2", "0"]
    assert [bar.get_width() for bar in bars.patches] == [100, 10, 4]
    assert [t.get_text() for t in bars.texts] == ["100", "10", "4"]
    assert [bar.get_width() for bar in holders.patches] == [1, 1, 2]
    assert [t.get_text() for t in holders.texts] == ["1", "1", "2"]
    assert [bar.get_height() for bar in sizes.patches] == [101, 13]
    assert (bars.get_xlabel(), holders.get_xlabel(), sizes.get_ylabel()) == ("Examples", "Holders", "Size")
    assert cells.get_xlabel() == "Client"
    assert "114 examples, 2 clients, 3 classes" in "".join(_texts(cells.figure))


def test_classes_draws_mean_and_band_of_the_last_round_against_the_training_count(digits):
    figure = plots.classes(digits)
    axes = figure.axes[0]
    grab, avg = axes.lines[:2]
    totals = digits[0].counts.sum(0)
    order = np.argsort(-totals, kind="stable")
    recall = 100 * np.array([run.records[-1]["test"]["per_class_recall"] for run in digits])[:, order]
    np.testing.assert_allclose(grab.get_ydata(), recall[:2].mean(0))
    np.testing.assert_allclose(avg.get_ydata(), recall[2])
    np.testing.assert_array_equal(grab.get_xdata(), totals[order])
    [area] = axes.collections  # one method has two seeds
    top = area.get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(recall[:2].max())
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    assert axes.get_xlabel() == "Training examples of the class"
    assert axes.get_ylabel() == "Recall, global test set (%)"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["fedgrab", "fedavg"]
    assert figure.legends[0].get_title().get_text() == "line: mean of the seeds; band: lowest to highest"


def test_groups_puts_the_best_tail_on_top_and_draws_mean_and_range():
    found = _made_up(10, methods=3, seeds=2)
    tails = {i: [r.last["test"]["tail"] for r in found[2 * i : 2 * i + 2]] for i in range(3)}
    axes = overview.groups(found).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    best = max(tails, key=lambda i: np.mean(tails[i]))
    assert names[-1] == f"fedgrab (top={2 + best})"
    assert len(axes.lines) == 3 * (2 * 3 + 1)  # of each group: a bar and a mark a method, and the dashed line
    drawn = [line.get_xdata() for line in axes.lines if line.get_color() == drawing.COLOURS[1]]
    assert drawn[0] == pytest.approx(sorted(100 * v for v in min(tails.values(), key=np.mean)))
    assert drawn[-1] == pytest.approx([100 * np.mean(tails[0])] * 2)


def test_groups_without_groups_is_refused():
    found = _made_up(10, methods=1, seeds=1)
    for record in found[0].records:
        record["test"].update(head=None, medium=None, tail=None)
    with pytest.raises(ConfigError, match=r"rule makes no groups"):
        overview.groups(found)


def test_classes_shades_the_shot_groups_of_the_rule():
    run = dataclasses.replace(_made_up(4, clients=1, methods=1, seeds=1)[0], counts=np.array([[80, 5, 10, 5]]))
    run = dataclasses.replace(run, test_counts=np.array([[80, 5, 10, 5]]))  # 80 %; 90 %, 95 %; the last 5 %
    axes = plots.classes([run]).axes[0]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    inner = [*sorted({round(edge, 6) for span in spans for edge in span})[1:-1]]
    assert inner == pytest.approx([5, np.sqrt(80 * 10)])  # medium is classes 2 and 1, tail is class 3: both have 5
    assert [t.get_text() for t in axes.child_axes[0].get_xticklabels()] == ["head", "medium", "tail"]


def test_classes_smooths_over_nine_neighbours_where_there_are_many():
    run = _made_up(100, methods=1, seeds=1)[0]
    figure = plots.classes([run])
    dots, line = figure.axes[0].lines
    recall = 100 * np.array(run.last["test"]["per_class_recall"])
    order = np.argsort(-run.counts.sum(0), kind="stable")
    np.testing.assert_allclose(dots.get_ydata(), recall[order])
    assert line.get_ydata()[50] == pytest.approx(recall[order][46:55].mean())
    assert line.get_ydata()[0] == pytest.approx(recall[order][:5].mean())
    assert "9 neighbours" in figure.axes[0].get_title()


def test_classes_leaves_out_classes_without_test_examples_and_places_those_without_training_examples():
    run = _made_up(4, clients=1, methods=1, seeds=1)[0]
    run = dataclasses.replace(run, counts=np.array([[80, 40, 10, 0]]))
    run.records[-1]["test"]["per_class_recall"] = [0.9, None, 0.5, 0.1]
    axes = plots.classes([run]).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [80, 10, 0.5]
    assert axes.lines[0].get_ydata() == pytest.approx([90, 50, 10])
    assert axes.get_xlabel().endswith("(none: drawn at 0.5)")


def test_classes_refuses_other_numbers_of_classes():
    with pytest.raises(ConfigError, match=r"the runs have \[4, 10\] classes"):
        plots.classes([_made_up(4, methods=1, seeds=1)[0], _made_up(10, methods=2, seeds=1)[1]])


def test_curves_draw_percent_over_rounds_in_one_panel_a_metric(digits):
    figure = plots.curves(digits)
    overall, tail = figure.axes
    values = [[100 * record["test"]["tail"] for record in run.records] for run in digits]
    np.testing.assert_allclose(tail.lines[0].get_ydata(), np.mean(values[:2], axis=0))
    np.testing.assert_allclose(tail.lines[1].get_ydata(), values[2])
    assert tail.lines[0].get_xdata().tolist() == [1, 2]
    assert (overall.get_ylabel(), tail.get_ylabel(), tail.get_xlabel()) == (
        "Overall accuracy (%)",
        "Tail accuracy (%)",
        "Round",
    )
    assert (overall.get_title(), tail.get_title()) == ("Global model, global test set", "")


def test_curves_take_any_number_of_the_records(digits):
    axes = plots.curves(digits, ["train.loss"]).axes[0]
    assert axes.lines[1].get_ydata() == pytest.approx([record["train"]["loss"] for record in digits[2].records])
    assert axes.get_ylabel() == "train.loss"
    with pytest.raises(ConfigError, match=r"no run records 'test\.tial'; known are .*test\.tail"):
        plots.curves(digits, ["test.tial"])


def test_curves_leave_out_a_group_without_classes(digits):
    found = _made_up(10, methods=2, seeds=1)
    for run in found:
        for record in run.records:
            record["test"]["tail"] = None
    [axes] = plots.curves(found).axes
    assert axes.get_ylabel() == "Overall accuracy (%)"
    with pytest.raises(ConfigError, match=r"no run records 'test\.tail'; known are .*test\.medium"):
        plots.curves(found, ["test.tail"])
    assert len(plots.curves([*found, digits[2]]).axes) == 2  # one run has a tail


def test_curves_draw_the_rounds_that_all_seeds_have():
    found = _made_up(4, methods=1, seeds=2, rounds=5)
    del found[1].records[3:]
    assert plots.curves(found).axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]


def test_prior_draws_estimate_truth_distance_and_order():
    run = _made_up(3, clients=1, methods=1, seeds=1, rounds=2)[0]
    run = dataclasses.replace(run, counts=np.array([[50, 30, 20]]))
    for record, estimate in zip(run.records, ([0.2, 0.3, 0.5], [0.5, 0.2, 0.3]), strict=True):
        record["diagnostics"]["prior"] = estimate
    figure = plots.prior(run)
    shares, course = figure.axes
    assert [bar.get_height() for bar in shares.patches] == pytest.approx([50, 30, 20])
    assert shares.lines[0].get_ydata() == pytest.approx([50, 20, 30])
    distance, order = course.lines
    assert distance.get_ydata() == pytest.approx([0.6, 0.2])
    assert order.get_ydata() == pytest.approx([-1, 0.5])  # ranks 3 2 1 against 1 2 3, then against 3 1 2
    assert "fedgrab" in shares.get_title()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "estimate after round 2", "true share", "L1 distance (0: equal)", "Spearman (1: same order)"]  # fmt: skip


def test_spearman_shares_the_ranks_of_ties():
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    assert drawing.spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.arange(4.0)) == pytest.approx(4.5 / np.sqrt(22.5))
    assert np.isnan(drawing.spearman(np.ones(3), np.arange(3.0)))


def test_balance_shows_the_ratio_by_class_and_round_grey_where_there_is_none():
    run = _made_up(2, clients=1, methods=1, seeds=1, rounds=2)[0]
    run = dataclasses.replace(run, counts=np.array([[10, 30]]))  # class 1 is the most frequent
    for record, positive in zip(run.records, ([1.0, 8.0], [2.0, 0.0]), strict=True):
        record["train"].update(positive_gradient=positive, negative_gradient=[4.0, 2.0])
    axes, bar = plots.balance(run).axes
    image = axes.images[0].get_array()
    assert image.filled(np.nan) == pytest.approx(np.array([[2.0, np.nan], [-2.0, -1.0]]), nan_ok=True)
    assert axes.images[0].get_extent() == [0.5, 2.5, 1.5, -0.5]
    labels = [t.get_text() for t in bar.get_xticklabels()]
    assert labels == ["1/4", "1/2", "1", "2", "4"]
    assert "grey: none" in bar.get_xlabel()


def test_clients_have_a_row_for_each_method_and_for_personal_models(digits):
    figure = plots.clients(digits)
    axes = figure.axes[0]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    local = [100 * run.last["local"]["mean"] for run in digits]
    assert means == pytest.approx([np.mean(local[:2]), local[2]])
    worst = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "v"]
    assert worst[1] == pytest.approx(100 * digits[2].last["local"]["worst_decile"])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["fedgrab", "fedavg"]
    run = _made_up(4, methods=1, seeds=1)[0]
    run.last["personal"] = {"mean": 0.9, "std": 0.05, "worst_decile": 0.7}
    assert [t.get_text() for t in plots.clients([run]).axes[0].get_yticklabels()] == ["fedgrab", "fedgrab, personal"]


def test_what_a_run_does_not_record_is_refused(digits):
    with pytest.raises(ConfigError, match=r"avg0 \(fedavg\) records no prior"):
        plots.prior(digits[2])
    with pytest.raises(ConfigError, match=r"avg0 \(fedavg\) records no gradients by class"):
        plots.balance(digits[2])
    run = _made_up(4, methods=1, seeds=1)[0]
    del run.last["local"]
    with pytest.raises(ConfigError, match=r"Set evaluation\.local = true"):
        plots.clients([run])


# ---- files and style


def test_methods_have_different_looks():
    looks = [json.dumps(drawing.look(number)) for number in range(28)]
    assert len(set(looks)) == 28


def test_the_head_is_seen_in_grey():
    pixels = _png(plots.classes(_made_up(10, methods=1)))
    shade = tuple(int(plots.SHADES["head"][i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == shade).all(-1).mean() > 0.02


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saved_pictures_have_equal_bytes_and_leave_no_other_file(digits, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    plots.save(plots.curves(digits), path)
    first = path.read_bytes()
    plots.save(plots.curves(digits), path)
    assert path.read_bytes() == first
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_refuses_other_forms_and_missing_folders(digits, tmp_path):
    figure = plots.partition(digits[0].counts)
    with pytest.raises(ConfigError, match=r"suffix must be \.png or \.svg, got '\.jpg'"):
        plots.save(figure, tmp_path / "picture.jpg")
    with pytest.raises(ConfigError, match="there is no folder"):
        plots.save(figure, tmp_path / "missing" / "picture.png")


def test_drawing_leaves_matplotlibs_style_alone(digits):
    before = dict(matplotlib.rcParams)
    drawing.render(plots.classes(digits), "png")
    assert dict(matplotlib.rcParams) == before
