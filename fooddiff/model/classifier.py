"""The classifier of noisy images that guides ADM: the first half of its UNet, pooled to one logit per class."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Float, Image, Key
from fooddiff.keys import Rngs
from fooddiff.model.unet import (
    GroupNorm,
    attention,
    check_time_features,
    heads_of,
    linear,
    make_blocks,
    make_encoder,
    make_levels,
    run_stage,
    space_to_depth,
    split_heads,
    timestep_embedding,
)
from fooddiff.settings import check_counts

POOLS = ("attention", "adaptive")


class AttentionPool(nnx.Module):
    """Attention of the mean over all positions to itself and to each of them (CLIP's pooling)."""

    def __init__(self, channels: int, num_classes: int, *, size: int, head_channels: int, rngs: Rngs):
        """Builds the layer for feature maps of size x size; `head_channels` must divide `channels`."""
        normal = nnx.initializers.normal(channels**-0.5)
        self.position = nnx.Param(normal(rngs.params(), (1 + size * size, channels)))
        self.qkv = linear(channels, 3 * channels, rngs=rngs)
        self.out = linear(channels, num_classes, rngs=rngs)
        self.num_heads = heads_of(channels, head_channels)
        self.size = size

    def __call__(self, x: Image) -> Float[Array, "n num_classes"]:
        """[n, size, size, c] to logits."""
        n, h, w, c = x.shape
        if (h, w) != (self.size, self.size):
            raise ValueError(
                f"the classifier's images are of another size: they arrive at its pool as {h}x{w}, expected "
                f"{self.size}x{self.size}"
            )
        tokens = x.reshape(n, h * w, c)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1) + self.position[None]
        q, k, v = split_heads(self.qkv(tokens), self.num_heads, new_order=True)
        return self.out(attention(q[:, :1], k, v).reshape(n, c))


class MeanPool(nnx.Module):
    """A linear map of the mean over all positions; it starts at zero."""

    def __init__(self, channels: int, num_classes: int, *, rngs: Rngs):
        """Builds the layer."""
        zeros = nnx.initializers.zeros
        self.logits = nnx.Linear(channels, num_classes, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Image) -> Float[Array, "n num_classes"]:
        """[n, h, w, c] to logits."""
        return self.logits(x.mean(axis=(1, 2)))


