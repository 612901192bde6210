"""Composition root: config sections to objects. No room below sees a ConfigDict or a string from one.

First the tables of names and the fields of a config. Then, in this order, the makers of diffusion models, autoencoders
and codecs, classifiers, samplers, optimizers, of a training of any of these, and of data sets.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fooddiff import codec, parallel
from fooddiff.arrays import Array, Batch, Cond, Image, Key, Params, PerExample, Pixels
from fooddiff.codec import Codec
from fooddiff.data import sources
from fooddiff.data.cache import Dataset, load_dataset
from fooddiff.diffusion import continuous, denoiser, discrete, guidance, losses, samplers, weights
from fooddiff.diffusion import schedule as schedules
from fooddiff.diffusion.denoiser import Denoiser, Prediction
from fooddiff.diffusion.discrete import GaussianDiffusion
from fooddiff.diffusion.level import Level, Transition, clean_level
from fooddiff.eval import resize
from fooddiff.keys import sample_noise, stream
from fooddiff.low_res import LowRes, shrink
from fooddiff.model import bottleneck
from fooddiff.model.autoencoder import Autoencoder
from fooddiff.model.classifier import Classifier
from fooddiff.model.discriminator import PatchDiscriminator
from fooddiff.model.network import Network, abstract_params, make_network
from fooddiff.model.taesd import TAESD
from fooddiff.model.unet import UNet
from fooddiff.model.uvit import UViT
from fooddiff.sample import one_step
from fooddiff.sample.enlarge import Enlarge
from fooddiff.sample.generate import BoundSampler, Draw, Stepper, make_draw, make_stepper
from fooddiff.sample.one_step import OneStep
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import (
    MAX_SEED,
    ConfigError,
    check_fields,
    check_known,
    check_positive,
    check_type,
    choose,
    construct,
)
from fooddiff.train import optimizer
from fooddiff.train import times as levels
from fooddiff.train.averages import MAX_LENGTH, MIN_LENGTH, make_averages
from fooddiff.train.state import TrainState, init_state
from fooddiff.train.step import StepFn, make_diagnosis, make_train_step
from fooddiff.train.task import Task
from fooddiff.train.tasks import autoencoder as autoencoding
from fooddiff.train.tasks import classifier as classification
from fooddiff.train.tasks import diffusion
from fooddiff.train.times import Times
from fooddiff.xla import jit

SCHEDULES = {"linear": schedules.linear_betas, "cosine": schedules.cosine_betas}
LOG_SNRS = {"linear": continuous.linear_log_snr, "cosine": continuous.cosine_log_snr}
PREDICTIONS = {
    "eps": denoiser.read_eps,
    "x_0": denoiser.read_x0,
    "v": denoiser.read_v,
    "flow": denoiser.read_flow,
    "edm": denoiser.read_edm,
}
ERRORS = {"eps": denoiser.eps_error, "x_0": denoiser.x0_error, "v": denoiser.v_error}
VARIANCES = {
    "fixed_small": denoiser.fixed_small,
    "fixed_large": denoiser.fixed_large,
    "learned_range": denoiser.learned_range,
}
OBJECTIVES = {"mse": losses.mse_loss, "hybrid": losses.hybrid_loss, "vlb": losses.vlb_loss}  # of discrete processes
TIMESTEP_SAMPLING = {"uniform": levels.uniform_timesteps, "loss_second_moment": levels.important_timesteps}
WEIGHTS = {
    "constant": weights.constant,
    "snr": weights.snr,
    "min_snr": weights.min_snr,
    "capped": weights.capped,
    "p2": weights.p2,
    "sigmoid": weights.sigmoid,
    "edm": weights.edm,
}
DENSITIES = {
    "uniform": continuous.uniform,
    "stratified": continuous.stratified,
    "logit_normal": continuous.logit_normal,
    "log_sigma_normal": continuous.log_sigma_normal,
}
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "dpmpp_2m": samplers.dpmpp_2m,
    "sde_dpmpp_2m": samplers.sde_dpmpp_2m,
    "heun": samplers.heun,
}
SPACINGS = {"time": continuous.even_in_time, "log_snr": continuous.even_in_log_snr, "karras": continuous.karras}
NETWORKS = {"unet": UNet, "uvit": UViT}
AUTOENCODERS = {"ldm": Autoencoder, "taesd": TAESD}
BOTTLENECKS = {"kl": autoencoding.gaussian, "vq": autoencoding.codebook, "none": autoencoding.no_bottleneck}
PIXEL_ERRORS = {"l1": autoencoding.absolute_error, "l2": autoencoding.squared_error}
CLASSIFIERS = {"adm_encoder": Classifier}
OPTIMIZERS = {"adam": optimizer.adam, "adamw": optimizer.adamw, "muon": optimizer.muon}
RESIZE = {"tf1": resize.tf1, "half_pixel": resize.half_pixel, "clean_bicubic": resize.clean_bicubic}
SHARDED = {"nothing": (), "averages": ("ema", "opt_state"), "all": ("ema", "opt_state", "params")}  # parts of the state
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SOURCES = {
    "food101": sources.food101,
    "archive": sources.archive,
    "folder": sources.folder,
    "digits": sources.digits,
}

IMAGE_CHANNELS = 3
POSITIVE = ("cap", "k", "data_std", "std")  # options of weights and densities

SECTIONS = {  # of every task: fields with their types; None where the arguments of a function say them
    "objective": None,
    "model": None,
    "optimizer": None,
    "data": {
        "source": str, "path": str | None, "cache_dir": str, "image_size": int, "flip": bool, "max_unreadable": int,
    },
    "ema": {"rates": tuple[float, ...], "warmup": bool, "power_lengths": tuple[float, ...]},
    "train": {
        "steps": int, "batch_size": int, "accumulate": int, "shard": str, "checkpoint_every": int,
        "keep_checkpoints": int | None, "keep_best": int, "max_skipped": int,
    },
    "log": {"every_steps": int, "wandb_project": str | None},
}  # fmt: skip
DIFFUSION_SECTIONS = {
    "diffusion": None,
    "codec": None,
    "low_res": None,
    "sample": {"every_steps": int, "classes": tuple[str, ...], "per_class": int, "batch_size": int}
    | {field.name: SamplerSpec.__annotations__[field.name] for field in fields(SamplerSpec)},
    "eval": {
        "every_steps": int, "inception": str | None, "features": tuple[str, ...], "resize": str,
        "per_class": int | None, "weights": tuple[str, ...], "cache_dir": str,
    },
}  # fmt: skip
AUTOENCODER_SECTIONS = {
    "perceptual": None,
    "adversary": None,
    "eval": {"every_steps": int, "count": int | None, "batch_size": int},
}
CLASSIFIER_SECTIONS = {
    "diffusion": None,
    "eval": {
        "every_steps": int, "batches": int, "batch_size": int, "weights": tuple[str, ...],
        "source": str | None, "path": str | None,
    },
}  # fmt: skip


def _network_maker(module: type) -> Callable[..., Network]:
    """`make_network` of a module, with the parameters of its constructor: the only list of them."""

    def make(**arguments: Any) -> Network:
        return make_network(module, **{name: _tuples(value) for name, value in arguments.items()})

    parameters = inspect.signature(module.__init__).parameters.values()
    make.__signature__ = inspect.Signature([p for p in parameters if p.name not in ("self", "rngs")])
    return make


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _floats(value: Any) -> Any:
    """Integers as floats, alone and in a list or tuple, so that equal settings are equal in JSON."""
    if isinstance(value, list | tuple):
        return tuple(map(_floats, value))
    return float(value) if type(value) is int else value


class DiffusionModel(NamedTuple):
    """A network together with what its output means and the levels at which it is used."""

    network: Network
    codec: Codec
    denoiser: Callable[[Callable], Denoiser]  # the network as (x_t, time, cond) -> output, read as a denoiser
    process: GaussianDiffusion | None  # a discrete process with all its timesteps; None in continuous time
    steps: Callable[[SamplerSpec], Transition]  # the steps of a sampling run
    num_classes: int | None
    null_label: int | None  # the label that means none, if the network knows one
    posterior_variance: bool  # of a step's variance: whether it is the posterior's, zero at the last step
    low_res: LowRes | None  # what a model for super-resolution is shown; None for all others

    def cond(self, key: Key, ids: Array, images: Image | None = None) -> Cond:
        """What samples are conditioned on.

        Args:
            key: the seed's key.
            ids: i32[n, 2], (class, index) of every sample.
            images: f32[n, h, w, c], needed for super-resolution alone: what is enlarged, as large as the condition, or
                larger, in which case the condition is a small version.

        Returns:
            The class where the model knows classes; for super-resolution the small image with sampling's noise, too.
        """
        cond = {} if self.num_classes is None else {"y": ids[:, 0]}
        if self.low_res is None:
            return cond
        small = shrink(images, self.low_res.size)
        noise = sample_noise(stream(key, "low_res"), ids, small.shape[1:])
        return {**cond, "low_res": small + self.low_res.noise * noise}


def make_diffusion_model(config) -> DiffusionModel:
    """Builds the process, the network and its reading from config.diffusion, config.model and config.data."""
    settings = dict(config.diffusion)
    time = settings.pop("time", "discrete")  # absent where checkpoints are older than the choice
    process, read, log_var, steps = construct(choose("diffusion.time", time, PROCESSES), "diffusion", settings)
    model = dict(config.model)
    module = choose("model.network", model.pop("network", "unet"), NETWORKS)
    dtype = choose("model.dtype", model.pop("dtype", "float32"), DTYPES)
    diffused = make_codec(config)
    height, _, channels = diffused.shape
    outputs = channels * (2 if log_var is denoiser.learned_range else 1)
    given = dict(image_size=height, in_channels=channels, out_channels=outputs, dtype=dtype)
    low_res = make_low_res(config)
    if module is UNet:
        given["low_res"] = low_res is not None
    elif low_res is not None:
        raise ConfigError("config.low_res is for super-resolution, which takes config.model.network 'unet'")
    network = construct(_network_maker(module), "model", model, given=given)
    num_classes = model["num_classes"]
    return DiffusionModel(
        network,
        diffused,
        partial(denoiser.make_denoiser, read=read, log_var=log_var),
        process,
        steps,
        num_classes,
        num_classes if knows_null_label(network, num_classes) else None,
        log_var in (None, denoiser.fixed_small),
        low_res,
    )


def make_low_res(config) -> LowRes | None:
    """Reads config.low_res, which makes a diffusion model one for super-resolution; None without it."""
    if "low_res" not in config:
        return None
    if "codec" in config:
        raise ConfigError("config.low_res is for super-resolution of pixels: expected no config.codec beside it")
    return construct(_low_res, "low_res", dict(config.low_res), given={"image_size": config.data.image_size})


def _low_res(*, size: int, max_noise: float, noise: float, image_size: int) -> LowRes:
    if not 1 <= size < image_size or image_size % size:
        raise ConfigError(
            f"config.low_res.size is {size}, expected a divisor of config.data.image_size {image_size} below it"
        )
    if not 0 <= noise <= max_noise:
        raise ConfigError(
            f"config.low_res.noise is {noise} and max_noise {max_noise}, expected 0 <= noise <= max_noise: a model is "
            f"to sample at a level that it was trained at"
        )
    return LowRes(size, max_noise, noise)


def knows_null_label(network: Network, num_classes: int | None) -> bool:
    """Whether the network's label embedding has a row more than there are classes."""
    return num_classes is not None and abstract_params(network)["label.embedding"].shape[0] > num_classes


