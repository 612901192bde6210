"""Folders that Hugging Face's diffusers loads: a UNet2DModel, a scheduler and a small pipeline that knows both.

And the way back, from a UNet2DModel to our parameters.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from fooddiff import build
from fooddiff.arrays import Params
from fooddiff.files.safetensors_file import read_tensors
from fooddiff.model.diffusers import HEADS_CLASS, from_diffusers, to_diffusers, unet_config
from fooddiff.runs.load import TrainedModel
from fooddiff.runs.workdir import write_json

VERSION = "0.42.1"  # of diffusers, against which the tests compare
PYTHON = Path(__file__).parent / "huggingface"
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
ABSENT = {
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5, "act_fn": "silu",
    "resnet_time_scale_shift": "default", "center_input_sample": False, "time_embedding_type": "positional",
    "freq_shift": 0, "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "add_attention": True,
}  # fmt: skip
"""What a UNet2DModel takes for settings that its config.json lacks, as those of older versions may."""
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"

USE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)  # runs pipeline.py of this folder
images = pipe({classes}, generator=torch.manual_seed(0)).images
"""


def write_folder(folder: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> str:
    """Writes a model as `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads it.

    Arguments and result are those of `exporting.Format.write`.

    Raises:
        ValueError: diffusers cannot compute what this model does; names the field.
    """
    config = trained.config
    try:
        unet, scheduler = unet_of(config), scheduler_of(config)
    except ValueError as error:
        raise ValueError(f"{error}. Export it with --format=stablehlo, or to a .safetensors file") from error
    own_class = unet["_class_name"] == HEADS_CLASS
    names = None if trained.model.num_classes is None else dict(enumerate(trained.class_names))
    diffusion = config.diffusion
    index = {
        "_class_name": ["pipeline", "FooddiffPipeline"],
        "_diffusers_version": VERSION,
        "unet": ["unet" if own_class else "diffusers", unet["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "timestep_scale": 1000 / diffusion.timesteps if diffusion.rescale_timesteps else 1.0,
        "id2label": names,
        "null_label": trained.model.null_label,
    }
    write_json(folder / "model_index.json", index)
    shutil.copy(PYTHON / "pipeline.py", folder)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "unet" / CONFIG, unet)
    if own_class:
        shutil.copy(PYTHON / "unet.py", folder / "unet")
    state_dict = {name: np.ascontiguousarray(value) for name, value in to_diffusers(params, config.model).items()}
    (folder / "unet" / WEIGHTS).write_bytes(safetensors.numpy.save(state_dict, {"format": "pt"}))
    return USE.format(classes=[None] if names is None else json.dumps(trained.class_names[:2]))


def read_folder(folder: Path, config: ConfigDict, like: Params) -> Params:
    """Reads the weights of a `UNet2DModel`.

    Args:
        folder: with its config.json and `diffusion_pytorch_model.safetensors`.
        config: of ours, which must describe the same network.
        like: our parameters, or their shapes.

    Returns:
        Float32 parameters by our names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the network is another one, or a file is damaged; names the fields that differ.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the folder of a UNet2DModel")
    ours = unet_of(config)
    try:
        differing = _differences(json.loads((folder / CONFIG).read_text(encoding="utf-8")), ours)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    if differing:
        raise ValueError(f"the network in {folder} is not that of the config: {'; '.join(differing)}")
    return from_diffusers(read_tensors(folder / WEIGHTS), like, config.model)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In what a UNet2DModel's config.json differs from the one that an export of ours would have."""
    theirs = ABSENT | {name: value for name, value in theirs.items() if not name.startswith("_")}
    if theirs["attn_norm_num_groups"] is None and theirs["resnet_time_scale_shift"] == "default":
        theirs["attn_norm_num_groups"] = theirs["norm_num_groups"]
    names = [name for name in theirs | ours if not name.startswith("_") and name != "dropout"]
    return [
        f"{name} is {theirs.get(name)!r}, that of the config {ours.get(name)!r}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def unet_of(config: ConfigDict) -> dict[str, Any]:
    """The config.json of the UNet2DModel that is a config's network.

    Raises:
        ValueError: there is none; names the field.
    """
    _check(config)
    learned = config.diffusion.variance == "learned_range"
    channels = build.IMAGE_CHANNELS
    return unet_config(
        {name: value for name, value in config.model.items() if name not in ("network", "dtype", "remat")},
        image_size=config.data.image_size,
        in_channels=channels,
        out_channels=channels * (2 if learned else 1),
    ) | {"_diffusers_version": VERSION}


def scheduler_of(config: ConfigDict) -> dict[str, Any]:
    """The config of the DDPMScheduler that is a config's process with the ancestral sampler."""
    diffusion = config.diffusion
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": diffusion.timesteps,
        "trained_betas": build.SCHEDULES[diffusion.schedule](diffusion.timesteps).tolist(),
        "variance_type": diffusion.variance,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",  # from the first timestep to the last, as our own respacing
    }


def _check(config: ConfigDict) -> None:
    """Raises ValueError unless diffusers has a class for a config's network and its process."""
    for field, value, known in (
        ("task", build.task_of(config), ("diffusion",)),
        ("codec", "codec" in config and "an autoencoder", (False,)),
        ("low_res", "low_res" in config and "a small image", (False,)),
        ("model.network", config.model.get("network", "unet"), ("unet",)),
        ("diffusion.time", config.get("diffusion", {}).get("time", "discrete"), ("discrete",)),
        ("diffusion.prediction", config.get("diffusion", {}).get("prediction"), PREDICTIONS),
    ):
        if value not in known:
            expected = " or ".join(map(repr, known)) if known != (False,) else "none"
            raise ValueError(f"config.{field} is {value!r}, for which diffusers has no class: expected {expected}")
