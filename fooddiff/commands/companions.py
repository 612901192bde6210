"""The sampler of a trained model, with the networks that guide it or enlarge what it draws, if there are any."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fooddiff import build, processes
from fooddiff.arrays import Params
from fooddiff.runs.load import Guide, TrainedModel, check_classes, check_draws, load_guide, load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.enlarge import CascadeParams, cascade
from fooddiff.sample.generate import Draw
from fooddiff.sample.spec import SamplerSpec

log = logging.getLogger(__name__)


class Companions(NamedTuple):
    """Other networks that take part in sampling; None where there is no such network."""

    guide: Guide | None
    classifier: TrainedModel | None
    upsampler: TrainedModel | None


class Drawing(NamedTuple):
    """What draws images: a compiled sampler, its parameters, and how they came to be."""

    draw: Draw
    params: Params | build.GuidedParams | CascadeParams
    recipe: Mapping[str, Any]  # of all models that take part
    image_size: int  # pixels


def load_companions(
    trained: TrainedModel,
    mesh: jax.sharding.Mesh,
    *,
    guide: Path | None,
    guide_step: int | None,
    classifier: Path | None,
    upsample: Path | None,
) -> Companions:
    """Loads what guides a model, or enlarges what it draws; of each the averaged weights.

    Args:
        trained: the model that is guided.
        mesh: devices.
        guide: the workdir, or the file, of a model to move away from in place of the null label.
        guide_step: which checkpoint of it; None takes the newest.
        classifier: the workdir, or the file, of a classifier of noisy images.
        upsample: the workdir, or the file, of a model for super-resolution.

    Raises:
        FileNotFoundError: no such workdir, file or checkpoint.
        ValueError: one of them does not fit the model.
    """
    return Companions(
        load_guide(guide, step=guide_step, guided=trained, mesh=mesh),
        None if classifier is None else _load_classifier(classifier, trained, mesh),
        None if upsample is None else _load_second_half(upsample, trained, mesh),
    )


def _load_classifier(classifier: Path, trained: TrainedModel, mesh: jax.sharding.Mesh) -> TrainedModel:
    judge = load_trained(classifier, step=None, weights="ema", mesh=mesh, task="classifier")
    check_fits(judge, trained, classifier, image_size=trained.config.data.image_size)
    if trained.model.num_classes is None:
        raise WorkdirError("this model knows no classes, so no classifier can guide it to one")
    if "codec" in trained.config:
        raise WorkdirError("this model diffuses latents, and classifiers know noisy images alone: none can guide it")
    if judge.model.noise is None:
        raise WorkdirError(f"the classifier {classifier} has seen no noise: to guide, it takes one of noisy images")
    return judge


def _load_second_half(path: Path, trained: TrainedModel, mesh: jax.sharding.Mesh) -> TrainedModel:
    upsampler = load_upsampler(path, step=None, weights="ema", mesh=mesh)
    check_enlarges(upsampler, trained, path)
    log.info("enlarged by step %d of %s, weights %s", upsampler.step, path, upsampler.weights)
    return upsampler


def load_upsampler(path: Path, *, step: int | None, weights: str, mesh: jax.sharding.Mesh) -> TrainedModel:
    """Loads a model for super-resolution; raises WorkdirError if it is another one."""
    trained = load_trained(path, step=step, weights=weights, mesh=mesh)
    if trained.model.low_res is None:
        raise WorkdirError(
            f"{path} holds no model for super-resolution: expected one of configs/superres.py, or another with "
            f"config.low_res"
        )
    return trained


def check_enlarges(upsampler: TrainedModel, trained: TrainedModel, where: Path) -> None:
    """Raises WorkdirError unless a model for super-resolution takes what another model draws, or shrinks it first."""
    takes, gives = upsampler.model.low_res.size, upsampler.config.data.image_size
    draws, what = trained.config.data.image_size, f"the upsampler {where}"
    if draws % takes or draws > gives:
        raise WorkdirError(
            f"{what} takes images of {takes} pixels, or shrinks those of a multiple of it up to {gives}; the model "
            f"draws {draws}"
        )
    if upsampler.model.num_classes is None:
        return
    if trained.model.num_classes is None:
        raise WorkdirError(f"{what} is told the class of an image, and the model knows no classes")
    check_classes(trained, upsampler.class_names, what)


def drawing(trained: TrainedModel, mesh: jax.sharding.Mesh, spec: SamplerSpec, companions: Companions) -> Drawing:
    """Builds the sampler of a trained model. With an upsampler, sampled as its own config says, it is a cascade.

    Raises:
        ValueError: no such sampler, a setting of it that cannot be, or a model for super-resolution.
    """
    check_draws(trained)
    guide, classifier, upsampler = companions
    draw = build.make_sampler(
        trained.model, mesh, spec, guide=guide and guide.model, classifier=classifier and classifier.model
    )
    params, recipe = trained.params, build.recipe(trained.config)
    if guide is not None or classifier is not None:
        params = build.GuidedParams(params, guide and guide.params, classifier and classifier.params)
    if guide is not None:
        recipe |= {"guide": guide.identity}
    if classifier is not None:
        weights = processes.sha256_of(classifier.params)
        recipe |= {"classifier": {"weights_sha256": weights, "recipe": build.recipe(classifier.config)}}
    if upsampler is None:
        return Drawing(draw, params, recipe, trained.config.data.image_size)
    above = build.sampler_spec(upsampler.config.sample)
    recipe |= {
        "upsampler": {
            "weights_sha256": processes.sha256_of(upsampler.params),
            "recipe": build.recipe(upsampler.config),
            "sampling": above.to_json(),
        }
    }
    enlarge = build.make_sampler(upsampler.model, mesh, above)
    both = CascadeParams(params, upsampler.params)
    return Drawing(cascade(draw, enlarge), both, recipe, upsampler.config.data.image_size)


def check_fits(classifier: TrainedModel, trained: TrainedModel, where: Path, *, image_size: int) -> None:
    """Raises WorkdirError unless a classifier takes images of this size, and has the classes of the model."""
    if (takes := classifier.config.data.image_size) != image_size:
        raise WorkdirError(f"the classifier {where} takes images of {takes} pixels, the model draws {image_size}")
    check_classes(trained, classifier.class_names, f"the classifier {where}")
