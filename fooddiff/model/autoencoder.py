"""The autoencoders of latent diffusion (Rombach et al. 2022) as Flax NNX modules: no losses and no training.

Images are NHWC. Parameters are float32; `dtype` is the type that convolutions and matmuls compute in, while norm
statistics, the softmax and what leaves the encoder or the decoder stay float32.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Float, Image, Key
from fooddiff.keys import Rngs
from fooddiff.model.unet import GroupNorm, Level, Upsample, attention, conv, make_levels
from fooddiff.settings import check_counts

NORM_EPSILON = 1e-6


class ResBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv; plus the skip connection."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_groups: int, dropout: float, dtype, rngs: Rngs
    ):  # fmt: skip
        """Builds the block; see Autoencoder for the arguments."""
        self.norm_in = GroupNorm(in_channels, norm_groups, epsilon=NORM_EPSILON)
        self.conv_in = conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(out_channels, norm_groups, epsilon=NORM_EPSILON)
        self.dropout = nnx.Dropout(dropout)
        self.conv_out = conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.skip = None if in_channels == out_channels else conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image, dropout_key: Key | None) -> Image:
        """[n, h, w, in] to [n, h, w, out]."""
        h = self.conv_in(self.norm_in(x, silu=True))
        h = self.dropout(self.norm_out(h, silu=True), deterministic=dropout_key is None, rngs=dropout_key)
        return (x if self.skip is None else self.skip(x)) + self.conv_out(h)


class AttentionBlock(nnx.Module):
    """Self-attention with one head over the positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, *, norm_groups: int, dtype, rngs: Rngs):
        """Builds the block."""
        self.norm = GroupNorm(channels, norm_groups, epsilon=NORM_EPSILON)
        self.q, self.k, self.v, self.out = (conv(channels, channels, 1, dtype=dtype, rngs=rngs) for _ in range(4))

    def __call__(self, x: Image) -> Image:
        """Applies the block to x [n, h, w, c]."""
        n, h, w, c = x.shape
        normed = self.norm(x, silu=False)
        q, k, v = (layer(normed).reshape(n, h * w, 1, c) for layer in (self.q, self.k, self.v))
        return x + self.out(attention(q, k, v).reshape(n, h, w, c))


class Downsample(nnx.Module):
    """Halves height and width with a strided convolution that looks below and to the right, not above and left."""

    def __init__(self, channels: int, *, dtype, rngs: Rngs):
        """Builds the layer."""
        self.conv = conv(channels, channels, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """[n, h, w, c] to [n, h/2, w/2, c]."""
        return self.conv(x)


class Stage(nnx.Module):
    """One resolution: residual blocks, attention after each of them or after none, and the way to the next one."""

    def __init__(
        self, channels: Sequence[int], attends: bool, resample: nnx.Module | None,
        *, norm_groups: int, dropout: float, dtype, rngs: Rngs,
    ):  # fmt: skip
        """Builds the stage; between `channels` lie its residual blocks, `resample` ends it."""
        normed = dict(norm_groups=norm_groups, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ResBlock(*pair, dropout=dropout, **normed) for pair in itertools.pairwise(channels)])
        self.attentions = nnx.List([AttentionBlock(c, **normed) for c in channels[1:] if attends])
        self.resample = resample

    def __call__(self, x: Image, dropout_keys: Iterator[Key | None]) -> Image:
        """Applies the stage to x [n, h, w, c]; every residual block takes the next key."""
        for block, attend in itertools.zip_longest(self.blocks, self.attentions):
            x = block(x, next(dropout_keys))
            x = x if attend is None else attend(x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, *, norm_groups: int, dropout: float, dtype, rngs: Rngs):
        """Builds the layers."""
        block = partial(ResBlock, channels, channels, norm_groups=norm_groups, dropout=dropout, dtype=dtype, rngs=rngs)
        self.first = block()
        self.attention = AttentionBlock(channels, norm_groups=norm_groups, dtype=dtype, rngs=rngs)
        self.last = block()

    def __call__(self, x: Image, dropout_keys: Iterator[Key | None]) -> Image:
        """Applies the layers to x [n, h, w, c]."""
        return self.last(self.attention(self.first(x, next(dropout_keys))), next(dropout_keys))


