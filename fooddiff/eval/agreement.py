"""Class agreement: whether a classifier of real images reads in an image the class that it was drawn for.

And how far samples are from real images to that classifier.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Float, Image, Int, Label, Params, Pixels
from fooddiff.chunks import stored_chunks
from fooddiff.codec import Codec
from fooddiff.eval.distances import frechet_estimate
from fooddiff.eval.extract import CHUNK
from fooddiff.eval.images import ImageSet
from fooddiff.eval.results import Result, frechet_result
from fooddiff.eval.stats import finish, grouped_sums, sums_of
from fooddiff.files.hashes import sha256_of_json
from fooddiff.train.tasks.classifier import TOP, rank_of
from fooddiff.xla import jit


class Readings(NamedTuple):
    """What a classifier reads in images with labels."""

    ranks: Int[Array, " n"]  # how many classes it holds more probable than the label
    features: Float[Array, "n d"]  # f32, means over all positions before its pool


Read: TypeAlias = Callable[[Params, Pixels, Label], Readings]
"""(params, pixels, labels) -> readings of one batch."""


def make_read(
    classify: Callable[[Params, Image], tuple[Array, Array]], codec: Codec, mesh: jax.sharding.Mesh
) -> Read:  # fmt: skip
    """Compiles a classifier of clean images, (params, x_0) -> logits and features, with the batch over the devices."""
    replicated, over_data = parallel.replicated(mesh), parallel.over_data(mesh)

    @partial(jit, out_shardings=replicated)
    def read(params, pixels, labels):
        pixels, labels = jax.lax.with_sharding_constraint((pixels, labels), over_data)
        logits, features = classify(params, codec.encode(pixels))
        return Readings(rank_of(logits, labels), features)

    return read


def read_images(
    read: Read, params: Params, images: ImageSet, *, batch_size: int, judge: str, cache_dir: Path,
    after_chunk: Callable[[], None],
) -> Readings:  # fmt: skip
    """Classifies a set of images. Its chunks are kept, so what was interrupted goes on where it was.

    Args:
        read: from `make_read`.
        params: the classifier's weights.
        images: with labels, which are class ids of the classifier.
        batch_size: images per call, a multiple of the number of devices.
        judge: the hash of the classifier.
        cache_dir: where chunks are kept; safe to delete at any time.
        after_chunk: called after a chunk was computed and stored; what it raises ends the work there.
    """
    identity = {
        "images": images.identity["sha256"], "n": len(images.pixels), "judge": judge, "arrays": Readings._fields,
    }  # fmt: skip

    def compute(rows: slice) -> dict[str, np.ndarray]:
        labels = images.labels[rows].astype(np.int32)
        found = parallel.in_batches(partial(read, params), images.pixels[rows], labels, batch_size=batch_size)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)._asdict()

    folder = cache_dir / "agreement" / sha256_of_json(identity)[:16]
    chunks = list(
        stored_chunks(len(images.pixels), CHUNK, compute, identity=identity, folder=folder, after_chunk=after_chunk)
    )
    return Readings(*(np.concatenate([chunk[name] for chunk in chunks]) for name in Readings._fields))


def accuracies(name: str, judge: str, ranks: Int[np.ndarray, " n"], warnings: tuple[str, ...] = ()) -> list[Result]:
    """Names the shares of images whose label is the classifier's first choice, and among its first five.

    Args:
        name: what is counted, such as "agreement".
        judge: the hash of the classifier.
        ranks: from `read_images`.
        warnings: what a reader must know.

    Returns:
        The shares, each with the standard deviation of a count of independent images.
    """
    found = []
    for top in (1, TOP):
        share = float((ranks < top).mean())
        metric = f"{name}-top{top}[classifier {judge[:8]}]"
        error = float(np.sqrt(share * (1 - share) / len(ranks)))
        texts = tuple(f"{metric}: {text}" for text in warnings)
        found.append(
            Result(metric=metric, value=share, error=error, bias=None, jackknife=(), n=len(ranks), warnings=texts)
        )
    return found


def distance(judge: str, samples: Readings, reference: Readings) -> Result:
    """Names the Fréchet distance between the classifier's features of two sets of images.

    They know dishes, where the features of `inception` that a distance is usually taken of know colours and textures.

    Args:
        judge: the hash of the classifier.
        samples: from `read_images`.
        reference: that, of real images.
    """
    n, dimension = samples.features.shape
    estimate = frechet_estimate(grouped_sums([samples.features]), finish(sums_of(reference.features)))
    metric = f"FD-{dimension}[classifier {judge[:8]}]"
    return frechet_result(metric, estimate, n=n, dimension=dimension, warnings=())
