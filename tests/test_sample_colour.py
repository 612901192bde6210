import numpy as np

from fooddiff.sample.colour import colour_spread, is_suspicious


def test_the_spread_is_that_of_the_images_means_by_channel():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(colour_spread(images), images.mean(axis=(1, 2)).std(axis=0))
    tinted = np.stack([np.full((4, 4, 3), (level, 0, 255 - level), np.uint8) for level in (0, 100, 200)])
    np.testing.assert_allclose(colour_spread(tinted), np.array([1, 0, 1]) * np.std([0, 100, 200]))


def test_a_factor_of_one_and_a_half_is_suspicious_either_way():
    assert [is_suspicious(ratio) for ratio in (0.5, 0.7, 1.0, 1.4, 1.6, float("nan"))] == [
        True, False, False, False, True, True,
    ]  # fmt: skip
