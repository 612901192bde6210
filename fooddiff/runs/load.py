"""From a run's directory, or a file of weights, to a model: its config, its classes and its parameters."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import parallel, processes
from fooddiff.arrays import Params
from fooddiff.build import (
    DiffusionModel,
    check_ema_rates,
    codec_tensors,
    make_model,
    power_lengths,
    recipe,
    task_of,
)
from fooddiff.data.sources.source import checked_class_names
from fooddiff.model.network import abstract_params
from fooddiff.runs.checkpoint import Checkpoints, choose_step
from fooddiff.runs.codec_file import check_codec, read_codec, sha256_of_codec, split_codec
from fooddiff.runs.weights_file import read_weights
from fooddiff.runs.workdir import WorkdirError
from fooddiff.settings import ConfigError, did_you_mean
from fooddiff.train.averages import power_name

log = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """A checkpoint's weights with everything that is needed to use them."""

    config: ConfigDict
    model: Any  # of the config's task: a `build.DiffusionModel`, ...
    class_names: tuple[str, ...]
    params: Mapping[str, jax.Array]
    step: int
    weights: str  # "raw", "ema_<rate>" or "power_<length>"
    meta: Mapping[str, Any]

    @property
    def images_seen(self) -> int:
        """Images that it was trained on, repeated ones included, and those of runs that it went on from, if known."""
        before = self.meta.get("origin") or {}
        return self.step * self.config.train.batch_size + before.get("images_seen", 0)


def load_trained(
    workdir: Path, *, step: int | None, weights: str, mesh: jax.sharding.Mesh, task: str | None = "diffusion"
) -> TrainedModel:
    """Loads a model from a checkpoint or from a file of weights; its config comes from there, too.

    Args:
        workdir: a run's directory, or a file of `python -m fooddiff.convert export`, which has one step and one set of
            weights.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema" for the first rate of config.ema.rates, "ema_<rate>" or "power_<length>".
        mesh: devices to put the weights on, replicated.
        task: what the model must have been trained for, as config.task names it; None takes any.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        WorkdirError: no such average, or a model of another task.
    """
    if workdir.is_file():
        return _load_file(workdir, step, weights, mesh, task)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no run in {workdir}: expected a directory that run_train.py has written, or a .safetensors file"
        )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = choose_step(checkpoints, step)
        meta = checkpoints.meta(step)
        config, class_names, model = described(meta, workdir / "checkpoints" / str(step))
        check_task(config, task, workdir)
        name, average = stored_weights(weights, config.ema)
        replicated = parallel.replicated(mesh)
        params = checkpoints.restore_weights(
            step, parallel.with_sharding(abstract_params(model.network), replicated), average
        )
    codec = read_codec(workdir, codec_tensors(config))
    check_codec(meta.get("codec_sha256"), codec, workdir)
    params |= {name: jax.device_put(value, replicated) for name, value in codec.items()}
    return TrainedModel(config, model, class_names, params, step, name, meta)


def _load_file(file: Path, step: int | None, weights: str, mesh: jax.sharding.Mesh, task: str | None) -> TrainedModel:
    about, params = read_weights(file)
    config, class_names, model = described(about, file)
    check_task(config, task, file)
    if step not in (None, about["step"]) or weights not in ("ema", about["weights"]):
        raise WorkdirError(
            f"{file} holds the weights {about['weights']} of step {about['step']}: expected these, got step {step} and "
            f"weights {weights}"
        )
    tensors = abstract_params(model.network) | codec_tensors(config)
    expected = {name: leaf.shape for name, leaf in tensors.items()}
    if expected != {name: value.shape for name, value in params.items()}:
        raise WorkdirError(f"{file} does not hold the tensors of the model that its own config describes")
    replicated = parallel.replicated(mesh)
    params = {name: jax.device_put(value.astype(np.float32), replicated) for name, value in params.items()}
    return TrainedModel(config, model, class_names, params, about["step"], about["weights"], about)


def check_task(config: ConfigDict, task: str | None, where: Path) -> None:
    """Raises WorkdirError unless a config trains a task; None accepts any."""
    if task not in (None, found := task_of(config)):
        raise WorkdirError(f"{where} holds a model of the task {found!r}, where one of the task {task!r} is needed")


def check_classes(trained: TrainedModel, class_names: tuple[str, ...], what: str) -> None:
    """Raises WorkdirError unless the classes of `what` are those that a model is told, if it is told any."""
    if trained.model.num_classes is not None and class_names != trained.class_names:
        raise WorkdirError(
            f"the classes of {what} are not those of the model, or in another order: {', '.join(class_names[:3])}, "
            f"... instead of {', '.join(trained.class_names[:3])}, ..."
        )


def check_draws(trained: TrainedModel) -> None:
    """Raises WorkdirError for a model that draws nothing without an image: one for super-resolution."""
    if (low_res := trained.model.low_res) is not None:
        raise WorkdirError(
            f"this model enlarges images of {low_res.size} pixels and draws none by itself: name a model that does as "
            f"the --workdir of run_sample.py and this one as --upsample, or score it with python -m fooddiff.eval "
            f"superres"
        )


