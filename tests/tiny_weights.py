"""A file of weights of a tiny model that knows ten dishes, guidance included, for tests that draw."""

from pathlib import Path

import jax
import numpy as np

from fooddiff import build
from fooddiff.runs.weights_file import write_weights
from fooddiff.runs.workdir import to_json
from tests import tiny

DISHES = (
    "apple_pie", "baklava", "cannoli", "donuts", "edamame", "french_fries", "gyoza", "hot_dog", "ice_cream", "pizza",
)  # fmt: skip
CONTINUOUS = dict(time="continuous", schedule="cosine", prediction="x_0", log_snr_range=(-9.0, 9.0))
STEPS = 5


def write(path: Path, *, channels: int = 32, classes: int | None = len(DISHES), image_size: int = 8) -> Path:
    """Writes random weights; those that start at zero are filled, too, so that the network matters."""
    config = tiny.config(path.parent)
    with config.unlocked():
        config.data.image_size = image_size
        config.diffusion = CONTINUOUS
        config.model.model_channels = channels
        config.model.num_classes = classes
        config.model.null_label = classes is not None
        config.sample.steps, config.sample.spacing = STEPS, "log_snr"
        if classes is not None:
            config.sample.guidance, config.sample.interval = 2.0, (-4.0, 4.0)
    params = jax.eval_shape(build.make_diffusion_model(config).network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for name, leaf in params.items()}
    about = dict(config=to_json(config), class_names=DISHES, step=4, images_seen=16, weights="ema_0.995")
    write_weights(path, params, about, half=False)
    return path
