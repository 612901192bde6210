"""Compiler settings by platform, in one place. Imports nothing of ours."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import jax

_CPU_OPTIONS = {
    # XLA sends whole convolutions to YNNPACK by default, whose kernel gradients take about 2.5 times as long as
    # Eigen's; this keeps YNNPACK for single matmuls and reductions only.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}


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
    return jax.default_backend() == "cpu"


def jit(fun: Callable, **kwargs) -> Callable:
    """Compiles `fun` with `jax.jit` and the compiler options of the default backend.

    Args:
        fun: a pure function of arrays.
        **kwargs: passed to `jax.jit` unchanged.

    Returns:
        The jitted function.
    """
    options = _CPU_OPTIONS if jax.default_backend() == "cpu" else {}
    return jax.jit(fun, compiler_options=options, **kwargs)


@jax.custom_vjp
def _matmul(x, kernel):
    return x @ kernel


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(saved, gradient):
    x, kernel = saved
    transposed = kernel.T
    if jax.default_backend() == "cpu":  # a product with a transposition folded in takes up to 4 times as long there
        transposed = jax.lax.optimization_barrier(transposed)
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return (columns @ transposed).reshape(x.shape), rows.T @ columns


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dot_general(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    """`jax.lax.dot_general` for linear layers: [..., i] times [i, o], with a gradient that is fast on the CPU."""
    return _matmul(x, kernel)
