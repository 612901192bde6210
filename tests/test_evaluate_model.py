"""Scoring the checkpoints of a run: `run`, `follow`, and the evaluation during training."""

import json
import re

import numpy as np
import pytest

from fooddiff.commands import scorer, train
from fooddiff.commands.eval import main
from fooddiff.eval import generated
from fooddiff.report.runs import read_run
from fooddiff.runs.record import read_scalars
from tests import tiny
from tests.random_stem import random_stem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    np.savez(workspace / "stem.npz", **random_stem())
    config = tiny.config(workspace, eval__inception=str(workspace / "stem.npz"), eval__per_class=3)
    with tiny.small_reference(40):
        train.run(config, workspace / "run")
        yield workspace


def call(workspace, command, *flags):
    main([
        command, f"--workdir={workspace / 'run'}", f"--inception={workspace / 'stem.npz'}",
        f"--cache_dir={workspace / 'features'}", "--batch_size=20", *flags,
    ])  # fmt: skip


def records(workspace, pattern):
    return {path.name: json.loads(path.read_text()) for path in sorted((workspace / "run" / "eval").glob(pattern))}


def test_evaluation_during_training_uses_every_weights_and_reaches_the_metrics(workspace):
    found = records(workspace, "*_n30_*.json")
    assert {(r["samples"]["made_by"]["step"], r["samples"]["made_by"]["weights"]) for r in found.values()} == {
        (step, weights) for step in (2, 4) for weights in ("raw", "ema_0.995")
    }
    lines = [record for record in read_scalars(workspace / "run") if any(name.startswith("eval/") for name in record)]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]


def test_run_gives_the_number_of_the_training_and_a_row_to_quote(workspace, capsys):
    (during,) = records(workspace, "step_0000004_ema_0.995_*_n30_*.json").values()
    call(workspace, "run", "--per_class=3", "--batch_size=4")
    assert "FD-64[stem" in (table := capsys.readouterr().out)
    assert "digits test, n = 40" in table
    (after,) = records(workspace, "step_0000004_ema_0.995_*_n30_*.json").values()
    assert after["results"] == during["results"]  # the same weights, ids and batch size: the features are in no cache
    assert after["samples"]["n_per_class"] == {str(digit): 3 for digit in range(10)}


def test_without_a_number_there_are_as_many_samples_per_class_as_in_the_reference(workspace):
    call(workspace, "run", "--steps=2", "--sampler=ddim", "--weights=raw")
    (record,) = records(workspace, "step_0000004_raw_ddim-2_*_n40_*.json").values()
    assert record["samples"]["n_per_class"] == record["reference"]["n_per_class"]
    made_by = record["samples"]["made_by"]
    assert (made_by["sampling"]["sampler"], made_by["sampling"]["steps"], made_by["weights"]) == ("ddim", 2, "raw")
    (last,) = read_scalars(workspace / "run")[-1].keys() - {"step"}
    assert ", n=40, ddim-2" in last  # apart from what a training notes of its own sampler


def test_an_earlier_checkpoint_guides_and_the_record_says_so(workspace, capsys):
    run = workspace / "run"
    call(workspace, "run", "--per_class=2", "--guidance=2", f"--guide={run}", "--guide_step=2")
    assert f"guided by step 2 of {run}, weights ema_0.995" in capsys.readouterr().err
    (record,) = records(workspace, "*_guidance2_*_n20_*.json").values()
    guide = record["samples"]["made_by"]["recipe"]["guide"]
    assert (guide["step"], guide["weights"], len(guide["weights_sha256"])) == (2, "ema_0.995", 64)
    assert {d.conditions.sampler for d in read_run(run, "run").distances if "guidance2" in d.path.name} == {
        f"ancestral, all steps, guidance 2, by step 2 ema_0.995 ({guide['weights_sha256'][:8]})"
    }
    for flags, message in [
        (("--guide_step=2",), "--guide_step is 2, but no --guide is given"),
        (("--guidance=2",), "give another model as --guide"),
        (("--guidance=2", f"--guide={run}", "--guide_step=3"), "no checkpoint of step 3"),
    ]:
        with pytest.raises(SystemExit):
            call(workspace, "run", *flags)
        assert message in " ".join(capsys.readouterr().err.split())


