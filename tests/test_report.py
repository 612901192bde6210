"""The report: what it reads, draws and refuses. That the page works in a browser: test_report_browser.py."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fooddiff.commands.report import main
from fooddiff.report import figures
from fooddiff.report.curves import MAX_POINTS, smooth, thin
from fooddiff.report.figures import best_of
from fooddiff.report.page import make_report, render
from fooddiff.report.runs import Curve, read_run
from fooddiff.report.svg import SVG, inline
from tests.made_up_run import evaluation, make_run, real_images


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "hybrid_777")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody changes, and its page."""
    run = make_run(tmp_path_factory.mktemp("whole") / "hybrid_777")
    return run, page_of(run)


def page_of(*workdirs):
    return render(make_report([read_run(workdir, workdir.name) for workdir in workdirs], []))


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code != 0
    return " ".join(capsys.readouterr().err.split())


def test_thinning_keeps_every_peak_and_the_ends():
    values = np.random.default_rng(0).normal(size=90_000)
    values[12_345], values[54_321] = 50, -50
    thinned = thin(Curve(np.arange(90_000.0), values))
    assert len(thinned.steps) <= MAX_POINTS
    assert {0, 12_345, 54_321, 89_999} <= set(thinned.steps)
    np.testing.assert_array_equal(thinned.values, values[thinned.steps.astype(int)])
    assert (np.diff(thinned.steps) > 0).all()


def test_short_curves_are_not_thinned():
    curve = Curve(np.arange(MAX_POINTS), np.arange(MAX_POINTS))
    assert thin(curve) is curve


def test_smoothing_is_the_mean_of_a_centred_window():
    curve = Curve(np.arange(1000), np.random.default_rng(0).normal(size=1000))
    smoothed = smooth(curve)
    np.testing.assert_allclose(smoothed.values[500], curve.values[490:511].mean())
    np.testing.assert_allclose(smoothed.values[0], curve.values[:11].mean())
    np.testing.assert_allclose(smooth(Curve(np.arange(1), np.ones(1))).values, [1])


def test_a_run_is_read_whole(run):
    read = read_run(run, "hybrid")
    assert (read.config["objective.name"], read.config["train.batch_size"], read.steps) == ("hybrid", 32, 200)
    assert len(read.curve("train/loss").steps) == 200
    assert {(d.step, d.weights, d.value) for d in read.distances} == {
        (100, "raw", 5.0), (200, "raw", 2.5), (100, "ema_0.999", 5.0), (200, "ema_0.999", 2.5),
    }  # fmt: skip
    assert {weights: sorted(by_step) for weights, by_step in read.grids.items()} == {
        "raw": [100, 200], "ema_0.999": [100, 200],
    }  # fmt: skip


def test_numbers_that_were_not_finite_are_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "train/loss": null}\n')
    assert len(read_run(run, "run").curve("train/loss").steps) == 200


@pytest.mark.parametrize("change", [{"n": 505}, {"metric": "FD-64[other def]"}, {"sampler": "ddim"}])
def test_distances_measured_otherwise_are_never_drawn_together(run, change):
    (run / "eval" / "other.json").write_text(json.dumps(evaluation(**change)))
    report = make_report([read_run(run, "run")], [])
    assert len(report.comparisons) == 2
    assert sorted(len(comparison.rows) for comparison in report.comparisons) == [1, 4]


def agreement(**changes):
    numbers = {
        "agreement-top1": 0.125, "agreement-top5": 0.25, "accuracy-top1": 0.375, "accuracy-top5": 0.625,
        "FD-192": 1.523,
    }  # fmt: skip
    results = [
        {"metric": f"{name}[classifier abcdef01]", "value": value, "error": 0.01, "bias": None, "n": 303}
        for name, value in numbers.items()
    ]
    return evaluation() | {"results": results, "judge": {"sha256": "abcdef01" * 8}} | changes