def _discrete(*, schedule: str, timesteps: int, rescale_timesteps: bool, prediction: str, variance: str):
    betas = choose("diffusion.schedule", schedule, SCHEDULES)(timesteps)
    read = choose("diffusion.prediction", prediction, PREDICTIONS)
    log_var = choose("diffusion.variance", variance, VARIANCES)
    make = partial(discrete.make_process, betas, rescale_timesteps=rescale_timesteps)

    def steps(spec: SamplerSpec) -> Transition:
        grid_of = choose("sample.spacing", spec.spacing, SPACINGS)
        if spec.steps is None:
            if spec.spacing != "time":
                raise ConfigError(f"spacing is {spec.spacing!r}, but without a number of steps every timestep is taken")
            return discrete.transitions(make())
        if not 2 <= spec.steps <= timesteps:
            raise ConfigError(f"cannot sample in {spec.steps} steps: expected 2 to {timesteps}")
        if spec.spacing == "time":
            return discrete.transitions(make(schedules.evenly_spaced(timesteps, (spec.steps,))))
        log_snrs = np.asarray(make().log_snr, np.float64)
        grid = grid_of(spec.steps, log_snrs[-1], log_snrs[0], log_snr_of=None)
        return discrete.transitions(make(schedules.nearest(log_snrs, grid)))

    return make(), read, log_var, steps


