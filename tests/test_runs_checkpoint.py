import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fooddiff import processes
from fooddiff.parallel import with_sharding
from fooddiff.runs.checkpoint import Checkpoints, MisfitError, SaveError, choose_step
from fooddiff.runs.workdir import checkpoint_steps
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
        carried=None,
        sums=jax.tree.map(lambda zero: zero + step, zero_sums(("loss", "grad_norm"))),  # of a log window that is open
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
            checkpoints.save(each, {"config": {"seed": int(each.step)}, "class_names": ["a", "b"]})
            if (score := scores.pop(0)) is not None:
                checkpoints.add_score(int(each.step), score)
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
        ([3.0, 1.0, 2.0, 4.0, 0.5], 2, [2, 3, 5]),  # the next save would act on the last score
        ([3.0, None, 2.0, None, None], 1, [3, 5]),
        ([None, None, None, None, None], 2, [5]),
        ([2.0, np.nan, 3.0, None, None], 1, [1, 5]),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"down.3.kernel": jax.ShapeDtypeStruct((9, 9), jnp.float32)},
            r"float32\[2, 3\], expected .*9, 9",
        ),
        (
            lambda p: p | {"down.3.kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)},
            r"float32\[2, 3\], expected bfloat16",
        ),
        (lambda p: p | {"down.3.norm": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"missing, expected float32\[2\]"),
        (lambda p: {name: p[name] for name in p if name != "down.3.kernel"}, r"float32\[2, 3\], expected nothing"),
    ],
    ids=["shape", "dtype", "one more", "one less"],
)
def test_a_checkpoint_of_another_model_is_an_error_and_never_passed_over(tmp_path, change, message):
    save(tmp_path, state(1), state(2))
    like = abstract()
    other = with_sharding(replace(like, params=change(like.params)), sharding(1))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(MisfitError, match=rf"step 2 in .* does not fit the model: down\.3\.\w+ is {message}"):
            checkpoints.restore_newest(other, accept=lambda meta: None)
        with pytest.raises(MisfitError):
            checkpoints.restore_weights(2, other.params, None)
        assert checkpoints.steps() == [1, 2]


def test_metrics_may_come_and_go(tmp_path):
    save(tmp_path, state(1))
    sums = {"loss": abstract().sums["loss"], "accuracy": abstract().sums["loss"]}
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(1, replace(abstract(), sums=sums))
    np.testing.assert_array_equal(restored.sums["loss"], state(1).sums["loss"])
    np.testing.assert_array_equal(restored.sums["accuracy"], np.zeros(2))
    assert restored.sums.keys() == sums.keys()


def test_another_optimizer_is_a_misfit_and_no_damage(tmp_path):
    save(tmp_path, state(1))
    other = replace(abstract(), opt_state=([abstract().opt_state[0][0]], ()))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(MisfitError, match=r"opt_state/0/1 is float32\[2\]"):
        checkpoints.restore_newest(other, accept=lambda meta: None)


def test_a_checkpoint_that_is_not_accepted_is_an_error_and_nothing_is_touched(tmp_path):
    save(tmp_path, state(1), state(2))

    def refuse(meta):
        raise PermissionError(meta["config"]["seed"])

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(PermissionError, match="2"):
            checkpoints.restore_newest(abstract(), accept=refuse)
        assert checkpoints.steps() == [1, 2]


def test_a_score_that_cannot_be_read_is_named_and_set_aside(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fooddiff"), "propagate", True)
    save(tmp_path, state(1), state(2), scores=[1.0, 2.0])
    scores = Path("1") / "metrics" / "metrics"
    (tmp_path / "checkpoints" / scores).write_text("{not json")
    save(tmp_path, state(3), keep_newest=1, keep_best=1)
    assert f"{scores} is damaged, its checkpoint counts as not scored" in caplog.text
    assert (tmp_path / "damaged" / scores).read_text() == "{not json"
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]


def test_a_slow_disk_delays_the_commit_and_not_the_training(tmp_path, monkeypatch):
    commit, rename = threading.Event(), os.rename

    def slowly(*paths):
        commit.wait(timeout=20)
        rename(*paths)

    monkeypatch.setattr("os.rename", slowly)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {})
        checkpoints.check()
        assert checkpoint_steps(tmp_path) == []  # the commit waits on the disk, and we do not
        commit.set()
        checkpoints.wait()
    assert checkpoint_steps(tmp_path) == [1]


def test_hashing_holds_up_no_step_and_is_of_the_state_as_it_was(tmp_path, monkeypatch):
    go_on, sha256_of = threading.Event(), processes.sha256_of

    def slowly(tree):
        go_on.wait(timeout=20)
        return sha256_of(tree)

    saved, step = state(1), jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "sha256_of", slowly)
            checkpoints.save(saved, {})
            jax.block_until_ready(step(saved))  # which takes the buffers of what is saved
            assert checkpoint_steps(tmp_path) == []
            go_on.set()
            checkpoints.wait()
        assert_equal(checkpoints.restore(1, abstract()), state(1))


def test_a_commit_that_fails_is_found_without_another_save(tmp_path, monkeypatch):
    save(tmp_path, state(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    def log_points(checkpoints):
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)

    monkeypatch.setattr("os.rename", full)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(2), {})
        with pytest.raises(SaveError, match=r"could not be written to .*No space left on device"):
            log_points(checkpoints)
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1]
        assert_equal(reader.restore(1, abstract()), state(1))


def test_a_reader_lists_checkpoints_without_looking_into_them(tmp_path):
    """The training may be about to delete one, and an empty file stands for that."""
    save(tmp_path, state(1), state(2), scores=[1.0, 2.0])
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_bytes(b"")
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1, 2]
        assert_equal(reader.restore(2, abstract()), state(2))


def test_an_error_of_the_devices_is_not_the_files(tmp_path, monkeypatch):
    save(tmp_path, state(1))

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", full)
        with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
            checkpoints.restore(1, abstract())
