"""The sampler of a trained model, with the networks that guide it if there are any."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fooddiff import build, processes
from fooddiff.arrays import Params
from fooddiff.runs.load import Guide, TrainedModel, check_classes, check_draws, load_guide, load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.enlarge import CascadeParams
from fooddiff.sample.generate import Draw
from fooddiff.sample.spec import SamplerSpec


class Guides(NamedTuple):
    """Other networks that take part in sampling; None where there is no such network."""

    guide: Guide | None
    classifier: TrainedModel | None


class Drawing(NamedTuple):
    """What draws images: a compiled sampler, its parameters, and how they came to be."""

    draw: Draw
    params: Params | build.GuidedParams | CascadeParams
    recipe: Mapping[str, Any]  # of all models that take part


def load_guides(
    trained: TrainedModel,
    mesh: jax.sharding.Mesh,
    *,
    guide: Path | None,
    guide_step: int | None,
    classifier: Path | None,
) -> Guides:
    """Loads what guides a model; of each the averaged weights.

    Args:
        trained: the model that is guided.
        mesh: devices.
        guide: the workdir, or the file, of a model to move away from in place of the null label.
        guide_step: which checkpoint of it; None takes the newest.
        classifier: the workdir, or the file, of a classifier of noisy images.

    Raises:
        ValueError: one of them does not fit the model.
    """
    found = load_guide(guide, step=guide_step, guided=trained, mesh=mesh)
    if classifier is None:
        return Guides(found, None)
    judge = load_trained(classifier, step=None, weights="ema", mesh=mesh, task="classifier")
    check_fits(judge, trained, classifier)
    if trained.model.num_classes is None:
        raise WorkdirError("this model knows no classes, so no classifier can guide it to one")
    if "codec" in trained.config:
        raise WorkdirError("this model diffuses latents, and classifiers know noisy images alone: none can guide it")
    if judge.model.noise is None:
        raise WorkdirError(f"the classifier {classifier} has seen no noise: to guide, it takes one of noisy images")
    return Guides(found, judge)


def drawing(trained: TrainedModel, mesh: jax.sharding.Mesh, spec: SamplerSpec, guides: Guides) -> Drawing:
    """Builds the sampler of a trained model.

    Raises:
        ValueError: no such sampler, a setting of it that cannot be, or a model for super-resolution.
    """
    check_draws(trained)
    guide, classifier = guides
    draw = build.make_sampler(
        trained.model, mesh, spec, guide=guide and guide.model, classifier=classifier and classifier.model
    )
    recipe = build.recipe(trained.config)
    if guides == Guides(None, None):
        return Drawing(draw, trained.params, recipe)
    params = build.GuidedParams(trained.params, guide and guide.params, classifier and classifier.params)
    if guide is not None:
        recipe |= {"guide": guide.identity}
    if classifier is not None:
        weights = processes.sha256_of(classifier.params)
        recipe |= {"classifier": {"weights_sha256": weights, "recipe": build.recipe(classifier.config)}}
    return Drawing(draw, params, recipe)


def check_fits(classifier: TrainedModel, trained: TrainedModel, where: Path) -> None:
    """Raises WorkdirError unless a classifier and a model have the same classes and image size."""
    check_takes(f"the classifier {where}", classifier.config.data.image_size, classifier.class_names, trained)


def check_takes(what: str, image_size: int, class_names: tuple[str, ...] | None, trained: TrainedModel) -> None:
    """Raises WorkdirError unless a model draws images of this size and these classes, which `what` is for."""
    if (draws := trained.config.data.image_size) != image_size:
        raise WorkdirError(f"{what} takes images of {image_size} pixels, the model draws {draws}")
    if class_names is not None:
        check_classes(trained, class_names, what)