def _continuous(*, schedule: str, prediction: str, log_snr_range: tuple[float, ...]):
    log_snr_of = choose("diffusion.schedule", schedule, LOG_SNRS)
    read = choose("diffusion.prediction", prediction, PREDICTIONS)
    low, high = log_snr_range if len(log_snr_range) == 2 else (0.0, 0.0)
    if not low < high:
        raise ConfigError(f"config.diffusion.log_snr_range is {log_snr_range}, expected two ascending numbers")

    def steps(spec: SamplerSpec) -> Transition:
        if spec.steps is None or spec.steps < 2:
            raise ConfigError(f"cannot sample in {spec.steps} steps: a process in continuous time needs at least 2")
        grid = choose("sample.spacing", spec.spacing, SPACINGS)
        return continuous.transitions(grid(spec.steps, low, high, log_snr_of=log_snr_of))

    return None, read, None, steps


PROCESSES = {"discrete": _discrete, "continuous": _continuous}


def _diffusion_task(config, model: DiffusionModel) -> Task:
    """Builds the task from config.objective, which also holds the keyword arguments of the loss function."""
    if config.train.keep_best and config.eval.inception is None:
        raise ConfigError(
            f"config.train.keep_best is {config.train.keep_best}, expected 0 without config.eval.inception, since "
            f"nothing is scored then"
        )
    settings = dict(config.objective)
    check_type("objective.label_dropout", label_dropout := settings.pop("label_dropout", 0.0), float)
    if not 0 <= label_dropout < 1 or (label_dropout and model.null_label is None):
        raise ConfigError(
            f"config.objective.label_dropout is {label_dropout}, expected a number in [0, 1), and above 0 only for a "
            f"network that knows a null label (config.model.null_label)"
        )
    make_times_and_loss = _continuous_objective if model.process is None else _discrete_objective
    times, loss_terms, terms = make_times_and_loss(config, model, settings)
    return diffusion.make_diffusion_task(
        model.network,
        model.codec,
        times,
        model.denoiser,
        loss_terms,
        terms=terms,
        conditional=model.num_classes is not None,
        dropout=config.model.get("dropout", 0.0) > 0,
        label_dropout=label_dropout,
        null_label=model.null_label,
        low_res=model.low_res,
    )


def _discrete_objective(config, model: DiffusionModel, settings: dict[str, Any]):
    name, sampling = settings.pop("name", None), settings.pop("timestep_sampling", None)
    function = choose("objective.name", name, OBJECTIVES)
    if name == "hybrid" and config.diffusion.variance != "learned_range":
        raise ConfigError(
            f"config.objective.name is 'hybrid', whose bound trains the variance, but config.diffusion.variance is "
            f"{config.diffusion.variance!r}: expected 'learned_range'"
        )
    error = choose("diffusion.prediction", config.diffusion.prediction, ERRORS)
    given = {"num_timesteps": model.process.num_timesteps} if name == "vlb" else {}
    check_fields(function, "objective", settings, given=given)
    if (weight := settings.get("vb_weight", 0.0)) < 0:
        raise ConfigError(f"config.objective.vb_weight is {weight}, expected 0 or more")
    times = choose("objective.timestep_sampling", sampling, TIMESTEP_SAMPLING)(model.process)
    return times, partial(function, error, **settings, **given), ("mse", "vb")


def _continuous_objective(config, model: DiffusionModel, settings: dict[str, Any]):
    choose("objective.name", settings.pop("name", None), {"weighted": losses.weighted_loss})
    tables = {"weight": WEIGHTS, "density": DENSITIES}
    functions = {
        field: choose(f"objective.{field}", settings.pop(field, None), table) for field, table in tables.items()
    }
    log_snr_of = {"log_snr_of": LOG_SNRS[config.diffusion.schedule]}
    options = {field: dict(settings.pop(f"{field}_options", {})) for field in tables}
    if settings:
        raise ConfigError(f"config.objective has no field {', '.join(settings)}")
    check_fields(functions["weight"], "objective.weight_options", options["weight"])
    check_fields(functions["density"], "objective.density_options", options["density"], given=log_snr_of)
    for name, value in [*options["weight"].items(), *options["density"].items()]:
        if name in POSITIVE and value <= 0:
            raise ConfigError(f"config.objective sets {name} to {value}, expected more than 0")
    times = levels.log_snrs(partial(functions["density"], **options["density"], **log_snr_of))
    weight = partial(functions["weight"], **options["weight"])
    return times, partial(losses.weighted_loss, weight), ("x0_mse",)


class AutoencoderModel(NamedTuple):
    """A network with two halves, and what its latents are."""

    network: Network
    encoder: Callable[..., Array]  # (params, x, dropout_key=...) -> what the encoder gives
    decoder: Callable[..., Image]  # (params, z, dropout_key=...) -> images
    bottleneck: str  # between them, of BOTTLENECKS
    latent_shape: tuple[int, int, int]
    num_classes: None = None

    def encode(self, params: Params, x: Image) -> Image:
        """Images f32[n, h, w, 3] in [-1, 1] to latents f32[n, *latent_shape]; nothing is drawn."""
        return LATENTS[self.bottleneck].latents(self.encoder(params, x))

    def decode(self, params: Params, z: Image) -> Image:
        """Latents to images, nearly in [-1, 1]."""
        return self.decoder(params, LATENTS[self.bottleneck].to_decoder(params, z))


LATENTS = {"kl": bottleneck.GAUSSIAN, "vq": bottleneck.CODEBOOK, "none": bottleneck.OPEN}


def make_autoencoder_model(config) -> AutoencoderModel:
    """Builds an autoencoder from config.model and config.data."""
    return _autoencoder("model", config.model, config.data.image_size)


