"""Names for the arrays that cross module borders. Imports nothing of ours.

Shape letters: n batch, h height, w width, c channels, T diffusion steps, d features. Images are NHWC.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

Image: TypeAlias = Float[Array, "n h w c"]  # float32 in [-1, 1] wherever it is not a network output
Pixels: TypeAlias = UInt8[Array, "n h w c"]  # the form of images in files and batches
Timestep: TypeAlias = Int[Array, " n"]  # an index into the process: 0 has the least noise
Label: TypeAlias = Int[Array, " n"]  # a class id in the data set's own order
PerExample: TypeAlias = Float[Array, " n"]
Scalar: TypeAlias = Float[Array, ""]
Key: TypeAlias = PRNGKeyArray
Params: TypeAlias = PyTree[jax.Array]

Cond: TypeAlias = Mapping[str, Array]
"""What an image is conditioned on, by name: {"y": i32[n]} of labels, {"low_res": f32[n, h, w, c]}; {} for nothing."""


class Batch(NamedTuple):
    """One global training batch as it lies on the devices."""

    pixels: Pixels | Image  # or, where latents are diffused, these instead
    cond: Cond
