"""Guidance by a classifier and class agreement, as a user combines them, and their laws."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from fooddiff import build, parallel
from fooddiff.commands import sample
from fooddiff.commands.companions import check_fits
from fooddiff.commands.eval import main as evaluator
from fooddiff.diffusion import continuous
from fooddiff.diffusion.denoiser import Prediction
from fooddiff.diffusion.guidance import classifier_gradient, classifier_guided, without_last
from fooddiff.diffusion.level import add_noise, eps_from_x0, per_image
from fooddiff.diffusion.samplers import ancestral, begin, ddim, dpmpp_2m, heun, sde_dpmpp_2m
from fooddiff.eval import generated
from fooddiff.eval.agreement import Readings, distance
from fooddiff.keys import sample_noise
from fooddiff.report.runs import read_run
from fooddiff.runs.load import load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import ConfigError
from tests import test_classifier, tiny, tiny_weights
from tests.random_stem import random_stem
from tests.test_classifier import tiny_classifier
from tests.test_recipes import continuous as continuous_config

STEPS = continuous.transitions(np.linspace(-12, 12, 400))


def gaussian(x_t, level, cond, m=0.0, s=0.5):
    """The exact denoiser of data ~ N(m, s^2)."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    x_0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)
    return Prediction(x_0, eps_from_x0(level, x_0, x_t), None)


