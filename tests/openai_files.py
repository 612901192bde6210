"""State dicts in OpenAI's format with random weights, for any config."""

import jax
import numpy as np

from fooddiff import build
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.network import abstract_params
from fooddiff.model.openai import to_openai


def random_params(config, seed=0):
    """Parameters of config's model, of a size that keeps outputs near 1, by name."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(build.make_diffusion_model(config).network)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), shapes)


def write_random_pt(path, config, seed=0):
    """Writes such parameters as OpenAI's programs would, and returns them."""
    params = random_params(config, seed)
    write_state_dict(path, to_openai(params))
    return params
