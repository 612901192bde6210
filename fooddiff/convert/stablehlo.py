"""Compiled functions with their weights inside, which run wherever JAX does, without this program.

`denoiser.stablehlo` is a `jax.export` artifact for a batch of any size, on CPU, CUDA or TPU. `config.json` beside it
says what it takes and gives, and along which levels of noise to sample. Latents have `decoder.stablehlo`, too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fooddiff import build
from fooddiff.diffusion import continuous, discrete
from fooddiff.diffusion.denoiser import clipped
from fooddiff.runs.load import TrainedModel
from fooddiff.runs.workdir import to_json, write_json

PLATFORMS = ("cpu", "cuda", "tpu")
DENOISER, DECODER = "denoiser.stablehlo", "decoder.stablehlo"

USE = """\
import json, pathlib
import jax, numpy as np
from jax import export

folder = pathlib.Path(FOLDER)
about = json.loads((folder / "config.json").read_text())
denoise = jax.jit(export.deserialize(bytearray((folder / "denoiser.stablehlo").read_bytes())).call)
n, rng = 4, np.random.default_rng(0)
x_t = rng.standard_normal((n, *about["shape"]), np.float32)
{labels}for step in about["steps"]:  # DDIM
    level = np.full(n, step["level"], about["level_dtype"])
    x_0, eps = denoise(x_t, level{y})
    x_t = np.float32(step["next_alpha"]) * x_0 + np.float32(step["next_sigma"]) * eps
{decode}
"""
PIXELS = """images = np.round((np.clip(x_t, -1, 1) + 1) * 127.5).astype(np.uint8)"""
LATENTS = """\
decode = export.deserialize(bytearray((folder / "decoder.stablehlo").read_bytes())).call
images = np.asarray(decode(x_t))  # uint8"""


def write_folder(folder: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> str:
    """Writes a denoiser, and what one must know to use it.

    Arguments and result are those of `exporting.Format.write`.

    Raises:
        ValueError: the model is no denoiser, or one for super-resolution.
    """
    config, model = trained.config, trained.model
    if (task := build.task_of(config)) != "diffusion":
        raise ValueError(f"config.task is {task!r}: --format=stablehlo is for models of the task 'diffusion'")
    if model.low_res is not None:
        raise ValueError(
            "config.low_res is set: --format=stablehlo is for models that draw by themselves, and this one enlarges "
            "images. Export it to a .safetensors or .pt file"
        )
    conditional = model.num_classes is not None
    shape = model.codec.shape
    denoise, level_type = _denoise(model, params)
    arguments = [(shape, jnp.float32), ((), level_type), *([((), jnp.int32)] if conditional else [])]
    _write(folder / DENOISER, denoise, arguments)
    if model.codec.tensors:
        _write(folder / DECODER, partial(model.codec.decode, params), [(shape, jnp.float32)])
    about = {
        "format": 1,
        "inputs": {
            "x_t": f"float32[n, {', '.join(map(str, shape))}]",
            "level": f"{np.dtype(level_type).name}[n], {'log SNR' if model.process is None else 'timestep'}",
            **({"y": "int32[n], class id"} if conditional else {}),
        },
        "outputs": ["x_0", "eps"],
        "shape": list(shape),
        "level_dtype": np.dtype(level_type).name,
        "steps": _steps(model, config),
        "class_names": list(trained.class_names) if conditional else None,
        "null_label": model.null_label,
        "step": trained.step,
        "weights": trained.weights,
        "jax": jax.__version__,
        "config": to_json(config),
    }
    write_json(folder / "config.json", about)
    return USE.format(
        labels="y = np.arange(n, dtype=np.int32) % len(about['class_names'])\n" if conditional else "",
        y=", y" if conditional else "",
        decode=LATENTS if model.codec.tensors else PIXELS,
    )


def _denoise(model: build.DiffusionModel, params: Mapping[str, np.ndarray]) -> tuple[Callable, type]:
    """(x_t, level, y) -> (x_0, eps), and the type of its levels: log SNRs, or timesteps of a discrete process."""
    denoiser = model.denoiser(partial(model.network.apply, params))
    denoiser = clipped(denoiser) if model.codec.bounded else denoiser
    continuously = model.process is None
    level_of = continuous.level_of if continuously else partial(discrete.level_at, model.process)

    def denoise(x_t, level, *y):
        prediction = denoiser(x_t, level_of(level), {"y": y[0]} if y else {})
        return prediction.x_0, prediction.eps

    return denoise, jnp.float32 if continuously else jnp.int32


def _steps(model: build.DiffusionModel, config) -> list[dict[str, Any]]:
    """The levels of config.sample, the noisiest first, and where each step leads."""
    steps = model.steps(build.sampler_spec(config.sample))
    levels = np.asarray(steps.level.log_snr)
    if model.process is not None:
        levels = np.abs(np.asarray(model.process.log_snr)[:, None] - levels).argmin(axis=0)
    columns = {
        "level": levels,
        "alpha": steps.level.alpha,
        "sigma": steps.level.sigma,
        "next_alpha": steps.next.alpha,
        "next_sigma": steps.next.sigma,
    }
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _write(path: Path, function: Callable, arguments: list[tuple[tuple[int, ...], type]]) -> None:
    """Exports a function of arrays whose first axis is n, any number."""
    (n,) = export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct((n, *shape), dtype) for shape, dtype in arguments]
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    path.write_bytes(exported.serialize())