@pytest.mark.slow
def test_class_agreement_stands_beside_the_accuracy_on_real_images(run):
    before = page_of(run)
    (run / "eval" / "agreement.json").write_text(json.dumps(agreement()))
    after = page_of(run)
    assert 'id="agreement"' not in before
    row = re.search(r'<tr title="agreement.json">.*?</tr>', after, re.DOTALL)[0]
    assert re.findall(r"\d+\.\d%", row) == ["12.5%", "25.0%", "37.5%", "62.5%"]
    assert ">1.523<" in row
    assert "abcdef01" in row
    assert len(read_run(run, "run").distances) == 4


def test_a_damaged_record_of_agreement_is_named(run, capsys):
    (run / "eval" / "agreement.json").write_text(json.dumps(agreement(results=[{"metric": "agreement", "value": 1}])))
    assert "agreement.json is not a record of class agreement" in refused(capsys, run)


def test_parts_of_the_loss_stand_in_the_order_of_noise(run):
    report = make_report([read_run(run, "run")], [])
    names = [panel.log.name.removesuffix("_log") for panel in report.parts]
    assert names == [
        "loss_q1", "loss_q2", "loss_q3", "loss_q4",
        "loss_log_snr_below_-8", "loss_log_snr_-2_to_0", "loss_log_snr_0_to_2", "loss_log_snr_above_8",
    ]  # fmt: skip
    assert report.parts[4].log.alt == "Loss, log SNR below -8, over steps."
    assert [panel.log.name for panel in report.colours] == [
        "samples_ema_0.999_colour_spread_ratio_log", "samples_raw_colour_spread_ratio_log",
    ]  # fmt: skip


def test_curves_are_drawn_over_steps_images_or_hours(run):
    read = read_run(run, "run")
    expected = {
        "steps": ("step", 200),
        "images": ("images trained on", 6400),
        "hours": ("hours of training", 6400 / 60 / 3600),
    }
    for name, (label, end) in expected.items():
        drawing = figures.loss([read], figures.AXES[name], scale="linear")
        axes = drawing.figure.axes[0]
        assert axes.get_xlabel() == label
        np.testing.assert_allclose(axes.lines[0].get_xdata()[-1], end)
        assert drawing.alt.startswith(f"Training loss over {name}: ")


def test_hours_add_up_at_the_speed_of_every_window(run):
    speeds = [{"step": 10, "perf/images_per_second": 32.0}, {"step": 30, "perf/images_per_second": 64.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in speeds))
    hours = read_run(run, "run").hours_at(np.array([0, 5, 10, 20, 30]))
    np.testing.assert_allclose(hours * 3600, [0, 5, 10, 15, 20])
    stopped = read_run(run, "run").hours_at(np.array([30, 36]))  # and saved after the last record
    np.testing.assert_allclose(stopped * 3600, [20, 23])


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(run):
    drawing = figures.loss([read_run(run, "_digits")], figures.AXES["steps"], scale="linear")
    (legend,) = drawing.figure.legends
    assert [text.get_text().lstrip("\u200b") for text in legend.get_texts()] == ["_digits"]


