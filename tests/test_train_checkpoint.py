from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fooddiff.train.checkpoint import Checkpoints, choose_step, with_sharding
from fooddiff.train.state import TrainState, zero_sums


def sharding(devices):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec())


def state(step, devices=1):
    """A state whose every number depends on the step; has eleven list entries, which sort badly as strings."""
    params = {f"down.{i}.kernel": jnp.full((2, 3), step + i / 100) for i in range(11)}
    value = TrainState(
        step=jnp.int32(step),
        params=params,
        ema={"0.9999": jax.tree.map(lambda x: x + 0.5, params), "0.999": jax.tree.map(lambda x: x + 0.25, params)},
        opt_state=([jnp.full((2,), step + i / 10) for i in range(11)], ()),
        history=None,
        sums=zero_sums(),
        skipped=jnp.int32(0),
        skipped_total=jnp.int32(step),
    )
    return jax.device_put(value, sharding(devices))


def abstract(devices=1):
    return with_sharding(jax.eval_shape(lambda: state(0)), sharding(devices))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(workdir, *states, scores=(), **options):
    scores = list(scores) or [None] * len(states)
    with Checkpoints(workdir, **options) as checkpoints:
        for each in states:
            checkpoints.save(each, {"config": {"seed": int(each.step)}, "class_names": ["a", "b"]}, score=scores.pop(0))
        checkpoints.wait()


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 1), (1, 2), (2, 1)])
def test_restores_every_bit_on_whatever_devices_there_are(tmp_path, saved_on, restored_on):
    save(tmp_path, state(3, saved_on))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, abstract(restored_on))
        assert checkpoints.meta(3) == {"config": {"seed": 3}, "class_names": ["a", "b"]}
    assert_equal(restored, state(3))
    assert restored.params["down.0.kernel"].sharding == sharding(restored_on)


def test_weights_alone(tmp_path):
    save(tmp_path, state(3))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for rate, expected in [(None, state(3).params), *state(3).ema.items()]:
            assert_equal(checkpoints.restore_weights(3, abstract(2).params, rate), expected)


def test_keeps_the_newest(tmp_path):
    save(tmp_path, state(1), state(2), state(3), keep_newest=2)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], 1, [2, 5]),
        ([3.0, 1.0, 2.0, 4.0, 0.5], 2, [2, 5]),
        ([3.0, None, 2.0, None, None], 1, [3, 5]),
        ([None, None, None, None, None], 2, [5]),
    ],
)
def test_keeps_the_best_besides_the_newest(tmp_path, scores, best, kept):
    for i in range(5):  # each a restart, which must still know the scores of those before
        save(tmp_path, state(i + 1), scores=[scores[i]], keep_newest=1, keep_best=best)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == kept


def test_a_moved_workdir_still_reads(tmp_path):
    save(tmp_path / "old", state(2))
    (tmp_path / "old").rename(tmp_path / "new")
    with Checkpoints(tmp_path / "new", read_only=True) as checkpoints:
        assert_equal(checkpoints.restore(2, abstract()), state(2))


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(FileNotFoundError, match=r"train first with run_train\.py"),
    ):
        choose_step(checkpoints, None)
    save(tmp_path, state(1), state(2))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert choose_step(checkpoints, None) == 2
        assert choose_step(checkpoints, 1) == 1
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* there are \[1, 2\]"):
            choose_step(checkpoints, 5)


def test_another_shape_is_an_error(tmp_path):
    save(tmp_path, state(1))
    like = abstract()
    other = replace(like, params={name: jax.ShapeDtypeStruct((9, 9), jnp.float32) for name in like.params})
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(ValueError, match="shape"):
        checkpoints.restore(1, with_sharding(other, sharding(1)))
