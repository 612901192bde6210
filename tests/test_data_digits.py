import numpy as np
import pytest
from sklearn.datasets import load_digits

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [load_dataset(sources.digits(), split, image_size=8, cache_dir=cache) for split in ("train", "test")]


def test_the_splits_are_all_digits_in_order(splits):
    train, test = splits
    assert (len(train.images), len(test.images)) == (1437, 360)
    grey = np.concatenate([train.images, test.images])
    data = load_digits()
    assert (grey == grey[..., :1]).all()
    np.testing.assert_allclose(grey[..., 0] * (16 / 255), data.images, atol=16 / 255 / 2 + 1e-6)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), data.target)


def test_the_whole_range_of_grey_is_used(splits):
    assert (splits[0].images.min(), splits[0].images.max()) == (0, 255)


def test_class_names(splits):
    assert splits[0].class_names == sources.digits().class_names == tuple("0123456789")


def test_a_larger_size(tmp_path):
    dataset = load_dataset(sources.digits(), "test", image_size=16, cache_dir=tmp_path)
    assert dataset.images.shape == (360, 16, 16, 3)


def test_a_path_is_refused():
    with pytest.raises(ValueError, match="takes no config"):
        sources.digits("somewhere")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, test"):
        sources.digits().split("validation")