class Encoder(nnx.Module):
    """Images to features at the coarsest resolution."""

    def __init__(
        self, in_channels: int, stem_channels: int, levels: Sequence[Level], out_channels: int,
        *, num_res_blocks: int, norm_groups: int, dropout: float, dtype, rngs: Rngs,
    ):  # fmt: skip
        """Builds the encoder; `levels` come finest first. See Autoencoder for the other arguments."""
        layer = dict(dtype=dtype, rngs=rngs)
        normed = layer | dict(norm_groups=norm_groups, dropout=dropout)
        self.conv_in = conv(in_channels, stem_channels, 3, **layer)
        entering = [stem_channels, *(level.channels for level in levels)]
        self.levels = nnx.List(
            Stage(
                [entering[i], *[level.channels] * num_res_blocks],
                level.attends,
                Downsample(level.channels, **layer) if i < len(levels) - 1 else None,
                **normed,
            )
            for i, level in enumerate(levels)
        )
        self.middle = Middle(entering[-1], **normed)
        self.norm_out = GroupNorm(entering[-1], norm_groups, epsilon=NORM_EPSILON)
        self.conv_out = conv(entering[-1], out_channels, 3, dtype=jnp.float32, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Image, *, dropout_key: Key | None = None) -> Image:
        """f32[n, h, w, in] to f32[n, h/f, w/f, out], where f is 2^(levels - 1)."""
        keys = _dropout_keys(dropout_key)
        h = self.conv_in(x.astype(self.dtype))
        for stage in self.levels:
            h = stage(h, keys)
        h = self.middle(h, keys)
        return self.conv_out(self.norm_out(h.astype(jnp.float32), silu=True))


class Decoder(nnx.Module):
    """Features at the coarsest resolution to images: one residual block more per level than the encoder has."""

    def __init__(
        self, in_channels: int, levels: Sequence[Level], out_channels: int,
        *, num_res_blocks: int, norm_groups: int, dropout: float, dtype, rngs: Rngs,
    ):  # fmt: skip
        """Builds the decoder; `levels` come finest first, and are run through last to first."""
        layer = dict(dtype=dtype, rngs=rngs)
        normed = layer | dict(norm_groups=norm_groups, dropout=dropout)
        coarsest, finest = levels[-1].channels, levels[0].channels
        self.conv_in = conv(in_channels, coarsest, 3, **layer)
        self.middle = Middle(coarsest, **normed)
        entering = [*(level.channels for level in levels[1:]), coarsest]
        self.levels = nnx.List(
            Stage(
                [entering[i], *[level.channels] * (num_res_blocks + 1)],
                level.attends,
                Upsample(level.channels, **layer) if i > 0 else None,
                **normed,
            )
            for i, level in enumerate(levels)
        )
        self.norm_out = GroupNorm(finest, norm_groups, epsilon=NORM_EPSILON)
        self.conv_out = conv(finest, out_channels, 3, dtype=jnp.float32, rngs=rngs)
        self.dtype = dtype

    def __call__(self, z: Image, *, dropout_key: Key | None = None) -> Image:
        """f32[n, h, w, in] to f32[n, h f, w f, out], where f is 2^(levels - 1)."""
        keys = _dropout_keys(dropout_key)
        h = self.middle(self.conv_in(z.astype(self.dtype)), keys)
        for stage in reversed(self.levels):
            h = stage(h, keys)
        return self.conv_out(self.norm_out(h.astype(jnp.float32), silu=True))


