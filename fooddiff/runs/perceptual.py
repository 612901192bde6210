"""The network whose features an autoencoder's perceptual term compares: a classifier of images without noise."""

import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from fooddiff.arrays import Params
from fooddiff.runs.load import check_model, load_trained
from fooddiff.settings import ConfigError

log = logging.getLogger(__name__)


def features_of(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Params]:
    """Loads what a run that begins is to carry: the averaged weights of the classifier at config.perceptual.path.

    From then on they are in every checkpoint, so a run that goes on does not need the file.

    Args:
        config: of the run.
        mesh: devices.

    Returns:
        {"perceptual": parameters}; {} without config.perceptual.

    Raises:
        ConfigError: config.perceptual.path is not given, or holds another classifier than config.perceptual.model, one
            of images of another size, or one of noisy images.
        FileNotFoundError: it holds no model.
        WorkdirError: it holds a model of another task.
    """
    if "perceptual" not in config:
        return {}
    if config.perceptual.get("path") is None:
        raise ConfigError("config.perceptual.path is None, expected the workdir or the file of a trained classifier")
    path = Path(config.perceptual.path)
    trained = load_trained(path, step=None, weights="ema", mesh=mesh, task="classifier")
    if "diffusion" in trained.config:
        raise ConfigError(
            f"config.perceptual.path {path} is a classifier of noisy images, expected one of clean ones, as "
            f"configs/classifier.py:clean trains it"
        )
    if (size := trained.config.data.image_size) != config.data.image_size:
        raise ConfigError(
            f"config.perceptual.path {path} is a classifier of images of {size} pixels, expected "
            f"config.data.image_size, {config.data.image_size}"
        )
    check_model("perceptual.model", config.perceptual.model, trained, f"the classifier {path}")
    log.info("features of the classifier %s, step %d, weights %s", path, trained.step, trained.weights)
    return {"perceptual": dict(trained.params)}
