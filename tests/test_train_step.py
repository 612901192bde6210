"""The step's own laws on a toy task that compiles at once, and the real one where the model matters."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fooddiff import build, parallel
from fooddiff.arrays import Batch
from fooddiff.diffusion.losses import LossTerms
from fooddiff.train.averages import make_averages, power_exponent
from fooddiff.train.loop import read_metrics
from fooddiff.train.state import init_state
from fooddiff.train.step import make_train_step
from fooddiff.train.task import Task
from fooddiff.train.tasks.diffusion import Examples
from fooddiff.xla import jit
from tests import tiny


def pixels_and_labels(n=4, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return Batch(pixels, {"y": rng.integers(0, 10, n, dtype=np.int32)})


def toy_task():
    """Regresses noise on pixels with one weight per pixel: loss_i = weight_i * mean((w * x_0 - eps)^2)."""

    def draw(carried, batch, key):
        n = len(batch.pixels)
        eps = jax.random.normal(key, batch.pixels.shape)
        return Examples(batch.pixels / 255.0, batch.cond["y"], 1.0 + jnp.arange(n, dtype=jnp.float32), eps, {})

    def loss(params, carried, examples, key):
        error = ((params["w"][None] * examples.x_0 - examples.eps) ** 2).mean((1, 2, 3))
        return (examples.weight * error).mean(), LossTerms(error, error, error)

    def observe(carried, examples, terms):
        n = terms.total.shape[0]
        return carried + terms.total.sum(), {"loss": jnp.stack([terms.total.sum(), jnp.float32(n)])}

    def init(key):
        return {"w": jax.random.normal(key, (8, 8, 3))}

    return Task(init, lambda key: jnp.zeros(()), draw, loss, observe, ("loss",))


class Toy:
    """The step on the toy task, with its state."""

    def __init__(self, optimizer=None, *, ema_rates=(), ema_warmup=False, power_lengths=(), accumulate=1):
        optimizer = optax.sgd(0.1) if optimizer is None else optimizer
        self.key = jax.random.key(0)
        averages = make_averages(ema_rates, warmup=ema_warmup, power_lengths=power_lengths)
        self.step = jax.jit(make_train_step(toy_task(), optimizer, averages, accumulate=accumulate))
        self.state = init_state(jax.random.key(1), toy_task(), optimizer, averages)

    def advance(self, *seeds):
        for seed in seeds:
            self.state = self.step(self.state, pixels_and_labels(seed=seed), self.key)
        return self.state


class Real:
    """The compiled step of a config on some devices, with its state."""

    def __init__(self, config, *, devices=1):
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])
        training = build.make_training(config, mesh)
        self.over_data = training.over_data
        self.traces = 0

        @functools.wraps(training.step)  # of the same name it is the same program
        def counted(*args):
            self.traces += 1
            return training.step(*args)

        self.step = jit(counted, donate_argnums=0, out_shardings=training.state_sharding)
        self.key = jax.device_put(jax.random.key(0), training.replicated)
        self.state = jit(training.init, out_shardings=training.state_sharding)(self.key)

    def advance(self, *batches):
        for batch in batches:
            batch = jax.device_put(batch, self.over_data)
            with jax.transfer_guard("disallow"):
                self.state = self.step(self.state, batch, self.key)
        return self.state


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_microbatches_change_nothing_but_rounding():
    whole, split = Toy().advance(0, 1), Toy(accumulate=2).advance(0, 1)
    assert_close(whole, split, rtol=1e-5)


def test_randomness_is_a_function_of_key_and_step():
    still = Toy(optax.sgd(0.0))
    losses = []
    for _ in range(3):
        values, still.state = read_metrics(still.advance(0))
        losses.append(values["train/loss"])
    assert len(set(losses)) == 3
    assert read_metrics(Toy(optax.sgd(0.0)).advance(0))[0]["train/loss"] == losses[0]


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_follows_its_rate_and_warm_up(warmup):
    toy = Toy(ema_rates=(0.5, 0.9), ema_warmup=warmup)
    expected = {rate: jax.device_get(toy.state.params) for rate in ("0.5", "0.9")}
    for step in range(3):
        params = jax.device_get(toy.advance(step).params)
        for rate in expected:
            decay = min(float(rate), (1 + step) / (10 + step)) if warmup else float(rate)
            expected[rate] = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected[rate], params)
    assert_close(toy.state.ema, expected, atol=1e-6)


def adam(**changes):
    config = tiny.config(Path("unused"), optimizer__lr=1e-2, optimizer__warmup_steps=0, optimizer__clip_norm=None)
    with config.unlocked():
        config.optimizer.update(changes)
        config.train.steps = 8
    return build.make_optimizer(config)


def update_norms(steps, **changes):
    """Of the first steps with an optimizer."""
    norms, toy = [], Toy(adam(**changes))
    for _ in range(steps):
        values, toy.state = read_metrics(toy.advance(0))
        norms.append(values["train/update_norm"])
    return norms


def test_learning_rate_warms_up_linearly():
    norms, (full,) = update_norms(6, warmup_steps=4), update_norms(1)
    np.testing.assert_allclose(norms[0], full / 4, rtol=1e-4)
    assert norms[0] < norms[1] < norms[2] < norms[3]


def test_learning_rate_falls_linearly_to_zero_and_stays_there():
    norms, (full,) = update_norms(6, anneal_steps=4), update_norms(1)
    np.testing.assert_allclose(norms[0], full, rtol=1e-4)
    assert norms[0] > norms[1] > norms[2] > norms[3] > norms[4] == norms[5] == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(cooldown_steps=4), [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (dict(inverse_sqrt_after=2), [1, 1, 1, 1.5**-0.5, 2**-0.5, 2.5**-0.5, 3**-0.5, 3.5**-0.5]),
        (dict(warmup_steps=2, cooldown_steps=4), [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_shapes_of_the_learning_rate(changes, expected):
    """Adam's update of a constant gradient is the learning rate itself."""
    optimizer, params = adam(**changes), {"w": jnp.ones(3)}
    state, rates = optimizer.init(params), []
    for _ in expected:
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        rates.append(float(-updates["w"][0]))
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        dict(name="adamw", weight_decay=0.1),
        dict(name="muon", weight_decay=0.1, matrix_lr_ratio=10.0),
    ],
)
def test_other_optimizers_train_and_decay_weights(changes):
    """Without a gradient, both shrink every kernel by lr times the decay; Muon's rate of matrices is another."""
    optimizer = adam(**changes)
    params = {"a.kernel": jnp.ones((4, 3)), "b.kernel": jnp.ones((3, 3, 2, 4)), "a.bias": jnp.ones(3)}
    state = optimizer.init(params)
    still, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    ratio = changes.get("matrix_lr_ratio", 1.0)
    for name, factor in (("a.kernel", ratio), ("b.kernel", ratio), ("a.bias", 1.0)):
        np.testing.assert_allclose(still[name], -1e-2 * 0.1 * factor, rtol=1e-4)
    moved, _ = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
    assert all((moved[name] < still[name]).all() for name in params)


