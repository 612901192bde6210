import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fooddiff.diffusion.schedule import MAX_BETA, cosine_betas, evenly_spaced, integer_stride, linear_betas, nearest


@given(st.integers(21, 5000))
def test_linear_is_a_line_over_the_same_noise_for_any_T(timesteps):
    betas = linear_betas(timesteps)
    assert betas.dtype == np.float64
    assert betas.shape == (timesteps,)
    np.testing.assert_allclose(betas[[0, -1]] * timesteps, [0.1, 20])
    np.testing.assert_allclose(np.diff(betas, 2), 0, atol=1e-15)


@given(st.integers(2, 3000))
def test_cosine_gives_the_alpha_bar_of_its_definition(timesteps):
    betas = cosine_betas(timesteps)
    u = np.arange(timesteps + 1) / timesteps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    assert betas.dtype == np.float64
    assert betas.shape == (timesteps,)
    assert betas[-1] == MAX_BETA  # alpha_bar would reach 0
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (f[1:] / f[0])[:-1], rtol=1e-9)


@pytest.mark.parametrize("schedule", [linear_betas, cosine_betas])
@pytest.mark.parametrize("timesteps", [-1, 0, 1])
def test_too_few_timesteps(schedule, timesteps):
    with pytest.raises(ValueError, match=f"at least 2 timesteps, got {timesteps}"):
        schedule(timesteps)


@pytest.mark.parametrize("timesteps", [2, 20])
def test_linear_refuses_a_beta_of_one(timesteps):
    with pytest.raises(ValueError, match=f"at least 21 timesteps, got {timesteps}.*cosine"):
        linear_betas(timesteps)


@given(st.data(), st.integers(1, 4), st.integers(4, 500))
def test_evenly_spaced_fills_every_section_from_end_to_end(data, sections, timesteps):
    sizes = [len(part) for part in np.array_split(np.arange(timesteps), sections)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    kept = evenly_spaced(timesteps, counts)
    assert (np.diff(kept) > 0).all()
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        inside = [step for step in kept if start <= step < start + size]
        assert len(inside) == count
        assert inside[0] == start
        if count > 1:
            assert inside[-1] == start + size - 1
            assert np.ptp(np.diff(inside)) <= 1
        start += size


@given(st.integers(2, 300))
def test_evenly_spaced_can_keep_all(timesteps):
    assert evenly_spaced(timesteps, (timesteps,)) == list(range(timesteps))


@pytest.mark.parametrize(("counts", "bad"), [((0,), 0), ((11,), 11), ((2, 6), 6), ((2, -1), -1)])
def test_evenly_spaced_refuses_counts_that_do_not_fit(counts, bad):
    with pytest.raises(ValueError, match=f"cannot keep {bad} of the {10 // len(counts)} timesteps"):
        evenly_spaced(10, counts)


@given(st.integers(2, 1000), st.integers(1, 999))
def test_integer_stride_is_constant_and_starts_at_zero(timesteps, stride):
    count = len(range(0, timesteps, min(stride, timesteps - 1)))
    kept = integer_stride(timesteps, count)
    assert len(kept) == count
    assert kept[0] == 0
    assert np.ptp(np.diff(kept)) == 0
    assert kept[-1] + np.diff(kept)[0] >= timesteps


def test_integer_stride_names_the_nearest_possible_counts():
    with pytest.raises(ValueError, match=r"exactly 60 of 100.*\[20, 25, 34, 50\]"):
        integer_stride(100, 60)


def test_as_many_timesteps_are_near_the_levels_as_are_wanted():
    log_snrs = np.array([4.0, 2.0, 1.0, 0.0, -3.0])
    assert nearest(log_snrs, np.array([-3.0, 0.9, 4.0])) == [0, 2, 4]
    assert nearest(log_snrs, np.array([-3.0, -2.9, -2.8])) == [2, 3, 4]  # each takes one of those that are left
    alpha_bar = np.cumprod(1 - cosine_betas(200))
    log_snrs = np.log(alpha_bar / (1 - alpha_bar))
    for steps in (2, 10, 50, 200):
        kept = nearest(log_snrs, np.linspace(log_snrs[-1], log_snrs[0], steps))
        assert len(set(kept)) == steps
        assert {kept[0], kept[-1]} == {0, 199}