def _autoencoder(section: str, settings: Mapping[str, Any], size: int) -> AutoencoderModel:
    check_positive("data.image_size", size)
    settings = dict(settings)
    name = settings.pop("network", None)
    module = choose(f"{section}.network", name, AUTOENCODERS)
    given = {"dtype": choose(f"{section}.dtype", settings.pop("dtype", "float32"), DTYPES)}
    if name == "ldm":
        given |= {"image_size": size, "in_channels": IMAGE_CHANNELS, "out_channels": IMAGE_CHANNELS}
    network = construct(_network_maker(module), section, settings, given=given)
    kind = "none" if name != "ldm" else "kl" if settings.get("num_codes") is None else "vq"
    encoder, decoder = (partial(network.apply, method=method) for method in (module.encode, module.decode))
    model = AutoencoderModel(network, encoder, decoder, kind, latent_shape=())
    image = jax.ShapeDtypeStruct((1, size, size, IMAGE_CHANNELS), jnp.float32)
    try:
        latents = jax.eval_shape(model.encode, abstract_params(network), image)
    except ValueError as error:
        raise ConfigError(f"config.data.image_size is {size}: {error}") from error
    return model._replace(latent_shape=latents.shape[1:])


def _autoencoder_task(config, model: AutoencoderModel) -> Task:
    """Builds the task from config.objective, which also holds the keyword arguments of the bottleneck."""
    settings = dict(config.objective)
    name = settings.pop("name", None)
    passage = choose("objective.name", name, BOTTLENECKS)
    if name != model.bottleneck:
        raise ConfigError(
            f"config.objective.name is {name!r}, but the network of config.model is one for {model.bottleneck!r}"
        )
    error = choose("objective.error", settings.pop("error", None), PIXEL_ERRORS)
    check_fields(passage, "objective", settings)
    perceptual = _perceptual(config) if "perceptual" in config else None
    adversary = None
    if "adversary" in config:
        if config.train.accumulate != 1:
            raise ConfigError(
                f"config.train.accumulate is {config.train.accumulate}, expected 1 with config.adversary, which looks "
                f"at the whole batch at once"
            )
        _check_weight("adversary", config.adversary)
        given = {"image_size": config.data.image_size}
        adversary = construct(_adversary, "adversary", dict(config.adversary), given=given)
    return autoencoding.make_autoencoder_task(
        model.network.init,
        model.encoder,
        model.decoder,
        model.latent_shape,
        partial(passage, **settings),
        error,
        dropout=config.model.get("dropout", 0.0) > 0,
        perceptual=perceptual,
        adversary=adversary,
    )


def _perceptual(config) -> autoencoding.Perceptual:
    """Builds the network of config.perceptual.model, a classifier of images without noise."""
    check_known("perceptual", config.perceptual, ("path", "model", "weight"))
    check_type("perceptual.path", config.perceptual.get("path"), str | None)
    _check_weight("perceptual", config.perceptual)
    network = make_perceptual_model(config)

    def features(params: Params, images: Image) -> list[Image]:
        return network.apply(params, images, jnp.zeros(len(images)), method=Classifier.features)

    return autoencoding.Perceptual(network.init, features, config.perceptual.weight)


def make_perceptual_model(config) -> Network:
    """Builds the network of config.perceptual.model, which that of config.perceptual.path must be."""
    return _classifier("perceptual.model", config.perceptual.get("model", {}), config.data.image_size)


def _adversary(
    *, weight: float, start_step: int, lr: float, channels: int, num_layers: int, image_size: int
) -> autoencoding.Adversary:
    if start_step < 0 or lr <= 0:
        raise ConfigError(
            f"config.adversary.start_step and lr are {start_step} and {lr}, expected 0 or more, and above 0"
        )
    network = make_network(PatchDiscriminator, channels=channels, num_layers=num_layers)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, IMAGE_CHANNELS), jnp.float32)
    jax.eval_shape(network.apply, abstract_params(network), image)  # raises if that is smaller than a patch
    return autoencoding.Adversary(network, optimizer.adam(lambda _: lr, b1=0.5, b2=0.9), weight, start_step)


def _check_weight(section: str, settings: Mapping[str, Any]) -> None:
    check_type(f"{section}.weight", weight := settings.get("weight"), float)
    if weight <= 0:
        raise ConfigError(
            f"config.{section}.weight is {weight}, expected more than 0; a config without this section has no such term"
        )


def make_reconstruct(model: AutoencoderModel, mesh: jax.sharding.Mesh) -> Callable[[Params, Pixels], Pixels]:
    """Compiles an autoencoder's way there and back, u8[n, h, w, 3] to the same, spread over the devices of a mesh."""
    batch = parallel.over_data(mesh)

    @partial(jit, out_shardings=parallel.replicated(mesh))  # every process gets every image
    def reconstruct(params, pixels):
        pixels = jax.lax.with_sharding_constraint(pixels, batch)
        return codec.to_uint8(model.decode(params, model.encode(params, codec.to_signed(pixels))))

    return reconstruct


def make_encode(model: AutoencoderModel, mesh: jax.sharding.Mesh) -> Callable[[Params, Pixels], Image]:
    """Compiles an autoencoder's first half, u8[n, h, w, 3] to latents, spread over the devices of a mesh."""
    batch = parallel.over_data(mesh)

    @partial(jit, out_shardings=parallel.replicated(mesh))  # every process gets all latents
    def encode(params, pixels):
        return model.encode(params, codec.to_signed(jax.lax.with_sharding_constraint(pixels, batch)))

    return encode


def make_codec(config) -> Codec:
    """Builds what stands between images and what is diffused: config.codec, or nothing if that is absent."""
    size = config.data.image_size
    check_positive("data.image_size", size)
    if "codec" not in config:
        return codec.pixels(size)
    check_known("codec", config.codec, ("path", "model"))
    check_type("codec.path", config.codec.get("path"), str | None)
    autoencoder = make_codec_model(config)
    return codec.latents(autoencoder.decode, autoencoder.latent_shape, abstract_params(autoencoder.network))


def codec_tensors(config) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a model has among its parameters besides the network's: the tensors of config.codec, by name."""
    return make_codec(config).tensors


def make_codec_model(config) -> AutoencoderModel:
    """Builds the autoencoder of config.codec.model, which that of config.codec.path must be."""
    return _autoencoder("codec.model", config.codec.get("model", {}), config.data.image_size)


