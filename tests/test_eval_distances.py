import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
from hypothesis import given
from hypothesis import strategies as st

from fooddiff.eval.distances import (
    distance_to,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    kernel_distance_subsets,
    paired_difference,
    precision_recall,
)
from fooddiff.eval.stats import Stats, finish, grouped_sums, sums_of

seeds = st.integers(0, 2**32 - 1)


def gaussian(seed, d=6, rank=None):
    g = np.random.default_rng(seed)
    root = g.normal(size=(d, rank or d))
    return Stats(100, g.normal(size=d), root @ root.T)


@given(seed=seeds)
def test_frechet_distance_is_the_textbook_formula(seed):
    a, b = gaussian(seed), gaussian(seed + 1)
    cross = np.trace(scipy.linalg.sqrtm(a.cov @ b.cov).real)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@given(seed=seeds)
def test_frechet_distance_is_a_squared_metric(seed):
    a, b, c = (gaussian(seed + i) for i in range(3))
    # the root of an eigenvalue that is zero but for rounding is off by up to the root of float64's epsilon, 1.5e-8
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8 * np.trace(a.cov))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    direct, detour = (np.sqrt(x) for x in (frechet_distance(a, c), frechet_distance(a, b)))
    assert direct <= detour + np.sqrt(frechet_distance(b, c)) + 1e-9


@given(seed=seeds, shift=st.floats(-10, 10))
def test_a_shift_adds_its_squared_length(seed, shift):
    a = gaussian(seed)
    moved = a._replace(mean=a.mean + shift)
    assert frechet_distance(a, moved) == pytest.approx(len(a.mean) * shift**2, abs=1e-8 * np.trace(a.cov))


@given(seed=seeds, scale=st.floats(0.1, 10))
def test_scaling_a_centred_gaussian(seed, scale):
    """Between N(0, C) and N(0, s^2 C) it is (s - 1)^2 tr C."""
    a = gaussian(seed)
    b = a._replace(cov=a.cov * scale**2)
    assert frechet_distance(a, b) == pytest.approx((scale - 1) ** 2 * np.trace(a.cov), abs=1e-8 * np.trace(b.cov))


@given(seed=seeds)
def test_singular_covariances_are_no_special_case(seed):
    """Points on orthogonal lines: nothing of one covariance lies in the other's range."""
    a, b = gaussian(seed, rank=2), gaussian(seed + 1, rank=3)
    distance = frechet_distance(a, b)
    assert np.isfinite(distance)
    regular = [s._replace(cov=s.cov + 1e-10 * np.eye(6)) for s in (a, b)]
    assert distance == pytest.approx(frechet_distance(*regular), rel=1e-3)


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match=r"dimension 4 .* dimension 6"):
        frechet_distance(gaussian(0, d=4), gaussian(1))


def draw(g, n, root):
    return g.normal(size=(n, len(root))) @ root.T


def test_bias_and_error_bar_are_those_of_repeated_draws():
    g = np.random.default_rng(0)
    root = g.normal(size=(16, 16))
    reference = finish(sums_of(draw(g, 100_000, root)))
    distance = distance_to(reference)
    repeated = [distance(finish(sums_of(1.3 * draw(g, 400, root)))) for _ in range(200)]
    limit = distance(finish(sums_of(1.3 * draw(g, 200_000, root))))
    estimates = [frechet_estimate(grouped_sums([1.3 * draw(g, 400, root)]), reference) for _ in range(20)]
    assert np.mean([e.bias for e in estimates]) == pytest.approx(np.mean(repeated) - limit, rel=0.2)
    assert 0.8 < np.mean([e.error for e in estimates]) / np.std(repeated) < 1.4
    assert np.mean([e.value for e in estimates]) == pytest.approx(np.mean(repeated), rel=0.05)


