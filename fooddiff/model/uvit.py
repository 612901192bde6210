"""A U-ViT: convolutions where the resolution is high, a transformer where it is low, one skip connection around it.

After Hoogeboom et al. 2023, "simple diffusion" (arXiv 2301.11093), with a patch of pixels at every position, so that an
image costs a hundredth of what it costs the UNet. The time that it is fed is a log SNR.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Cond, Float, Image, Key
from fooddiff.keys import Rngs
from fooddiff.model.unet import (
    GroupNorm,
    ResBlock,
    attention,
    check_labels,
    conv,
    linear,
    space_to_depth,
    timestep_embedding,
    zero_conv,
)
from fooddiff.settings import check_counts
from fooddiff.xla import activation_dtype, dot_general

TIME_FEATURES = 128
MAX_PERIOD = 1000.0  # of the sinusoids, in units of log SNR and radians
NORM_EPSILON = 1e-6


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each scaled, shifted and gated by the embedding (adaLN-zero, DiT, arXiv 2212.09748)."""

    def __init__(self, width: int, embed_dim: int, num_heads: int, mlp_ratio: int, *, dtype, rngs: Rngs):
        """Builds the block; `width` must be a multiple of `num_heads`."""
        zeros = nnx.initializers.zeros
        layer = dict(dtype=activation_dtype(dtype), dot_general=dot_general(dtype), rngs=rngs)
        self.modulation = nnx.Linear(embed_dim, 6 * width, kernel_init=zeros, bias_init=zeros, rngs=rngs)
        self.qkv = linear(width, 3 * width, **layer)
        self.out = linear(width, width, **layer)
        self.mlp_in = linear(width, mlp_ratio * width, **layer)
        self.mlp_out = linear(mlp_ratio * width, width, **layer)
        self.num_heads = num_heads
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n p w"], embedding: Float[Array, "n e"]) -> Float[Array, "n p w"]:
        """Applies the block to the tokens of p positions."""
        modulation = self.modulation(jax.nn.silu(embedding))[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, axis=-1)
        n, positions, width = x.shape
        h = layer_norm(x) * (1 + scale) + shift
        qkv = self.qkv(h).reshape(n, positions, 3 * self.num_heads, width // self.num_heads)
        q, k, v = jnp.split(qkv, 3, axis=2)
        q, k, v = (each.astype(self.dtype) for each in (unit_rms(q), unit_rms(k), v))
        h = attention(q, k, v).astype(x.dtype).reshape(n, positions, width)
        x = x + gate * self.out(h)
        h = layer_norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp_out(jax.nn.gelu(self.mlp_in(h)))


class UViT(nnx.Module):
    """Patches, residual blocks, a transformer at half the resolution, residual blocks, patches."""

    def __init__(
        self,
        *,
        image_size: int,
        out_channels: int,
        num_classes: int | None,
        rngs: Rngs,
        in_channels: int = 3,
        patch_size: int = 4,
        conv_channels: int = 96,
        num_res_blocks: int = 2,
        width: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        embed_dim: int = 256,
        mlp_ratio: int = 4,
        norm_groups: int = 8,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Builds the network.

        Args:
            image_size: height and width in pixels, divisible by 2 * patch_size.
            out_channels: in_channels, or twice as many with a learned variance.
            num_classes: number of classes, to which a null label is added that means none; None: unconditional.
            rngs: where initial parameters are drawn from.
            in_channels: channels of the image.
            patch_size: height and width in pixels of what becomes one position of the convolutions.
            conv_channels: width of the convolutions, a multiple of norm_groups.
            num_res_blocks: residual blocks before the transformer, and as many after it.
            width: of the transformer, a multiple of num_heads.
            depth: transformer blocks.
            num_heads: attention heads.
            embed_dim: features of time and label.
            mlp_ratio: width of the MLPs as a multiple of `width`.
            norm_groups: groups of channels that are normalised together.
            dtype: what convolutions and matmuls compute in; softmax, norms and the output stay float32, and on the CPU
                convolutions and all that passes between layers, too.

        Raises:
            ValueError: sizes that cannot be divided as said, or a count below 1.
        """
        check_counts(
            patch_size=patch_size, conv_channels=conv_channels, num_res_blocks=num_res_blocks, width=width, depth=depth,
            num_heads=num_heads, embed_dim=embed_dim, mlp_ratio=mlp_ratio, num_classes=num_classes,
        )  # fmt: skip
        if image_size % (2 * patch_size):
            raise ValueError(f"image_size {image_size} is not a multiple of twice the patch_size {patch_size}")
        if width % num_heads:
            raise ValueError(f"width {width} cannot be divided among {num_heads} attention heads")

        activations = activation_dtype(dtype)
        block = dict(norm_groups=norm_groups, scale_shift_norm=True, dropout=0.0, dtype=activations, rngs=rngs)
        self.time_in = linear(TIME_FEATURES, embed_dim, rngs=rngs)
        self.time_out = linear(embed_dim, embed_dim, rngs=rngs)
        normal = nnx.initializers.normal(0.1)
        self.label = (
            None if num_classes is None else nnx.Embed(num_classes + 1, embed_dim, embedding_init=normal, rngs=rngs)
        )
        self.conv_in = conv(in_channels * patch_size**2, conv_channels, 3, dtype=activations, rngs=rngs)
        c = conv_channels
        self.down = nnx.List([ResBlock(c, c, embed_dim, **block) for _ in range(num_res_blocks)])
        layer = dict(dtype=activations, dot_general=dot_general(dtype), rngs=rngs)
        self.to_tokens = linear(4 * conv_channels, width, **layer)
        positions = (image_size // (2 * patch_size)) ** 2
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (positions, width)))
        self.transformer = nnx.List(
            [TransformerBlock(width, embed_dim, num_heads, mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.from_tokens = linear(width, 4 * conv_channels, **layer)
        inputs = [2 * c] + [c] * (num_res_blocks - 1)
        self.up = nnx.List([ResBlock(channels, c, embed_dim, **block) for channels in inputs])
        self.norm_out = GroupNorm(conv_channels, norm_groups)
        self.conv_out = zero_conv(conv_channels, out_channels * patch_size**2, 3, dtype=jnp.float32, rngs=rngs)
        self.patch_size = patch_size
        self.activation_dtype = activations

    def __call__(
        self, x_t: Image, t: Float[Array, " n"], cond: Cond, *, dropout_key: Key | None = None
    ) -> Float[Array, "n h w o"]:
        """Denoises.

        Args:
            x_t: f32[n, h, w, c].
            t: f32[n], log SNR.
            cond: {"y": i32[n] labels in [0, num_classes]}, the last of which means none; {} exactly if the network is
                unconditional.
            dropout_key: there is no dropout.

        Returns:
            f32[n, h, w, out_channels].

        Raises:
            ValueError: labels without a class embedding, or the other way round.
        """
        check_labels(cond, known=self.label is not None)
        features = timestep_embedding(t, TIME_FEATURES, max_period=MAX_PERIOD)
        embedding = self.time_out(jax.nn.silu(self.time_in(features)))
        if self.label is not None:
            embedding = embedding + self.label(cond["y"])

        h = self.conv_in(space_to_depth(x_t.astype(self.activation_dtype), self.patch_size))
        for block in self.down:
            h = block(h, embedding, None)
        skip = h
        tokens = self.to_tokens(space_to_depth(h, 2))
        n, height, width, channels = tokens.shape
        tokens = tokens.reshape(n, height * width, channels) + self.positions[None]
        for block in self.transformer:
            tokens = block(tokens, embedding)
        h = self.from_tokens(layer_norm(tokens)).reshape(n, height, width, -1)
        h = jnp.concatenate([depth_to_space(h, 2), skip], axis=-1)
        for block in self.up:
            h = block(h, embedding, None)
        return depth_to_space(self.conv_out(self.norm_out(h.astype(jnp.float32), silu=True)), self.patch_size)


def depth_to_space(x: Image, size: int) -> Image:
    """The inverse of `space_to_depth`."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, size, size, c // size**2)
    return jnp.swapaxes(x, 2, 3).reshape(n, h * size, w * size, c // size**2)


def layer_norm(x: Float[Array, "n p w"]) -> Float[Array, "n p w"]:
    """Normalises every token, in float32; scale and shift are the caller's."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt((y**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


def unit_rms(x: Float[Array, "n p m d"]) -> Float[Array, "n p m d"]:
    """Brings queries and keys to a root mean square of 1, so that attention cannot saturate (arXiv 2302.05442)."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y**2).mean(axis=-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)
