"""TAESD (Ollin Boer Bohan): tiny autoencoders in the latent spaces of larger ones, of images 8 times smaller a side.

Owns the layers and the names of the published files, not their reading. The family's networks for 32 times smaller
latents (taesana) have other layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fooddiff.arrays import Image, Key, Params
from fooddiff.keys import Rngs
from fooddiff.model.names import check_fit
from fooddiff.model.unet import GroupNorm, conv, double

HALVINGS = 3
BLOCKS = 3  # per resolution but the finest, which has one
SATURATION = 3.0  # latents stay below, as the decoder sees them
POOL_GROUPS = 4


class Pool(nnx.Module):
    """Tells every position how the features are scaled over the whole image: 1x1 conv, norm, ReLU, 1x1 conv."""

    def __init__(self, channels: int, *, dtype, rngs: Rngs):
        """Builds the layers."""
        self.widen = conv(channels, 4 * channels, 1, bias=False, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(4 * channels, POOL_GROUPS)
        self.narrow = conv(4 * channels, channels, 1, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """Applies the layers to x [n, h, w, c]."""
        return self.narrow(jax.nn.relu(self.norm(self.widen(x), silu=False)))


class Block(nnx.Module):
    """Three convolutions with ReLUs between them, plus what they got; then a ReLU."""

    def __init__(self, channels: int, *, pools: bool, dtype, rngs: Rngs):
        """Builds the block; with `pools` a `Pool` comes first."""
        self.pool = Pool(channels, dtype=dtype, rngs=rngs) if pools else None
        self.convs = nnx.List([conv(channels, channels, 3, dtype=dtype, rngs=rngs) for _ in range(3)])

    def __call__(self, x: Image) -> Image:
        """Applies the block to x [n, h, w, c]."""
        if self.pool is not None:
            x = x + self.pool(x)
        h = x
        for i, layer in enumerate(self.convs):
            h = layer(jax.nn.relu(h) if i else h)
        return jax.nn.relu(x + h)


class Stage(nnx.Module):
    """One resolution: blocks, and the convolution that leads here from the finer one, or from here to it."""

    def __init__(self, channels: int, num_blocks: int, *, stride: int | None, pools: bool, dtype, rngs: Rngs):
        """Builds the stage; `stride` None is for the finest, which has no such convolution."""
        layer = dict(dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(channels, pools=pools, **layer) for _ in range(num_blocks)])
        self.resample = None if stride is None else conv(channels, channels, 3, stride=stride, bias=False, **layer)

    def __call__(self, x: Image) -> Image:
        """Applies the blocks to x [n, h, w, c]."""
        for block in self.blocks:
            x = block(x)
        return x


class Half(nnx.Module):
    """The layers of an encoder or of a decoder; the stages come finest first."""

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, *, stride: int, pools: bool, dtype, rngs: Rngs
    ):  # fmt: skip
        """Builds the layers; `stride` is that of the convolutions between resolutions."""
        layer = dict(dtype=dtype, rngs=rngs)
        self.conv_in = conv(in_channels, channels, 3, **layer)
        stages = [Stage(channels, 1, stride=None, pools=False, **layer)]
        stages += [
            Stage(channels, BLOCKS, stride=stride, pools=pools and i == HALVINGS, **layer)
            for i in range(1, HALVINGS + 1)
        ]
        self.stages = nnx.List(stages)
        self.conv_out = conv(channels, out_channels, 3, dtype=jnp.float32, rngs=rngs)


class TAESD(nnx.Module):
    """A deterministic autoencoder: images to latents of about unit scale, and back."""

    def __init__(
        self,
        *,
        latent_channels: int,
        pools: bool,
        rngs: Rngs,
        channels: int = 64,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Builds the network.

        Args:
            latent_channels: 4 for the latents of Stable Diffusion 1, 2 and XL, 16 of 3 and of FLUX.1, 32 of FLUX.2.
            pools: whether the coarsest blocks see the scale of the features over the whole image (FLUX.2).
            rngs: where initial parameters are drawn from.
            channels: width of all layers.
            dtype: what convolutions compute in.
        """
        each = dict(pools=pools, dtype=dtype, rngs=rngs)
        self.encoder = Half(3, channels, latent_channels, stride=2, **each)
        self.decoder = Half(latent_channels, channels, 3, stride=1, **each)
        self.dtype = dtype

    def encode(self, x: Image, *, dropout_key: Key | None = None) -> Image:
        """Encodes.

        Args:
            x: f32[n, h, w, 3] in [-1, 1] (its authors' range is [0, 1]), h and w divisible by 8.
            dropout_key: of no effect.

        Returns:
            f32[n, h/8, w/8, latent_channels].

        Raises:
            ValueError: a size that is not divisible by 8.
        """
        _, h, w, _ = x.shape
        if h % 2**HALVINGS or w % 2**HALVINGS:
            raise ValueError(f"images of {h}x{w} cannot be encoded: expected multiples of {2**HALVINGS}")
        features = self.encoder.conv_in(((x + 1) / 2).astype(self.dtype))
        for stage in self.encoder.stages:
            features = stage(features if stage.resample is None else stage.resample(features))
        return self.encoder.conv_out(features.astype(jnp.float32))

    def decode(self, z: Image, *, dropout_key: Key | None = None) -> Image:
        """Decodes.

        Args:
            z: f32[n, h, w, latent_channels]; large values saturate.
            dropout_key: of no effect.

        Returns:
            f32[n, 8h, 8w, 3], nearly in [-1, 1].
        """
        features = self.decoder.conv_in((jnp.tanh(z / SATURATION) * SATURATION).astype(self.dtype))
        features = jax.nn.relu(features)
        for stage in reversed(self.decoder.stages):
            features = stage(features)
            features = features if stage.resample is None else stage.resample(double(features))
        return 2 * self.decoder.conv_out(features.astype(jnp.float32)) - 1