class ClassifierModel(NamedTuple):
    """A network that says log p(y | x_t), and the noise of the images that it knows."""

    network: Network  # (params, x_t, network_time) -> logits
    codec: Codec
    num_classes: int
    noise: Times | None  # None: it has seen images without noise alone
    network_time: Callable[[Level], Array]  # what it is fed at a level, be it of another process


def make_classifier_model(config) -> ClassifierModel:
    """Builds a classifier from config.model and, where its images are noisy, config.diffusion."""
    size = config.data.image_size
    network = _classifier("model", config.model, size)
    noise, network_time = None, lambda level: jnp.zeros_like(level.log_snr)
    if "diffusion" in config:
        settings = dict(config.diffusion)
        make_noise = choose("diffusion.time", settings.pop("time", None), NOISES)
        noise, network_time = construct(make_noise, "diffusion", settings)
    return ClassifierModel(network, codec.pixels(size), config.model.num_classes, noise, network_time)


def _classifier(section: str, settings: Mapping[str, Any], size: int) -> Network:
    check_positive("data.image_size", size)
    settings = dict(settings)
    module = choose(f"{section}.network", settings.pop("network", None), CLASSIFIERS)
    dtype = choose(f"{section}.dtype", settings.pop("dtype", "float32"), DTYPES)
    given = dict(image_size=size, in_channels=IMAGE_CHANNELS, dtype=dtype)
    return construct(_network_maker(module), section, settings, given=given)


def _discrete_noise(*, schedule: str, timesteps: int, rescale_timesteps: bool):
    betas = choose("diffusion.schedule", schedule, SCHEDULES)(timesteps)
    process = discrete.make_process(betas, rescale_timesteps=rescale_timesteps)
    times = levels.uniform_timesteps(process)._replace(at=partial(discrete.level_at, process))
    return times, lambda level: discrete.network_time_at(process, level.log_snr)


def _continuous_noise(*, schedule: str):
    log_snr_of = choose("diffusion.schedule", schedule, LOG_SNRS)
    limit = continuous.MAX_LOG_SNR
    times = levels.log_snrs(partial(continuous.stratified, log_snr_of=log_snr_of))
    return times, lambda level: jnp.clip(level.log_snr, -limit, limit)


NOISES = {"discrete": _discrete_noise, "continuous": _continuous_noise}


def _classifier_task(config, model: ClassifierModel) -> Task:
    """Builds the task from config.objective."""
    for field in ("every_steps", "batches", "batch_size"):
        check_positive(f"eval.{field}", config.eval[field])
    return construct(
        _make_classifier_task, "objective", dict(config.objective),
        given=dict(model=model, dropout=config.model.get("dropout", 0.0) > 0),
    )  # fmt: skip


def _make_classifier_task(*, crop: int, model: ClassifierModel, dropout: bool) -> Task:
    if crop < 0:
        raise ConfigError(f"config.objective.crop is {crop}, expected 0 or more pixels")
    return classification.make_classifier_task(
        model.network, model.codec, noise=model.noise, network_time=model.network_time, crop=crop, dropout=dropout
    )


def heldout_task(model: ClassifierModel) -> Task:
    """A classifier's task without what is to make training harder: its metrics are those of held-out images."""
    return _make_classifier_task(crop=0, model=model, dropout=False)


def read_clean(model: ClassifierModel, params: Params, x_0: Image) -> tuple[Array, Array]:
    """What a classifier says of images without noise: a noisy one takes them as the least noisy ones that it knows.

    Returns:
        f32[n, num_classes] logits, and f32[n, channels] features: means over all positions before the pool.
    """
    t = model.network_time(jax.tree.map(lambda number: jnp.full((len(x_0),), number), clean_level()))
    return model.network.apply(params, x_0, t, method=Classifier.read)


def sampler_spec(settings: Mapping[str, Any], **changes: Any) -> SamplerSpec:
    """Reads a sampler from config.sample; `changes` that are not None replace its values.

    Raises:
        ConfigError: a value of another type.
    """
    names = [field.name for field in fields(SamplerSpec)]
    values = {name: settings[name] for name in names if name in settings}
    values |= {name: value for name, value in changes.items() if value is not None}
    check_fields(SamplerSpec, "sample", values)
    spec = SamplerSpec(**{name: value if name == "steps" else _floats(value) for name, value in values.items()})
    return replace(spec, interval=None, rescale=0.0) if spec.guidance == 1 else spec  # which belong to guidance


class GuidedParams(NamedTuple):
    """The parameters of a sampler that other networks guide; None where there is no such network."""

    params: Params
    guide: Params | None
    classifier: Params | None


def make_sampler(
    model: DiffusionModel,
    mesh: jax.sharding.Mesh,
    spec: SamplerSpec,
    *,
    guide: DiffusionModel | None = None,
    classifier: ClassifierModel | None = None,
) -> Draw | Enlarge:
    """Builds the compiled sampler of a spec.

    Args:
        model: what is sampled.
        mesh: devices, with an axis "data".
        spec: how.
        guide: a model to move away from, in place of the model's own null label.
        classifier: what spec.classifier_scale guides by.

    Returns:
        The sampler; that of a model for super-resolution is an `Enlarge`. With a guide or a classifier its parameters
        are `GuidedParams`.

    Raises:
        ConfigError: a sampler that does not exist, or a setting that it does not take.
    """
    sampler_of, codec = _bound_sampler(model, spec, guide, classifier), model.codec
    if guide is not None or classifier is not None:
        codec = codec._replace(decode=lambda given, x_0: model.codec.decode(given.params, x_0))
    return make_draw(
        partial(sampler_of, scale=spec.guidance),
        model.steps(spec),
        codec,
        cond=model.cond,
        mesh=mesh,
    )


def make_stepwise_sampler(model: DiffusionModel, mesh: jax.sharding.Mesh, spec: SamplerSpec) -> Stepper:
    """Builds the sampler of a spec in compiled steps, of which `model.steps(spec)` are to be taken.

    Specs that differ in steps, spacing or a scale of guidance that is not 1 may share one.

    Raises:
        ConfigError: a sampler that does not exist, or a setting that it does not take.
    """
    return make_stepper(_bound_sampler(model, spec, None, None), model.codec, cond=model.cond, mesh=mesh)