def test_two_checkpoints_are_compared_in_pairs(workspace, capsys):
    folder = workspace / "run" / "eval"
    names = sorted(records(workspace, "*_raw_ancestral-*_n30_*.json"))
    assert len(names) == 2
    main(["compare", *(str(folder / name) for name in names)])
    a, b = (records(workspace, name)[name]["results"][0]["value"] for name in names)
    assert f"{a - b:.4g} ±" in capsys.readouterr().out
    (folder / "images.json").write_text('{"results": [], "samples": {"made_by": {}}}')
    with pytest.raises(SystemExit):
        main(["compare", str(folder / names[0]), str(folder / "images.json")])
    assert "images.json is not a record of this evaluator's `run` or `follow`" in capsys.readouterr().err
    (folder / "images.json").unlink()


def test_follow_scores_what_is_not_scored_yet_and_ends_with_the_training(workspace, monkeypatch):
    scored = []
    inner = scorer.run
    monkeypatch.setattr(scorer, "run", lambda *args, **kw: scored.append(kw["step"]) or inner(*args, **kw))
    call(workspace, "follow", "--per_class=2", "--seed=5", "--poll_seconds=0.01")
    assert scored == [2, 4]
    call(workspace, "follow", "--per_class=2", "--seed=5", "--poll_seconds=0.01")
    assert scored == [2, 4]
    (name,) = read_scalars(workspace / "run")[-1].keys() - {"step"}
    assert re.search(r"\], n=20, ancestral-all_[0-9a-f]{8}$", name)  # a training notes those of seed 0
    call(workspace, "follow", "--per_class=1", "--seed=5", "--poll_seconds=0.01")
    assert scored == [2, 4, 2, 4]


def test_follow_goes_by_the_sampler_that_each_checkpoint_was_saved_with(workspace, monkeypatch):
    scored = []
    inner = scorer.run

    def run(*arguments, step, **how):
        assert len(scored) < 5, "it goes on forever"
        scored.append(step)
        return inner(*arguments, step=step, **how)

    monkeypatch.setattr(scorer, "run", run)
    path = workspace / "run" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"sample": json.loads(before)["sample"] | {"steps": 2}}))
    try:
        for _ in range(2):
            call(workspace, "follow", "--per_class=1", "--seed=6", "--poll_seconds=0.01")
    finally:
        path.write_text(before)
    assert scored == [2, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--poll_seconds=0"], "--poll_seconds is 0.0, expected a number above 0"),
        (["--poll_seconds=inf"], "--poll_seconds is inf"),
        ([f"--workdir={__file__}"], "is a file of weights, to which nothing is added"),
    ],
)
def test_what_cannot_be_followed_is_said(workspace, capsys, flags, message):
    with pytest.raises(SystemExit):
        call(workspace, "follow", *flags)
    assert message in capsys.readouterr().err


class Interrupted(BaseException):
    """What no command catches."""


def test_an_interrupted_evaluation_draws_only_what_is_missing(workspace, monkeypatch):
    monkeypatch.setattr("fooddiff.eval.extract.CHUNK", 8)
    drawn = []
    inner = generated.GeneratedImages.__getitem__

    def draw(self, rows):
        drawn.append(rows.start)
        if drawn == [0, 8, 16]:
            raise Interrupted
        return inner(self, rows)

    monkeypatch.setattr(generated.GeneratedImages, "__getitem__", draw)
    few = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    np.savez(workspace / "few.npz", few)
    flags = ("--per_class=4", "--seed=9", f"--reference={workspace / 'few.npz'}")
    interrupted, whole = (f"--cache_dir={workspace / name}" for name in ("interrupted", "whole"))
    with pytest.raises(Interrupted):
        call(workspace, "run", *flags, interrupted)
    call(workspace, "run", *flags, interrupted)
    assert drawn == [0, 8, 16, 16, 24, 32]
    (resumed,) = records(workspace, "*_seed9_*.json").values()
    call(workspace, "run", *flags, whole)
    (undisturbed,) = records(workspace, "*_seed9_*.json").values()
    assert undisturbed["results"] == resumed["results"]


def test_bad_requests_are_named(workspace, capsys):
    strange = workspace / "strange.npz"
    np.savez(strange, np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 12]))
    for flags, message in [
        (("--weights=ema_0.5",), "expected raw, ema_0.995"),
        (("--step=3",), "no checkpoint of step 3"),
        (("--per_class=0",), "--per_class is 0"),
        (("--kid_subsets=0",), "--kid_subsets is 0"),
        ((f"--reference={strange}",), "the reference has the classes 0 to 12, the model 10 classes"),
        (("--sampler=euler",), "expected one of ancestral, ddim"),
        (("--reference=nowhere",), "nowhere does not exist"),
        (
            ("--reference=digits::test", "--image_size=16"),
            "brought to 16 pixels, the samples have 8: give --image_size=8",
        ),
        (("--data_path=elsewhere",), "elsewhere"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            call(workspace, "run", *flags)
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
