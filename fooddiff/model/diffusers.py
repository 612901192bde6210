"""Which of our UNets the `UNet2DModel` of Hugging Face's diffusers computes, and its parameter names, both ways.

Knows settings, names and axes only. Facts about diffusers are of version 0.42.1.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fooddiff.arrays import Params
from fooddiff.model.names import check_fit
from fooddiff.model.unet import NORM_EPSILON, UNet, heads_of, make_levels

PLAIN_CLASS = "UNet2DModel"
HEADS_CLASS = "UNet2DModelWithHeads"
"""A subclass that an export brings with it: it has another `attention_head_dim` for every level."""

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet.__init__).parameters.items()
    if parameter.default is not parameter.empty
}

_TOP = {
    "time_in": "time_embedding.linear_1",
    "time_out": "time_embedding.linear_2",
    "label": "class_embedding",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "down.0.layers.0": "conv_in",
}
_RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embed": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "out": "to_out.0"}  # to_qkv stands for to_q, to_k and to_v
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def unet_config(model: Mapping[str, Any], *, image_size: int, in_channels: int, out_channels: int) -> dict[str, Any]:
    """The arguments of the `UNet2DModel` that computes what a UNet of ours does, as JSON types.

    Args:
        model: config.model; fields that it lacks have UNet's defaults.
        image_size: height and width of the images.
        in_channels: of the images.
        out_channels: of the output.

    Returns:
        The content of the model's config.json. Its `_class_name` is `HEADS_CLASS` where the heads of attention have
        other widths on other levels; `attention_head_dim` is then a list, which `UNet2DModel` itself cannot take.

    Raises:
        ValueError: no setting of `UNet2DModel` computes the same; names the field.
    """
    settings = _DEFAULTS | dict(model)
    channels, mult = settings["model_channels"], tuple(settings["channel_mult"])
    levels = make_levels(
        image_size=image_size, model_channels=channels, channel_mult=mult,
        attention_resolutions=settings["attention_resolutions"],
    )  # fmt: skip
    learned = settings["conv_resample"] or settings["resblock_updown"]
    for field, fits, why in (
        ("low_res", not settings["low_res"], "it has no low-resolution image as a condition"),
        ("channel_mult", mult[0] == 1, "its first level is as wide as its embedding of time: the first entry is 1"),
        ("stem_channels", settings["stem_channels"] in (None, channels), "its stem is as wide as its first level"),
        ("conv_resample", learned, "it resamples with parameters"),
        (
            "num_heads_upsample",
            settings["head_channels"] or settings["num_heads_upsample"] in (None, settings["num_heads"]),
            "it has as many heads on the way up as on the way down",
        ),
    ):
        if not fits:
            raise ValueError(
                f"config.model.{field} is {settings[field]!r}, which diffusers' UNet2DModel cannot compute: {why}"
            )
    heads = [level.channels // _heads(settings, level.channels) for level in levels]
    used = {width for width, level in zip(heads, levels, strict=True) if level.attends} | {heads[-1]}  # of the middle
    within = settings["resblock_updown"]
    without_attention = "ResnetDownsampleBlock2D" if within else "DownBlock2D"
    down = ["AttnDownBlock2D" if level.attends else without_attention for level in levels]
    return {
        "_class_name": PLAIN_CLASS if len(used) == 1 else HEADS_CLASS,
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,  # cosines first
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": settings["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "downsample_type": "resnet" if within else "conv",
        "upsample_type": "resnet" if within else "conv",
        "dropout": settings["dropout"],
        "act_fn": "silu",
        "attention_head_dim": heads[-1] if len(used) == 1 else heads,
        "norm_num_groups": settings["norm_groups"],
        "attn_norm_num_groups": settings["norm_groups"],  # otherwise the middle's attention would have no norm
        "norm_eps": NORM_EPSILON,
        "resnet_time_scale_shift": "scale_shift" if settings["scale_shift_norm"] else "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": settings["num_classes"] and settings["num_classes"] + settings["null_label"],
    }


def diffusers_name(name: str, num_res_blocks: int) -> str:
    """Translates one of our parameter names.

    Args:
        name: for instance "down.1.layers.0.conv_in.kernel".
        num_res_blocks: of the UNet.

    Returns:
        For instance "down_blocks.0.resnets.0.conv1.weight". "to_qkv" in it stands for three tensors.
    """
    *modules, leaf = name.split(".")
    prefix = ".".join(modules)
    if prefix in _TOP:
        return f"{_TOP[prefix]}.{_LEAVES[leaf]}"
    match = re.fullmatch(r"(?:(down|up)\.(\d+)|middle)\.layers\.(\d+)\.(\w+)", prefix)
    path, stage, layer, part = match.groups()
    attends = part in _ATTENTION
    part = (_ATTENTION if attends else _RESIDUAL).get(part, part)
    if path is None:
        block, place, resamples = "mid_block", 0 if attends else int(layer) // 2, False
    else:
        blocks = num_res_blocks + 1  # on the way down the resampling is a stage of its own, on the way up a layer
        level, place = divmod(int(stage) - (path == "down"), blocks)
        block = f"{path}_blocks.{level}"
        resamples = place == num_res_blocks if path == "down" else not attends and int(layer) > 0
    kind = f"{path}samplers.0" if resamples else f"{'attentions' if attends else 'resnets'}.{place}"
    return f"{block}.{kind}.{part}.{_LEAVES[leaf]}"


def to_diffusers(params: Params, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a UNet's parameters to diffusers' names and torch's layouts.

    Args:
        params: by our names.
        model: config.model, one that `unet_config` accepts.
    """
    settings = _DEFAULTS | dict(model)
    state_dict = {}
    for name, value in params.items():
        theirs, value = diffusers_name(name, settings["num_res_blocks"]), np.asarray(value)
        if "to_qkv" in theirs:
            for part, each in zip("qkv", _split(value, settings), strict=True):
                state_dict[theirs.replace("to_qkv", f"to_{part}")] = _to_torch_layout(theirs, each)
        else:
            state_dict[theirs] = _to_torch_layout(theirs, value)
    return state_dict


