"""Composition root: config sections to objects. The only module that sees a ConfigDict or a string from one.

A config section is the keyword arguments of one constructor, so a misspelt field is an error that lists the right ones.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Batch, Key, Params
from fooddiff.data import sources
from fooddiff.data.cache import Dataset, load_dataset
from fooddiff.diffusion import losses, reverse, samplers, schedule
from fooddiff.diffusion.process import GaussianDiffusion, make_process, x0_from_eps
from fooddiff.eval import resize
from fooddiff.model.network import Network, make_network
from fooddiff.sample.generate import Generator, make_generator
from fooddiff.train.checkpoint import with_sharding
from fooddiff.train.objective import Objective, make_objective
from fooddiff.train.state import TrainState, init_state
from fooddiff.train.step import StepFn, make_diagnosis, make_train_step
from fooddiff.xla import jit

SCHEDULES = {"linear": schedule.linear_betas, "cosine": schedule.cosine_betas}
PREDICTIONS = {
    "eps": (x0_from_eps, reverse.eps_target),
    "x_0": (reverse.x0_as_predicted, reverse.x0_target),
}
VARIANCES = {
    "fixed_small": reverse.fixed_small,
    "fixed_large": reverse.fixed_large,
    "learned_range": reverse.learned_range,
}
OBJECTIVES = {"mse": losses.mse_loss, "hybrid": losses.hybrid_loss, "vlb": losses.vlb_loss}
IMPORTANCE_SAMPLING = {"uniform": False, "loss_second_moment": True}
SAMPLERS = {
    "ancestral": samplers.single(samplers.ancestral_step),
    "ddim": samplers.single(samplers.ddim_step),
    "dpmpp_2m": samplers.dpmpp_2m_step,
}
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


class ConfigError(ValueError):
    """A config value that cannot be; the message names it and what is allowed."""


class DiffusionModel(NamedTuple):
    """A network together with what its output means."""

    network: Network
    process: GaussianDiffusion  # with all the timesteps that it is trained on
    param: reverse.Parameterization
    image_shape: tuple[int, int, int]
    num_classes: int | None
    respaced: Callable[[int | None], GaussianDiffusion]  # the process for a number of sampling steps; None means all


def choose(section: str, value: str, table: Mapping[str, Any]) -> Any:
    """Looks up a config string.

    Raises:
        ConfigError: the value is not in the table; lists those that are.
    """
    if not isinstance(value, str) or value not in table:
        raise ConfigError(f"config.{section} is {value!r}, expected one of {', '.join(table)}")
    return table[value]


def check_fields(function: Callable, section: str, values: Mapping[str, Any]) -> None:
    """Checks that a config section fills the keyword-only parameters of a function, with values of their types.

    Raises:
        ConfigError: an unknown or missing field, or a value of another type; names what is right.
    """
    fields = {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"config.{section} has no field {', '.join(unknown)}; its fields are {', '.join(fields) or 'none'}"
        )
    if missing := [name for name, p in fields.items() if p.default is p.empty and name not in values]:
        raise ConfigError(f"config.{section} lacks {', '.join(missing)}")
    for name, value in values.items():
        check_type(f"{section}.{name}", value, fields[name].annotation)


def check_type(name: str, value: Any, expected: type | UnionType) -> None:
    """Raises ConfigError unless a config value has a type such as `int`, `float | None` or `tuple[int, ...]`."""
    if not _has_type(value, expected):
        raise ConfigError(f"config.{name} is {value!r}, expected {inspect.formatannotation(expected)}")


def _has_type(value: Any, expected: type | UnionType) -> bool:
    """Floats are finite, integers are floats, too, and JSON has made lists of tuples."""
    if isinstance(expected, UnionType):
        return any(_has_type(value, one) for one in get_args(expected))
    if get_origin(expected) is tuple:
        return isinstance(value, tuple | list) and all(_has_type(item, get_args(expected)[0]) for item in value)
    if expected is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is expected


def construct(function: Callable, section: str, values: Mapping[str, Any]) -> Any:
    """Calls a constructor with a config section as keyword arguments.

    Raises:
        ConfigError: an unknown or missing field, or a value that the constructor refuses.
    """
    check_fields(function, section, values)
    try:
        return function(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{section}: {error}") from error


def make_diffusion_model(config) -> DiffusionModel:
    """Builds the process, its parameterization and the network from config.diffusion, config.model and config.data."""
    diffusion = construct(_diffusion, "diffusion", config.diffusion)
    betas, rescale_timesteps, param, learned = diffusion
    size = config.data.image_size
    check_positive("data.image_size", size)
    channels = IMAGE_CHANNELS * (2 if learned else 1)
    network = construct(_network_builder(image_size=size, out_channels=channels), "model", config.model)

    def respaced(steps: int | None) -> GaussianDiffusion:
        keep = None if steps is None else schedule.evenly_spaced(len(betas), (steps,))
        return make_process(betas, keep, rescale_timesteps=rescale_timesteps)

    return DiffusionModel(
        network, respaced(None), param, (size, size, IMAGE_CHANNELS), config.model.num_classes, respaced
    )


def _diffusion(*, schedule: str, timesteps: int, rescale_timesteps: bool, prediction: str, variance: str):
    betas = choose("diffusion.schedule", schedule, SCHEDULES)(timesteps)
    to_x0, target = choose("diffusion.prediction", prediction, PREDICTIONS)
    log_var = choose("diffusion.variance", variance, VARIANCES)
    return betas, rescale_timesteps, reverse.Parameterization(to_x0, target, log_var), variance == "learned_range"


def _network_builder(*, image_size: int, out_channels: int) -> Callable[..., Network]:
    def build(
        *,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        num_heads: int,
        num_classes: int | None,
        norm_groups: int,
        scale_shift_norm: bool,
        dropout: float,
        dtype: str,
        remat: bool,
    ) -> Network:
        counts = {"model_channels": model_channels, "num_res_blocks": num_res_blocks, "num_heads": num_heads}
        counts |= {} if num_classes is None else {"num_classes": num_classes}
        for name, value in (counts | {"channel_mult": min(channel_mult, default=0)}).items():
            check_positive(f"model.{name}", value)
        return make_network(
            image_size=image_size,
            in_channels=IMAGE_CHANNELS,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            num_heads=num_heads,
            num_classes=num_classes,
            norm_groups=norm_groups,
            scale_shift_norm=scale_shift_norm,
            dropout=dropout,
            dtype=choose("model.dtype", dtype, DTYPES),
            remat=remat,
        )

    return build


def make_training_objective(config, model: DiffusionModel) -> Objective:
    """Builds the loss from config.objective, which also holds the keyword arguments of the loss function."""
    settings = dict(config.objective)
    name, sampling = settings.pop("name"), settings.pop("timestep_sampling")
    function = choose("objective.name", name, OBJECTIVES)
    if name == "hybrid" and config.diffusion.variance != "learned_range":
        raise ConfigError(
            f"config.objective.name is 'hybrid', whose bound trains the variance, but config.diffusion.variance is "
            f"{config.diffusion.variance!r}: expected 'learned_range'"
        )
    check_fields(function, "objective", settings)
    return make_objective(
        model.network,
        partial(function, model.process, model.param, **settings),
        model.process.num_timesteps,
        conditional=model.num_classes is not None,
        dropout=config.model.dropout > 0,
        importance_sampling=choose("objective.timestep_sampling", sampling, IMPORTANCE_SAMPLING),
    )


def make_optimizer(config) -> optax.GradientTransformation:
    """Builds Adam from config.optimizer."""
    return construct(_adam, "optimizer", config.optimizer)


def _adam(*, lr: float, b1: float, b2: float, warmup_steps: int, anneal_steps: int | None, clip_norm: float | None):
    if lr <= 0:
        raise ConfigError(f"config.optimizer.lr is {lr}, expected a positive learning rate")
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ConfigError(f"config.optimizer.{name} is {beta}, expected a number in [0, 1)")
    if warmup_steps < 0:
        raise ConfigError(f"config.optimizer.warmup_steps is {warmup_steps}, expected 0 or more")
    if anneal_steps is not None:
        check_positive("optimizer.anneal_steps", anneal_steps)
    if clip_norm is not None and clip_norm <= 0:
        raise ConfigError(f"config.optimizer.clip_norm is {clip_norm}, expected a positive norm or None")

    def learning_rate(count):
        warmed = jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        left = 1.0 if anneal_steps is None else jnp.maximum(0.0, 1 - count / anneal_steps)
        return lr * warmed * left

    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adam(learning_rate, b1=b1, b2=b2))


class Training(NamedTuple):
    """A model with the functions that train it, none of them compiled yet."""

    model: DiffusionModel
    init: Callable[[Key], TrainState]
    step: StepFn
    diagnose: Callable[[TrainState, Batch, Key], Mapping[str, Any]]  # see `make_diagnosis`
    abstract_state: TrainState  # shapes, dtypes and shardings
    state_sharding: TrainState  # the shardings alone
    replicated: jax.sharding.NamedSharding  # of keys, and of what a user looks at
    over_data: jax.sharding.NamedSharding  # of a batch


def make_training(config, mesh: jax.sharding.Mesh) -> Training:
    """Builds everything that a train step needs but the data."""
    train, ema = config.train, config.ema
    check_type("seed", config.seed, int)
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"config.seed is {config.seed}, expected a number in [0, 2^32)")
    for field in ("steps", "batch_size", "accumulate", "checkpoint_every", "max_skipped"):
        check_positive(f"train.{field}", train[field])
    if train.keep_checkpoints is not None:
        check_positive("train.keep_checkpoints", train.keep_checkpoints)
    check_type("train.keep_best", train.keep_best, int)
    if train.keep_best < 0 or (train.keep_best and None in (train.keep_checkpoints, config.eval.inception)):
        raise ConfigError(
            f"config.train.keep_best is {train.keep_best}, expected 0, or a positive number together with "
            f"config.train.keep_checkpoints (None keeps all) and config.eval.inception (without, nothing is scored)"
        )
    check_ema_rates(ema.rates)
    share = mesh.size * train.accumulate
    if train.batch_size % share:
        raise ConfigError(
            f"config.train.batch_size {train.batch_size} cannot be divided among {mesh.size} devices times "
            f"{train.accumulate} microbatches: expected a multiple of {share}"
        )
    model = make_diffusion_model(config)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    objective, optimizer = gathering(make_training_objective(config, model), replicated), make_optimizer(config)

    def init(key: Key) -> TrainState:
        return init_state(key, model.network, optimizer, objective, ema.rates)

    abstract_state = jax.eval_shape(init, jax.random.key(0))
    state_sharding = shard(abstract_state, mesh, choose("train.shard", train.shard, SHARDED))
    return Training(
        model,
        init,
        make_train_step(objective, optimizer, ema_warmup=ema.warmup, accumulate=train.accumulate),
        make_diagnosis(objective, accumulate=train.accumulate),
        jax.tree.map(with_sharding, abstract_state, state_sharding),
        state_sharding,
        replicated,
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
    )


def gathering(objective: Objective, replicated: jax.sharding.NamedSharding) -> Objective:
    """An objective that brings divided parameters together before it uses them.

    Their gradient is whole, too. Left to itself, XLA divides the convolutions as it finds parameters or moments
    divided: in loops, and with more memory instead of less.
    """

    def loss(params, examples, key):
        return objective.loss(jax.lax.with_sharding_constraint(params, replicated), examples, key)

    return objective._replace(loss=loss)


def shard(abstract: TrainState, mesh: jax.sharding.Mesh, parts: Sequence[str]) -> TrainState:
    """Says where each leaf of a state lies.

    Args:
        abstract: shapes.
        mesh: devices, with an axis "data".
        parts: fields of the state that are divided among the devices, each leaf along the longest of its axes that can
            be divided evenly (ZeRO, Rajbhandari et al. 2020). The rest, and a leaf without such an axis, is replicated.

    Returns:
        A sharding for every leaf.
    """

    def divided(leaf) -> jax.sharding.NamedSharding:
        longest = max((size for size in leaf.shape if size % mesh.size == 0), default=None)
        axes = () if longest is None else (None,) * leaf.shape.index(longest) + ("data",)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    replicated = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), abstract)
    return replace(replicated, **{part: jax.tree.map(divided, getattr(abstract, part)) for part in parts})


def abstract_step_arguments(config, training: Training) -> tuple[TrainState, Batch, Key]:
    """Shapes, dtypes and shardings of a step's arguments, to compile it without data or a model in memory."""
    n = config.train.batch_size
    pixels = jax.ShapeDtypeStruct((n, *training.model.image_shape), jnp.uint8)
    batch = with_sharding(Batch(pixels, jax.ShapeDtypeStruct((n,), jnp.int32)), training.over_data)
    key = with_sharding(jax.eval_shape(lambda: jax.random.key(0)), training.replicated)
    return training.abstract_state, batch, key