def test_a_run_whose_speed_is_not_known_is_not_drawn_over_hours(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl does not tell the speed of every step" in refused(capsys, run, "--over", "hours")
    (run / "config.json").write_text("{}")
    assert "config.json has no number train.batch_size" in refused(capsys, run, "--over", "images")


def test_class_agreement_is_drawn_beside_that_of_real_images(run):
    for step in (100, 200):
        record = agreement()
        record["samples"]["made_by"]["step"] = step
        (run / "eval" / f"agreement_{step}.json").write_text(json.dumps(record))
    ((conditions, (share, distance)),) = make_report([read_run(run, "run")], []).judged.items()
    assert conditions.startswith("classifier abcdef01, n = 303, ancestral, 20 steps")
    floor, shares = share.linear.figure.axes[0].lines
    assert (list(shares.get_xdata()), list(shares.get_ydata())) == ([100, 200], [0.125, 0.125])
    assert list(floor.get_ydata()) == [0.375, 0.375]
    (distances,) = distance.linear.figure.axes[0].lines
    assert list(distances.get_ydata()) == [1.523, 1.523]


@pytest.mark.slow
def test_the_newest_predictions_in_one_step_are_shown(whole):
    run, page = whole
    assert sorted(read_run(run, "run").one_steps) == [100, 200]
    assert "hybrid_777, step 200</figcaption>" in page


def test_the_best_step_of_each_weights_is_marked(run):
    (comparison,) = make_report([read_run(run, "run")], []).comparisons
    assert {(d.weights, d.step) for _, d, best in comparison.rows if best} == {("raw", 200), ("ema_0.999", 200)}


@pytest.mark.parametrize(("metric", "expected"), [("FD-64[x]", 100), ("PSNR [dB]", 200), ("Precision-64[x]", 200)])
def test_the_best_is_the_least_distance_or_the_largest_likeness(run, metric, expected):
    point = read_run(run, "run").distances[0]
    conditions = replace(point.conditions, metric=metric)
    points = [replace(point, conditions=conditions, step=step, value=step / 10) for step in (100, 200)]
    assert best_of(points).step == expected


def test_other_networks_that_took_part_keep_distances_apart(run):
    recipe = {"classifier": {"weights_sha256": "ab" * 32}, "upsampler": {"weights_sha256": "cd" * 32}}
    record = evaluation()
    record["samples"]["made_by"]["recipe"] = recipe
    (run / "eval" / "other.json").write_text(json.dumps(record))
    samplers = {distance.conditions.sampler for distance in read_run(run, "run").distances}
    assert any(", by classifier abababab, enlarged by " in sampler for sampler in samplers)
    assert len(samplers) == 2


def test_records_about_other_things_are_left_out(run):
    (run / "eval" / "bpd.json").write_text('{"bits_per_dim": 3.5}')
    (run / "eval" / "images.json").write_text(json.dumps(real_images()))
    assert len(read_run(run, "run").distances) == 4


def test_colour_tells_settings_apart_and_dashes_tell_seeds_apart(tmp_path):
    runs = [
        read_run(make_run(tmp_path / f"{objective}_{seed}", objective=objective, seed=seed), f"{objective}_{seed}")
        for objective in ("hybrid", "mse")
        for seed in (1, 2)
    ]
    a, b, c, d = figures.styles(runs).values()
    assert a.colour == b.colour != c.colour == d.colour
    assert a.dash == c.dash != b.dash == d.dash


def test_every_point_of_the_page_tells_where_it_comes_from(run):
    report = make_report([read_run(run, "hybrid_777")], [])
    drawing = report.comparisons[0].panels["raw"].log
    root = ElementTree.fromstring(inline(drawing))
    titles = [element.text for element in root.iter(f"{{{SVG}}}title")]
    assert len(titles) == 2
    for title, step in zip(titles, (100, 200), strict=True):
        assert title.startswith(f"hybrid_777, step {step}, raw")
        assert f"step_{step}_raw.json" in title


@pytest.mark.slow
def test_figures_of_a_page_share_no_ids(whole):
    _, html = whole
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert referred <= set(ids)


class Links(HTMLParser):
    """Everything that a page loads, and pictures without a description."""

    def __init__(self):
        super().__init__()
        self.loads, self.images = [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [v for n, v in attributes.items() if n in ("src", "href", "srcset") and not v.startswith("#")]
        if tag == "img" or attributes.get("role") == "img":
            self.images.append(attributes)


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_describes_its_figures(whole):
    links = Links()
    links.feed(whole[1])
    assert [load[:22] for load in links.loads] == ["data:image/jpeg;base64"]  # the newest predictions in one step
    drawings = [image for image in links.images if "role" in image]
    assert len(drawings) == 26  # loss, its eight parts, two spreads of colours, two distances; each on two scales
    assert all(image["aria-label"].endswith(".") for image in drawings)


@pytest.mark.slow
def test_what_a_file_says_is_shown_and_not_run(tmp_path):
    name = "<script>alert(1)<"
    run = make_run(tmp_path / "x")
    config = json.loads((run / "config.json").read_text())
    config["objective"]["name"] = name
    (run / "config.json").write_text(json.dumps(config))
    html = render(make_report([read_run(run, "</script><b>")], []))
    assert name not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;" in html


@pytest.mark.slow
def test_the_same_files_give_the_same_page(whole):
    run, page = whole
    assert page_of(run) == page


@pytest.mark.slow
def test_a_page_says_what_is_missing(run, whole):
    missing = {
        "eval": "No run was evaluated",
        "samples": "No run has grids",
        "metrics.jsonl": "No run has recorded a loss",
        "versions.json": "not recorded",
    }
    assert not any(said in whole[1] for said in missing.values())
    for name in missing:
        (run / name).rename(run / f"no_{name}")
    page = page_of(run)
    assert all(said in page for said in missing.values())


@pytest.mark.slow
def test_runs_of_the_same_settings_have_none_that_differ(tmp_path):
    a, b = (make_run(tmp_path / name) for name in ("a", "b"))
    assert "all runs have the same config.json" in page_of(a, b)
    c = make_run(tmp_path / "c", objective="mse")
    html = page_of(a, c)
    assert "all runs have the same" not in html
    assert "<code>objective.name</code>" in html


@pytest.mark.slow
def test_the_command_writes_page_and_figures(run, tmp_path, capsys):
    main([str(run), "--figures", str(tmp_path / "figures")])
    assert "report.html (" in capsys.readouterr().out
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert len(written) == 52
    assert {"loss_log.svg", "loss_log.png", "loss_q4_linear.svg", "distance_1_raw_log.png"} <= set(written)
    with Image.open(tmp_path / "figures" / "loss_log.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    ElementTree.parse(tmp_path / "figures" / "loss_log.svg")


@pytest.mark.slow
def test_what_real_images_score_is_drawn_where_it_belongs(run, tmp_path, capsys):
    floor = tmp_path / "floor.json"
    floor.write_text(json.dumps(real_images(value=0.4321)))
    main([str(run), "--floor", str(floor)])
    html = (run / "report.html").read_text()
    assert "score 0.4321 with n = 303" in html
    floor.write_text(json.dumps(real_images(metric="FD-64[other def]")))
    assert "floor.json is about FD-64[other def]" in refused(capsys, run, "--floor", floor)
    floor.write_text(json.dumps(evaluation()))
    assert "expected real images" in refused(capsys, run, "--floor", floor)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[1]", "holds no JSON object"),
        ("config.json", b"\xff\xfe", "config.json cannot be read"),
        ("metrics.jsonl", b"{}\n", "metrics.jsonl, line 1 is damaged"),
        ("eval/step_100_raw.json", b"[" * 100_000, "step_100_raw.json cannot be read"),
        ("eval/step_100_raw.json", b'{"samples": []}', "is not a record of an evaluation"),
        ("eval/step_100_raw.json", b'{"samples": {"made_by": {"step": 1}}}', "is not a record of an evaluation"),
        ("samples/step_0000100_raw.png", b"x", "step_0000100_raw.png is not a grid"),
    ],
)
def test_a_damaged_file_is_named_and_leaves_the_old_page(run, capsys, file, content, message):
    (run / "report.html").write_text("the old page")
    (run / file).write_bytes(content)
    assert message in refused(capsys, run)
    assert (run / "report.html").read_text() == "the old page"


def test_directories_that_are_no_runs_and_forgotten_flags(run, tmp_path, capsys):
    assert "no run in" in refused(capsys, tmp_path / "nothing")
    assert "several runs need --out" in refused(capsys, run, tmp_path)
    assert "given twice" in refused(capsys, run, run, "--out", tmp_path / "page.html")


@pytest.mark.slow
def test_runs_of_equal_names_keep_their_paths(run, tmp_path):
    other = make_run(tmp_path / "other" / run.name)
    main([str(run), str(other), "--out", str(tmp_path / "page.html")])
    assert str(other) in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_the_report_imports_no_jax():
    script = "import sys, fooddiff.commands.report; assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parent.parent)