def _bound_sampler(
    model: DiffusionModel, spec: SamplerSpec, guide: DiffusionModel | None, classifier: ClassifierModel | None
) -> Callable[..., BoundSampler]:
    """(parameters, scale of guidance) -> the sampler of a spec with its denoiser."""
    if bool(spec.classifier_scale) != (classifier is not None):
        raise ConfigError(
            f"classifier_scale is {spec.classifier_scale} with{'out' if classifier is None else ''} a classifier: "
            f"expected both --classifier=WORKDIR and --classifier_scale, or neither"
        )
    sampler = _sampler(model, spec)
    _check_guidance(model, spec, guide)

    def sampler_of(given: Params | GuidedParams, scale: float | Array) -> BoundSampler:
        params = GuidedParams(given, None, None) if guide is None and classifier is None else given
        other = None if guide is None else _denoiser(guide, params.guide)
        denoise = _guided(model, spec, _denoiser(model, params.params), other, scale)
        if model.codec.bounded:
            denoise = denoiser.clipped(denoise)
        if classifier is None:
            return partial(sampler, denoise)
        log_prob = _classifier_log_prob(classifier, params.classifier)
        gradient = guidance.classifier_gradient(log_prob, spec.classifier_scale)
        if spec.sampler != "ancestral":
            return partial(sampler, guidance.classifier_guided(denoise, gradient))
        discrete_posterior = model.process is not None and model.posterior_variance
        return partial(sampler, denoise, gradient=guidance.without_last(gradient) if discrete_posterior else gradient)

    return sampler_of


def _classifier_log_prob(model: ClassifierModel, params: Params) -> guidance.LogProb:
    """A classifier as guidance asks it: at a level of noise of whatever process, which it is fed as its own time."""

    def log_prob(x_t: Image, level: Level, cond: Cond) -> PerExample:
        return classification.log_prob(model.network.apply(params, x_t, model.network_time(level)), cond["y"])

    return log_prob


def _sampler(model: DiffusionModel, spec: SamplerSpec) -> samplers.Sampler:
    sampler = choose("sample.sampler", spec.sampler, SAMPLERS)
    if not 0 <= spec.eta <= 1:
        raise ConfigError(f"eta is {spec.eta}, expected a number in [0, 1]")
    if spec.sampler == "ddim":
        return partial(sampler, eta=spec.eta)
    if spec.sampler == "heun":
        if spec.eta and model.process is not None:
            raise ConfigError(f"eta is {spec.eta}, but heun adds noise in continuous time only")
        return partial(sampler, churn=spec.eta * samplers.MAX_CHURN, level_of=continuous.level_of)
    if spec.eta:
        raise ConfigError(f"eta is {spec.eta}, but only the samplers 'ddim' and 'heun' have one")
    return sampler


def _denoiser(model: DiffusionModel, params: Params) -> Denoiser:
    return model.denoiser(partial(model.network.apply, params))


def _check_guidance(model: DiffusionModel, spec: SamplerSpec, guide: DiffusionModel | None) -> None:
    if spec.guidance == 1:
        if guide is not None:
            raise ConfigError("a guide is given, but guidance is 1, which is off: give --guidance=2, for instance")
        return
    if guide is None and model.num_classes is None:
        raise ConfigError(
            f"guidance is {spec.guidance}, but this model knows no classes to be guided to: take --guidance=1, or give "
            f"another model as --guide"
        )
    if guide is None and model.null_label is None:
        raise ConfigError(
            f"guidance is {spec.guidance}, but this model knows no null label: train with config.model.null_label and "
            f"config.objective.label_dropout, give another model as --guide, or take --guidance=1"
        )
    if spec.guidance < 0 or not 0 <= spec.rescale <= 1:
        raise ConfigError(f"expected guidance >= 0 and rescale in [0, 1], got {spec.guidance} and {spec.rescale}")
    if spec.interval is not None and not (len(spec.interval) == 2 and spec.interval[0] < spec.interval[1]):
        raise ConfigError(f"interval is {spec.interval}, expected two ascending log SNRs")


def _guided(
    model: DiffusionModel, spec: SamplerSpec, denoise: Denoiser, guide: Denoiser | None, scale: float | Array
) -> Denoiser:
    """What a spec makes of a denoiser and a scale, which matters unless the spec's own is 1.

    Without a guide of its own the null label is one.
    """
    if spec.guidance == 1:
        return denoise
    guide = guidance.unconditional(denoise, model.null_label) if guide is None else guide
    return guidance.guided(denoise, guide, scale=scale, interval=spec.interval, rescale=spec.rescale)


def network_calls(model: DiffusionModel, spec: SamplerSpec) -> int:
    """How often networks are called for one image, guides included: counted in a run of the sampler without any.

    The gradient of a classifier counts once at every x_t.
    """
    if spec.classifier_scale:
        alone = replace(spec, classifier_scale=0.0)
        return network_calls(model, alone) + network_calls(model, replace(alone, guidance=1.0))
    calls = []

    def counted(x_t, level, cond):
        jax.debug.callback(lambda: calls.append(1))
        return Prediction(x_t, x_t, None)

    pixel = jnp.zeros((1, 1, 1, 1))
    sampler, steps = _sampler(model, spec), model.steps(spec)
    denoise = _guided(model, spec, counted, counted, spec.guidance)
    jit(lambda x_T: sampler(denoise, steps, samplers.begin(x_T), lambda _: pixel, {}))(pixel)
    jax.effects_barrier()
    return len(calls)


def make_one_step(model: DiffusionModel, mesh: jax.sharding.Mesh) -> tuple[OneStep, list[str]]:
    """Builds the compiled prediction of x_0 at the levels nearest to `one_step.LOG_SNRS`, and their captions."""
    if model.process is None:
        levels = continuous.level_of(jnp.array(one_step.LOG_SNRS))
    else:
        distances = np.abs(np.asarray(model.process.log_snr)[:, None] - one_step.LOG_SNRS)
        levels = discrete.level_at(model.process, jnp.asarray(distances.argmin(axis=0)))
    made = one_step.make_one_step(
        lambda params: denoiser.clipped(_denoiser(model, params)) if model.codec.bounded else _denoiser(model, params),
        levels,
        model.codec,
        cond=model.cond,
        mesh=mesh,
    )
    return made, one_step.captions(levels)