def from_diffusers(state_dict: Mapping[str, np.ndarray], like: Params, model: Mapping[str, Any]) -> Params:
    """Converts the state dict of a `UNet2DModel` to our parameters: the inverse of `to_diffusers`.

    Args:
        state_dict: arrays by diffusers' names.
        like: parameters of the network that is to receive them, or their shapes (`abstract_params`).
        model: config.model, one that `unet_config` accepts.

    Returns:
        Float32 parameters with the names and shapes of `like`.

    Raises:
        ValueError: the file is of another architecture; names the first tensors that do not fit.
    """
    settings = _DEFAULTS | dict(model)
    check_fit(state_dict, lambda params: to_diffusers(params, model), like)
    params = {}
    for name, leaf in like.items():
        theirs = diffusers_name(name, settings["num_res_blocks"])
        if "to_qkv" in theirs:
            third = (*leaf.shape[:-1], leaf.shape[-1] // 3)
            names = [theirs.replace("to_qkv", f"to_{part}") for part in "qkv"]
            parts = [_from_torch_layout(theirs, state_dict[name], third) for name in names]
            params[name] = _join(np.stack(parts), settings)
        else:
            params[name] = _from_torch_layout(theirs, state_dict[theirs], leaf.shape)
    return {name: np.asarray(value, np.float32) for name, value in params.items()}


def _heads(settings: Mapping[str, Any], channels: int) -> int:
    width = settings["head_channels"]
    return settings["num_heads"] if width is None else heads_of(channels, width)


def _split(qkv: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """[..., 3 c] in the order of our channels to [3, ..., c]: queries, keys and values, each head by head."""
    *rest, width = qkv.shape
    heads = _heads(settings, width // 3)
    if settings["new_attention_order"]:
        qkv = np.moveaxis(qkv.reshape(*rest, 3, -1), -2, 0)
    else:
        qkv = np.moveaxis(qkv.reshape(*rest, heads, 3, -1), -2, 0)
    return qkv.reshape(3, *rest, width // 3)


def _join(parts: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `_split`."""
    _, *rest, channels = parts.shape
    heads = _heads(settings, channels)
    if settings["new_attention_order"]:
        return np.moveaxis(parts, 0, -2).reshape(*rest, 3 * channels)
    return np.moveaxis(parts.reshape(3, *rest, heads, -1), 0, -2).reshape(*rest, 3 * channels)


def _to_torch_layout(theirs: str, value: np.ndarray) -> np.ndarray:
    if theirs == "class_embedding.weight":
        return value
    if ".to_" in theirs and value.ndim == 4:  # attention's 1x1 convolutions are linear maps there
        return value.reshape(value.shape[-2:]).T
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _from_torch_layout(theirs: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if theirs == "class_embedding.weight":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T.reshape(shape)
