"""The classifier's task from config to accuracy, and what refuses which kind of run."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import classifier
from fooddiff import build, parallel
from fooddiff.commands import dry_run, likelihood, sample, scorer, train
from fooddiff.commands.convert import main as convert
from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.discrete import level_at, make_process, network_time_at
from fooddiff.diffusion.level import clean_level
from fooddiff.diffusion.schedule import cosine_betas, evenly_spaced
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import read_scalars
from fooddiff.runs.workdir import WorkdirError
from fooddiff.settings import ConfigError
from fooddiff.train.tasks.classifier import log_prob, moved, rank_of
from tests import tiny


def tiny_classifier(folder, images="noisy", **overrides):
    """configs/classifier.py on digits, in seconds."""
    config = classifier.get_config(images)
    base = tiny.config(folder)
    config.data, config.train, config.log = base.data, base.train, base.log
    config.ema.rates = base.ema.rates
    config.optimizer.name = "adamw"  # which compiles faster
    config.optimizer.warmup_steps = 0
    config.optimizer.cooldown_steps = 1
    config.objective.crop = 1
    config.model.update(
        dict(num_classes=10, patch_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    )
    config.model.attention_resolutions = ()
    config.eval.every_steps = 2
    config.eval.batches = 2
    config.eval.batch_size = 20
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


def noisy(workspace):
    """The config of the shared run of a classifier of noisy images."""
    return tiny_classifier(workspace)


def clean(workspace):
    """The config of the shared run of a classifier of clean images."""
    return tiny_classifier(workspace, "clean", train__keep_best=1, train__keep_checkpoints=1)


@pytest.fixture(scope="module")
def trained(workspace, once):
    return once("noisy", noisy(workspace))


def numbers(run):
    records = {}
    for record in read_scalars(run):
        records.setdefault(record["step"], {}).update(record)
    return records


@pytest.mark.slow
def test_training_reports_accuracy_by_level_in_training_and_on_held_out_images(trained):
    last = numbers(trained)[4]
    assert {"train/top1", "train/top5", "train/loss"} <= last.keys()
    held_out = {name for name in last if name.startswith("eval/ema_0.995/")}
    assert {f"eval/ema_0.995/{name}, n=40" for name in ("loss", "top1", "top5", "top1_log_snr_0_to_2")} <= held_out
    assert {name.replace("ema_0.995", "raw") for name in held_out} <= last.keys()
    assert 0 <= last["eval/raw/top1, n=40"] <= last["eval/raw/top5, n=40"] <= 1


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(workspace, tmp_path):
    runs = tmp_path / "whole", tmp_path / "halves"
    for run, stops in zip(runs, [(4,), (2, 4)], strict=True):
        for steps in stops:
            train.run(tiny_classifier(workspace, train__steps=steps, optimizer__cooldown_steps=None), run)
    a, b = (
        load_trained(path, step=4, weights="ema", mesh=parallel.make_mesh(), task="classifier").params for path in runs
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    held = [{k: v for k, v in numbers(path)[4].items() if k.startswith("eval/")} for path in runs]
    assert held[0] == held[1] != {}


@pytest.mark.slow
def test_a_clean_classifier_knows_no_levels_and_the_error_picks_checkpoints(workspace, once):
    run = once("clean", clean(workspace))
    assert not any("log_snr" in name for record in read_scalars(run) for name in record)
    score = json.loads((run / "checkpoints" / "4" / "metrics" / "metrics").read_text())["score"]
    np.testing.assert_allclose(score, 1 - numbers(run)[4]["eval/ema_0.995/top1, n=40"])


@pytest.mark.slow
def test_commands_refuse_a_model_of_another_task(workspace, trained, tmp_path):
    refused = pytest.raises(WorkdirError, match=r"noisy holds a model of the task 'classifier', where one of the task")
    with refused:
        sample.run(
            trained, step=None, weights="ema", classes=(), per_class=1, spec={}, seed=0, batch_size=4,
            single_files=False, out=None,
        )  # fmt: skip
    with refused:
        scorer._config(trained)
    with refused:
        likelihood.run(
            trained, step=None, weights="ema", split="test", count=4, batch_size=4, seed=0, data_path=None,
            cache_dir=None, out=None, stop_if_asked=lambda: None,
        )  # fmt: skip
    config = tiny.config(workspace)
    config.init_from = str(trained)
    with refused:
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_a_classifier_is_exported_and_loaded_from_one_file(trained, tmp_path):
    file = tmp_path / "classifier.safetensors"
    convert(["export", f"--workdir={trained}", "--weights=ema", f"--out={file}"])
    load = dict(step=None, weights="ema", mesh=parallel.make_mesh(), task="classifier")
    ours, theirs = load_trained(file, **load).params, load_trained(trained, **load).params
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_dry_run_knows_classifiers(tmp_path, capsys):
    dry_run.run(tiny_classifier(tmp_path))
    assert "FLOP per image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(objective__crop=-1), "config.objective.crop is -1"),
        (dict(model__network="unet"), "config.model.network is 'unet', expected one of adm_encoder"),
        (dict(model__patch_size=3), "image_size 8 is not a multiple of the patch_size 3"),
        (dict(model__pool="max"), "pool is 'max', expected"),
        (dict(diffusion__time="never"), "config.diffusion.time is 'never', expected one of discrete, continuous"),
        (dict(eval__batches=0), "config.eval.batches is 0"),
    ],
)
def test_bad_values_are_named(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build.make_training(tiny_classifier(tmp_path, **overrides), parallel.make_mesh())


def test_more_held_out_images_than_there_are_is_said_before_the_first_step(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"are 20,000 images, but the test split has"):
        train.run(tiny_classifier(workspace, eval__batches=1000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_samples_in_folders_train_and_real_images_test(workspace, tiny_run, tmp_path):
    """The classification accuracy score: a folder of samples by class name, real images of another source."""
    sample.run(
        tiny_run, step=None, weights="ema", classes=(), per_class=2, spec={}, seed=0, batch_size=20,
        single_files=True, out=tmp_path,
    )  # fmt: skip
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (tmp_path / "samples").mkdir()
    shutil.move(folder, tmp_path / "samples" / "train")
    config = tiny_classifier(
        workspace, "clean", data__source="folder", data__path=str(tmp_path / "samples"), eval__source="digits"
    )
    train.run(config, tmp_path / "run")
    assert "eval/raw/top1, n=40" in numbers(tmp_path / "run")[4]


def test_labels_of_another_source_follow_the_names(tmp_path):
    config = tiny_classifier(tmp_path)
    names = tuple(reversed("0123456789"))
    heldout = build.make_heldout(config, names)
    real = build.make_dataset(config, "test")
    assert [names[y] for y in heldout.labels[:20]] == [real.class_names[y] for y in real.labels[:20]]
    with pytest.raises(ConfigError, match=r"has other classes than config.data.source: 9, ten"):
        build.make_heldout(config, (*"012345678", "ten"))


def test_ranks_and_probabilities():
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    np.testing.assert_array_equal(rank_of(logits, jnp.array([2, 0])), [1, 1])
    np.testing.assert_allclose(
        log_prob(logits, jnp.array([1, 2])), np.log([np.exp(2) / (1 + np.e + np.e**2), 1 / (2 * np.exp(3) + 1)]),
        rtol=1e-5,
    )  # fmt: skip


def test_images_are_moved_by_their_offsets():
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(moved(images, jnp.array([[1, 1]]), 1), images)
    down = moved(images, jnp.array([[2, 1]]), 1)
    np.testing.assert_array_equal(down[0, :3], images[0, 1:])
    np.testing.assert_array_equal(down[0, 3], images[0, 3])


def test_a_classifier_of_one_process_is_fed_its_own_time_at_the_levels_of_another():
    betas = cosine_betas(200)
    whole, few = make_process(betas), make_process(betas, evenly_spaced(200, (20,)))
    level = level_at(few, jnp.arange(20))
    np.testing.assert_allclose(network_time_at(whole, level.log_snr), few.model_timesteps, rtol=1e-4, atol=1e-3)
    beyond = jnp.array([jnp.inf, 100.0, -100.0])
    np.testing.assert_array_equal(network_time_at(whole, beyond), [0, 0, whole.model_timesteps[-1]])


def test_a_continuous_classifier_is_fed_the_log_snr_within_its_limits(tmp_path):
    model = build.make_classifier_model(tiny_classifier(tmp_path))
    np.testing.assert_array_equal(model.network_time(level_of(jnp.array([-3.0, 40.0]))), [-3, 15])
    assert model.network_time(clean_level()) == 15
    clean = build.make_classifier_model(tiny_classifier(tmp_path, "clean"))
    assert clean.noise is None
    np.testing.assert_array_equal(clean.network_time(level_of(jnp.array([-3.0]))), [0])
    discrete = tiny_classifier(tmp_path)
    with discrete.unlocked():
        discrete.diffusion = ConfigDict(dict(time="discrete", schedule="cosine", timesteps=8, rescale_timesteps=True))
    training = build.make_training(discrete, parallel.make_mesh())
    assert {"top1_q1", "top1_q4"} <= training.abstract_state.sums.keys()
    jax.eval_shape(training.step, *build.abstract_step_arguments(discrete, training))


@pytest.mark.slow
def test_fine_tuning_on_other_classes_renews_the_last_layer(workspace, trained, tmp_path, monkeypatch):
    inner = build.make_dataset

    def renamed(config, split):
        dataset = inner(config, split)
        return replace(dataset, class_names=dataset.class_names[::-1])

    monkeypatch.setattr(build, "make_dataset", renamed)
    train.run(tiny_classifier(workspace, init_from=str(trained), train__steps=1), tmp_path / "tuned")
    origin = load_trained(
        tmp_path / "tuned", step=None, weights="raw", mesh=parallel.make_mesh(), task="classifier"
    ).meta["origin"]
    assert origin["reinitialised"] == ["pool.out.bias", "pool.out.kernel"]
