"""What a model for super-resolution is shown of an image besides noise: a smaller one."""

from typing import NamedTuple

from fooddiff.arrays import Image


class LowRes(NamedTuple):
    """The condition of a model for super-resolution: a small image, with some noise of its own.

    The noise, whose level the network is not told, lets a model that was trained on small versions of real images
    cope with those that another model draws (conditioning augmentation: Ho et al. 2021, arXiv 2106.15282, section 4).
    Levels are standard deviations of Gaussian noise on images in [-1, 1]: 0.1 is 13 grey levels.
    """

    size: int  # height and width, in pixels
    max_noise: float  # in training an example's level is uniform from 0 to this
    noise: float  # the level in sampling


def shrink(images: Image, size: int) -> Image:
    """The mean of each block of pixels, as `torch.nn.functional.interpolate` has it with the mode "area".

    Args:
        images: f32[n, h, w, c], h and w multiples of size; images of that size come back as they are.
        size: height and width of the result.

    Returns:
        f32[n, size, size, c].
    """
    n, h, w, c = images.shape
    return images.reshape(n, size, h // size, size, w // size, c).mean(axis=(2, 4))
