"""The table of many samplers, on a tiny model in continuous time."""

import csv
import json

import numpy as np
import pytest

from fooddiff import build, parallel, processes
from fooddiff.commands import train
from fooddiff.commands.eval import main
from fooddiff.convert.exporting import write_safetensors
from fooddiff.eval import generated
from fooddiff.runs.load import load_trained
from fooddiff.sample.spec import SamplerSpec
from tests import tiny
from tests.random_stem import random_stem
from tests.test_recipes import continuous


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("sweep")
    np.savez(workspace / "stem.npz", **random_stem())
    train.run(continuous(workspace, train__steps=1, sample__every_steps=9), workspace / "run")
    with tiny.small_reference(20):
        yield workspace


def call(workspace, *flags):
    main([
        "sweep", f"--workdir={workspace / 'run'}", f"--inception={workspace / 'stem.npz'}",
        f"--cache_dir={workspace / 'features'}", "--batch_size=10", "--per_class=2", *flags,
    ])  # fmt: skip


@pytest.mark.slow
def test_every_combination_is_scored_once(workspace, capsys, monkeypatch):
    drawn = []
    inner = generated.GeneratedImages.__getitem__
    monkeypatch.setattr(
        generated.GeneratedImages, "__getitem__", lambda self, rows: drawn.append(1) or inner(self, rows)
    )
    grid = ("--guidances=1,3", "--intervals=all,-4:4", "--step_counts=3")
    call(workspace, *grid)
    assert len(drawn) == 3  # an interval is nothing to a scale of 1
    shown = capsys.readouterr().out
    assert "FD-64[stem" in shown.replace(" ", "")
    assert "-4:4" in shown
    folder = workspace / "run" / "eval"
    (sheet,) = folder.glob("sweep_step_0000001_ema_0.995_*.csv")
    rows = list(csv.DictReader(sheet.open()))
    assert [(row["steps"], row["guidance"], row["interval"]) for row in rows] == [
        ("3", "1.0", "all"), ("3", "3.0", "all"), ("3", "3.0", "-4:4"),
    ]  # fmt: skip
    assert [row["network_calls_per_image"] for row in rows] == ["3", "6", "5"]
    for row in rows:
        record = json.loads((folder / row["record"]).read_text())
        (result,) = record["results"]
        assert float(row[result["metric"]]) == result["value"]
        assert float(row["seconds_per_image"]) == record["samples"]["seconds_per_image"] > 0

    call(workspace, "--guidances=1", "--step_counts=3", "--samplers=ancestral,heun")
    assert len(drawn) == 4  # that of ancestral is there


@pytest.mark.slow
def test_a_record_of_other_weights_of_the_same_name_is_not_taken(workspace, monkeypatch):
    file = workspace / "model.safetensors"
    for factor in (1, 2):
        trained = load_trained(workspace / "run", step=None, weights="ema", mesh=parallel.make_mesh())
        params = {name: np.asarray(value) * factor for name, value in trained.params.items()}
        write_safetensors(file, params, trained)
        call(workspace, f"--workdir={file}", "--guidances=1", "--step_counts=2", "--seed=3")
        (record,) = (workspace / "model" / "eval").glob("step_*.json")
        made_by = json.loads(record.read_text())["samples"]["made_by"]
        assert made_by["weights_sha256"] == processes.sha256_of(params)


@pytest.mark.slow
def test_a_guide_acts_where_there_is_guidance(workspace, capsys):
    call(workspace, "--guidances=1,2", "--step_counts=2", f"--guide={workspace / 'run'}", "--guide_step=1")
    assert "guided by step 1 of" in " ".join(capsys.readouterr().out.split())
    made_by = [
        json.loads(path.read_text())["samples"]["made_by"] for path in (workspace / "run" / "eval").glob("*.json")
    ]
    guided = [each for each in made_by if "guide" in each["recipe"]]
    assert [each["sampling"]["guidance"] for each in guided] == [2.0]


@pytest.mark.slow
def test_a_bad_combination_is_refused_before_the_first_is_scored(workspace, capsys, monkeypatch):
    monkeypatch.setattr(generated.GeneratedImages, "__getitem__", lambda *_: pytest.fail("nothing is to be drawn"))
    with pytest.raises(SystemExit):
        call(workspace, "--samplers=ancestral,euler", "--seed=8")
    assert "'euler', expected one of ancestral, ddim" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("spec", "calls"),
    [
        (SamplerSpec(sampler="dpmpp_2m", steps=5), 5),
        (SamplerSpec(sampler="heun", steps=5), 9),
        (SamplerSpec(sampler="heun", steps=5, guidance=2.0), 18),
        (SamplerSpec(sampler="heun", steps=5, guidance=2.0, classifier_scale=1.0), 18 + 9),
        (SamplerSpec(steps=9, spacing="log_snr", guidance=2.0, interval=(-1.5, 1.5)), 9 + 2),
    ],
)
def test_network_calls_are_counted(tmp_path, spec, calls):
    """Nine levels from -9 on are 2 apart: -1 and 1 lie within the interval."""
    assert build.network_calls(build.make_diffusion_model(continuous(tmp_path)), spec) == calls
