"""A network as two pure functions over a flat dict of named arrays: the only place that splits and merges modules."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from fooddiff.arrays import Key, Params
from fooddiff.keys import Rngs


class Network(NamedTuple):
    """A network without its parameters."""

    init: Callable[[Key], Params]  # key -> {"down.1.layers.0.conv_in.kernel": f32[...], ...}
    apply: Callable[..., Any]  # (params, *inputs of the module, method=None, dropout_key=None) -> its output


def make_network(module: Callable[..., nnx.Module], **arguments: Any) -> Network:
    """Builds a module as pure functions.

    Args:
        module: the class; its variables are all nnx.Param.
        **arguments: those of its constructor except `rngs`.

    Returns:
        The network. Parameter names are the module path joined with dots. A module that is more than one function has
        them as methods: `apply(params, x, method=Autoencoder.encode)`.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: module(**arguments, rngs=Rngs(jax.random.key(0)))), nnx.Param)
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    names = {path: ".".join(map(str, path)) for path in paths}

    def init(key: Key) -> Params:
        state = nnx.state(module(**arguments, rngs=Rngs(key)), nnx.Param)
        return {names[path]: param[...] for path, param in nnx.to_flat_state(state)}

    def apply(params: Params, *inputs: Any, method: Callable | None = None, dropout_key: Key | None = None) -> Any:
        state = nnx.from_flat_state([(path, nnx.Param(params[names[path]])) for path in paths])
        merged = nnx.merge(graphdef, state)
        return (merged if method is None else partial(method, merged))(*inputs, dropout_key=dropout_key)

    return Network(init, apply)


def abstract_params(network: Network) -> Params:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(network.init, jax.random.key(0))
