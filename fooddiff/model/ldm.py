"""Names and layouts of other programs' autoencoder checkpoints, both ways: latent-diffusion's and diffusers'.

Knows names and axes only.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fooddiff.arrays import Params
from fooddiff.model.names import check_fit


class Naming(NamedTuple):
    """How a program names the parameters of an autoencoder."""

    places: tuple[tuple[str, str], ...]  # pattern of our module path -> its path
    block: dict[str, str]  # layers of a residual block
    attention: dict[str, str]  # layers of an attention block
    norm_out: str  # the last norm of encoder and decoder
    coarsest_first: bool  # how it counts the decoder's levels
    linear_attention: bool  # whether attention's layers are matrices, not 1x1 convolutions


_BLOCK = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2"}
_LDM = Naming(
    places=(
        (r"encoder\.levels\.(\d+)", r"encoder.down.\1"),
        (r"decoder\.levels\.(\d+)", r"decoder.up.\1"),
        (r"(encoder.*)\.resample", r"\1.downsample"),
        (r"(decoder.*)\.resample", r"\1.upsample"),
        (r"(.*)\.blocks\.(\d+)", r"\1.block.\2"),
        (r"(.*)\.attentions\.(\d+)", r"\1.attn.\2"),
        (r"(.*)\.middle\.first", r"\1.mid.block_1"),
        (r"(.*)\.middle\.attention", r"\1.mid.attn_1"),
        (r"(.*)\.middle\.last", r"\1.mid.block_2"),
    ),
    block=_BLOCK | {"skip": "nin_shortcut"},
    attention={"out": "proj_out"},
    norm_out="norm_out",
    coarsest_first=False,
    linear_attention=False,
)
_DIFFUSERS = Naming(
    places=(
        (r"encoder\.levels\.(\d+)", r"encoder.down_blocks.\1"),
        (r"decoder\.levels\.(\d+)", r"decoder.up_blocks.\1"),
        (r"(encoder.*)\.resample", r"\1.downsamplers.0"),
        (r"(decoder.*)\.resample", r"\1.upsamplers.0"),
        (r"(.*)\.blocks\.(\d+)", r"\1.resnets.\2"),
        (r"(.*)\.middle\.first", r"\1.mid_block.resnets.0"),
        (r"(.*)\.middle\.attention", r"\1.mid_block.attentions.0"),
        (r"(.*)\.middle\.last", r"\1.mid_block.resnets.1"),
    ),
    block=_BLOCK | {"skip": "conv_shortcut"},
    attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    norm_out="conv_norm_out",
    coarsest_first=True,
    linear_attention=True,
)
_DIFFUSERS_OLD = _DIFFUSERS._replace(
    attention={"norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn"}
)

NORM_GROUPS = 32  # of both programs; no tensor of a checkpoint shows them
NAMINGS = {"ldm": _LDM, "diffusers": _DIFFUSERS, "diffusers_old": _DIFFUSERS_OLD}
"""latent-diffusion and Stable Diffusion; diffusers; diffusers before it renamed its attention layers."""

_AROUND = {"to_latent": "quant_conv", "from_latent": "post_quant_conv", "codebook": "quantize.embedding"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_LAYER = re.compile(r"(?P<place>.*(?:blocks\.\d+|attentions\.\d+|middle\.\w+))\.(?P<layer>\w+)")
_PARTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|quantize)\.")
_BLOCKS_OUT = re.compile(
    r"encoder\.(?:down|down_blocks)\.(?P<level>\d+)\.(?:block|resnets)\.(?P<block>\d+)\.conv2\.weight"
)
_ATTENTIONS = re.compile(r"encoder\.(?:down|down_blocks)\.(?P<level>\d+)\.(?:attn|attentions)\.")
_PREFIX = "first_stage_model."  # of the autoencoder inside a latent diffusion model


def to_state_dict(params: Params, naming: str) -> dict[str, np.ndarray]:
    """Converts an autoencoder's parameters to another program's names and torch's layouts.

    Args:
        params: the parameters of an `Autoencoder`.
        naming: one of `NAMINGS`.

    Returns:
        Arrays by name.
    """
    names = _names(params, naming)
    return {names[name]: _to_torch_layout(name, np.asarray(value), naming) for name, value in params.items()}


def from_state_dict(state_dict: Mapping[str, np.ndarray], like: Params) -> Params:
    """Converts another program's autoencoder to parameters; which of `NAMINGS` it has is seen from its names.

    Of a whole latent diffusion model, the first stage is taken. What training left in the file besides the autoencoder
    (losses, averages) is ignored.

    Args:
        state_dict: arrays by name.
        like: parameters of the `Autoencoder` that is to receive them, or their shapes (`abstract_params`).

    Returns:
        Float32 parameters with the names and shapes of `like`.

    Raises:
        ValueError: the file is of another architecture; names the first tensors that do not fit.
    """
    found = _first_stage(state_dict)
    naming = max(NAMINGS, key=lambda naming: len(set(_names(like, naming).values()) & found.keys()))
    check_fit(found, partial(to_state_dict, naming=naming), like)
    names = _names(like, naming)
    return {
        name: _from_torch_layout(found[names[name]].astype(np.float32, copy=False), leaf.shape)
        for name, leaf in like.items()
    }


def is_of_autoencoder(name: str) -> bool:
    """Whether a state dict's entry may be a parameter of an autoencoder, alone or in a latent diffusion model."""
    return _PARTS.match(name.removeprefix(_PREFIX)) is not None


