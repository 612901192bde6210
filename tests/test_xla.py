import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.keys import stream

PROGRAM = "import jax; from fooddiff import xla; xla.keep_compiled(); print(jax.config.jax_compilation_cache_dir)"


def folder(**environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR",)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    assert folder(XDG_CACHE_HOME=str(tmp_path)).startswith(f"{tmp_path}/fooddiff/xla/")
    assert folder(HOME=str(tmp_path), XDG_CACHE_HOME="").startswith(f"{tmp_path}/.cache/fooddiff/xla/")
    assert folder(JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/mine") == f"{tmp_path}/mine"


@pytest.fixture
def factors():
    key = jax.random.key(0)
    shapes = {"x": (3, 5, 8), "kernel": (8, 4), "gradient": (3, 5, 4)}
    return tuple(jax.random.normal(stream(key, name), shape) for name, shape in shapes.items())


def test_products_of_linear_layers_and_their_gradients_are_those_of_jax(factors):
    *inputs, weight = factors

    def objective(multiply):
        dimensions = (((2,), (0,)), ((), ()))
        return lambda x, kernel: (weight * jnp.tanh(multiply(x, kernel, dimensions))).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(objective(multiply), argnums=(0, 1)))(*inputs)
        for multiply in (xla.dot_general(jnp.float32), jax.lax.dot_general)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_products_in_bfloat16_round_their_factors_and_nothing_else(factors):
    def product_and_gradients(x, kernel, gradient):
        product, backward = jax.vjp(lambda x, kernel: xla.matmul(x, kernel, jnp.bfloat16), x, kernel)
        return product, *backward(gradient)

    ours = jax.jit(product_and_gradients)(*factors)
    x, kernel, gradient = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in factors)
    expected = x @ kernel, gradient @ kernel.T, np.einsum("npi,npo->io", x, gradient)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_compiled_for_another_platform_is_for_it():
    assert (xla.platform(), xla.activation_dtype(jnp.bfloat16), xla.unroll_gradients()) == ("cpu", jnp.float32, True)
    with xla.compiling_for("tpu"):
        assert (xla.activation_dtype(jnp.bfloat16), xla.unroll_gradients()) == (jnp.bfloat16, False)
    assert xla.platform() == "cpu"
