"""Compiler settings by platform, in one place. Imports nothing of ours."""

from collections.abc import Callable

import jax

_CPU_OPTIONS = {
    # XLA sends whole convolutions to YNNPACK by default, whose kernel gradients take about 2.5 times as long as
    # Eigen's; this keeps YNNPACK for single matmuls and reductions only.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}


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
