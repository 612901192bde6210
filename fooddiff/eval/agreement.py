"""Class agreement: whether a classifier of real images reads in an image the class that it was drawn for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Image, Int, Label, Params, Pixels
from fooddiff.chunks import stored_chunks
from fooddiff.codec import Codec
from fooddiff.eval.extract import CHUNK
from fooddiff.eval.images import ImageSet
from fooddiff.eval.results import Result
from fooddiff.files.hashes import sha256_of_json
from fooddiff.train.tasks.classifier import TOP, rank_of
from fooddiff.xla import jit

Ranks: TypeAlias = Callable[[Params, Pixels, Label], Int[Array, " n"]]
"""(params, pixels, labels) -> how many classes the classifier holds more probable than the label."""


def make_ranks(logits: Callable[[Params, Image], Array], codec: Codec, mesh: jax.sharding.Mesh) -> Ranks:
    """Compiles a classifier of clean images, (params, x_0) -> logits, with the batch spread over the devices."""
    replicated, over_data = parallel.replicated(mesh), parallel.over_data(mesh)

    @partial(jit, out_shardings=replicated)
    def ranks(params, pixels, labels):
        pixels, labels = jax.lax.with_sharding_constraint((pixels, labels), over_data)
        return rank_of(logits(params, codec.encode(pixels)), labels)

    return ranks


def ranks_of(
    ranks: Ranks, params: Params, images: ImageSet, *, batch_size: int, judge: str, cache_dir: Path,
    after_chunk: Callable[[], None],
) -> Int[np.ndarray, " n"]:  # fmt: skip
    """Classifies a set of images. Its chunks are kept, so what was interrupted goes on where it was.

    Args:
        ranks: from `make_ranks`.
        params: the classifier's weights.
        images: with labels, which are class ids of the classifier.
        batch_size: images per call, a multiple of the number of devices.
        judge: the hash of the classifier.
        cache_dir: where chunks are kept; safe to delete at any time.
        after_chunk: called after a chunk was computed and stored; what it raises ends the work there.
    """
    identity = {"images": images.identity["sha256"], "n": len(images.pixels), "judge": judge}

    def compute(rows: slice) -> dict[str, np.ndarray]:
        labels = images.labels[rows].astype(np.int32)
        found = parallel.in_batches(partial(ranks, params), images.pixels[rows], labels, batch_size=batch_size)
        return {"ranks": np.concatenate(list(found))}

    folder = cache_dir / "agreement" / sha256_of_json(identity)[:16]
    chunks = stored_chunks(
        len(images.pixels), CHUNK, compute, identity=identity, folder=folder, after_chunk=after_chunk
    )
    return np.concatenate([chunk["ranks"] for chunk in chunks])


def accuracies(name: str, judge: str, ranks: Int[np.ndarray, " n"], warnings: tuple[str, ...] = ()) -> list[Result]:
    """Names the shares of images whose label is the classifier's first choice, and among its first five.

    Args:
        name: what is counted, such as "agreement".
        judge: the hash of the classifier.
        ranks: from `ranks_of`.
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