def tilted_log_prob(x_t, level, cond, s=0.5, b=2.0):
    """The log of E[exp(b x_0) | x_t] for data ~ N(0, s^2), up to what does not depend on x_t."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    mean = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x_t
    return (b * mean).sum(axis=(1, 2, 3))


@pytest.mark.parametrize(
    "sampler",
    [ancestral, dpmpp_2m, heun, *(pytest.param(rarer, marks=pytest.mark.slow) for rarer in (ddim, sde_dpmpp_2m))],
)
def test_an_exact_classifier_moves_a_gaussian_by_its_slope_times_the_variance(sampler):
    """N(0, s^2) times exp(b x) is N(b s^2, s^2): samplers with the exact gradient draw from it.

    The ancestral sampler's move is of first order: in steps of 0.06 in log SNR it is off by about as large a share, in
    half of that by half.
    """
    ids, key, shape = jnp.zeros((1, 2), jnp.int32), jax.random.key(0), (96, 96, 1)
    given = (
        STEPS,
        begin(sample_noise(key, ids, shape)),
        lambda k: sample_noise(jax.random.fold_in(key, k), ids, shape),
        {},
    )

    @jax.jit
    def draw(scale):
        gradient = classifier_gradient(tilted_log_prob, scale)
        if sampler is ancestral:
            return ancestral(gaussian, *given, gradient=gradient).x_t
        return sampler(classifier_guided(gaussian, gradient), *given).x_t

    for scale in (0.0, 1.0, 2.0):
        x_0 = draw(scale)
        moved, off = scale * 2.0 * 0.25, 0.06 if sampler is ancestral else 0.0
        np.testing.assert_allclose(x_0.mean(), moved, rtol=off, atol=0.02)
        np.testing.assert_allclose(x_0.std(), 0.5, rtol=0.03)


def test_the_guided_prediction_is_of_one_image():
    level = continuous.level_of(jnp.array([-3.0, 0.0, 5.0]))
    x_t = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    prediction = classifier_guided(gaussian, classifier_gradient(tilted_log_prob, 3.0))(x_t, level, {})
    np.testing.assert_allclose(add_noise(level, prediction.x_0, prediction.eps), x_t, atol=1e-5)


def test_no_pull_at_the_last_timestep():
    level = continuous.level_of(jnp.zeros(2))._replace(index=jnp.array([0, 1]))
    pull = without_last(lambda x_t, level, cond: jnp.ones_like(x_t))(jnp.zeros((2, 1, 1, 1)), level, {})
    np.testing.assert_array_equal(pull.ravel(), [0, 1])


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


@pytest.fixture(scope="module")
def model(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("guided") / "run")


@pytest.fixture(scope="module")
def guide(workspace, once):
    return once("noisy", test_classifier.noisy(workspace))


@pytest.fixture(scope="module")
def judge(workspace, once):
    return once("clean", test_classifier.clean(workspace))


def drawn(model, out, classifier, **spec):
    sample.run(
        model, step=None, weights="ema", classes=("3", "1"), per_class=2, spec=spec, classifier=classifier, seed=0,
        batch_size=4, single_files=False, out=out,
    )  # fmt: skip
    (path,) = out.glob("*.npz")
    return np.load(path)["arr_0"], path.stem


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_a_classifier_in_continuous_time_guides_a_discrete_model(model, guide, tmp_path, sampler):
    plain, plain_name = drawn(model, tmp_path / "plain", None, sampler=sampler)
    pulled, name = drawn(model, tmp_path / "pulled", guide, sampler=sampler, classifier_scale=1000.0)
    assert plain.shape == pulled.shape == (4, 8, 8, 3)
    assert (plain != pulled).any()
    assert "classifier_scale1000" in name
    assert "classifier" not in plain_name


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m"])
def test_a_classifier_guides_a_continuous_model_together_with_classifier_free_guidance(workspace, sampler):
    mesh = parallel.make_mesh()
    denoising = build.make_diffusion_model(continuous_config(workspace))
    classifier = build.make_classifier_model(tiny_classifier(workspace))
    spec = SamplerSpec(sampler=sampler, steps=3, spacing="log_snr", guidance=2.0, classifier_scale=1.0)
    draw = build.make_sampler(denoising, mesh, spec, classifier=classifier)
    shapes = [jax.eval_shape(each.network.init, jax.random.key(0)) for each in (denoising, classifier)]
    params = build.GuidedParams(shapes[0], None, shapes[1])
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.eval_shape(draw, params, key, jax.ShapeDtypeStruct((4, 2), jnp.int32))
    assert images.shape == (4, 8, 8, 3)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(workspace, model, guide, judge, tmp_path):
    with pytest.raises(ConfigError, match="expected both --classifier=WORKDIR and --classifier_scale"):
        drawn(model, tmp_path / "out", guide)
    with pytest.raises(ConfigError, match="expected both --classifier=WORKDIR and --classifier_scale"):
        drawn(model, tmp_path / "out", None, classifier_scale=1.0)
    with pytest.raises(WorkdirError, match="has seen no noise"):
        drawn(model, tmp_path / "out", judge, classifier_scale=1.0)
    with pytest.raises(WorkdirError, match="where one of the task 'classifier' is needed"):
        drawn(model, tmp_path / "out", model, classifier_scale=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_classifier_of_other_images_or_for_no_classes_is_refused(guide, tmp_path):
    small = tiny_weights.write(tmp_path / "small.safetensors", image_size=4)
    unconditional = tiny_weights.write(tmp_path / "unconditional.safetensors", classes=None)
    with pytest.raises(WorkdirError, match=r"takes images of 8 pixels, the model draws 4"):
        drawn(small, tmp_path / "out", guide, classifier_scale=1.0)
    with pytest.raises(WorkdirError, match="knows no classes, so no classifier can guide it"):
        drawn(unconditional, tmp_path / "out", guide, classifier_scale=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_classifier_of_other_classes_is_refused(model, guide, tmp_path):
    trained, classifier = (
        load_trained(path, step=None, weights="ema", mesh=parallel.make_mesh(), task=None) for path in (model, guide)
    )
    with pytest.raises(WorkdirError, match=r"the classes of the classifier .* or in another order: 9, 8, 7"):
        check_fits(classifier._replace(class_names=classifier.class_names[::-1]), trained, tmp_path, image_size=8)


@pytest.mark.slow
def test_class_agreement_is_a_record_beside_the_judges_own_accuracy(model, judge, guide, tmp_path, capsys):
    flags = [
        f"--workdir={model}", f"--judge={judge}", "--per_class=2", "--batch_size=10", f"--cache_dir={tmp_path}",
    ]  # fmt: skip
    evaluator(["agreement", *flags])
    (path,) = (model / "eval").glob("agreement_*.json")
    record = json.loads(path.read_text())
    by_name = {result["metric"].split("[")[0]: result for result in record["results"]}
    assert list(by_name) == ["agreement-top1", "agreement-top5", "accuracy-top1", "accuracy-top5", "FD-32"]
    assert by_name["FD-32"]["value"] > 0
    assert by_name["agreement-top1"]["n"] == 20
    assert by_name["accuracy-top1"]["n"] > 100
    assert 0 <= by_name["agreement-top1"]["value"] <= by_name["agreement-top5"]["value"] <= 1
    assert all(f"[classifier {record['judge']['sha256'][:8]}]" in result["metric"] for result in record["results"])
    assert "agreement-top1[classifier" in capsys.readouterr().out
    assert read_run(model, "model").distances == []  # it is no distance

    evaluator(["agreement", *flags, f"--classifier={guide}", "--classifier_scale=5"])
    assert len(list((model / "eval").glob("agreement_*.json"))) == 2
    evaluator(["agreement", *(flag for flag in flags if "judge" not in flag), f"--judge={guide}",
               f"--classifier={guide}", "--classifier_scale=5"])  # fmt: skip
    assert "the judge has guided the samples itself" in capsys.readouterr().err


def test_the_distance_of_a_judges_features_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    real, drawn = (Readings(np.zeros(n, int), rng.normal(mean, 1, (n, 2))) for n, mean in ((40_000, 0), (20_000, 1)))
    result = distance("0123456789", drawn, real)
    assert result.metric == "FD-2[classifier 01234567]"
    assert result.value == pytest.approx(2, rel=0.02)  # the squared distance of the means
    assert (result.n, result.warnings) == (20_000, ())
    assert distance("0123456789", real, real).value == pytest.approx(0, abs=1e-8)


@pytest.mark.slow
def test_a_sweep_reads_the_samples_that_it_scores(model, judge, guide, tmp_path, monkeypatch):
    np.savez(tmp_path / "stem.npz", **random_stem())
    flags = [
        f"--workdir={model}", f"--judge={judge}", f"--classifier={guide}", "--per_class=1", "--batch_size=10",
        f"--cache_dir={tmp_path}",
    ]  # fmt: skip
    drawn = []
    inner = generated.GeneratedImages._drawn
    monkeypatch.setattr(generated.GeneratedImages, "_drawn", lambda self, rows: drawn.append(1) or inner(self, rows))
    with tiny.small_reference(20):
        evaluator(["sweep", *flags, "--classifier_scales=0,5", f"--inception={tmp_path / 'stem.npz'}"])
        assert len(drawn) == 2
        (sheet,) = (model / "eval").glob("sweep_*.csv")
        unguided, guided = csv.DictReader(sheet.open())
        evaluator(["agreement", *flags, "--classifier_scale=5"])
    (path,) = (model / "eval").glob("agreement_*scale5*_n10_*.json")
    for result in json.loads(path.read_text())["results"]:
        if result["metric"].startswith("agreement"):
            assert float(guided[result["metric"]]) == result["value"]
    (fd,) = (name for name in guided if name.startswith("FD-64[stem") and not name.endswith("sd"))
    assert guided[fd] != unguided[fd]


def test_names_without_a_classifier_are_what_they_were():
    assert "classifier_scale" not in SamplerSpec(steps=5).to_json()
    spec = SamplerSpec(steps=5, classifier_scale=2.0)
    assert SamplerSpec.from_json(spec.to_json()) == spec
    assert ConfigDict(spec.to_json()).classifier_scale == 2.0