def make_optimizer(config) -> optax.GradientTransformation:
    """Builds the optimizer of config.optimizer with its learning rate."""
    settings = dict(config.optimizer)
    function = choose("optimizer.name", settings.pop("name", "adam"), OPTIMIZERS)
    shared = {name: settings.pop(name) for name in tuple(settings) if name in LEARNING_RATE_FIELDS}
    learning_rate, clip = construct(_learning_rate, "optimizer", shared, given={"total_steps": config.train.steps})
    check_fields(function, "optimizer", settings, given=dict.fromkeys(shared))
    for name in ("b1", "b2"):
        if not 0 <= settings[name] < 1:
            raise ConfigError(f"config.optimizer.{name} is {settings[name]}, expected a number in [0, 1)")
    if (decay := settings.get("weight_decay", 0.0)) < 0:
        raise ConfigError(f"config.optimizer.weight_decay is {decay}, expected 0 or more")
    return optax.chain(clip, function(learning_rate, **settings))


def _learning_rate(
    *,
    lr: float,
    warmup_steps: int,
    clip_norm: float | None,
    total_steps: int,
    anneal_steps: int | None = None,
    cooldown_steps: int | None = None,
    inverse_sqrt_after: int | None = None,
):
    if lr <= 0:
        raise ConfigError(f"config.optimizer.lr is {lr}, expected a positive learning rate")
    if warmup_steps < 0:
        raise ConfigError(f"config.optimizer.warmup_steps is {warmup_steps}, expected 0 or more")
    if clip_norm is not None and clip_norm <= 0:
        raise ConfigError(f"config.optimizer.clip_norm is {clip_norm}, expected a positive norm or None")
    shapes = {
        "anneal_steps": (anneal_steps, lambda end: optimizer.linear_to_zero(0, end)),
        "cooldown_steps": (cooldown_steps, lambda n: optimizer.linear_to_zero(total_steps - n, total_steps)),
        "inverse_sqrt_after": (inverse_sqrt_after, optimizer.inverse_sqrt),
    }
    shapes = {name: (value, make) for name, (value, make) in shapes.items() if value is not None}
    for name, (value, _) in shapes.items():
        check_positive(f"optimizer.{name}", value)
    if cooldown_steps is not None and cooldown_steps > total_steps:
        raise ConfigError(
            f"config.optimizer.cooldown_steps is {cooldown_steps}, expected at most config.train.steps {total_steps}"
        )
    if len(shapes) > 1:
        raise ConfigError(f"config.optimizer sets {' and '.join(shapes)}: expected one of them at the most")
    shape = next((make(value) for value, make in shapes.values()), optimizer.constant)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optimizer.warmed_up(lr, warmup_steps, shape), clip


LEARNING_RATE_FIELDS = tuple(inspect.signature(_learning_rate).parameters)


class TaskMaker(NamedTuple):
    """What is trained: from a config to a model, and to the task that trains it.

    A model is any value with the fields `network` and `num_classes`, which is None where classes play no part.
    """

    model: Callable[[Any], Any]  # config -> model
    task: Callable[[Any, Any], Task]  # (config, model) -> task
    sections: Mapping[str, Mapping[str, Any] | None]  # of the config, besides SECTIONS and as there


MAY_LACK = {"ema": {"power_lengths"}, "sample": {field.name for field in fields(SamplerSpec)}}  # of these sections

TASKS = {
    "diffusion": TaskMaker(make_diffusion_model, _diffusion_task, DIFFUSION_SECTIONS),
    "autoencoder": TaskMaker(make_autoencoder_model, _autoencoder_task, AUTOENCODER_SECTIONS),
    "classifier": TaskMaker(make_classifier_model, _classifier_task, CLASSIFIER_SECTIONS),
}


def task_of(config) -> str:
    """The name of what a config trains; configs that do not say it are older than the choice."""
    return config.get("task", "diffusion")


def make_model(config) -> Any:
    """Builds the model of a config's task; see `TaskMaker`."""
    return choose("task", task_of(config), TASKS).model(config)


class Training(NamedTuple):
    """A model with the functions that train it, none of them compiled yet."""

    model: Any  # of the task, see `TaskMaker`
    init: Callable[[Key], TrainState]
    step: StepFn
    diagnose: Callable[[TrainState, Batch, Key], Mapping[str, Any]]  # see `make_diagnosis`
    abstract_state: TrainState  # shapes, dtypes and shardings
    state_sharding: TrainState  # the shardings alone
    replicated: jax.sharding.NamedSharding  # of keys, and of what a user looks at
    over_data: jax.sharding.NamedSharding  # of a batch


def check_config(config) -> None:
    """Refuses unknown and missing fields, and values of other types, where nothing else would notice them in time.

    Raises:
        ConfigError: names the field and what is right.
    """
    sections = SECTIONS | choose("task", task_of(config), TASKS).sections
    check_known("", config, ("task", "seed", "init_from", *sections))
    needed = {section: types.keys() - MAY_LACK.get(section, ()) for section, types in sections.items() if types}
    if missing := sorted({"seed", "init_from", *needed} - set(config)):
        raise ConfigError(f"config lacks {', '.join(missing)}")
    for section, types in sections.items():
        if types is None:
            continue
        check_known(section, config[section], types)
        if missing := sorted(needed[section] - set(config[section])):
            raise ConfigError(f"config.{section} lacks {', '.join(missing)}")
        for name, value in config[section].items():
            check_type(f"{section}.{name}", value, types[name])


def power_lengths(ema) -> tuple[float, ...]:
    """Reads config.ema.power_lengths; raises ConfigError unless they are lengths of power averages."""
    lengths = ema.get("power_lengths", ())
    check_type("ema.power_lengths", lengths, tuple[float, ...])
    if bad := [length for length in lengths if not MIN_LENGTH <= length <= MAX_LENGTH]:
        raise ConfigError(f"config.ema.power_lengths has {bad[0]}, expected numbers in [{MIN_LENGTH}, {MAX_LENGTH}]")
    return tuple(lengths)


def check_ema_rates(rates: Any) -> None:
    """Raises ConfigError unless config.ema.rates is numbers in [0, 1)."""
    check_type("ema.rates", rates, tuple[float, ...])
    for rate in rates:
        if not 0 <= rate < 1:
            raise ConfigError(f"config.ema.rates has {rate}, expected numbers in [0, 1)")


