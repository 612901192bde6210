"""Parameter names and layouts of OpenAI's improved-diffusion and guided-diffusion checkpoints, both ways.

Knows names and axes only; reading a file is `torch_file`'s task.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fooddiff.arrays import Params
from fooddiff.model.names import check_fit

NORM_GROUPS = 32
"""In how many groups OpenAI's UNet normalises its channels, whatever their number."""

_STAGES = [
    (r"^down\.(\d+)\.layers\.(\d+)", r"input_blocks.\1.\2"),
    (r"^middle\.layers\.(\d+)", r"middle_block.\1"),
    (r"^up\.(\d+)\.layers\.(\d+)", r"output_blocks.\1.\2"),
]
_LAYERS = {
    # outside the stages
    "time_in": "time_embed.0",
    "time_out": "time_embed.2",
    "label": "label_emb",
    "norm_out": "out.0",
    "conv_out": "out.2",
    # of a classifier
    "pool": "out.2",
    "pool.qkv": "out.2.qkv_proj",
    "pool.out": "out.2.c_proj",
    "pool.logits": "out.3",
}
_STAGE_LAYERS = {
    # residual block
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    # attention block
    "norm": "norm",
    "qkv": "qkv",
    "out": "proj_out",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "position": "positional_embedding",
}


def openai_name(name: str) -> str:
    """Translates one of our parameter names, for instance "down.1.layers.0.conv_in.kernel"."""
    *modules, leaf = name.split(".")
    prefix = ".".join(modules)
    for pattern, replacement in _STAGES:
        match = re.match(pattern, prefix)
        if match:
            stage, layer = match.expand(replacement), prefix[match.end() + 1 :]
            if layer == "conv":  # of a Downsample or an Upsample
                layer = "op" if stage.startswith("input") else "conv"
            else:
                layer = _STAGE_LAYERS.get(layer, layer)
            return ".".join(filter(None, [stage, layer, _LEAVES[leaf]]))
    return f"{_LAYERS[prefix]}.{_LEAVES[leaf]}"


def to_openai(params: Params) -> dict[str, np.ndarray]:
    """Converts parameters to OpenAI's names and torch's layouts (OIHW kernels, transposed matrices)."""
    return {openai_name(name): _to_torch_layout(name, np.asarray(value)) for name, value in params.items()}


def from_openai(state_dict: Mapping[str, np.ndarray], like: Params) -> Params:
    """Converts an OpenAI state dict to parameters.

    Args:
        state_dict: arrays by OpenAI's names.
        like: parameters of the network that is to receive them, or their shapes (`abstract_params`).

    Returns:
        Float32 parameters with the names and shapes of `like`.

    Raises:
        ValueError: the file is of another architecture; names the first tensors that do not fit.
    """
    check_fit(state_dict, to_openai, like)
    return {
        name: _from_torch_layout(name, state_dict[openai_name(name)].astype(np.float32, copy=False), leaf.shape)
        for name, leaf in like.items()
    }


def check_is_openais(model: Mapping[str, Any]) -> None:
    """Refuses a network that OpenAI's code does not have; what its norms are, no tensor of a checkpoint shows.

    Args:
        model: the config's section.

    Raises:
        ValueError: another kind of network, patches, or norms in another number of groups than 32.
    """
    if (network := model.get("network", "unet")) not in ("unet", "adm_encoder"):
        raise ValueError(f"config.model.network is {network!r}, but OpenAI's code has 'unet' and 'adm_encoder' alone")
    if (size := model.get("patch_size", 1)) != 1:
        raise ValueError(f"config.model.patch_size is {size}, but OpenAI's networks see single pixels: expected 1")
    if (groups := model["norm_groups"]) != NORM_GROUPS:
        raise ValueError(
            f"config.model.norm_groups is {groups}, but OpenAI's UNet always normalises in {NORM_GROUPS} groups: its "
            f"code would compute something else from these weights"
        )


def _to_torch_layout(name, value):
    if name.endswith((".qkv.kernel", ".out.kernel")):  # attention's linear maps are convolutions there: [out, in, 1]
        return value.reshape(value.shape[-2:]).T[..., None]
    if name == "pool.logits.kernel":
        return value.T[..., None, None]
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if name.endswith((".kernel", "pool.position")) else value


def _from_torch_layout(name, value, shape):
    if len(shape) == 4 and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim > 2:  # a linear map
        return value.reshape(value.shape[:2]).T.reshape(shape)
    return value.T if name.endswith((".kernel", "pool.position")) else value
