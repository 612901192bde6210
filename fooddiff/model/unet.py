"""The UNets of improved-diffusion and guided-diffusion (ADM) as Flax NNX modules: no training and no diffusion.

Images are NHWC. Parameters are float32; `dtype` is the type that convolutions and matmuls compute in, while norm
statistics, the softmax, embeddings of t and y, and the output convolution stay float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Cond, Float, Image, Key
from fooddiff.keys import Rngs
from fooddiff.settings import check_counts

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


def check_time_features(channels: int) -> None:
    """Raises ValueError unless the time's features, as many as a network's channels, are an even number."""
    if channels % 2:
        raise ValueError(f"model_channels is {channels}, expected an even number: half as many frequencies of the time")


def space_to_depth(x: Image, size: int) -> Image:
    """[n, h, w, c] to [n, h/size, w/size, size size c]: every patch becomes the channels of one position."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // size, size, w // size, size, c)
    return jnp.swapaxes(x, 2, 3).reshape(n, h // size, w // size, size * size * c)


def conv(
    in_channels: int, out_channels: int, size: int,
    *, dtype, rngs: Rngs, stride: int = 1, padding: tuple[int, int] | None = None, bias: bool = True,
) -> nnx.Conv:  # fmt: skip
    """A convolution with the initial distribution of torch.nn.Conv2d.

    `padding` is (above and left, below and right); None means size // 2 on both sides. "SAME" would pad a stride-2
    convolution on one side only and give other numbers.
    """
    bound = 1 / math.sqrt(in_channels * size * size)
    return nnx.Conv(
        in_channels, out_channels, (size, size), strides=stride, padding=[padding or (size // 2, size // 2)] * 2,
        use_bias=bias, kernel_init=_uniform(bound), bias_init=_uniform(bound), dtype=dtype, rngs=rngs,
    )  # fmt: skip


def zero_conv(in_channels: int, out_channels: int, size: int, *, dtype, rngs: Rngs) -> nnx.Conv:
    """A convolution that starts at zero, so that its branch starts as the identity."""
    zeros = nnx.initializers.zeros
    return nnx.Conv(
        in_channels, out_channels, (size, size), padding=size // 2,
        kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs,
    )  # fmt: skip


def linear(
    in_features: int, out_features: int,
    *, rngs: Rngs, dtype: jnp.dtype = jnp.float32, dot_general: Callable = jax.lax.dot_general,
) -> nnx.Linear:  # fmt: skip
    """A linear layer with the initial distribution of torch.nn.Linear."""
    init = _uniform(1 / math.sqrt(in_features))
    return nnx.Linear(
        in_features, out_features, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs, dot_general=dot_general
    )


def _uniform(bound: float) -> Callable:
    return lambda key, shape, dtype, *_, **__: jax.random.uniform(key, shape, dtype, -bound, bound)


class GroupNorm(nnx.Module):
    """Group normalisation, fused with an optional further scale and shift and with SiLU."""

    def __init__(self, channels: int, groups: int, *, epsilon: float = NORM_EPSILON):
        """Builds the layer; `channels` must be a multiple of `groups`, and `epsilon` is added to each variance."""
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be normalised in {groups} groups: expected a divisor")
        self.groups = groups
        self.epsilon = epsilon
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
        mean, inv_std = group_statistics(x, self.groups, self.epsilon)
        gain = inv_std * self.scale[None]
        offset = self.bias[None] - mean * gain
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return _affine(x, gain, offset, silu)


def group_statistics(x: Image, groups: int, epsilon: float) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
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
    return mean, jax.lax.rsqrt(var + epsilon)


@jax.checkpoint  # recomputed in the backward pass: as fast, and about half the activation memory
def _affine_silu(x, gain, offset):
    return jax.nn.silu(x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]).astype(x.dtype)


def _affine(x: Image, gain: Array, offset: Array, silu: bool) -> Image:
    if silu:
        return _affine_silu(x, gain, offset)
    return (x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]).astype(x.dtype)


def resize_bilinear(x: Image, height: int, width: int) -> Image:
    """[n, h, w, c] to [n, height, width, c], bilinear: half-pixel centres, edges repeated, no antialiasing."""
    n, _, _, c = x.shape
    return jax.image.resize(x, (n, height, width, c), "bilinear", antialias=False)


def halve(x: Image) -> Image:
    """[n, h, w, c] to [n, h/2, w/2, c]: the mean of each 2x2 pixels."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def double(x: Image) -> Image:
    """[n, h, w, c] to [n, 2h, 2w, c]: every pixel four times."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class ResBlock(nnx.Module):
    """norm, SiLU, conv, conditioning on the embedding, norm, SiLU, dropout, conv; plus the skip connection.

    With `resample`, the first convolution and the skip connection see a smaller or larger image (BigGAN's blocks).
    """

    def __init__(
        self, in_channels: int, out_channels: int, embed_dim: int,
        *, norm_groups: int, scale_shift_norm: bool, dropout: float, dtype, rngs: Rngs,
        resample: Callable[[Image], Image] | None = None,
    ):  # fmt: skip
        """Builds the block; `resample` is `halve`, `double` or None. See UNet for the other arguments."""
        self.norm_in = GroupNorm(in_channels, norm_groups)
        self.conv_in = conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.embed = linear(embed_dim, out_channels * (2 if scale_shift_norm else 1), rngs=rngs)
        self.norm_out = GroupNorm(out_channels, norm_groups)
        self.dropout = nnx.Dropout(dropout)
        self.conv_out = zero_conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.skip = None if in_channels == out_channels else conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)
        self.scale_shift_norm = scale_shift_norm
        self.resample = resample

    def __call__(self, x: Image, embedding: Float[Array, "n e"], dropout_key: Key | None) -> Image:
        """Applies the block to x [n, h, w, in] and returns [n, h, w, out], with h and w resampled."""
        h = self.norm_in(x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        condition = self.embed(jax.nn.silu(embedding))
        if self.scale_shift_norm:
            h = self.norm_out(h, *jnp.split(condition, 2, axis=-1), silu=True)
        else:
            h = self.norm_out(h + condition[:, None, None].astype(h.dtype), silu=True)
        h = self.dropout(h, deterministic=dropout_key is None, rngs=dropout_key)
        return (x if self.skip is None else self.skip(x)) + self.conv_out(h)


class AttentionBlock(nnx.Module):
    """Multi-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(
        self, channels: int, num_heads: int,
        *, head_channels: int | None = None, new_attention_order: bool = False, norm_groups: int, dtype, rngs: Rngs,
    ):  # fmt: skip
        """Builds the block; `channels` must be a multiple of `num_heads` or, if given, of `head_channels`."""
        if head_channels is not None:
            num_heads = heads_of(channels, head_channels)
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided among {num_heads} attention heads")
        self.norm = GroupNorm(channels, norm_groups)
        self.qkv = conv(channels, 3 * channels, 1, dtype=dtype, rngs=rngs)
        self.out = zero_conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads
        self.new_attention_order = new_attention_order

    def __call__(self, x: Image) -> Image:
        """Applies the block to x [n, h, w, c]."""
        n, h, w, c = x.shape
        q, k, v = split_heads(self.qkv(self.norm(x, silu=False)), self.num_heads, new_order=self.new_attention_order)
        return x + self.out(attention(q, k, v).reshape(n, h, w, c))


def heads_of(channels: int, head_channels: int) -> int:
    """How many heads of `head_channels` there are in `channels`.

    Raises:
        ValueError: the channels are not a multiple of it.
    """
    if head_channels < 1 or channels % head_channels:
        raise ValueError(f"{channels} channels cannot be divided into attention heads of {head_channels} channels")
    return channels // head_channels


def split_heads(qkv: Float[Array, "n ... d3"], num_heads: int, *, new_order: bool) -> Float[Array, "3 n t m d"]:
    """Queries, keys and values of each head, from channels in the order [head, qkv, d] or, if new, [qkv, head, d]."""
    n, d = qkv.shape[0], qkv.shape[-1] // (3 * num_heads)  # n may be a symbol, which has no len
    if new_order:
        return jnp.moveaxis(qkv.reshape(n, -1, 3, num_heads, d), 2, 0)
    return jnp.moveaxis(qkv.reshape(n, -1, num_heads, 3, d), 3, 0)


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
    """Halves height and width with a strided convolution, or without parameters by `halve`."""

    def __init__(self, channels: int, *, dtype, rngs: Rngs, learned: bool = True):
        """Builds the layer."""
        self.conv = conv(channels, channels, 3, stride=2, dtype=dtype, rngs=rngs) if learned else None

    def __call__(self, x: Image) -> Image:
        """[n, h, w, c] to [n, h/2, w/2, c]."""
        return halve(x) if self.conv is None else self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by repetition, then convolves if it has parameters."""

    def __init__(self, channels: int, *, dtype, rngs: Rngs, learned: bool = True):
        """Builds the layer."""
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs) if learned else None

    def __call__(self, x: Image) -> Image:
        """[n, h, w, c] to [n, 2h, 2w, c]."""
        return double(x) if self.conv is None else self.conv(double(x))


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