def settings_of(decoder: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `TAESD` for a published decoder.

    Raises:
        ValueError: the file is of another architecture.
    """
    first = decoder.get("1.weight")
    if first is None or first.ndim != 4:
        raise ValueError("the decoder is of another architecture: it has no convolution 1.weight of the latents")
    channels, latent_channels = first.shape[:2]
    return dict(
        latent_channels=latent_channels, channels=channels, pools=any(".pool." in name for name in decoder)
    )  # fmt: skip


def to_taesd(params: Params) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Converts parameters to the state dicts of encoder and decoder, by the published names and in torch's layouts."""
    halves = {"encoder": {}, "decoder": {}}
    for name, value in params.items():
        half, published = _published(name)
        halves[half][published] = _to_torch_layout(np.asarray(value))
    return halves["encoder"], halves["decoder"]


def from_taesd(encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray], like: Params) -> Params:
    """Converts the state dicts of an encoder and a decoder to parameters.

    Args:
        encoder: arrays by the published names.
        decoder: arrays by the published names.
        like: parameters of the `TAESD` that is to receive them, or their shapes (`abstract_params`).

    Returns:
        Float32 parameters with the names and shapes of `like`.

    Raises:
        ValueError: a file is of another architecture; names the first tensors that do not fit.
    """
    halves = {"encoder": encoder, "decoder": decoder}
    for i, state_dict in enumerate(halves.values()):
        check_fit(state_dict, lambda params, i=i: to_taesd(params)[i], like)
    params = {}
    for name in like:
        half, published = _published(name)
        params[name] = _from_torch_layout(halves[half][published].astype(np.float32, copy=False))
    return params


def _published(name: str) -> tuple[str, str]:
    """Which half, and the published name, which has places in a sequence of layers with and without parameters."""
    half, *path, leaf = name.split(".")
    leaf = "bias" if leaf == "bias" else "weight"
    encodes = half == "encoder"
    if path[0] in ("conv_in", "conv_out"):
        place = _FIRST[half] if path[0] == "conv_in" else _LAST[half]
        return half, f"{place}.{leaf}"
    stage, within = int(path[1]), path[2:]
    place = _STAGES[half][stage]
    if within == ["resample"]:
        return half, f"{place if encodes else place + BLOCKS + 1}.{leaf}"
    first_block = place + 1 if encodes and stage else place
    layer = {"convs": "conv", "pool": "pool"}[within[2]]
    index = 2 * int(within[3]) if layer == "conv" else ("widen", "norm", "relu", "narrow").index(within[3])
    return half, f"{first_block + int(within[1])}.{layer}.{index}.{leaf}"


# Places of the stages, finest first. But for the finest, the encoder's begin with a convolution, and the decoder's end
# with a doubling and a convolution. The decoder starts with saturation, convolution and ReLU.
_STAGES = {
    "encoder": [1, *(2 + i * (BLOCKS + 1) for i in range(HALVINGS))],
    "decoder": [3 + i * (BLOCKS + 2) for i in reversed(range(HALVINGS + 1))],
}
_FIRST = {"encoder": 0, "decoder": 1}
_LAST = {"encoder": 2 + HALVINGS * (BLOCKS + 1), "decoder": 4 + HALVINGS * (BLOCKS + 2)}


def _to_torch_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value


def _from_torch_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
