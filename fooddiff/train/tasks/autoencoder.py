"""Training an autoencoder: the error of its reconstructions plus what its bottleneck charges.

Two terms more can be asked for: the distance between features of a fixed network (perceptual), and what a discriminator
of patches, which learns beside the autoencoder, says of the reconstructions (adversarial).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Array, Image, Key, Params, PerExample, Scalar
from fooddiff.codec import to_signed
from fooddiff.keys import stream
from fooddiff.model import bottleneck
from fooddiff.model.discriminator import adaptive_weight, generator_loss, hinge_loss
from fooddiff.model.network import Network
from fooddiff.train.task import Task

PEAK = 2.0  # from black to white, in images in [-1, 1]
METRICS = ("loss", "reconstruction", "penalty", "psnr")
ADVERSARY_METRICS = ("adversarial", "adversarial_weight", "discriminator")
LAST_LAYER = "decoder.conv_out.kernel"  # where the adaptive weight compares gradients, in every autoencoder
FEATURE_EPSILON = 1e-10  # of a squared norm


class Examples(NamedTuple):
    """A batch with everything random already drawn."""

    x: Image
    noise: Image  # standard normal, of the latents


class Terms(NamedTuple):
    """What one image costs."""

    total: PerExample
    reconstruction: PerExample  # mean error of the image
    penalty: PerExample  # of the bottleneck, without its weight
    psnr: PerExample  # dB; of the reconstruction before it is rounded
    further: Mapping[str, PerExample]  # where asked for: perceptual and adversarial term, and the latter's weight
    decoded: Image | None  # the reconstruction, where a discriminator learns from it


class Passage(NamedTuple):
    """What a bottleneck makes of an encoder's output in training."""

    z: Image  # what the decoder takes
    penalty: PerExample
    cost: PerExample  # the penalty, weighted


Bottleneck = Callable[[Params, Array, Image], Passage]
"""(params, the encoder's output, noise) -> what passes."""


def gaussian(params: Params, moments: Array, noise: Image, *, weight: float) -> Passage:
    """Draws from the posterior and charges its KL divergence from the standard normal one, in nats per dimension."""
    posterior = bottleneck.posterior_of(moments)
    kl = bottleneck.kl_divergence(posterior) / math.prod(noise.shape[1:])
    return Passage(bottleneck.draw(posterior, noise), kl, weight * kl)


def codebook(params: Params, z: Array, noise: Image, *, weight: float, beta: float) -> Passage:
    """Takes the nearest codes and charges the mean squared distance to them, see `quantize`."""
    quantize = partial(bottleneck.quantize, codebook=params["codebook"], beta=beta)
    found = jax.vmap(lambda one: quantize(one[None]))(z)
    return Passage(found.z[:, 0], found.loss, weight * found.loss)


def no_bottleneck(params: Params, z: Array, noise: Image) -> Passage:
    """Lets everything pass for nothing."""
    free = jnp.zeros(len(z))
    return Passage(z, free, free)


def absolute_error(x: Image, reconstruction: Image) -> PerExample:
    """Mean |difference| of every image: f32[n]."""
    return jnp.abs(x - reconstruction).mean(axis=(1, 2, 3))


def squared_error(x: Image, reconstruction: Image) -> PerExample:
    """Mean squared difference of every image: f32[n]."""
    return ((x - reconstruction) ** 2).mean(axis=(1, 2, 3))


def psnr(x: Image, reconstruction: Image) -> PerExample:
    """Peak signal-to-noise ratio of every image in dB: f32[n]."""
    return 10 * jnp.log10(PEAK**2 / squared_error(x, reconstruction))


class Perceptual(NamedTuple):
    """A network whose features tell images apart. Its parameters stay as they are; the train state takes them along."""

    init: Callable[[Key], Params]
    features: Callable[[Params, Image], Sequence[Image]]
    weight: float  # of the distance


class Adversary(NamedTuple):
    """A discriminator with the optimizer that trains it."""

    network: Network
    optimizer: optax.GradientTransformation
    weight: float  # of the adversarial term, by which the adaptive weight is multiplied
    start_step: int  # the first step in which it learns and counts


class Learning(NamedTuple):
    """What a discriminator takes from step to step."""

    params: Params
    opt_state: optax.OptState
    steps: Array  # i32[], done by the autoencoder


def perceptual_distance(x: Sequence[Image], reconstruction: Sequence[Image]) -> PerExample:
    """Squared distance of features whose vector at each position has length 1: mean over positions, then over layers.

    Zhang et al. 2018 (LPIPS), eq. 1, with all channels weighted alike.

    Args:
        x: features f[n, h, w, c] of every layer.
        reconstruction: the same of other images.

    Returns:
        f32[n] in [0, 4].
    """

    def unit(feature: Image) -> Image:
        feature = feature.astype(jnp.float32)
        return feature * jax.lax.rsqrt((feature**2).sum(axis=-1, keepdims=True) + FEATURE_EPSILON)

    layers = [((unit(a) - unit(b)) ** 2).sum(axis=-1).mean(axis=(1, 2)) for a, b in zip(x, reconstruction, strict=True)]
    return sum(layers) / len(layers)