class Autoencoder(nnx.Module):
    """Encoder and decoder around a Gaussian (KL) or, with `num_codes`, around a codebook (VQ).

    `bottleneck` has what happens between them: `posterior_of` reads what a KL encoder gives, `quantize` takes what a VQ
    encoder gives and `codebook`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        channel_mult: tuple[float, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        z_channels: int,
        latent_channels: int,
        rngs: Rngs,
        num_codes: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        norm_groups: int = 32,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Builds the network.

        Args:
            image_size: height and width in pixels that `attention_resolutions` refer to, divisible by 2^(levels - 1).
                Other sizes that are divisible by it are encoded and decoded, too.
            model_channels: width of the first convolution, a multiple of norm_groups.
            channel_mult: width of each level as a multiple of model_channels; each further level halves the resolution.
            num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
            attention_resolutions: sizes in pixels of the feature maps that get attention; the middle always does.
            z_channels: what the decoder's first convolution takes, and the encoder's last one gives (in KL, for the
                mean and again for the log variance).
            latent_channels: channels of the latents.
            rngs: where initial parameters are drawn from.
            num_codes: size of the codebook; None for the Gaussian.
            in_channels: channels of the image.
            out_channels: channels of the reconstruction.
            norm_groups: groups of channels that are normalised together.
            dropout: rate of dropout in residual blocks, in [0, 1).
            dtype: what convolutions and matmuls compute in.

        Raises:
            ValueError: a count below 1, a size that cannot be halved often enough, an attention resolution that never
                occurs, channels that cannot be grouped, or no rate of dropout.
        """
        check_counts(
            num_res_blocks=num_res_blocks, z_channels=z_channels, latent_channels=latent_channels, num_codes=num_codes,
            in_channels=in_channels, out_channels=out_channels,
        )  # fmt: skip
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        levels = make_levels(
            image_size=image_size, model_channels=model_channels, channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
        )  # fmt: skip
        each = dict(num_res_blocks=num_res_blocks, norm_groups=norm_groups, dropout=dropout, dtype=dtype, rngs=rngs)
        moments = 2 if num_codes is None else 1
        self.factor = 2 ** (len(levels) - 1)
        self.encoder = Encoder(in_channels, model_channels, levels, moments * z_channels, **each)
        self.to_latent = conv(moments * z_channels, moments * latent_channels, 1, dtype=jnp.float32, rngs=rngs)
        self.from_latent = conv(latent_channels, z_channels, 1, dtype=jnp.float32, rngs=rngs)
        self.decoder = Decoder(z_channels, levels, out_channels, **each)
        if num_codes is not None:
            codes = (num_codes, latent_channels)
            self.codebook = nnx.Param(jax.random.uniform(rngs.params(), codes, minval=-1, maxval=1) / num_codes)

    def encode(self, x: Image, *, dropout_key: Key | None = None) -> Float[Array, "n h w d"]:
        """Encodes.

        Args:
            x: f32[n, h, w, in_channels] in [-1, 1], h and w divisible by f = 2^(levels - 1).
            dropout_key: key for dropout; None switches it off.

        Returns:
            KL: moments f32[n, h/f, w/f, 2 latent_channels]. VQ: latents f32[n, h/f, w/f, latent_channels], not yet
            quantised.

        Raises:
            ValueError: a size that is not divisible by f.
        """
        _, h, w, _ = x.shape
        if h % self.factor or w % self.factor:
            raise ValueError(f"images of {h}x{w} cannot be encoded: expected multiples of {self.factor}")
        return self.to_latent(self.encoder(x, dropout_key=dropout_key))

    def decode(self, z: Image, *, dropout_key: Key | None = None) -> Image:
        """Decodes.

        Args:
            z: f32[n, h, w, latent_channels]; in VQ, codes.
            dropout_key: key for dropout; None switches it off.

        Returns:
            f32[n, f h, f w, out_channels], nearly in [-1, 1].
        """
        return self.decoder(self.from_latent(z), dropout_key=dropout_key)


def _dropout_keys(dropout_key: Key | None) -> Iterator[Key | None]:
    """A key for every residual block of an encoder or decoder."""
    for i in itertools.count():
        yield None if dropout_key is None else jax.random.fold_in(dropout_key, i)
