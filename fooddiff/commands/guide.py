"""The sampler of a trained model, with the classifier that guides it if there is one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fooddiff import build
from fooddiff.arrays import Params
from fooddiff.runs.load import TrainedModel, load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.generate import Draw
from fooddiff.sample.spec import SamplerSpec


class Drawing(NamedTuple):
    """What draws images: a compiled sampler, its parameters, and how they came to be."""

    spec: SamplerSpec
    draw: Draw
    params: Params
    recipe: Mapping[str, Any]


def drawing(
    trained: TrainedModel, mesh: jax.sharding.Mesh, changes: Mapping[str, Any], classifier: Path | None
) -> Drawing:
    """Builds the sampler of a trained model.

    Args:
        trained: the model.
        mesh: devices.
        changes: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        classifier: the workdir, or the file, of a classifier of noisy images; its averaged weights guide.

    Raises:
        ValueError: no such sampler, or a classifier that does not fit the model.
    """
    spec = build.sampler_spec(trained.config.sample, **changes)
    recipe = build.recipe(trained.config)
    if classifier is None:
        return Drawing(spec, build.make_sampler(trained.model, mesh, spec), trained.params, recipe)
    guide = load_trained(classifier, step=None, weights="ema", mesh=mesh, task="classifier")
    check_fits(guide, trained, classifier)
    if trained.model.num_classes is None:
        raise WorkdirError("this model knows no classes, so no classifier can guide it to one")
    if "codec" in trained.config:
        raise WorkdirError("this model diffuses latents, and classifiers know noisy images alone: none can guide it")
    if guide.model.noise is None:
        raise WorkdirError(f"the classifier {classifier} has seen no noise: to guide, it takes one of noisy images")
    draw = build.make_sampler(trained.model, mesh, spec, classifier=guide.model)
    params = build.WithClassifier(trained.params, guide.params)
    return Drawing(spec, draw, params, recipe | {"classifier": build.recipe(guide.config)})


def check_fits(classifier: TrainedModel, trained: TrainedModel, where: Path) -> None:
    """Raises WorkdirError unless a classifier and a model have the same classes and image size."""
    ours, theirs = (model.config.data.image_size for model in (trained, classifier))
    if ours != theirs:
        raise WorkdirError(f"the classifier {where} takes images of {theirs} pixels, the model draws {ours}")
    if trained.model.num_classes is not None and classifier.class_names != trained.class_names:
        raise WorkdirError(
            f"the classes of the classifier {where} are not those of the model, or in another order: it has "
            f"{', '.join(classifier.class_names[:3])}, ..., the model {', '.join(trained.class_names[:3])}, ..."
        )
