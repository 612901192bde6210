"""What a number is called, and where its record lies: numbers that do not compare never take each other's place."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fooddiff import build
from fooddiff.commands import agreement, pairs, scorer
from fooddiff.commands.companions import Companions
from fooddiff.eval.images import ImageSet
from fooddiff.sample.generate import sample_ids
from fooddiff.sample.spec import SamplerSpec
from tests import tiny

EXTRACTOR = SimpleNamespace(
    weights=SimpleNamespace(sha256="ab"), names=("64",), resize="tf1", cache_dir=None, batch_size=4, after_chunk=None
)
SCORING = scorer.Scoring(
    extractor=EXTRACTOR, metrics=("fd",), kid_subsets=100, kid_subset_size=1000, seed=0, per_class=None, sampling={},
    batch_size=4,
)  # fmt: skip


def images(sha256: str, n: int = 3) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)
    return ImageSet("made up", {"kind": "source", "sha256": sha256, "size": 16}, pixels, np.zeros(n, np.int32), ("a",))


def test_a_number_drawn_or_compared_otherwise_than_in_training_has_another_name(tmp_path):
    trained = SimpleNamespace(config=tiny.config(tmp_path))
    spec, recipe = build.sampler_spec(trained.config.sample), build.recipe(trained.config)
    usual = dict(spec=spec, trained=trained, recipe=recipe, reference=None, seed=0, resize="tf1")
    assert scorer.how_drawn(**usual) == ""
    assert scorer.how_drawn(**usual | {"resize": None}) == ""  # no features
    others = [
        {"spec": replace(spec, sampler="ddim")}, {"recipe": recipe | {"guide": "x"}}, {"reference": "ab"}, {"seed": 1},
        {"resize": "clean_bicubic"},
    ]  # fmt: skip
    names = {scorer.how_drawn(**usual | other) for other in others}
    assert len(names - {""}) == len(others)


def test_a_number_is_named_by_its_own_count():
    record = {
        "results": [{"metric": "agreement", "value": 0.5, "n": 505}, {"metric": "accuracy", "value": 0.3, "n": 6060}],
        "samples": {"n": 505, "made_by": {"weights": "raw"}},
    }
    assert scorer.numbers_of(record) == {"eval/raw/agreement, n=505": 0.5, "eval/raw/accuracy, n=6060": 0.3}


def test_as_many_samples_of_other_classes_have_another_record():
    def path(ids):
        return scorer.record_path(Path(), SCORING, SamplerSpec(), {}, images("ab"), 1, "raw", ids)

    even, uneven = sample_ids(range(2), 3), np.array([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]])
    assert path(even) != path(uneven)
    assert path(even).name.startswith("step_0000001_raw_ancestral-all_seed0_n6_")


@pytest.mark.parametrize("change", [{"seed": 7}, {"kid_subsets": 10}, {"kid_subset_size": 5}, {"metrics": ("kd",)}])
def test_pairs_scored_otherwise_have_another_record(tmp_path, monkeypatch, change):
    monkeypatch.setattr(scorer.Measures, "evaluate", lambda *_: {"results": []})
    monkeypatch.setattr(pairs, "print_record", lambda record: None)
    originals = images("ab")
    for scoring in (SCORING, replace(SCORING, **change)):
        record = pairs.score_pairs(
            scoring, originals.pixels, originals, kind="x", name="x", made_by={}, folder=tmp_path, stem="x"
        )
        assert [result["metric"] for result in record["results"]] == ["PSNR [dB]", "SSIM"]
    assert len(list(tmp_path.glob("x_n3_*.json"))) == 2


def test_the_mean_of_many_pairs_is_that_of_all_at_once():
    real, made = images("ab", 150).pixels, images("ab", 150).pixels[::-1]
    result = pairs._mean("PSNR [dB]", real, made, pairs.psnr)
    np.testing.assert_allclose(result.value, pairs.psnr(real, made).mean())
    assert result.n == 150


def test_agreement_of_another_reference_has_another_record(tmp_path):
    read = SimpleNamespace(ranks=np.array([0, 1, 7]), features=np.random.default_rng(0).normal(size=(3, 2)))
    judge = SimpleNamespace(sha256="cd" * 32, read=lambda images: read, path=Path("judge"), made_by={})
    made_by = dict(recipe={}, sampling={}, batch_size=4, weights_sha256="ef", step=1, weights="raw", seed=0)
    alone = Companions(None, None, None)
    for reference in ("ab", "cd"):
        agreement.judge_samples(judge, images("s"), made_by, SamplerSpec(), images(reference), tmp_path, alone)
    assert len(list((tmp_path / "eval").glob("agreement_step_0000001_raw_*_n3_*.json"))) == 2