def make_training(config, mesh: jax.sharding.Mesh) -> Training:
    """Builds everything that a train step needs but the data."""
    check_config(config)
    train, ema = config.train, config.ema
    check_type("seed", config.seed, int)
    if not 0 <= config.seed <= MAX_SEED:
        raise ConfigError(f"config.seed is {config.seed}, expected an integer from 0 to {MAX_SEED}")
    for field in ("steps", "batch_size", "accumulate", "checkpoint_every", "max_skipped"):
        check_positive(f"train.{field}", train[field])
    check_positive("log.every_steps", config.log.every_steps)
    if train.keep_checkpoints is not None:
        check_positive("train.keep_checkpoints", train.keep_checkpoints)
    if train.keep_best < 0 or (train.keep_best and train.keep_checkpoints is None):
        raise ConfigError(
            f"config.train.keep_best is {train.keep_best}, expected 0, or a positive number together with "
            f"config.train.keep_checkpoints (None keeps all)"
        )
    check_ema_rates(ema.rates)
    share = mesh.size * train.accumulate
    if train.batch_size % share:
        raise ConfigError(
            f"config.train.batch_size {train.batch_size} cannot be divided among {mesh.size} devices times "
            f"{train.accumulate} microbatches: expected a multiple of {share}"
        )
    maker = TASKS[task_of(config)]
    model = maker.model(config)
    replicated, optimizer = parallel.replicated(mesh), make_optimizer(config)
    task = maker.task(config, model)
    task = task._replace(loss=parallel.gathering(task.loss, replicated))
    averages = make_averages(tuple(ema.rates), warmup=ema.warmup, power_lengths=power_lengths(ema))

    def init(key: Key) -> TrainState:
        return init_state(key, task, optimizer, averages)

    abstract_state = jax.eval_shape(init, jax.random.key(0))
    state_sharding = parallel.shard(abstract_state, mesh, choose("train.shard", train.shard, SHARDED))
    return Training(
        model,
        init,
        make_train_step(task, optimizer, averages, accumulate=train.accumulate),
        make_diagnosis(task, accumulate=train.accumulate),
        jax.tree.map(parallel.with_sharding, abstract_state, state_sharding),
        state_sharding,
        replicated,
        parallel.over_data(mesh),
    )


def recipe(config) -> dict[str, Any]:
    """What a model computes from its weights, as JSON types: the network, the process and how its output is read."""
    sections = {name: config[name].to_dict() for name in ("model", "diffusion", "low_res") if name in config}
    sections["model"].pop("remat", None)  # which changes what is kept in memory alone
    if "codec" in config:
        sections["codec"] = config.codec.model.to_dict()
    return json.loads(json.dumps(sections | {"image_size": config.data.image_size}))


def abstract_step_arguments(config, training: Training) -> tuple[TrainState, Batch, Key]:
    """Shapes, dtypes and shardings of a step's arguments, to compile it without data or a model in memory."""
    n = config.train.batch_size
    stored = make_codec(config).stored
    pixels = jax.ShapeDtypeStruct((n, *stored.shape), stored.dtype)
    batch = parallel.with_sharding(Batch(pixels, {"y": jax.ShapeDtypeStruct((n,), jnp.int32)}), training.over_data)
    key = parallel.with_sharding(jax.eval_shape(lambda: jax.random.key(0)), training.replicated)
    return training.abstract_state, batch, key


def first_state(
    training: Training, key: Key, weights: Params, carried: Mapping[str, Params] = MappingProxyType({})
) -> TrainState:  # fmt: skip
    """Makes the state before the first step, on the devices.

    Args:
        training: from `make_training`.
        key: the run's root key.
        weights: parameters to start from, by name; those that are not among them start at random.
        carried: of what the task carries, the networks that are not to start at random, by name.

    Returns:
        The state. Every average equals the parameters, and every leaf has a buffer of its own.
    """

    def init(key: Key, weights: Params, carried: Mapping[str, Params]) -> TrainState:
        state = training.init(key)
        params = state.params | jax.tree.map(jnp.copy, weights)
        if carried:
            state = replace(state, carried=state.carried | jax.tree.map(jnp.copy, carried))
        return replace(state, params=params, ema={rate: jax.tree.map(jnp.copy, params) for rate in state.ema})

    return jit(init, out_shardings=training.state_sharding)(key, weights, dict(carried))


def make_data_source(config) -> sources.Source:
    """Opens config.data.source."""
    check_type("data.path", config.data.path, str | None)
    return choose("data.source", config.data.source, SOURCES)(config.data.path)


def make_dataset(config, split: str) -> Dataset:
    """Opens, and if need be builds, the cached pixels of a split ("train" or "test")."""
    data = config.data
    check_positive("data.image_size", data.image_size)
    check_type("data.cache_dir", data.cache_dir, str)
    check_type("data.max_unreadable", data.max_unreadable, int)
    dataset = load_dataset(
        make_data_source(config),
        split,
        image_size=data.image_size,
        cache_dir=data.cache_dir,
        max_unreadable=data.max_unreadable,
    )
    if config.model.get("num_classes") not in (None, len(dataset.class_names)):
        raise ConfigError(
            f"config.model.num_classes is {config.model.num_classes}, but {data.source} has "
            f"{len(dataset.class_names)} classes"
        )
    return dataset


def make_heldout(config, class_names: tuple[str, ...]) -> Dataset:
    """Opens the test split that a classifier is tested on: of config.eval.source or, if that is None, of config.data.

    Labels are those of the given class names, whatever the order of the other source.

    Raises:
        ConfigError: that source has other classes.
    """
    settings = config.copy_and_resolve_references()
    if config.eval.source is not None:
        settings.data.update({"source": config.eval.source, "path": config.eval.path})
    dataset = make_dataset(settings, "test")
    if dataset.class_names == class_names:
        return dataset
    if set(dataset.class_names) != set(class_names):
        raise ConfigError(
            f"config.eval.source {settings.data.source!r} has other classes than config.data.source: "
            f"{', '.join(sorted(set(dataset.class_names) ^ set(class_names))[:5])}, ... are not in both"
        )
    order = np.array([class_names.index(name) for name in dataset.class_names], np.int32)
    return replace(dataset, labels=order[dataset.labels], class_names=class_names)