def learned(adversary: Adversary, learning: Learning, x: Image, decoded: Image) -> tuple[Learning, Scalar]:
    """Lets a discriminator take one step, if it is to have begun; and its loss before that."""

    def loss(params: Params) -> Scalar:
        return hinge_loss(adversary.network.apply(params, x), adversary.network.apply(params, decoded))

    value, grads = jax.value_and_grad(loss)(learning.params)
    updates, opt_state = adversary.optimizer.update(grads, learning.opt_state, learning.params)
    after = learning._replace(params=optax.apply_updates(learning.params, updates), opt_state=opt_state)
    begun = learning.steps >= adversary.start_step
    after = jax.tree.map(lambda new, old: jnp.where(begun, new, old), after, learning)
    return after._replace(steps=learning.steps + 1), value


def make_autoencoder_task(
    init: Callable[[Key], Params],
    encode: Callable[..., Array],
    decode: Callable[..., Image],
    latent_shape: tuple[int, int, int],
    bottleneck: Bottleneck,
    error: Callable[[Image, Image], PerExample],
    *,
    dropout: bool,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
) -> Task:
    """Builds the task of an autoencoder.

    With an adversary, autoencoder and discriminator learn in turn from the same images: the former against the
    discriminator as it was, then the latter from the reconstructions that this took. latent-diffusion makes new ones
    for it with the updated autoencoder.

    Args:
        init: key -> params.
        encode: (params, x, dropout_key=...) -> the encoder's output.
        decode: (params, z, dropout_key=...) -> the reconstruction.
        latent_shape: (h, w, c) of the latents.
        bottleneck: what lies between.
        error: of reconstructions.
        dropout: whether the network gets dropout keys.
        perceptual: the network whose features are to be alike, if any.
        adversary: the discriminator, if any.

    Returns:
        The task. With either of the two, it carries a dict with "perceptual", that network's parameters, and
        "adversary", a `Learning`; otherwise nothing.
    """
    metrics = METRICS
    metrics += ("perceptual",) if perceptual is not None else ()
    metrics += ADVERSARY_METRICS if adversary is not None else ()

    def init_carried(key):
        carried = {}
        if perceptual is not None:
            carried["perceptual"] = perceptual.init(stream(key, "perceptual"))
        if adversary is not None:
            params = adversary.network.init(stream(key, "adversary"))
            carried["adversary"] = Learning(params, adversary.optimizer.init(params), jnp.zeros((), jnp.int32))
        return carried or None

    def draw(carried, batch, key):
        noise = jax.random.normal(stream(key, "noise"), (len(batch.pixels), *latent_shape))
        return Examples(to_signed(batch.pixels), noise)

    def differences(carried, x, decoded):
        """The error and, where asked for, the perceptual distance: what each image lacks, and the weighted sum."""
        found = {"reconstruction": error(x, decoded)}
        if perceptual is None:
            return found, found["reconstruction"]
        features = [perceptual.features(carried["perceptual"], images) for images in (x, decoded)]
        found["perceptual"] = perceptual_distance(*features)
        return found, found["reconstruction"] + perceptual.weight * found["perceptual"]

    def adversarial(carried, decoded):
        """How little each image looks real to the discriminator."""
        logits = adversary.network.apply(carried["adversary"].params, decoded)
        return jax.vmap(generator_loss)(logits)

    def weight_of_adversary(params, carried, x, decode_with):
        """The adaptive weight; what is computed twice for it, compilers compute once."""

        def gradient(objective):
            return jax.grad(lambda last: objective(decode_with(params | {LAST_LAYER: last})).mean())(params[LAST_LAYER])

        of_differences = gradient(lambda decoded: differences(carried, x, decoded)[1])
        weight = adversary.weight * adaptive_weight(of_differences, gradient(partial(adversarial, carried)))
        return jnp.where(carried["adversary"].steps >= adversary.start_step, weight, 0.0)

    def loss(params, carried, examples, key):
        keys = jax.random.split(key) if dropout else (None, None)
        encoded = encode(params, examples.x, dropout_key=keys[0])
        passage = bottleneck(params, encoded, examples.noise)
        decoded = decode(params, passage.z, dropout_key=keys[1])
        found, total = differences(carried, examples.x, decoded)
        total = total + passage.cost
        if adversary is not None:
            fixed, z = jax.lax.stop_gradient((params, passage.z))
            weight = weight_of_adversary(
                fixed, carried, examples.x, lambda fixed: decode(fixed, z, dropout_key=keys[1])
            )
            found["adversarial"] = adversarial(carried, decoded)
            found["adversarial_weight"] = jnp.full_like(total, weight)
            total = total + weight * found["adversarial"]
        terms = Terms(
            total, found.pop("reconstruction"), passage.penalty, psnr(examples.x, decoded), found,
            None if adversary is None else decoded,
        )  # fmt: skip
        return total.mean(), terms

    def observe(carried, examples, terms):
        n = jnp.full((), len(terms.total), jnp.float32)
        reported = terms._asdict() | {"loss": terms.total} | terms.further
        if adversary is not None:
            learning, value = learned(adversary, carried["adversary"], examples.x, terms.decoded)
            carried, reported["discriminator"] = carried | {"adversary": learning}, jnp.full_like(terms.total, value)
        return carried, {name: jnp.stack([reported[name].sum(), n]) for name in metrics}

    return Task(init, init_carried, draw, loss, observe, metrics)
