import os
import subprocess
import sys

PROGRAM = "import jax; from fooddiff import xla; xla.keep_compiled(); print(jax.config.jax_compilation_cache_dir)"


def folder(**environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR",)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    assert folder(XDG_CACHE_HOME=str(tmp_path)).startswith(f"{tmp_path}/fooddiff/xla/")
    assert folder(HOME=str(tmp_path), XDG_CACHE_HOME="").startswith(f"{tmp_path}/.cache/fooddiff/xla/")
    assert folder(JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/mine") == f"{tmp_path}/mine"
