"""The step's own laws on a toy objective that compiles at once, and the real one where the model matters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fooddiff import build
from fooddiff.arrays import Batch
from fooddiff.diffusion.losses import LossTerms
from fooddiff.train.loop import read_metrics
from fooddiff.train.objective import Examples, Objective
from fooddiff.train.state import init_state
from fooddiff.train.step import make_train_step
from fooddiff.xla import jit
from tests import tiny


def pixels_and_labels(n=4, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.int32))


class ToyNetwork:
    """Weights for `toy_objective`."""

    @staticmethod
    def init(key):
        return {"w": jax.random.normal(key, (8, 8, 3))}


def toy_objective():
    """Regresses noise on pixels with one weight per pixel: loss_i = weight_i * mean((w * x_0 - eps)^2)."""

    def draw(history, batch, key):
        n = batch.y.shape[0]
        eps = jax.random.normal(key, batch.pixels.shape)
        return Examples(batch.pixels / 255.0, batch.y, 1.0 + jnp.arange(n, dtype=jnp.float32), eps, None)

    def loss(params, examples, key):
        error = ((params["w"][None] * examples.x_0 - examples.eps) ** 2).mean((1, 2, 3))
        return (examples.weight * error).mean(), LossTerms(error, error, error)

    def observe(history, examples, terms):
        n = terms.total.shape[0]
        return history + terms.total.sum(), {"loss": jnp.stack([terms.total.sum(), jnp.float32(n)])} | dict.fromkeys(
            ("mse", "vb", "loss_q1", "loss_q2", "loss_q3", "loss_q4"), jnp.zeros(2)
        )

    return Objective(lambda: jnp.zeros(()), draw, loss, observe)


class Toy:
    """The step on the toy objective, with its state."""

    def __init__(self, optimizer=None, *, ema_rates=(), ema_warmup=False, accumulate=1):
        optimizer = optax.sgd(0.1) if optimizer is None else optimizer
        self.key = jax.random.key(0)
        self.step = jax.jit(make_train_step(toy_objective(), optimizer, ema_warmup=ema_warmup, accumulate=accumulate))
        self.state = init_state(jax.random.key(1), ToyNetwork, optimizer, toy_objective(), ema_rates)

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
    settings = dict(lr=1e-2, b1=0.9, b2=0.999, warmup_steps=0, anneal_steps=None, clip_norm=None) | changes
    return build._adam(**settings)


def test_learning_rate_warms_up_linearly():
    norms = []
    toy = Toy(adam(warmup_steps=4))
    for _ in range(6):
        values, toy.state = read_metrics(toy.advance(0))
        norms.append(values["train/update_norm"])
    full = read_metrics(Toy(adam()).advance(0))[0]["train/update_norm"]
    np.testing.assert_allclose(norms[0], full / 4, rtol=1e-4)
    assert norms[0] < norms[1] < norms[2] < norms[3]


def test_learning_rate_falls_linearly_to_zero_and_stays_there():
    norms = []
    toy = Toy(adam(anneal_steps=4))
    for _ in range(6):
        values, toy.state = read_metrics(toy.advance(0))
        norms.append(values["train/update_norm"])
    full = read_metrics(Toy(adam()).advance(0))[0]["train/update_norm"]
    np.testing.assert_allclose(norms[0], full, rtol=1e-4)
    assert norms[0] > norms[1] > norms[2] > norms[3] > norms[4] == norms[5] == 0


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
    for part in ("params", "ema", "opt_state", "history", "sums"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_total)) == (3, 2, 2)


def test_one_trace_for_all_steps_and_the_old_state_is_donated(tmp_path):
    run = Real(tiny.config(tmp_path))
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
    assert_close(a.history, b.history, rtol=1e-5)
    # A bias before a norm of one channel has no gradient but rounding, which Adam scales up to as much as lr a step.
    differences = [np.abs(np.asarray(a.params[name]) - np.asarray(b.params[name])).ravel() for name in a.params]
    differences = np.concatenate(differences)
    assert np.quantile(differences, 0.99) < 1e-5
    assert differences.max() < 1e-4
    assert int(a.history.counts.sum()) == 8
    assert int((a.history.losses > 0).sum()) == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_convolutions_have_the_form_of_the_fast_kernels(tmp_path, accumulate):
    training = build.make_training(tiny.config(tmp_path, train__accumulate=accumulate), build.make_mesh())
    program = jit(training.step).lower(*build.abstract_step_arguments(tiny.config(tmp_path), training)).compile()
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
