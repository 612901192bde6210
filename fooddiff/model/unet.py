"""The UNet of improved-diffusion as Flax NNX modules: layers only, no training and no diffusion.

Images are NHWC. Parameters are float32; `dtype` is the type that convolutions and matmuls compute in, while norm
statistics, the softmax, embeddings of t and y, and the output convolution stay float32.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Cond, Float, Image, Key

NORM_EPSILON = 1e-5


def timestep_embedding(t: Float[Array, " n"], dim: int, *, max_period: float = 10_000) -> Float[Array, "n dim"]:
    """Sinusoidal features of t, cosines then sines, with frequencies from 1 down to almost 1/max_period.

    Args:
        t: timesteps as floats; fractions are allowed.
        dim: number of features, even.
        max_period: longest period is 2 pi times nearly this.

    Returns:
        f32[n, dim].
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def conv(in_channels: int, out_channels: int, size: int, *, dtype, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    """A convolution with padding size // 2 on both sides and the initial distribution of torch.nn.Conv2d.

    "SAME" would pad a stride-2 convolution on one side only and give other numbers.
    """
    bound = 1 / math.sqrt(in_channels * size * size)
    return nnx.Conv(
        in_channels, out_channels, (size, size), strides=stride, padding=size // 2,
        kernel_init=_uniform(bound), bias_init=_uniform(bound), dtype=dtype, rngs=rngs,
    )  # fmt: skip


def zero_conv(in_channels: int, out_channels: int, size: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution that starts at zero, so that its branch starts as the identity."""
    zeros = nnx.initializers.zeros
    return nnx.Conv(
        in_channels, out_channels, (size, size), padding=size // 2,
        kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs,
    )  # fmt: skip


def linear(in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> nnx.Linear:
    """A linear layer with the initial distribution of torch.nn.Linear."""
    init = _uniform(1 / math.sqrt(in_features))
    return nnx.Linear(in_features, out_features, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


def _uniform(bound: float) -> Callable:
    return lambda key, shape, dtype, *_, **__: jax.random.uniform(key, shape, dtype, -bound, bound)


class GroupNorm(nnx.Module):
    """Group normalisation, fused with an optional further scale and shift and with SiLU."""

    def __init__(self, channels: int, groups: int):
        """Builds the layer; `channels` must be a multiple of `groups`."""
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be normalised in {groups} groups: expected a divisor")
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Image, scale: Array | None = None, shift: Array | None = None, *, silu: bool) -> Image:
        """Normalises, then applies x * (1 + scale) + shift per example and channel if given, then SiLU if asked.

        Args:
            x: [n, h, w, c].
            scale: [n, c] or None.
            shift: [n, c] or None.
            silu: whether SiLU follows.

        Returns:
            [n, h, w, c] in the dtype of x.
        """
        mean, inv_std = group_statistics(x, self.groups)
        gain = inv_std * self.scale[None]
        offset = self.bias[None] - mean * gain
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return _affine(x, gain, offset, silu)


def group_statistics(x: Image, groups: int) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Mean and 1 / standard deviation of each channel's group, in float32.

    Reduces over space first and over the few channels of a group second: both are contiguous, which a reduction over
    a 5-D view is not. The variance takes a second pass, since E[x^2] - E[x]^2 cancels.
    """
    n, _, _, c = x.shape
    x = x.astype(jnp.float32)

    def group_mean(per_channel):
        grouped = per_channel.reshape(n, groups, c // groups).mean(axis=2, keepdims=True)
        return jnp.broadcast_to(grouped, (n, groups, c // groups)).reshape(n, c)

    mean = group_mean(x.mean(axis=(1, 2)))
    var = group_mean(((x - mean[:, None, None]) ** 2).mean(axis=(1, 2)))
    return mean, jax.lax.rsqrt(var + NORM_EPSILON)


@jax.checkpoint  # recomputed in the backward pass: as fast, and about half the activation memory
def _affine_silu(x, gain, offset):
    return jax.nn.silu(x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]).astype(x.dtype)


def _affine(x: Image, gain: Array, offset: Array, silu: bool) -> Image:
    if silu:
        return _affine_silu(x, gain, offset)
    return (x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]).astype(x.dtype)


class ResBlock(nnx.Module):
    """norm, SiLU, conv, conditioning on the embedding, norm, SiLU, dropout, conv; plus the skip connection."""

    def __init__(
        self, in_channels: int, out_channels: int, embed_dim: int,
        *, norm_groups: int, scale_shift_norm: bool, dropout: float, dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        """Builds the block; see UNet for the arguments."""
        self.norm_in = GroupNorm(in_channels, norm_groups)
        self.conv_in = conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.embed = linear(embed_dim, out_channels * (2 if scale_shift_norm else 1), rngs=rngs)
        self.norm_out = GroupNorm(out_channels, norm_groups)
        self.dropout = nnx.Dropout(dropout)
        self.conv_out = zero_conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.skip = None if in_channels == out_channels else conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)
        self.scale_shift_norm = scale_shift_norm

    def __call__(self, x: Image, embedding: Float[Array, "n e"], dropout_key: Key | None) -> Image:
        """Applies the block to x [n, h, w, in] and returns [n, h, w, out]."""
        h = self.conv_in(self.norm_in(x, silu=True))
        condition = self.embed(jax.nn.silu(embedding))
        if self.scale_shift_norm:
            h = self.norm_out(h, *jnp.split(condition, 2, axis=-1), silu=True)
        else:
            h = self.norm_out(h + condition[:, None, None].astype(h.dtype), silu=True)
        h = self.dropout(h, deterministic=dropout_key is None, rngs=dropout_key)
        return (x if self.skip is None else self.skip(x)) + self.conv_out(h)


class AttentionBlock(nnx.Module):
    """Multi-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, num_heads: int, *, norm_groups: int, dtype, rngs: nnx.Rngs):
        """Builds the block; `channels` must be a multiple of `num_heads`."""
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided among {num_heads} attention heads")
        self.norm = GroupNorm(channels, norm_groups)
        self.qkv = conv(channels, 3 * channels, 1, dtype=dtype, rngs=rngs)
        self.out = zero_conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: Image) -> Image:
        """Applies the block to x [n, h, w, c]."""
        n, h, w, c = x.shape
        qkv = self.qkv(self.norm(x, silu=False)).reshape(n, h * w, self.num_heads, 3, c // self.num_heads)
        q, k, v = jnp.moveaxis(qkv, 3, 0)  # channels are head-major, then q, k, v
        return x + self.out(attention(q, k, v).reshape(n, h, w, c))


def attention(q: Float[Array, "n t m d"], k: Float[Array, "n t m d"], v: Float[Array, "n t m d"]) -> Array:
    """softmax(q k^T / d^1/2) v per head m; scores and softmax in float32.

    The sum of the softmax divides the result instead of the weights: d divisions per position instead of t.
    """
    scale = q.shape[-1] ** -0.25  # on both factors, which keeps low precision products in range
    scores = jnp.einsum("ntmd,nsmd->nmts", q * scale, k * scale, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    values = jnp.einsum("nmts,nsmd->nmtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return jnp.swapaxes(values / weights.sum(axis=-1, keepdims=True), 1, 2).astype(v.dtype)


class Downsample(nnx.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        """Builds the layer."""
        self.conv = conv(channels, channels, 3, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """[n, h, w, c] to [n, h/2, w/2, c]."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by repetition, then convolves."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        """Builds the layer."""
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """[n, h, w, c] to [n, 2h, 2w, c]."""
        n, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
        return self.conv(doubled.reshape(n, 2 * h, 2 * w, c))


class Stage(nnx.Module):
    """One entry of the down path, the middle or the up path: layers in sequence, of which some are None."""

    def __init__(self, layers: Sequence[nnx.Module]):
        """Keeps the layers in order."""
        self.layers = nnx.List(layers)

    def __call__(self, x: Image, embedding: Float[Array, "n e"], dropout_key: Key | None) -> Image:
        """Applies the layers; only residual blocks see the embedding."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, ResBlock):
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
                x = layer(x, embedding, key)
            else:
                x = layer(x)
        return x


class UNet(nnx.Module):
    """The UNet of IDDPM: eps and, with twice the output channels, the variance, of a noisy image."""

    def __init__(
        self,
        *,
        image_size: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        num_heads: int,
        num_classes: int | None,
        rngs: nnx.Rngs,
        in_channels: int = 3,
        num_heads_upsample: int | None = None,
        null_label: bool = False,
        norm_groups: int = 32,
        scale_shift_norm: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
    ):
        """Builds the network.

        Args:
            image_size: height and width in pixels, divisible by 2^(levels - 1).
            out_channels: in_channels, or twice as many with a learned variance.
            model_channels: width of the first level, a multiple of norm_groups.
            channel_mult: width of each level as a multiple of model_channels; each further level halves the resolution.
            num_res_blocks: residual blocks per level on the way down; one more on the way up.
            attention_resolutions: sizes in pixels of the feature maps that get attention, for instance (16, 8).
            num_heads: attention heads on the way down and in the middle.
            num_classes: number of classes, or None for an unconditional network.
            rngs: where initial parameters are drawn from.
            in_channels: channels of the image.
            num_heads_upsample: attention heads on the way up; None means num_heads.
            null_label: know a further label, num_classes, that means none: for classifier-free guidance.
            norm_groups: groups of channels that are normalised together. With as many groups as channels a block
                cannot see the mean colour of what it gets.
            scale_shift_norm: let the embedding scale and shift the second norm; otherwise it is added before it.
            dropout: rate of dropout in residual blocks, in [0, 1).
            dtype: what convolutions and matmuls compute in.
            remat: recompute each stage in the backward pass: less memory, about a third more time.

        Raises:
            ValueError: a size that cannot be halved often enough, an attention resolution that never occurs, or
                channels that cannot be grouped.
        """
        counts = dict(model_channels=model_channels, num_res_blocks=num_res_blocks, num_heads=num_heads)
        counts |= dict(channel_mult=min(channel_mult, default=0), num_classes=1 if num_classes is None else num_classes)
        if bad := [f"{name} is {count}, expected at least 1" for name, count in counts.items() if count < 1]:
            raise ValueError(bad[0])
        if null_label and num_classes is None:
            raise ValueError("null_label is for class-conditional networks, and num_classes is None")
        resolutions = [image_size >> level for level in range(len(channel_mult))]
        if image_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"image_size {image_size} cannot be halved {len(channel_mult) - 1} times, once for each level of "
                f"channel_mult {tuple(channel_mult)} after the first"
            )
        if unknown := sorted(set(attention_resolutions) - set(resolutions)):
            raise ValueError(
                f"attention_resolutions {unknown} never occur in this UNet: "
                f"its feature maps have the sizes {resolutions}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")

        embed_dim = 4 * model_channels
        layer = dict(dtype=dtype, rngs=rngs)
        normed = layer | dict(norm_groups=norm_groups)
        block = normed | dict(embed_dim=embed_dim, scale_shift_norm=scale_shift_norm, dropout=dropout)
        heads_up = num_heads if num_heads_upsample is None else num_heads_upsample

        self.time_in = linear(model_channels, embed_dim, rngs=rngs)
        self.time_out = linear(embed_dim, embed_dim, rngs=rngs)
        normal = nnx.initializers.normal(1.0)
        self.label = (
            None
            if num_classes is None
            else nnx.Embed(num_classes + null_label, embed_dim, embedding_init=normal, rngs=rngs)
        )

        down = [Stage([conv(in_channels, model_channels, 3, **layer)])]
        skips = [model_channels]
        channels = model_channels
        for level, (mult, resolution) in enumerate(zip(channel_mult, resolutions, strict=True)):
            for _ in range(num_res_blocks):
                layers = [ResBlock(channels, mult * model_channels, **block)]
                channels = mult * model_channels
                if resolution in attention_resolutions:
                    layers.append(AttentionBlock(channels, num_heads, **normed))
                down.append(Stage(layers))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                down.append(Stage([Downsample(channels, **layer)]))
                skips.append(channels)

        middle = [
            ResBlock(channels, channels, **block),
            AttentionBlock(channels, num_heads, **normed),
            ResBlock(channels, channels, **block),
        ]

        up = []
        for level, (mult, resolution) in reversed(list(enumerate(zip(channel_mult, resolutions, strict=True)))):
            for i in range(num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), mult * model_channels, **block)]
                channels = mult * model_channels
                if resolution in attention_resolutions:
                    layers.append(AttentionBlock(channels, heads_up, **normed))
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(channels, **layer))
                up.append(Stage(layers))

        self.down, self.middle, self.up = nnx.List(down), Stage(middle), nnx.List(up)
        self.norm_out = GroupNorm(channels, norm_groups)
        self.conv_out = zero_conv(channels, out_channels, 3, dtype=jnp.float32, rngs=rngs)
        self.model_channels = model_channels
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self, x_t: Image, t: Float[Array, " n"], cond: Cond, *, dropout_key: Key | None = None
    ) -> Float[Array, "n h w o"]:
        """Denoises.

        Args:
            x_t: f32[n, h, w, c].
            t: f32[n], the timestep as the process feeds it to the network.
            cond: {"y": i32[n] labels in [0, num_classes)}, or {} exactly if the network is unconditional.
            dropout_key: key for dropout; None switches it off.

        Returns:
            f32[n, h, w, out_channels].

        Raises:
            ValueError: labels without a class embedding, or the other way round.
        """
        if ("y" in cond) != (self.label is not None):
            needs = "a class-conditional network needs labels"
            raise ValueError("an unconditional network takes no labels" if "y" in cond else needs)
        embedding = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(t, self.model_channels))))
        if self.label is not None:
            embedding = embedding + self.label(cond["y"])

        def run(index, stage, h):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            apply = jax.checkpoint(stage.__call__) if self.remat else stage
            return apply(h, embedding, key)

        h = x_t.astype(self.dtype)
        skips = []
        for i, stage in enumerate(self.down):
            h = run(i, stage, h)
            skips.append(h)
        h = run(len(self.down), self.middle, h)
        for i, stage in enumerate(self.up):
            h = run(len(self.down) + 1 + i, stage, jnp.concatenate([h, skips.pop()], axis=-1))
        return self.conv_out(self.norm_out(h.astype(jnp.float32), silu=True))
