"""What differs by platform, in one place: compiler settings, and products that are fast. Imports nothing of ours."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_CPU_OPTIONS = {
    # XLA sends whole convolutions to YNNPACK by default, whose kernel gradients take about 2.5 times as long as
    # Eigen's; this keeps YNNPACK for single matmuls and reductions only.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}
_target: ContextVar[str | None] = ContextVar("target", default=None)


def platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"; the default backend, but within `compiling_for`."""
    return _target.get() or jax.default_backend()


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Within it, what is traced is meant for another platform than the default backend."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def keep_compiled() -> None:
    """Keeps compiled programs on the disk for later processes, in ~/.cache/fooddiff/xla.

    XDG_CACHE_HOME moves that folder, JAX_COMPILATION_CACHE_DIR names another one; an empty one switches the cache off.
    The folder is safe to delete at any time.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "fooddiff" / "xla" / _instruction_set()))


def _instruction_set() -> str:
    """Names what code for this machine's processor may use: hosts that share a home may differ in it."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:8]


def unroll_gradients() -> bool:
    """Whether a loop around gradients is to be unrolled: inside loops XLA:CPU computes them about 16 times slower.

    It brings convolutions to the form that its fast kernels take outside of loops only, and gradients need that.
    """
    return platform() == "cpu"


def jit(fun: Callable, **kwargs) -> Callable:
    """Compiles `fun` with `jax.jit` and the compiler options of the platform.

    Args:
        fun: a pure function of arrays.
        **kwargs: passed to `jax.jit` unchanged.

    Returns:
        The jitted function.
    """
    options = _CPU_OPTIONS if platform() == "cpu" else {}
    return jax.jit(fun, compiler_options=options, **kwargs)


def activation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What layers pass on that compute in `dtype`: float32 on the CPU, where all but products is slower in bfloat16."""
    return jnp.float32 if platform() == "cpu" else dtype


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Multiplies [..., i] by [i, o], with a gradient that is fast on the CPU.

    Factors, those of the gradient included, are rounded to `dtype`; sums are float32. On a CPU, products of bfloat16
    reach the processor's matrix unit (AMX) if both factors lie in memory row by row.

    Args:
        x: f[..., i].
        kernel: f[i, o].
        dtype: float32 or bfloat16.

    Returns:
        [..., o] in the dtype of x.
    """
    return _product(x, kernel, dtype).astype(x.dtype)


def _forward(x, kernel, dtype):
    return matmul(x, kernel, dtype), (x.astype(dtype), kernel)


def _backward(dtype, saved, gradient):
    x, kernel = saved
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    by_kernel, by_rows = kernel.astype(dtype).T, rows.T
    if platform() == "cpu":  # a product that a transposition is folded into takes up to 4 times as long
        if dtype == jnp.float32:  # but writing out the rows takes as long as it saves
            by_kernel = jax.lax.optimization_barrier(by_kernel)
        else:
            by_kernel, by_rows = _row_by_row(by_kernel), _row_by_row(by_rows)
    to_x = _product(columns, by_kernel, dtype).reshape(x.shape)
    return to_x.astype(gradient.dtype), _product(by_rows, columns, dtype).astype(kernel.dtype)


matmul.defvjp(_forward, _backward)


def _product(x, kernel, dtype):
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def _row_by_row(x):
    return with_layout_constraint(x, Layout((0, 1)))


def dot_general(dtype: jnp.dtype) -> Callable:
    """Makes what linear layers call in place of `jax.lax.dot_general`: `matmul` in `dtype`."""
    return lambda x, kernel, *_, **__: matmul(x, kernel, dtype)