def check_model(section: str, given: ConfigDict, trained: TrainedModel, where: str) -> None:
    """Raises ConfigError unless a config section says of which network a model is, but for what weights do not see."""
    ours, theirs = (json.loads(json.dumps(each.to_dict())) for each in (given, trained.config.model))
    for name in sorted((ours.keys() | theirs.keys()) - {"dropout", "dtype"}):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(f"config.{section}.{name} is {ours.get(name)}, but {theirs.get(name)} in {where}")


class Guide(NamedTuple):
    """A model that another one moves away from (autoguidance, Karras et al. 2024, arXiv 2406.02507)."""

    model: DiffusionModel
    params: Params
    identity: Mapping[str, Any]  # for records


def make_guide(guide: TrainedModel, guided: TrainedModel) -> Guide:
    """Makes a model the guide of another one. Their networks and what these predict may differ.

    Raises:
        WorkdirError: they differ in the images that they draw, their classes or the process.
    """
    check_draws(guide)
    for what, of in (
        ("classes", lambda trained: trained.model.num_classes and trained.class_names),
        ("image size", lambda trained: trained.config.data.image_size),
        ("process", _process),
        ("codec", lambda trained: sha256_of_codec(split_codec(trained.params, codec_tensors(trained.config))[1])),
    ):
        if of(guide) != of(guided):
            raise WorkdirError(
                f"the guide does not fit this model. Its {what}: {_short(of(guide))}; this model's: "
                f"{_short(of(guided))}"
            )
    identity = {
        "weights_sha256": processes.sha256_of(guide.params),
        "recipe": recipe(guide.config),
        "step": guide.step,
        "weights": guide.weights,
    }
    return Guide(guide.model, guide.params, identity)


def load_guide(
    path: Path | None, *, step: int | None, guided: TrainedModel, mesh: jax.sharding.Mesh
) -> Guide | None:  # fmt: skip
    """Loads the averaged weights of another model as the guide of one; none if there is no path.

    Raises:
        WorkdirError: see `make_guide`; or a step is given and no path.
    """
    if path is None:
        if step is not None:
            raise WorkdirError(f"--guide_step is {step}, but no --guide is given")
        return None
    guide = load_trained(path, step=step, weights="ema", mesh=mesh)
    log.info("guided by step %d of %s, weights %s", guide.step, path, guide.weights)
    return make_guide(guide, guided)


def _process(trained: TrainedModel) -> dict[str, Any]:
    of_the_network = ("prediction", "variance")
    return {"time": "discrete"} | {
        name: value for name, value in recipe(trained.config)["diffusion"].items() if name not in of_the_network
    }


def _short(value: Any) -> str:
    """Settings as they are; of many class names the first."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return f"{len(value)} ({', '.join(value[:3])}, ...)" if isinstance(value, tuple) else str(value)


def described(meta: Mapping[str, Any], where: Path) -> tuple[ConfigDict, tuple[str, ...], Any]:
    """Builds the model that a checkpoint's meta describes. The meta may come from anybody.

    Args:
        meta: with "config" and "class_names".
        where: what to call it in messages.

    Returns:
        The config, the class names, which are safe to print and to make files of, and the model, without weights.

    Raises:
        WorkdirError: it describes no model of this program.
    """
    try:
        config, class_names = ConfigDict(meta["config"]), checked_class_names(meta["class_names"], where)
        check_ema_rates(config.ema.rates)
        power_lengths(config.ema)
        model = make_model(config)
        codec_tensors(config)  # whatever cannot be built is to be found here
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WorkdirError(f"{where} does not describe a model: {error}") from error
    if model.num_classes not in (None, len(class_names)):
        raise WorkdirError(f"{where} names {len(class_names)} classes, but its model has {model.num_classes}")
    return config, class_names, model


def stored_weights(weights: str, ema: Mapping[str, Any]) -> tuple[str, str | None]:
    """Finds weights among those of a checkpoint.

    Args:
        weights: "raw", "ema" for the first rate, "ema_<rate>" or "power_<length>".
        ema: config.ema.

    Returns:
        Their whole name, and the average's name in the state; None means the raw weights.

    Raises:
        WorkdirError: there are no such weights.
    """
    known = {"raw": None} | {f"ema_{rate}": str(rate) for rate in ema["rates"]}
    known |= {power_name(length): power_name(length) for length in power_lengths(ema)}
    name = f"ema_{ema['rates'][0]}" if weights == "ema" and ema["rates"] else weights
    if name not in known:
        near = did_you_mean(weights, known)
        raise WorkdirError(f"no weights {weights!r} in the checkpoint, expected {', '.join(known)}{near}")
    return name, known[name]


def class_ids(names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int]:
    """Looks up class names.

    Raises:
        WorkdirError: an unknown name; lists the classes.
    """
    if unknown := [name for name in wanted if name not in names]:
        near = did_you_mean(unknown[0], names)
        raise WorkdirError(f"no class {', '.join(map(repr, unknown))}: the model knows {', '.join(names)}{near}")
    return [names.index(name) for name in wanted]
