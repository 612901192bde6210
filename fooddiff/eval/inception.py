"""InceptionV3 as the Fréchet distance uses it: the TensorFlow graph of 2015-12-05 and its features.

Owns the network: `STAGES` is the architecture as a table, the functions below walk it. Szegedy et al. 2016
(arXiv 1512.00567), with the graph's own deviations: average pools leave the padding out of the mean, the last
block max-pools, 1008 classes, no auxiliary head. Does not own weights (weights.py) or resizing (resize.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fooddiff.arrays import Array, Float, Pixels
from fooddiff.eval.resize import Resize

Params = dict[str, dict[str, Array]]
"""Layer name -> {"kernel": f32[h, w, c_in, c_out], "bias": f32[c_out]}; "fc" has a kernel f32[2048, 1008]."""

IMAGE_SIZE = 299
NUM_CLASSES = 1008
DIMENSIONS = {
    "64": 64,
    "192": 192,
    "spatial": 17 * 17 * 7,
    "768": 768,
    "2048": 2048,
    "logits_unbiased": NUM_CLASSES,
    "logits": NUM_CLASSES,
}
"""Feature name -> d, from shallow to deep; logits_unbiased is the head without its bias.

"spatial" is not averaged over the image: the first 7 channels of `SPATIAL`, flattened, which guided-diffusion's
evaluator takes for its sFID (Nash et al. 2021, arXiv 2103.03841). Its other features are "2048" and "logits_unbiased".
"""

LOGITS = ("logits_unbiased", "logits")

_BN_EPSILON = 1e-3
_BN_PARAMETERS = ("weight", "bias", "running_mean", "running_var")  # gamma, beta, mean, variance


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, BatchNorm, ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"


@dataclass(frozen=True)
class MaxPool:
    """3x3 maximum."""

    stride: int
    padding: str


@dataclass(frozen=True)
class AvgPool:
    """3x3 mean with stride 1 over the pixels that exist: the padding is not counted."""


@dataclass(frozen=True)
class Concat:
    """Chains of layers that start from the same input; their outputs are joined along the channels."""

    branches: tuple["Chain", ...]


Layer = Conv | MaxPool | AvgPool | Concat
Chain = tuple[Layer, ...]


def _block_a(block: str, pool_channels: int) -> Concat:
    return Concat(
        (
            (Conv(f"{block}.branch1x1", 64, (1, 1)),),
            (Conv(f"{block}.branch5x5_1", 48, (1, 1)), Conv(f"{block}.branch5x5_2", 64, (5, 5))),
            (
                Conv(f"{block}.branch3x3dbl_1", 64, (1, 1)),
                Conv(f"{block}.branch3x3dbl_2", 96, (3, 3)),
                Conv(f"{block}.branch3x3dbl_3", 96, (3, 3)),
            ),
            (AvgPool(), Conv(f"{block}.branch_pool", pool_channels, (1, 1))),
        )
    )


def _block_b(block: str) -> Concat:
    return Concat(
        (
            (Conv(f"{block}.branch3x3", 384, (3, 3), 2, "VALID"),),
            (
                Conv(f"{block}.branch3x3dbl_1", 64, (1, 1)),
                Conv(f"{block}.branch3x3dbl_2", 96, (3, 3)),
                Conv(f"{block}.branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
            ),
            (MaxPool(2, "VALID"),),
        )
    )


def _block_c(block: str, channels: int) -> Concat:
    return Concat(
        (
            (Conv(f"{block}.branch1x1", 192, (1, 1)),),
            (
                Conv(f"{block}.branch7x7_1", channels, (1, 1)),
                Conv(f"{block}.branch7x7_2", channels, (1, 7)),
                Conv(f"{block}.branch7x7_3", 192, (7, 1)),
            ),
            (
                Conv(f"{block}.branch7x7dbl_1", channels, (1, 1)),
                Conv(f"{block}.branch7x7dbl_2", channels, (7, 1)),
                Conv(f"{block}.branch7x7dbl_3", channels, (1, 7)),
                Conv(f"{block}.branch7x7dbl_4", channels, (7, 1)),
                Conv(f"{block}.branch7x7dbl_5", 192, (1, 7)),
            ),
            (AvgPool(), Conv(f"{block}.branch_pool", 192, (1, 1))),
        )
    )


def _block_d(block: str) -> Concat:
    return Concat(
        (
            (
                Conv(f"{block}.branch3x3_1", 192, (1, 1)),
                Conv(f"{block}.branch3x3_2", 320, (3, 3), 2, "VALID"),
            ),
            (
                Conv(f"{block}.branch7x7x3_1", 192, (1, 1)),
                Conv(f"{block}.branch7x7x3_2", 192, (1, 7)),
                Conv(f"{block}.branch7x7x3_3", 192, (7, 1)),
                Conv(f"{block}.branch7x7x3_4", 192, (3, 3), 2, "VALID"),
            ),
            (MaxPool(2, "VALID"),),
        )
    )


def _block_e(block: str, pool: Layer) -> Concat:
    def split(name: str) -> Concat:
        return Concat(((Conv(f"{name}a", 384, (1, 3)),), (Conv(f"{name}b", 384, (3, 1)),)))

    return Concat(
        (
            (Conv(f"{block}.branch1x1", 320, (1, 1)),),
            (Conv(f"{block}.branch3x3_1", 384, (1, 1)), split(f"{block}.branch3x3_2")),
            (
                Conv(f"{block}.branch3x3dbl_1", 448, (1, 1)),
                Conv(f"{block}.branch3x3dbl_2", 384, (3, 3)),
                split(f"{block}.branch3x3dbl_3"),
            ),
            (pool, Conv(f"{block}.branch_pool", 192, (1, 1))),
        )
    )


STAGES: dict[str, Chain] = {
    "64": (
        Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
        Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
        Conv("Conv2d_2b_3x3", 64, (3, 3)),
        MaxPool(2, "VALID"),
    ),
    "192": (
        Conv("Conv2d_3b_1x1", 80, (1, 1), 1, "VALID"),
        Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
        MaxPool(2, "VALID"),
    ),
    "spatial": (
        _block_a("Mixed_5b", 32),
        _block_a("Mixed_5c", 64),
        _block_a("Mixed_5d", 64),
        _block_b("Mixed_6a"),
        _block_c("Mixed_6b", 128),
        _block_c("Mixed_6c", 160),
    ),
    "768": (
        _block_c("Mixed_6d", 160),
        _block_c("Mixed_6e", 192),
    ),
    "2048": (
        _block_d("Mixed_7a"),
        _block_e("Mixed_7b", AvgPool()),
        _block_e("Mixed_7c", MaxPool(1, "SAME")),
    ),
}
"""The layers from one feature to the next deeper one. All but "spatial" are the mean over the image after a stage."""

SPATIAL = Conv("Mixed_6d.branch1x1", 192, (1, 1))
"""What "spatial" shows of the block after its stage: "mixed_6/conv:0" in the graph."""
_SPATIAL_CHANNELS = 7


def required_parameters(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The parameters that the requested features depend on, under the names of the published weights.

    Args:
        names: feature names, keys of `DIMENSIONS`.

    Returns:
        Parameter name -> shape; kernels are OIHW, as published. ("64",) needs 29,024 numbers of weights.

    Raises:
        ValueError: a feature has no such name.
    """
    check_names(names)
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for stage, chain in _stages_for(names).items():
        ahead = (SPATIAL,) if stage == "spatial" and stage in names else ()
        for conv, c_in in _convs(chain + ahead, channels):
            shapes[f"{conv.name}.conv.weight"] = (conv.channels, c_in, *conv.kernel)
            shapes |= {f"{conv.name}.bn.{part}": (conv.channels,) for part in _BN_PARAMETERS}
        channels = _width(chain, channels)
    if set(LOGITS) & set(names):
        shapes["fc.weight"] = (NUM_CLASSES, channels)
    if "logits" in names:
        shapes["fc.bias"] = (NUM_CLASSES,)
    return shapes


