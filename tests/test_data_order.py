import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fooddiff.data.order import batch_order

SEEDS = st.integers(0, 2**40)
COUNTS = st.integers(1, 40)
BATCHES = st.integers(1, 25)


def line(seed, num_examples, batch_size, steps):
    """The first steps, laid end to end."""
    parts = [batch_order(seed, step, num_examples=num_examples, batch_size=batch_size) for step in range(steps)]
    return np.concatenate([indices for indices, _ in parts]), np.concatenate([flip for _, flip in parts])


@given(SEEDS, COUNTS, BATCHES)
def test_every_epoch_holds_every_image_once(seed, num_examples, batch_size):
    indices, _ = line(seed, num_examples, batch_size, steps=-(-3 * num_examples // batch_size))
    for epoch in range(3):
        one = indices[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(one) == list(range(num_examples))


@given(SEEDS, COUNTS, BATCHES, st.integers(0, 10**6))
def test_a_batch_depends_on_seed_and_step_alone(seed, num_examples, batch_size, step):
    fresh = batch_order(seed, step, num_examples=num_examples, batch_size=batch_size)
    line(seed + 1, num_examples, batch_size, 3)  # whatever was asked before, and whatever it left in a cache
    again = batch_order(seed, step, num_examples=num_examples, batch_size=batch_size)
    np.testing.assert_array_equal(fresh, again)


@given(SEEDS, COUNTS, st.integers(1, 6), st.integers(2, 5))
def test_the_line_of_images_does_not_depend_on_the_batch_size(seed, num_examples, batch_size, factor):
    small = line(seed, num_examples, batch_size, steps=4 * factor)
    large = line(seed, num_examples, batch_size * factor, steps=4)
    np.testing.assert_array_equal(small, large)


@given(SEEDS, COUNTS, BATCHES)
def test_types_and_shapes(seed, num_examples, batch_size):
    indices, flip = batch_order(seed, 7, num_examples=num_examples, batch_size=batch_size)
    assert (indices.dtype, flip.dtype) == (np.int64, np.bool_)
    assert indices.shape == flip.shape == (batch_size,)


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {tuple(line(seed, 50, 50, 3)[0][start : start + 50]) for seed in (0, 1) for start in (0, 50, 100)}
    assert len(orders) == 6
    assert tuple(range(50)) not in orders


def test_places_and_flips_are_uniform_and_independent():
    indices, flip = line(3, 100, 100, 400)
    places = np.argsort(indices.reshape(400, 100), axis=1)
    assert np.abs(places.mean(0) - 49.5).max() < 4.5 * 28.9 / 20  # standard error of a mean of 400 uniform places
    assert abs(flip.mean() - 0.5) < 4.5 * 0.5 / 200
    flips_of_image = flip[np.argsort(indices, kind="stable")].reshape(100, 400)  # one row per image
    assert np.abs(flips_of_image.mean(1) - 0.5).max() < 4.5 * 0.5 / 20
    assert abs(np.corrcoef(indices, flip)[0, 1]) < 4.5 / 200


def test_the_order_is_the_same_for_ever():
    # Resuming a run on another machine or a newer NumPy depends on these numbers.
    indices, flip = batch_order(777, 2, num_examples=10, batch_size=6)
    assert indices.tolist() == [7, 0, 1, 9, 5, 6]
    assert flip.astype(int).tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("step", -1), ("num_examples", 0), ("batch_size", 0)])
def test_numbers_out_of_range_are_named(name, value):
    arguments = {"seed": 0, "step": 0, "num_examples": 5, "batch_size": 2} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        batch_order(**arguments)