def settings_of(state_dict: Mapping[str, np.ndarray], image_size: int) -> dict[str, Any]:
    """The arguments of `Autoencoder` that names and shapes of another program's state dict show.

    Args:
        state_dict: arrays by name.
        image_size: in pixels, which `attention_resolutions` refer to.

    Raises:
        ValueError: it holds no such autoencoder.
    """
    found = _first_stage(state_dict)
    for name, ndim in {
        "encoder.conv_in.weight": 4,
        "post_quant_conv.weight": 4,
        "quantize.embedding.weight": 2,
    }.items():
        if (name not in found and ndim == 4) or (name in found and found[name].ndim != ndim):
            raise ValueError(
                f"the file holds no autoencoder of latent-diffusion or of diffusers' AutoencoderKL with quant "
                f"convolutions: it has no {name} of {ndim} axes"
            )
    blocks = [(match, found[match[0]].shape[0]) for name in found if (match := _BLOCKS_OUT.fullmatch(name))]
    if not blocks:
        raise ValueError("the file holds no autoencoder: its encoder has no residual blocks")
    base = found["encoder.conv_in.weight"].shape[0]
    widths = {int(match["level"]): width for match, width in sorted(blocks, key=lambda block: int(block[0]["level"]))}
    attending = {int(match["level"]) for name in found if (match := _ATTENTIONS.match(name))}
    codes = found.get("quantize.embedding.weight")
    z_channels, latent_channels = found["post_quant_conv.weight"].shape[:2]
    return dict(
        model_channels=base,
        channel_mult=tuple(width // base if width % base == 0 else width / base for width in widths.values()),
        num_res_blocks=1 + max(int(match["block"]) for match, _ in blocks),
        attention_resolutions=tuple(image_size >> level for level in sorted(attending)),
        z_channels=z_channels,
        latent_channels=latent_channels,
        num_codes=None if codes is None else codes.shape[0],
        norm_groups=NORM_GROUPS,
    )


def _first_stage(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in state_dict) else ""
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and is_of_autoencoder(name)
    }


def _names(params: Params, naming: str) -> dict[str, str]:
    """Our name -> the other program's, for all parameters of an autoencoder."""
    levels = 1 + max(int(match[1]) for name in params if (match := re.match(r"decoder\.levels\.(\d+)", name)))
    return {name: _name(name, NAMINGS[naming], levels) for name in params}


def _name(name: str, naming: Naming, levels: int) -> str:
    if name == "codebook":
        return f"{_AROUND[name]}.weight"
    path, leaf = name.rsplit(".", 1)
    if path in _AROUND:
        return f"{_AROUND[path]}.{_LEAVES[leaf]}"
    if naming.coarsest_first:
        path = re.sub(r"^decoder\.levels\.(\d+)", lambda match: f"decoder.levels.{levels - 1 - int(match[1])}", path)
    if match := _LAYER.fullmatch(path):
        attends = "attention" in match["place"]
        layers = naming.attention if attends else naming.block
        path = f"{match['place']}.{layers.get(match['layer'], match['layer'])}"
    elif path.endswith("norm_out"):
        path = path.replace("norm_out", naming.norm_out)
    for pattern, replacement in naming.places:
        path = re.sub(f"^{pattern}", replacement, path)
    return f"{path}.{_LEAVES[leaf]}"


def _to_torch_layout(name: str, value: np.ndarray, naming: str) -> np.ndarray:
    if value.ndim != 4:
        return value
    value = value.transpose(3, 2, 0, 1)
    return value[..., 0, 0] if NAMINGS[naming].linear_attention and ".attention" in name else value


def _from_torch_layout(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) != 4:
        return value
    return value.T.reshape(shape) if value.ndim == 2 else value.transpose(2, 3, 1, 0)
