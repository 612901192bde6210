import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fooddiff.eval import stats
from fooddiff.eval.stats import (
    Stats,
    finish,
    grouped_sums,
    merge,
    read_stats,
    sums_of,
    total,
    write_stats,
)


def features(n, d=5, seed=0):
    return np.random.default_rng(seed).normal(3, 2, (n, d)).astype(np.float32)


def test_mean_and_unbiased_covariance():
    x = features(40)
    found = finish(sums_of(x))
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    assert found.n == 40
    assert found.cov.dtype == np.float64


@given(cut=st.integers(0, 30))
def test_sums_of_parts_merge_to_the_sums_of_the_whole(cut):
    x = features(30)
    merged = merge(sums_of(x[:cut]), sums_of(x[cut:]))
    whole = sums_of(x)
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-13)
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-13)


@pytest.mark.parametrize("n", [1, 7, stats.GROUPS, stats.GROUPS + 1, 95])
@pytest.mark.parametrize("batch", [1, 6, 64])
def test_groups_do_not_depend_on_the_batches_and_add_up(n, batch):
    x = features(n)
    groups = grouped_sums(x[i : i + batch] for i in range(0, n, batch))
    assert len(groups) == min(n, stats.GROUPS)
    for g, group in enumerate(groups):
        np.testing.assert_allclose(group.total, x[g :: stats.GROUPS].astype(np.float64).sum(0), rtol=1e-12)
    assert total(groups).n == n
    np.testing.assert_allclose(total(groups).outer, sums_of(x).outer, rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_have_no_covariance(n):
    with pytest.raises(ValueError, match=f"at least 2 images, got {n}"):
        finish(sums_of(features(n)))


def test_an_empty_stream_has_no_groups():
    with pytest.raises(ValueError, match="no images"):
        grouped_sums([])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    x = features(4)
    x[2, 1] = value
    with pytest.raises(ValueError, match="image 2"):
        sums_of(x)


def test_statistics_survive_their_file(tmp_path):
    path = tmp_path / "new folder" / "ref.npz"
    written = finish(sums_of(features(9)))
    write_stats(path, written, {"feature": "64", "images": {"sha256": "ab"}})
    found, provenance = read_stats(path)
    assert found.n == 9
    np.testing.assert_array_equal(found.mean, written.mean)
    np.testing.assert_array_equal(found.cov, written.cov)
    assert provenance == {"feature": "64", "images": {"sha256": "ab"}}
    assert [file.name for file in path.parent.iterdir()] == ["ref.npz"]


def test_the_file_is_what_edm_reads_and_writes(tmp_path):
    """EDM's fid.py takes `mu` and `sigma` of `dict(np.load(path))` and writes these two in float64."""
    ours = tmp_path / "ours.npz"
    written = finish(sums_of(features(9)))
    write_stats(ours, written, {})
    as_edm = dict(np.load(ours))
    np.testing.assert_array_equal(as_edm["mu"], written.mean)
    np.testing.assert_array_equal(as_edm["sigma"], written.cov)

    theirs = tmp_path / "theirs.npz"
    np.savez(theirs, mu=written.mean, sigma=written.cov)
    found, provenance = read_stats(theirs)
    assert found.n is None
    assert provenance is None
    np.testing.assert_array_equal(found.cov, written.cov)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no `mu` and `sigma`"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\[4, 4\]"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "symmetric"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        read_stats(path)
    assert str(path) in str(error.value)


def test_a_truncated_file_is_refused_and_a_missing_one_is_missing(tmp_path):
    path = tmp_path / "cut.npz"
    write_stats(path, Stats(2, np.zeros(3), np.eye(3)), {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_stats(path)
    with pytest.raises(FileNotFoundError):
        read_stats(tmp_path / "none.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "ref.npz"
    write_stats(path, Stats(2, np.zeros(3), np.eye(3)), {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_stats(path, Stats(2, np.ones(3), np.eye(3)), {"not JSON": json})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
