import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fooddiff.arrays import Batch
from fooddiff.data.cache import Dataset
from fooddiff.data.feed import device_batches
from fooddiff.data.order import batch_order


def dataset(count=10):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return Dataset(images, np.arange(count, dtype=np.int32), tuple("abcdefghij"[:count]), {})


def over_devices(count=2):
    return NamedSharding(jax.make_mesh((count,), ("data",), devices=jax.devices()[:count]), P("data"))


def begin(data=None, **options):
    arguments = {"seed": 5, "batch_size": 4, "start_step": 0, "flip": True, "sharding": over_devices()}
    return device_batches(data or dataset(), **(arguments | options))


def take(count, data=None, **options):
    batches = begin(data, **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_array_equal(a.cond["y"], b.cond["y"])


@pytest.mark.parametrize("flip", [True, False])
def test_batches_are_what_the_order_says(flip):
    data = dataset()
    for step, batch in enumerate(take(7, data, flip=flip)):
        indices, mirrored = batch_order(5, step, num_examples=10, batch_size=4)
        expected = [
            data.images[i][:, ::-1] if flip and m else data.images[i] for i, m in zip(indices, mirrored, strict=True)
        ]
        np.testing.assert_array_equal(batch.pixels, expected)
        np.testing.assert_array_equal(batch.cond["y"], data.labels[indices])
        assert isinstance(batch, Batch)
        assert (batch.pixels.dtype, batch.cond["y"].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("step", range(6))
def test_a_restart_after_any_step_gives_the_same_batches(step):
    assert_equal(take(6)[step:], take(6 - step, start_step=step))


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_prefetching_changes_nothing(prefetch):
    assert_equal(take(6), take(6, prefetch=prefetch))


def test_the_number_of_devices_changes_nothing():
    assert_equal(take(5), take(5, sharding=over_devices(1)))


def test_each_device_gets_only_its_own_rows():
    class Spy:
        def __init__(self, labels):
            self.labels = labels
            self.asked = []

        def __getitem__(self, rows):
            self.asked.append(rows)
            return self.labels[rows]

    plain = dataset()
    spied = Dataset(plain.images, Spy(plain.labels), plain.class_names, {})
    take(1, spied, prefetch=1)
    indices, _ = batch_order(5, 0, num_examples=10, batch_size=4)
    assert [rows.tolist() for rows in spied.labels.asked[:2]] == [indices[:2].tolist(), indices[2:].tolist()]


def test_batches_lie_sharded_on_the_devices():
    sharding = over_devices()
    (batch,) = take(1, sharding=sharding)
    assert batch.pixels.sharding == batch.cond["y"].sharding == sharding
    assert [shard.data.shape for shard in batch.pixels.addressable_shards] == [(2, 4, 4, 3)] * 2


def test_no_implicit_transfers():
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        take(2)
    finally:
        jax.config.update("jax_transfer_guard", None)


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = take(1, dataset(3), batch_size=8)
    assert np.bincount(batch.cond["y"]).min() >= 2


def test_the_next_batches_are_made_while_the_consumer_works():
    class Slow:
        """Labels that report when a batch is gathered."""

        def __init__(self, labels):
            self.labels = labels
            self.gathered = threading.Semaphore(0)

        def __getitem__(self, rows):
            self.gathered.release()
            return self.labels[rows]

    plain = dataset()
    data = Dataset(plain.images, Slow(plain.labels), plain.class_names, {})
    batches = device_batches(data, seed=0, batch_size=2, start_step=0, flip=False, sharding=over_devices(1), prefetch=3)
    next(batches)
    for _ in range(1 + 3):
        assert data.labels.gathered.acquire(timeout=10)
    assert not data.labels.gathered.acquire(timeout=0.2)
    batches.close()


def test_what_fails_in_the_thread_reaches_the_consumer():
    plain = dataset()
    broken = Dataset(plain.images, plain.labels[:0], plain.class_names, {})
    with pytest.raises(IndexError):
        take(1, broken)
    assert not threads()


def test_closing_ends_the_thread():
    batches = device_batches(dataset(), seed=0, batch_size=2, start_step=0, flip=False, sharding=over_devices())
    next(batches)
    assert threads()
    batches.close()
    assert not threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "batch of 3 images cannot be divided"),
        ({"start_step": -1}, "start_step"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_bad_arguments_fail_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        begin(**options)