def run_stage(
    stage: Stage, index: int, x: Image, embedding: Float[Array, "n e"], dropout_key: Key | None, *, remat: bool
) -> Image:
    """Applies a network's stage number `index`, which has a dropout key of its own."""
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
    apply = jax.checkpoint(stage.__call__) if remat else stage
    return apply(x, embedding, key)


def check_labels(cond: Cond, *, known: bool) -> None:
    """Raises ValueError unless a network gets labels exactly if it knows classes."""
    if ("y" in cond) != known:
        needs = "a class-conditional network needs labels"
        raise ValueError("an unconditional network takes no labels" if "y" in cond else needs)


class Level(NamedTuple):
    """One resolution of a UNet."""

    channels: int
    attends: bool  # whether attention follows its residual blocks


def make_levels(
    *, image_size: int, model_channels: int, channel_mult: Sequence[float], attention_resolutions: Sequence[int]
) -> list[Level]:
    """The levels of a UNet, the finest first; see UNet for the arguments.

    Raises:
        ValueError: no level, a level without channels, a size that cannot be halved often enough, or an attention
            resolution that never occurs.
    """
    if not channel_mult:
        raise ValueError("channel_mult is empty, expected one entry per level")
    if bad := [mult for mult in channel_mult if mult * model_channels < 1 or mult * model_channels % 1]:
        raise ValueError(
            f"channel_mult {bad[0]} times model_channels {model_channels} is {bad[0] * model_channels} channels, "
            "expected a whole number of at least 1"
        )
    if image_size % 2 ** (len(channel_mult) - 1):
        raise ValueError(
            f"image_size {image_size} cannot be halved {len(channel_mult) - 1} times, once for each level of "
            f"channel_mult {tuple(channel_mult)} after the first"
        )
    resolutions = [image_size >> level for level in range(len(channel_mult))]
    if unknown := sorted(set(attention_resolutions) - set(resolutions)):
        raise ValueError(
            f"attention_resolutions {unknown} never occur in this UNet: its feature maps have the sizes {resolutions}"
        )
    return [
        Level(int(mult * model_channels), resolution in attention_resolutions)
        for mult, resolution in zip(channel_mult, resolutions, strict=True)
    ]


