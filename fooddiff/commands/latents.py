"""What a training takes its batches from, and the codec that its model needs: pixels need none."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, parallel, processes
from fooddiff.arrays import Params, Pixels
from fooddiff.codec import MEAN, PREFIX, STD
from fooddiff.data.cache import Dataset
from fooddiff.data.latents import Latents, load_latents
from fooddiff.runs.load import TrainedModel, check_model, load_trained
from fooddiff.runs.workdir import to_json
from fooddiff.settings import ConfigError

log = logging.getLogger(__name__)

BATCH = 64  # images that are encoded at once, at least


class Feed(NamedTuple):
    """What batches are taken from, the codec's tensors by their names among the model's parameters, and their origin.

    The origin is None for weights that were trained here, and for a codec that the run has already.
    """

    examples: Dataset | Latents
    codec: Params
    codec_origin: Mapping[str, Any] | None = None


def feed_of(config: ConfigDict, dataset: Dataset, mesh: jax.sharding.Mesh, *, begun: Params | None) -> Feed:
    """Prepares the examples of a training.

    A run that begins takes the averaged weights of the autoencoder at config.codec.path, and the statistics of the
    latents that these give; afterwards, the run has both of its own.

    Args:
        config: of the run.
        dataset: the training images.
        mesh: devices.
        begun: the codec of the model that the run goes on with; None for one that begins.

    Returns:
        Pixels and no codec, or latents with theirs.

    Raises:
        ConfigError: config.codec.path is not given, or holds another autoencoder than config.codec.model.
        FileNotFoundError: it holds no model.
    """
    if "codec" not in config:
        return Feed(dataset, {})
    tensors, origin = begun, None
    if begun is None:
        autoencoder = _autoencoder(config, mesh)
        tensors = {PREFIX + name: value for name, value in autoencoder.params.items()}
        origin = autoencoder.meta.get("origin")
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    own = {name: value for name, value in tensors.items() if name not in (MEAN, STD)}
    encode = build.make_encode(build.make_codec_model(config), mesh)
    params = {name.removeprefix(PREFIX): value for name, value in own.items()}
    params = jax.device_put(params, parallel.replicated(mesh))

    def encode_all(pixels: Pixels) -> np.ndarray:
        batches = parallel.in_batches(partial(encode, params), pixels, batch_size=parallel.divisible(BATCH, mesh))
        return np.concatenate(list(batches))

    latents = load_latents(
        dataset,
        encode_all,
        codec={"weights": processes.sha256_of(own), "model": to_json(config.codec.model)},
        mirror=config.data.flip,
        cache_dir=Path(config.data.cache_dir).expanduser(),
    )
    if begun is None:
        tensors |= {MEAN: latents.mean, STD: latents.std}
    return Feed(replace(latents, mean=tensors[MEAN], std=tensors[STD]), tensors, origin)


def _autoencoder(config: ConfigDict, mesh: jax.sharding.Mesh) -> TrainedModel:
    """The model at config.codec.path."""
    if config.codec.get("path") is None:
        raise ConfigError("config.codec.path is None, expected the workdir or the file of a trained autoencoder")
    path = Path(config.codec.path)
    trained = load_trained(path, step=None, weights="ema", mesh=mesh, task="autoencoder")
    check_model("codec.model", config.codec.model, trained, f"the autoencoder {path}")
    log.info("latents of the autoencoder %s, step %d, weights %s", path, trained.step, trained.weights)
    return trained
