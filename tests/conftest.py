"""Every test runs on two fake CPU devices, with JAX's own checks switched on.

Programs are compiled as fast as XLA can, since compiling is most of what tests do: without LLVM's optimiser, and with
the older code generator. `test_end_to_end` compiles as users do. Equal programs are compiled once per session, in all
its processes, and traced once per process. Each of pytest-xdist's workers keeps to a core, with what it starts: XLA's
threads of several workers on the same cores wait for each other.
"""

import gc
import os
import tempfile

import hypothesis
import jax

pytest_plugins = ["tests.data_fixtures", "tests.tiny_runs", "tests.traced_once"]

MINUTES = ("test_end_to_end", "test_eval_command", "test_notebook", "test_processes")
"""Files with tests of a minute or more, which begin first, so that none of them is alone at the end."""

FAST_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
_cache = tempfile.TemporaryDirectory(prefix="fooddiff-xla-")


def pytest_configure(config):
    if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=2", FAST_TO_COMPILE]
    compiled = os.environ.setdefault("FOODDIFF_TEST_CACHE", _cache.name)  # workers inherit it
    os.environ |= {
        "XLA_FLAGS": " ".join(dict.fromkeys(" ".join(flags).split())),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_debug_key_reuse", True)
    hypothesis.settings.register_profile("any machine", deadline=None)  # how fast it is, is not tested
    hypothesis.settings.load_profile("any machine")
    gc.set_threshold(50_000)  # tracing makes many objects, and few of them are garbage


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in MINUTES)
