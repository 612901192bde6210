"""The adversary of an autoencoder: a discriminator of patches (Isola et al. 2017), and its losses as pure functions."""

import jax
import jax.numpy as jnp
from flax import nnx

from fooddiff.arrays import Array, Float, Image, Key, Scalar
from fooddiff.keys import Rngs
from fooddiff.settings import check_counts

NORM_EPSILON = 1e-5
SLOPE = 0.2  # of the leaky ReLU
MAX_MULT = 8  # how much wider than the first layer the others may be
MAX_WEIGHT = 1e4


class BatchNorm(nnx.Module):
    """Normalises each channel over the batch and all positions; without running averages, as it is used in training."""

    def __init__(self, channels: int, *, rngs: Rngs):
        """Builds the layer."""
        self.scale = nnx.Param(1 + 0.02 * jax.random.normal(rngs.params(), (channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Image) -> Image:
        """Normalises x f32[n, h, w, c]; over several devices, with the statistics of the whole batch."""
        centred = x - x.mean(axis=(0, 1, 2), keepdims=True)
        inv_std = jax.lax.rsqrt((centred**2).mean(axis=(0, 1, 2)) + NORM_EPSILON)
        return centred * (inv_std * self.scale)[None, None, None] + self.bias[None, None, None]


class PatchDiscriminator(nnx.Module):
    """Tells real patches from reconstructed ones; latent-diffusion's NLayerDiscriminator."""

    def __init__(self, *, rngs: Rngs, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        """Builds the network.

        Args:
            rngs: where initial parameters are drawn from.
            in_channels: channels of the image.
            channels: width of the first layer; each further one is twice as wide, but none more than 8 times.
            num_layers: how often the resolution is halved. A logit sees 70 x 70 pixels with 3, 34 x 34 with 2.

        Raises:
            ValueError: a count below 1.
        """
        check_counts(in_channels=in_channels, channels=channels, num_layers=num_layers)
        widths = [channels * min(2**i, MAX_MULT) for i in range(num_layers + 1)]
        self.convs = nnx.List(
            [
                _conv(in_channels, widths[0], stride=2, bias=True, rngs=rngs),
                *(_conv(widths[i - 1], widths[i], stride=2, bias=False, rngs=rngs) for i in range(1, num_layers)),
                _conv(widths[-2], widths[-1], stride=1, bias=False, rngs=rngs),
                _conv(widths[-1], 1, stride=1, bias=True, rngs=rngs),
            ]
        )
        self.norms = nnx.List([BatchNorm(width, rngs=rngs) for width in widths[1:]])
        self.smallest = 3 * 2**num_layers

    def __call__(self, x: Image, *, dropout_key: Key | None = None) -> Float[Array, "n h w 1"]:
        """Logits of patches that overlap: large where they look real.

        Args:
            x: f32[n, h, w, in_channels], all real or all reconstructed, since the statistics are theirs.
            dropout_key: of no effect.

        Returns:
            f32[n, h', w', 1]; at 64 pixels and num_layers 3, h' = w' = 6.

        Raises:
            ValueError: images so small that no logit is left.
        """
        _, height, width, _ = x.shape
        if min(height, width) < self.smallest:
            raise ValueError(f"images of {height}x{width} are too small: expected at least {self.smallest} pixels")
        h = jax.nn.leaky_relu(self.convs[0](x), SLOPE)
        for layer, norm in zip(self.convs[1:-1], self.norms, strict=True):
            h = jax.nn.leaky_relu(norm(layer(h)), SLOPE)
        return self.convs[-1](h)


def _conv(in_channels: int, out_channels: int, *, stride: int, bias: bool, rngs: Rngs) -> nnx.Conv:
    return nnx.Conv(
        in_channels, out_channels, (4, 4), strides=stride, padding=1, use_bias=bias,
        kernel_init=nnx.initializers.normal(0.02), dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip


def hinge_loss(real: Array, reconstructed: Array) -> Scalar:
    """The discriminator's loss: its logits should be above 1 for real images, and below -1 for reconstructed ones."""
    return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + reconstructed).mean()) / 2


def generator_loss(reconstructed: Array) -> Scalar:
    """The autoencoder's adversarial loss: the discriminator's logits of reconstructed images should be large."""
    return -reconstructed.mean()


def adaptive_weight(of_reconstruction: Array, of_adversary: Array) -> Scalar:
    """How much the adversarial loss is to count, so that both losses pull equally at the decoder's last layer.

    Esser et al. 2021, eq. 7. No gradient flows through it.

    Args:
        of_reconstruction: the gradient of the reconstruction loss by the last layer's kernel.
        of_adversary: that of `generator_loss`.

    Returns:
        The quotient of their norms, at most 10,000.
    """
    quotient = jnp.linalg.norm(of_reconstruction.ravel()) / (jnp.linalg.norm(of_adversary.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.minimum(quotient, MAX_WEIGHT))
