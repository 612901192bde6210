import numpy as np
import pytest
from PIL import Image

from fooddiff.data.preprocess import to_pixels


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def test_an_image_of_the_target_size_passes_through_bit_for_bit():
    pixels = noise(64, 64)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 64), pixels)


@pytest.mark.parametrize(("height", "width"), [(64, 91), (90, 64)])
def test_the_crop_is_the_centre(height, width):
    pixels = noise(height, width)
    top, left = (height - 64) // 2, (width - 64) // 2
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 64), pixels[top : top + 64, left : left + 64])


def test_what_the_crop_cuts_off_has_no_influence():
    pixels = noise(100, 150)
    other = pixels.copy()
    other[:, :25] = 0
    other[:, 125:] = 255
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 32), to_pixels(Image.fromarray(other), 32))


def test_the_resize_is_antialiased():
    # The finest checkerboard lies above the new Nyquist limit: only its mean may remain.
    board = np.indices((256, 256)).sum(0) % 2 * np.uint8(255)
    small = to_pixels(Image.fromarray(board.astype(np.uint8)), 32)
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [1, 8, 64, 100])
def test_shape_and_type(size):
    pixels = to_pixels(Image.fromarray(noise(37, 53)), size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8


def test_constant_colour_survives_resizing():
    image = Image.new("RGB", (77, 50), (10, 200, 31))
    assert (to_pixels(image, 16) == (10, 200, 31)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.fromarray(noise(8, 8)).convert(mode)
    np.testing.assert_array_equal(to_pixels(image, 8), np.array(image.convert("RGB")))


def test_grey_is_the_same_in_all_channels():
    pixels = noise(8, 8, 1)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 8), np.repeat(pixels[..., None], 3, axis=-1))


def test_alpha_is_dropped_not_blended():
    image = Image.fromarray(np.full((8, 8, 4), (50, 60, 70, 0), np.uint8))
    assert (to_pixels(image, 8) == (50, 60, 70)).all()


def test_exif_orientation_is_ignored():
    pixels = noise(8, 8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # rotate by 90 degrees to view
    np.testing.assert_array_equal(to_pixels(image, 8), pixels)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_rather_than_clipped(mode):
    with pytest.raises(ValueError, match="more than 8 bits"):
        to_pixels(Image.new(mode, (8, 8)), 8)