class Classifier(nnx.Module):
    """log p(y | x_t) of a noisy image, up to a constant (Dhariwal & Nichol 2021, section 4).

    Everything after the middle computes in float32.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_classes: int,
        model_channels: int,
        channel_mult: tuple[float, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        rngs: Rngs,
        in_channels: int = 3,
        patch_size: int = 1,
        pool: str = "attention",
        num_heads: int = 1,
        head_channels: int | None = 64,
        new_attention_order: bool = False,
        resblock_updown: bool = True,
        conv_resample: bool = True,
        norm_groups: int = 32,
        scale_shift_norm: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
    ):
        """Builds the network, whose first convolution is as wide as the first level.

        Args:
            image_size: height and width in pixels, divisible by patch_size 2^(levels - 1).
            num_classes: how many logits there are.
            model_channels: width of a level with channel_mult 1.
            channel_mult: width of each level as a multiple of model_channels.
            num_res_blocks: residual blocks per level.
            attention_resolutions: sizes of the feature maps that get attention, for instance (32, 16, 8).
            rngs: where initial parameters are drawn from.
            in_channels: channels of the image.
            patch_size: height and width in pixels of what becomes one position of the first convolution; 1 is ADM's
                own, more of it costs less.
            pool: "attention", or "adaptive": the mean over all positions.
            num_heads: attention heads, where head_channels does not say it.
            head_channels: channels of every attention head; None leaves it to num_heads, but not in the attention pool.
            new_attention_order: that of the attention blocks, as in UNet; the pool always has the new one.
            resblock_updown: halve the resolution inside of residual blocks.
            conv_resample: without resblock_updown, halve it with a convolution.
            norm_groups: groups of channels that are normalised together.
            scale_shift_norm: let the embedding scale and shift the second norm; otherwise it is added before it.
            dropout: rate of dropout in residual blocks, in [0, 1).
            dtype: what convolutions and matmuls compute in, up to the pool.
            remat: recompute each stage in the backward pass.

        Raises:
            ValueError: another pool, an attention pool without head_channels, or see UNet.
        """
        check_counts(
            num_classes=num_classes, model_channels=model_channels, num_res_blocks=num_res_blocks, num_heads=num_heads
        )
        check_time_features(model_channels)
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}, expected {' or '.join(map(repr, POOLS))}")
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of the patch_size {patch_size}")
        if pool == "attention" and head_channels is None:
            raise ValueError("the attention pool needs head_channels, which is None")
        levels = make_levels(
            image_size=image_size // patch_size, model_channels=model_channels, channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
        )  # fmt: skip
        embed_dim = 4 * model_channels
        blocks = make_blocks(
            embed_dim=embed_dim, head_channels=head_channels, new_attention_order=new_attention_order,
            resblock_updown=resblock_updown, conv_resample=conv_resample, norm_groups=norm_groups,
            scale_shift_norm=scale_shift_norm, dropout=dropout, dtype=dtype, rngs=rngs,
        )  # fmt: skip

        self.time_in = linear(model_channels, embed_dim, rngs=rngs)
        self.time_out = linear(embed_dim, embed_dim, rngs=rngs)
        down, self.middle, channels = make_encoder(
            blocks, levels, in_channels=in_channels * patch_size**2, stem_channels=levels[0].channels,
            num_res_blocks=num_res_blocks, num_heads=num_heads,
        )  # fmt: skip
        self.down = nnx.List(down)
        self.norm_out = GroupNorm(channels[-1], norm_groups)
        if pool == "attention":
            size = image_size // patch_size >> (len(levels) - 1)
            self.pool = AttentionPool(channels[-1], num_classes, size=size, head_channels=head_channels, rngs=rngs)
        else:
            self.pool = MeanPool(channels[-1], num_classes, rngs=rngs)
        self.model_channels = model_channels
        self.patch_size = patch_size
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self, x_t: Image, t: Float[Array, " n"], *, dropout_key: Key | None = None
    ) -> Float[Array, "n num_classes"]:
        """Classifies.

        Args:
            x_t: f32[n, h, w, c]; where the pool is attention, h = w = image_size.
            t: f32[n], the timestep as the process feeds it to the network.
            dropout_key: key for dropout; None switches it off.

        Returns:
            f32[n, num_classes] logits: their softmax is p(y | x_t).

        Raises:
            ValueError: images of another size than the attention pool has positions for.
        """
        return self.read(x_t, t, dropout_key=dropout_key)[0]

    def read(
        self, x_t: Image, t: Float[Array, " n"], *, dropout_key: Key | None = None
    ) -> tuple[Float[Array, "n num_classes"], Float[Array, "n channels"]]:
        """The logits, and the mean over all positions of what the pool reads; arguments as above."""
        last = self.norm_out(self.features(x_t, t, dropout_key=dropout_key)[-1].astype(jnp.float32), silu=True)
        return self.pool(last), last.mean(axis=(1, 2))

    def features(self, x_t: Image, t: Float[Array, " n"], *, dropout_key: Key | None = None) -> list[Image]:
        """What every stage before the pool gives, from the first convolution to the middle; arguments as above."""
        embedding = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(t, self.model_channels))))
        run = partial(run_stage, embedding=embedding, dropout_key=dropout_key, remat=self.remat)
        found = [space_to_depth(x_t, self.patch_size).astype(self.dtype)]
        for i, stage in enumerate([*self.down, self.middle]):
            found.append(run(stage, i, found[-1]))
        return found[1:]