def first_state(training: Training, key: Key, weights: Params) -> TrainState:
    """Makes the state before the first step, on the devices.

    Args:
        training: from `make_training`.
        key: the run's root key.
        weights: parameters to start from, by name; those that are not among them start at random.

    Returns:
        The state. Every average equals the parameters, and every leaf has a buffer of its own.
    """

    def init(key: Key, weights: Params) -> TrainState:
        state = training.init(key)
        params = state.params | jax.tree.map(jnp.copy, weights)
        return replace(state, params=params, ema={rate: jax.tree.map(jnp.copy, params) for rate in state.ema})

    return jit(init, out_shardings=training.state_sharding)(key, weights)


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
    if config.model.num_classes not in (None, len(dataset.class_names)):
        raise ConfigError(
            f"config.model.num_classes is {config.model.num_classes}, but {data.source} has "
            f"{len(dataset.class_names)} classes"
        )
    return dataset


def make_sampler(
    model: DiffusionModel, mesh: jax.sharding.Mesh, *, sampler: str, steps: int | None, eta: float
) -> Generator:
    """Builds the compiled generator.

    Args:
        model: the diffusion model.
        mesh: devices.
        sampler: "ancestral", "ddim" or "dpmpp_2m".
        steps: network calls per image; None takes every timestep.
        eta: noise of DDIM, in [0, 1]; no other sampler takes any.
    """
    step = choose("sample.sampler", sampler, SAMPLERS)
    check_type("sample.eta", eta, float)
    check_type("sample.steps", steps, int | None)
    if sampler == "ddim":
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta}, expected a number in [0, 1]")
        step = samplers.single(partial(samplers.ddim_step, eta=eta))
    elif eta:
        raise ConfigError(f"eta is {eta}, but only the sampler 'ddim' has one")
    if steps is not None and not 2 <= steps <= model.process.num_timesteps:
        raise ConfigError(f"cannot sample in {steps} steps: expected 2 to {model.process.num_timesteps}")
    return make_generator(
        model.network,
        model.respaced(steps),
        model.param,
        step,
        model.image_shape,
        conditional=model.num_classes is not None,
        mesh=mesh,
    )


def make_mesh() -> jax.sharding.Mesh:
    """All devices in a row, with the axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def check_ema_rates(rates: Any) -> None:
    """Raises ConfigError unless config.ema.rates is numbers in [0, 1)."""
    check_type("ema.rates", rates, tuple[float, ...])
    for rate in rates:
        if not 0 <= rate < 1:
            raise ConfigError(f"config.ema.rates has {rate}, expected numbers in [0, 1)")


def check_positive(name: str, value: int) -> None:
    """Raises ConfigError unless a config number is an integer of at least 1."""
    check_type(name, value, int)
    if value < 1:
        raise ConfigError(f"config.{name} is {value}, expected at least 1")
