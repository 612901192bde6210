from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fooddiff import build
from fooddiff.arrays import Batch
from fooddiff.train.loop import read_metrics
from fooddiff.train.state import init_state
from fooddiff.xla import jit
from tests import tiny


class Run:
    """A compiled step with its first state on some devices."""

    def __init__(self, config, *, devices=1):
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])
        self.replicated, self.over_data = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        model = build.make_diffusion_model(config)
        objective, optimizer = build.make_training_objective(config, model), build.make_optimizer(config)
        self.traces = 0
        inner = build.make_step(config, objective, optimizer, mesh)

        def counted(*args):
            self.traces += 1
            return inner(*args)

        self.step = jit(counted, donate_argnums=0, out_shardings=self.replicated)
        self.key = jax.device_put(jax.random.key(0), self.replicated)
        initialise = partial(
            init_state, network=model.network, optimizer=optimizer, objective=objective, ema_rates=config.ema.rates
        )
        self.state = jit(initialise, out_shardings=self.replicated)(self.key)

    def batch(self, n=4, seed=0):
        rng = np.random.default_rng(seed)
        pixels, y = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.int32)
        return jax.device_put(Batch(pixels, y), self.over_data)

    def advance(self, *batches):
        for batch in batches:
            with jax.transfer_guard("disallow"):
                self.state = self.step(self.state, batch, self.key)
        return self.state


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_one_trace_for_all_steps_and_the_old_state_is_donated(tmp_path):
    run = Run(tiny.config(tmp_path))
    first = run.state
    run.advance(run.batch(seed=0), run.batch(seed=1), run.batch(seed=2))
    assert run.traces == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert int(run.state.step) == 3


def test_averages_have_buffers_of_their_own(tmp_path):
    state = Run(tiny.config(tmp_path), devices=2).state
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((state.params, state.ema))
        for shard in leaf.addressable_shards
    ]
    assert len(pointers) == len(set(pointers))


def test_one_and_two_devices_agree(tmp_path):
    one, two = (Run(tiny.config(tmp_path), devices=devices) for devices in (1, 2))
    a, b = (run.advance(run.batch(seed=0), run.batch(seed=1)) for run in (one, two))
    assert_close(a.sums, b.sums, rtol=1e-5)
    assert_close(a.params, b.params, atol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "loss_second_moment"])
def test_microbatches_change_nothing_but_rounding(tmp_path, sampling):
    whole, split = (
        Run(tiny.config(tmp_path, train__accumulate=accumulate, objective__timestep_sampling=sampling))
        for accumulate in (1, 2)
    )
    a, b = (run.advance(run.batch()) for run in (whole, split))
    assert_close(a.sums, b.sums, rtol=1e-5)
    # Adam's first step is lr * sign(gradient): where a gradient is only rounding noise its sign may differ
    difference = np.concatenate([np.abs(x - y).ravel() for x, y in zip(*map(jax.tree.leaves, (a.params, b.params)))])
    assert np.mean(difference > 1e-5) < 0.01
    assert_close(a.history, b.history, rtol=1e-5)


def test_overfits_eight_images(tmp_path):
    run = Run(tiny.config(tmp_path, optimizer__lr=3e-3))
    batch = run.batch(8)
    run.advance(batch)
    first, run.state = read_metrics(run.state)
    run.advance(*[batch] * 149)
    _, run.state = read_metrics(run.state)
    run.advance(*[batch] * 50)
    last, _ = read_metrics(run.state)
    assert last["train/mse"] < 0.3 * first["train/mse"]


def test_randomness_is_a_function_of_key_and_step(tmp_path):
    run = Run(tiny.config(tmp_path, optimizer__lr=1e-12, ema__rates=()))
    losses = []
    for _ in range(3):
        run.advance(run.batch())
        values, run.state = read_metrics(run.state)
        losses.append(values["train/loss"])
    assert len(set(losses)) == 3
    again = Run(tiny.config(tmp_path, optimizer__lr=1e-12, ema__rates=()))
    again.advance(again.batch())
    assert read_metrics(again.state)[0]["train/loss"] == losses[0]


def test_ema_follows_its_rate_and_warm_up(tmp_path):
    for warmup in (False, True):
        run = Run(tiny.config(tmp_path, ema__rates=(0.5, 0.9), ema__warmup=warmup))
        expected = {rate: jax.device_get(run.state.params) for rate in ("0.5", "0.9")}
        for step in range(3):
            params = jax.device_get(run.advance(run.batch(seed=step)).params)
            for rate in expected:
                decay = min(float(rate), (1 + step) / (10 + step)) if warmup else float(rate)
                expected[rate] = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected[rate], params)
        assert_close(run.state.ema, expected, atol=1e-6)


def test_warm_up_and_clipping_reach_the_update(tmp_path):
    full, warm = (Run(tiny.config(tmp_path, optimizer__warmup_steps=steps, optimizer__clip_norm=None)) for steps in (0, 4))
    norms = [read_metrics(run.advance(run.batch()))[0]["train/update_norm"] for run in (full, warm)]
    np.testing.assert_allclose(norms[1], norms[0] / 4, rtol=1e-4)

    moment = {}
    for clip in (None, 1e-3):
        run = Run(tiny.config(tmp_path, optimizer__clip_norm=clip))
        adam = run.advance(run.batch()).opt_state[1][0]
        moment[clip] = float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(adam.mu))))
    np.testing.assert_allclose(moment[1e-3], 0.1 * 1e-3, rtol=1e-3)  # (1 - b1) * clip_norm
    assert moment[None] > 10 * moment[1e-3]


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path):
    run = Run(tiny.config(tmp_path, objective__timestep_sampling="loss_second_moment"))
    run.advance(run.batch())
    run.state.params["conv_out.bias"] = jax.device_put(run.state.params["conv_out.bias"].at[0].set(jnp.nan), run.replicated)
    before = jax.device_get(run.state)
    after = run.advance(run.batch(seed=1), run.batch(seed=2))
    for part in ("params", "ema", "opt_state", "history", "sums"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_total)) == (3, 2, 2)


def test_importance_sampling_fills_its_history(tmp_path):
    run = Run(tiny.config(tmp_path, objective__timestep_sampling="loss_second_moment"))
    run.advance(run.batch(8, seed=0), run.batch(8, seed=1))
    assert int(run.state.history.counts.sum()) == 16
    assert float((run.state.history.losses > 0).sum()) == 16