def test_power_averages_follow_their_formula():
    """EDM2 eq. 3: the average after step k is the mean of the parameters weighted by k^gamma, up to its recursion."""
    toy = Toy(power_lengths=(0.1,))
    (name,) = toy.state.ema
    gamma = power_exponent(0.1)
    np.testing.assert_allclose(0.1**2, (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)), rtol=1e-6)
    expected = None
    for step in range(4):
        params = jax.device_get(toy.advance(step).params["w"])
        keep = (1 - 1 / (step + 1)) ** (gamma + 1)
        expected = params if expected is None else keep * expected + (1 - keep) * params
    np.testing.assert_allclose(toy.state.ema[name]["w"], expected, atol=1e-6)


def test_clipping_bounds_what_adam_sees():
    def first_moment(clip):
        return float(optax.tree.norm(Toy(adam(clip_norm=clip)).advance(0).opt_state[1][0].mu))

    np.testing.assert_allclose(first_moment(1e-3), (1 - 0.9) * 1e-3, rtol=1e-4)
    assert first_moment(None) > 10 * first_moment(1e-3)


def test_norms_are_those_of_gradient_parameters_and_update():
    before = Toy().state.params
    state = Toy().advance(0)
    update = jax.tree.map(jnp.subtract, state.params, before)
    values, _ = read_metrics(state)
    np.testing.assert_allclose(values["train/update_norm"], optax.tree.norm(update), rtol=1e-4)
    np.testing.assert_allclose(values["train/grad_norm"], optax.tree.norm(update) / 0.1, rtol=1e-4)
    np.testing.assert_allclose(values["train/param_norm"], optax.tree.norm(state.params), rtol=1e-6)


