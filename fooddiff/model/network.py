"""A network as two pure functions over a flat dict of named arrays: the only place that splits and merges modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from fooddiff.arrays import Array, Key, Params
from fooddiff.model.unet import UNet


class Network(NamedTuple):
    """A network without its parameters."""

    init: Callable[[Key], Params]  # key -> {"down.1.layers.0.conv_in.kernel": f32[...], ...}
    apply: Callable[..., Array]  # (params, x_t, t, y, *, dropout_key=None) -> f32[n, h, w, out_channels]


def make_network(**unet: Any) -> Network:
    """Builds a UNet as pure functions.

    Args:
        **unet: the arguments of `UNet` except `rngs`.

    Returns:
        The network. Parameter names are the module path joined with dots.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: UNet(**unet, rngs=nnx.Rngs(0))), nnx.Param)
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    names = {path: ".".join(map(str, path)) for path in paths}

    def init(key: Key) -> Params:
        state = nnx.state(UNet(**unet, rngs=nnx.Rngs(key)), nnx.Param)
        return {names[path]: param[...] for path, param in nnx.to_flat_state(state)}

    def apply(params: Params, x_t, t, y, *, dropout_key: Key | None = None) -> Array:
        state = nnx.from_flat_state([(path, nnx.Param(params[names[path]])) for path in paths])
        return nnx.merge(graphdef, state)(x_t, t, y, dropout_key=dropout_key)

    return Network(init, apply)


def abstract_params(network: Network) -> Params:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(network.init, jax.random.key(0))
