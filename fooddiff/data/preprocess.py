"""From a decoded picture to pixels. Pure functions; owns no files."""

import numpy as np
from PIL import Image

RECIPE = {
    "colour": "RGB, alpha dropped, EXIF orientation ignored",
    "crop": "largest centre square",
    "resize": "bicubic, antialiased",
}
"""What `to_pixels` does, in words: part of a cache's identity, so change it whenever the pixels change."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


def to_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """Converts a picture to RGB, crops its largest centre square and resizes that with antialiasing.

    A picture that already has the target size is not resampled: its RGB values pass through bit for bit.

    Args:
        image: a decoded picture, see `to_rgb`.
        image_size: the side of the result, in pixels, >= 1.

    Returns:
        u8[image_size, image_size, 3].

    Raises:
        ValueError: `to_rgb` refuses the picture.
    """
    rgb = to_rgb(image)
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    if side == image_size:
        return np.array(square)
    return np.array(square.resize((image_size, image_size), Image.Resampling.BICUBIC))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB.

    As in the usual pipelines of the field (improved-diffusion, TFDS), an EXIF orientation is ignored and an alpha
    channel is dropped.

    Args:
        image: a decoded picture of 8 bits per channel, of any size and colour mode.

    Raises:
        ValueError: the picture has more than 8 bits per channel, which Pillow would clip, or a mode without colours.
    """
    if image.mode not in _MODES:
        raise ValueError(
            f"mode {image.mode!r} has more than 8 bits per channel or no colours; expected one of {', '.join(_MODES)}"
        )
    return image.convert("RGB")