def test_a_gradient_that_is_not_finite_updates_nothing():
    toy = Toy(adam(), ema_rates=(0.9,))
    toy.advance(0)
    toy.state.params["w"] = toy.state.params["w"].at[0, 0, 0].set(jnp.nan)
    before = jax.device_get(toy.state)
    after = toy.advance(1, 2)
    for part in ("params", "ema", "opt_state", "carried", "sums"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_total)) == (3, 2, 2)


def test_one_trace_for_all_steps_and_the_old_state_is_donated(tmp_path):
    run = Real(tiny.config(tmp_path), devices=2)
    first = run.state
    run.advance(*(pixels_and_labels(seed=seed) for seed in range(3)))
    assert run.traces == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert int(run.state.step) == 3


def test_averages_have_buffers_of_their_own(tmp_path):
    state = Real(tiny.config(tmp_path), devices=2).state
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((state.params, state.ema))
        for shard in leaf.addressable_shards
    ]
    assert len(pointers) == len(set(pointers))


@pytest.mark.slow
def test_one_and_two_devices_agree(tmp_path):
    config = tiny.config(tmp_path, objective__timestep_sampling="loss_second_moment")
    a, b = (
        Real(config, devices=devices).advance(pixels_and_labels(seed=0), pixels_and_labels(seed=1))
        for devices in (1, 2)
    )
    assert_close(a.sums, b.sums, rtol=1e-5)
    assert_close(a.carried, b.carried, rtol=1e-5)
    # A bias before a norm of one channel has no gradient but rounding, which Adam scales up to as much as lr a step.
    differences = [np.abs(np.asarray(a.params[name]) - np.asarray(b.params[name])).ravel() for name in a.params]
    differences = np.concatenate(differences)
    assert np.quantile(differences, 0.99) < 1e-5
    assert differences.max() < 1e-4
    assert int(a.carried.counts.sum()) == 8
    assert int((a.carried.losses > 0).sum()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_convolutions_have_the_form_of_the_fast_kernels(tmp_path, accumulate):
    training = build.make_training(tiny.config(tmp_path, train__accumulate=accumulate), parallel.make_mesh())
    step = jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
    program = step.lower(*build.abstract_step_arguments(tiny.config(tmp_path), training)).compile()
    forms = set(re.findall(r" convolution\(.*dim_labels=(\S+?),", program.as_text()))
    assert forms == {"b01f_01io->b01f"}


@pytest.mark.slow
def test_a_divided_state_takes_less_memory_and_trains_the_same(tmp_path):
    whole, averages, everything = (
        Real(tiny.config(tmp_path, train__shard=shard), devices=2).advance(pixels_and_labels(seed=0))
        for shard in ("nothing", "averages", "all")
    )

    def share(tree):
        """Of the numbers, how many lie on the first device."""
        leaves = jax.tree.leaves(tree)
        return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)

    assert share((whole.params, whole.ema, whole.opt_state)) == share(averages.params) == 1
    assert all(0.5 <= share(part) < 0.51 for part in (averages.ema, averages.opt_state, everything))
    for divided in (averages, everything):
        assert_close(divided.sums, whole.sums, rtol=1e-5)
        # Adam's first step moves a weight by lr whatever its gradient, whose sign is rounding where it is about zero
        differences = [np.abs(np.asarray(divided.params[name]) - whole.params[name]).ravel() for name in whole.params]
        assert np.quantile(np.concatenate(differences), 0.99) < 1e-5


@pytest.mark.slow
def test_overfits_eight_images(tmp_path):
    run = Real(tiny.config(tmp_path))
    batch = pixels_and_labels(8)
    run.advance(batch)
    first, run.state = read_metrics(run.state)
    run.advance(*[batch] * 250)
    _, run.state = read_metrics(run.state)
    run.advance(*[batch] * 50)
    last, _ = read_metrics(run.state)
    assert last["train/mse"] < 0.4 * first["train/mse"]