class Blocks(NamedTuple):
    """Makes the layers of one network, which are alike but for their channels."""

    stem: Callable[..., nnx.Conv]  # (in_channels, out_channels)
    res: Callable[..., ResBlock]  # (in_channels, out_channels)
    attention: Callable[..., AttentionBlock]  # (channels, num_heads)
    down: Callable[[int], nnx.Module]  # (channels); halves height and width
    up: Callable[[int], nnx.Module]  # (channels); doubles height and width


def make_blocks(
    *, embed_dim: int, head_channels: int | None, new_attention_order: bool, resblock_updown: bool, conv_resample: bool,
    norm_groups: int, scale_shift_norm: bool, dropout: float, dtype, rngs: Rngs,
) -> Blocks:  # fmt: skip
    """The layers that a network's settings describe; see UNet for the arguments.

    Raises:
        ValueError: no rate of dropout.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    layer = dict(dtype=dtype, rngs=rngs)
    normed = layer | dict(norm_groups=norm_groups)
    res = partial(ResBlock, embed_dim=embed_dim, scale_shift_norm=scale_shift_norm, dropout=dropout, **normed)

    def resampling(resample):
        return lambda channels: res(channels, channels, resample=resample)

    return Blocks(
        stem=partial(conv, size=3, **layer),
        res=res,
        attention=partial(
            AttentionBlock, head_channels=head_channels, new_attention_order=new_attention_order, **normed
        ),
        down=resampling(halve) if resblock_updown else partial(Downsample, learned=conv_resample, **layer),
        up=resampling(double) if resblock_updown else partial(Upsample, learned=conv_resample, **layer),
    )


def make_encoder(
    blocks: Blocks,
    levels: Sequence[Level],
    *,
    in_channels: int,
    stem_channels: int,
    num_res_blocks: int,
    num_heads: int,
) -> tuple[list[Stage], Stage, list[int]]:
    """The way down and the middle: the half that UNets and classifiers have in common.

    Returns:
        The stages of the way down, the middle, and how many channels leave each stage of the way down.
    """
    down, left = [Stage([blocks.stem(in_channels, stem_channels)])], [stem_channels]
    for i, level in enumerate(levels):
        for _ in range(num_res_blocks):
            layers = [blocks.res(left[-1], level.channels)]
            if level.attends:
                layers.append(blocks.attention(level.channels, num_heads))
            down.append(Stage(layers))
            left.append(level.channels)
        if i < len(levels) - 1:
            down.append(Stage([blocks.down(level.channels)]))
            left.append(level.channels)
    channels = left[-1]
    middle = Stage(
        [blocks.res(channels, channels), blocks.attention(channels, num_heads), blocks.res(channels, channels)]
    )
    return down, middle, left


class UNet(nnx.Module):
    """The UNet of IDDPM or ADM: eps and, with twice the output channels, the variance, of a noisy image.

    The defaults are those of IDDPM (Nichol & Dhariwal 2021). ADM (Dhariwal & Nichol 2021) has `resblock_updown`,
    `head_channels` and, in part, `new_attention_order`. With `low_res` it is either paper's model for super-resolution.
    """

    def __init__(
        self,
        *,
        image_size: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[float, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        num_heads: int,
        num_classes: int | None,
        rngs: Rngs,
        in_channels: int = 3,
        low_res: bool = False,
        stem_channels: int | None = None,
        num_heads_upsample: int | None = None,
        head_channels: int | None = None,
        new_attention_order: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
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
            channel_mult: width of each level as a multiple of model_channels, fractions allowed; each further level
                halves the resolution.
            num_res_blocks: residual blocks per level on the way down; one more on the way up.
            attention_resolutions: sizes in pixels of the feature maps that get attention, for instance (16, 8).
            num_heads: attention heads on the way down and in the middle.
            num_classes: number of classes, or None for an unconditional network.
            rngs: where initial parameters are drawn from.
            in_channels: channels of the image.
            low_res: the network also gets an image of lower resolution with in_channels channels, resized to x_t's.
            stem_channels: what the first convolution gives; None means model_channels. ADM's is as wide as the first
                level: channel_mult[0] * model_channels.
            num_heads_upsample: attention heads on the way up; None means num_heads.
            head_channels: channels of every attention head, whose number then follows; None leaves it to num_heads.
            new_attention_order: channels of queries, keys and values have the order [qkv, head, channel] instead of
                [head, qkv, channel]: matters to imported weights only.
            resblock_updown: resample inside of residual blocks, by 2x2 means and by repetition.
            conv_resample: without resblock_updown, resample with a convolution of its own.
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
        counts |= dict(num_classes=num_classes, stem_channels=stem_channels, num_heads_upsample=num_heads_upsample)
        check_counts(**counts)
        check_time_features(model_channels)
        if null_label and num_classes is None:
            raise ValueError("null_label is for class-conditional networks, and num_classes is None")
        levels = make_levels(
            image_size=image_size, model_channels=model_channels, channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
        )  # fmt: skip
        embed_dim = 4 * model_channels
        blocks = make_blocks(
            embed_dim=embed_dim, head_channels=head_channels, new_attention_order=new_attention_order,
            resblock_updown=resblock_updown, conv_resample=conv_resample, norm_groups=norm_groups,
            scale_shift_norm=scale_shift_norm, dropout=dropout, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        heads_up = num_heads if num_heads_upsample is None else num_heads_upsample

        self.time_in = linear(model_channels, embed_dim, rngs=rngs)
        self.time_out = linear(embed_dim, embed_dim, rngs=rngs)
        normal = nnx.initializers.normal(1.0)
        self.label = (
            None
            if num_classes is None
            else nnx.Embed(num_classes + null_label, embed_dim, embedding_init=normal, rngs=rngs)
        )

        down, self.middle, skips = make_encoder(
            blocks, levels, in_channels=in_channels * (2 if low_res else 1),
            stem_channels=model_channels if stem_channels is None else stem_channels,
            num_res_blocks=num_res_blocks, num_heads=num_heads,
        )  # fmt: skip
        up = []
        channels = skips[-1]
        for i, level in reversed(list(enumerate(levels))):
            for j in range(num_res_blocks + 1):
                layers = [blocks.res(channels + skips.pop(), level.channels)]
                channels = level.channels
                if level.attends:
                    layers.append(blocks.attention(channels, heads_up))
                if i > 0 and j == num_res_blocks:
                    layers.append(blocks.up(channels))
                up.append(Stage(layers))

        self.down, self.up = nnx.List(down), nnx.List(up)
        self.norm_out = GroupNorm(channels, norm_groups)
        self.conv_out = zero_conv(channels, out_channels, 3, dtype=jnp.float32, rngs=rngs)
        self.model_channels = model_channels
        self.in_channels = in_channels
        self.low_res = low_res
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self, x_t: Image, t: Float[Array, " n"], cond: Cond, *, dropout_key: Key | None = None
    ) -> Float[Array, "n h w o"]:
        """Denoises.

        Args:
            x_t: f32[n, h, w, c].
            t: f32[n], the timestep as the process feeds it to the network.
            cond: "y": i32[n] labels in [0, num_classes), exactly if the network is class-conditional; "low_res":
                f32[n, h', w', c], exactly if it is for super-resolution.
            dropout_key: key for dropout; None switches it off.

        Returns:
            f32[n, h, w, out_channels].

        Raises:
            ValueError: labels without a class embedding, a low-resolution image without its channels, or the other way
                round.
        """
        check_labels(cond, known=self.label is not None)
        if ("low_res" in cond) != self.low_res:
            needs = 'a network for super-resolution needs a low-resolution image, cond["low_res"]'
            raise ValueError(needs if self.low_res else 'a network without low_res takes no cond["low_res"]')
        if self.low_res and cond["low_res"].shape[-1] != self.in_channels:
            raise ValueError(
                f'cond["low_res"] has {cond["low_res"].shape[-1]} channels, expected those of x_t, {self.in_channels}'
            )
        embedding = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(t, self.model_channels))))
        if self.label is not None:
            embedding = embedding + self.label(cond["y"])

        if self.low_res:
            x_t = jnp.concatenate([x_t, resize_bilinear(cond["low_res"], *x_t.shape[1:3])], axis=-1)

        run = partial(run_stage, embedding=embedding, dropout_key=dropout_key, remat=self.remat)
        h = x_t.astype(self.dtype)
        skips = []
        for i, stage in enumerate(self.down):
            h = run(stage, i, h)
            skips.append(h)
        h = run(self.middle, len(self.down), h)
        for i, stage in enumerate(self.up, start=len(self.down) + 1):
            h = run(stage, i, jnp.concatenate([h, skips.pop()], axis=-1))
        return self.conv_out(self.norm_out(h.astype(jnp.float32), silu=True))
