"""Fits the weights of a trained model to a new run: which of them it can start from, and what to tell its user."""

import logging
from typing import Any

from ml_collections import ConfigDict

from fooddiff.arrays import Params
from fooddiff.build import codec_tensors
from fooddiff.model.names import misfits
from fooddiff.runs.load import TrainedModel
from fooddiff.runs.workdir import WorkdirError, differences, to_json

log = logging.getLogger(__name__)

OF_CLASSES = frozenset(  # parameters with a row or a column for each class: label embeddings, classifiers' last layers
    ("label.embedding", "pool.out.kernel", "pool.out.bias", "pool.logits.kernel", "pool.logits.bias")
)
FREE = ("model.num_classes", "model.dropout", "model.dtype", "model.remat")  # change nothing in what weights mean


def starting_weights(
    source: TrainedModel, config: ConfigDict, class_names: tuple[str, ...], like: Params
) -> tuple[Params, dict[str, Any]]:
    """Picks the weights of a trained model that a new run starts from: all, or all but those of other classes.

    Differences that shapes do not show, such as another schedule or number of heads, are logged as warnings.

    Args:
        source: the trained model.
        config: the new run's config.
        class_names: the new run's classes.
        like: parameters of the new model, or their shapes.

    Returns:
        The weights by name, and their origin as JSON. The weights lack `OF_CLASSES` if the classes are others, or in
        another order.

    Raises:
        WorkdirError: the models differ in more than that; names the first tensors that do not fit.
    """
    codecs = [to_json(each).get("codec", {}).get("model") for each in (source.config, config)]
    if codecs[0] != codecs[1]:
        raise WorkdirError(
            "config.init_from is a model of other latents, or of pixels: its config.codec.model is not the one given"
        )
    renewed = OF_CLASSES & like.keys() if source.class_names != class_names else set()
    expected = {name: leaf.shape for name, leaf in like.items() if name not in renewed}
    apart = renewed | codec_tensors(source.config).keys()
    found = {name: leaf.shape for name, leaf in source.params.items() if name not in apart}
    if problems := misfits(expected, found, "the other"):
        raise WorkdirError(f"config.init_from is a model of another architecture: {problems}")
    log.info("starting from step %d of config.init_from, weights %s", source.step, source.weights)
    if renewed:
        log.info(
            "the other model's %d classes are not these %d: anew begins %s",
            len(source.class_names), len(class_names), " and ".join(sorted(renewed)),
        )  # fmt: skip
    for name, (old, new) in differences(to_json(source.config), to_json(config)).items():
        if name.startswith(("diffusion.", "model.")) and name not in FREE:
            log.warning("config.%s is %r here, the weights were trained with %r", name, new, old)
    origin = {
        "step": source.step,
        "weights": source.weights,
        "images_seen": source.images_seen,
        "reinitialised": sorted(renewed),
        "origin": source.meta.get("origin"),
        "codec_origin": source.meta.get("codec_origin"),
    }
    return {name: source.params[name] for name in found}, origin