def test_a_difference_in_pairs_has_the_error_bar_of_repeated_draws():
    g = np.random.default_rng(0)
    root = g.normal(size=(16, 16))
    reference = finish(sums_of(draw(g, 100_000, root)))

    def pair():
        noise = draw(g, 400, root)
        changed = 1.2 * noise + 0.3 * draw(g, 400, root)
        return [frechet_estimate(grouped_sums([x]), reference) for x in (1.3 * noise, changed)]

    pairs = [pair() for _ in range(60)]
    differences = [paired_difference(a, b) for a, b in pairs]
    assert all(d.value == a.value - b.value for d, (a, b) in zip(differences, pairs, strict=True))
    assert 0.8 < np.mean([d.error for d in differences]) / np.std([d.value for d in differences]) < 1.4
    unpaired = [np.hypot(a.error, b.error) for a, b in pairs]
    assert np.mean([d.error for d in differences]) < 0.5 * np.mean(unpaired)


def test_a_difference_in_pairs_needs_the_same_groups():
    g = np.random.default_rng(0)
    estimates = [frechet_estimate(grouped_sums([g.normal(size=(n, 6))]), gaussian(0)) for n in (3, 10, 30)]
    with pytest.raises(ValueError, match="got 10 and 20"):
        paired_difference(*estimates[1:])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference(estimates[0], estimates[0])


def test_three_images_have_a_distance_but_no_error_bar():
    g = np.random.default_rng(0)
    found = frechet_estimate(grouped_sums([g.normal(size=(3, 6))]), gaussian(0))
    assert found.value > 0
    assert (found.error, found.bias) == (None, None)


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kernel_distance_is_its_definition_also_beyond_one_block():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(1100, 3)), g.normal(size=(1030, 3)) + 0.2
    n, m = len(x), len(y)
    expected = (
        (kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1))
        + (kernel(y, y).sum() - np.trace(kernel(y, y))) / (m * (m - 1))
        - 2 * kernel(x, y).mean()
    )
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased_and_its_error_bar_is_the_spread():
    g = np.random.default_rng(0)
    alike = [kernel_distance(g.normal(size=(10, 4)), g.normal(size=(10, 4))).value for _ in range(400)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(len(alike))
    y = g.normal(size=(100, 4))
    shifted = [kernel_distance(g.normal(size=(100, 4)) + 1, y) for _ in range(200)]
    assert np.mean([e.error for e in shifted]) == pytest.approx(np.std([e.value for e in shifted]), rel=0.2)


def test_subsets_as_large_as_the_sets_give_the_full_distance():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(50, 4)), g.normal(size=(50, 4)) + 1
    found = kernel_distance_subsets(x, y, subsets=3, size=50, seed=0)
    assert found.value == pytest.approx(kernel_distance(x, y).value, rel=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_subsets_are_a_function_of_the_seed():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(50, 4)), g.normal(size=(60, 4))
    one, same, other = (kernel_distance_subsets(x, y, subsets=5, size=20, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one != other
    with pytest.raises(ValueError, match="subsets of 51"):
        kernel_distance_subsets(x, y, subsets=5, size=51, seed=0)


def by_definition(x, y, k):
    def on(points, manifold):
        radii = np.sort(scipy.spatial.distance.cdist(manifold, manifold), axis=1)[:, k]
        return (scipy.spatial.distance.cdist(points, manifold) <= radii).any(axis=1).mean()

    return on(x, y), on(y, x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k):
    g = np.random.default_rng(0)
    x, y = g.normal(size=(1100, 3)) * 0.5, g.normal(size=(1050, 3))
    found = precision_recall(x, y, k=k)
    assert (found.precision.value, found.recall.value) == pytest.approx(by_definition(x, y, k), abs=1e-12)
    assert found.precision.value > found.recall.value


def test_precision_and_recall_of_equal_and_of_distant_sets():
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert [e.value for e in precision_recall(x, x)] == [1, 1]
    assert [e.value for e in precision_recall(x, x + 100)] == [0, 0]


def test_precision_needs_more_examples_than_neighbours():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(x, x)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
        kernel_distance(x, np.zeros((3, 4)))