def fold(weights: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Params:
    """Turns published weights into parameters for `features`: BatchNorm is folded into its convolution.

    In evaluation, gamma (W x - mean) / sqrt(var + 0.001) + beta is again a convolution; it is computed in
    float64.

    Args:
        weights: at least `required_parameters(names)`.
        names: feature names.

    Returns:
        The parameters, float32.
    """
    required = required_parameters(names)
    params: Params = {}
    for layer in (name.removesuffix(".conv.weight") for name in required if name.endswith(".conv.weight")):
        w = np.asarray(weights[f"{layer}.conv.weight"], np.float64)
        gamma, beta, mean, var = (np.asarray(weights[f"{layer}.bn.{part}"], np.float64) for part in _BN_PARAMETERS)
        scale = gamma / np.sqrt(var + _BN_EPSILON)
        kernel = (w * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        params[layer] = {"kernel": kernel, "bias": beta - mean * scale}
    if "fc.weight" in required:
        params["fc"] = {"kernel": np.transpose(weights["fc.weight"])}
    if "fc.bias" in required:
        params["fc"]["bias"] = np.asarray(weights["fc.bias"])
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def features(
    params: Params, pixels: Pixels, *, names: tuple[str, ...], resize: Resize
) -> dict[str, Float[Array, "n d"]]:
    """Computes Inception features of images; only the stages up to the deepest requested feature are run.

    The input is resized to 299x299 and mapped to (x - 128) / 128. Everything is float32, also on accelerators
    whose convolutions would round to fewer bits by default.

    Args:
        params: from `fold`.
        pixels: u8[n, h, w, 3].
        names: feature names, keys of `DIMENSIONS`.
        resize: a rule of resize.py.

    Returns:
        Name -> f32[n, d], in the order of `names`.

    Raises:
        ValueError: a feature has no such name.
    """
    check_names(names)
    x = (resize(pixels, IMAGE_SIZE) - 128) / 128
    out: dict[str, Array] = {}
    for stage, chain in _stages_for(names).items():
        x = _run(chain, params, x)
        if stage != "spatial":
            out[stage] = x.mean(axis=(1, 2))
        elif stage in names:
            out[stage] = _run((SPATIAL,), params, x)[..., :_SPATIAL_CHANNELS].reshape(x.shape[0], -1)
    if set(LOGITS) & set(names):
        out["logits_unbiased"] = jnp.dot(out["2048"], params["fc"]["kernel"], precision=lax.Precision.HIGHEST)
    if "logits" in names:
        out["logits"] = out["logits_unbiased"] + params["fc"]["bias"][None]
    return {name: out[name] for name in names}


def check_names(names: tuple[str, ...]) -> None:
    """Refuses feature names that do not exist.

    Raises:
        ValueError: names the feature and the allowed set.
    """
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        raise ValueError(
            f"{', '.join(map(repr, unknown)) or 'nothing'} is not a set of Inception features; "
            f"choose from {', '.join(DIMENSIONS)}"
        )


def _stages_for(names: tuple[str, ...]) -> dict[str, Chain]:
    stages = list(STAGES)
    deepest = max(stages.index(name) if name in stages else len(stages) - 1 for name in names)
    return {stage: STAGES[stage] for stage in stages[: deepest + 1]}


def _convs(chain: Chain, channels: int):
    """Yields every convolution of a chain with the number of channels that it reads."""
    for layer in chain:
        match layer:
            case Conv():
                yield layer, channels
            case Concat(branches):
                for branch in branches:
                    yield from _convs(branch, channels)
        channels = _width((layer,), channels)


def _width(chain: Chain, channels: int) -> int:
    """The number of channels that leave a chain."""
    for layer in chain:
        match layer:
            case Conv():
                channels = layer.channels
            case Concat(branches):
                channels = sum(_width(branch, channels) for branch in branches)
    return channels


def _run(chain: Chain, params: Params, x: Array) -> Array:
    for layer in chain:
        match layer:
            case Conv(name, _, _, stride, padding):
                x = _conv(params[name], x, stride, padding)
            case MaxPool(stride, padding):
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)
            case AvgPool():
                x = _avg_pool(x)
            case Concat(branches):
                x = jnp.concatenate([_run(branch, params, x) for branch in branches], axis=-1)
    return x


def _conv(p: dict[str, Array], x: Array, stride: int, padding: str) -> Array:
    y = lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.maximum(y + p["bias"][None, None, None], 0)


def _avg_pool(x: Array) -> Array:
    total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(n, np.float32), np.ones(3, np.float32), "same") for n in x.shape[1:3])
    return total / np.outer(rows, columns)[None, :, :, None]
