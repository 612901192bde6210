"""Food-101 through TensorFlow Datasets: downloaded, prepared as ArrayRecord and read without TensorFlow.

Owns the download. TFDS's images are decoded by this project, not by TFDS, so that every source shares one
decoder.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fooddiff.data.sources.source import Source, Split, open_image
from fooddiff.files.lock import locked

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

log = logging.getLogger(__name__)

_BUILDER = "food101:2.1.0"  # the first version that stores the images' ids
_URL = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"  # where TFDS finds it
_TIMEOUT = 60  # seconds
_TFDS_SPLITS = {"train": "train", "test": "validation"}
_EXAMPLES = {"train": 75_750, "test": 25_250}
_DOWNLOAD_BYTES = 4_996_278_331
_PREPARE_BYTES = 4 * _DOWNLOAD_BYTES  # archive, extracted files, records, and as much to shuffle them


def food101(path: str | os.PathLike | None = None) -> Source:
    """Reads Food-101 as TFDS prepares it, version 2.1.0; the first `split` downloads it if need be.

    TFDS checks the download against the checksum it knows, so the version and the counts identify the data,
    and a finished cache is used even where TFDS's own folder has been deleted.

    Args:
        path: TFDS's `data_dir`, or None for its default, `~/tensorflow_datasets`.

    Returns:
        A source whose "test" is what TFDS calls "validation".
    """
    import tensorflow_datasets as tfds  # imported here: other sources work without it

    def open_builder() -> tfds.core.DatasetBuilder:
        return tfds.builder(_BUILDER, data_dir=path, file_format="array_record")

    def split(name: str) -> Split:
        records = _prepared(open_builder).as_data_source(
            _TFDS_SPLITS[name], decoders={"image": tfds.decode.SkipDecoding()}
        )
        # TFDS stores examples in hashed order. One pass finds the ids, a second decodes the images into their
        # places.
        found = [(record["id"].decode(), record["label"]) for record in records]
        order = sorted(range(len(found)), key=lambda i: found[i])
        position = {i: row for row, i in enumerate(order)}
        return Split(
            ids=[found[i][0] for i in order],
            labels=[found[i][1] for i in order],
            read=lambda: ((position[i], partial(open_image, r["image"])) for i, r in enumerate(records)),
        )

    builder = open_builder()
    counts = (
        {name: builder.info.splits[theirs].num_examples for name, theirs in _TFDS_SPLITS.items()}
        if builder.is_prepared()
        else _EXAMPLES
    )
    return Source(
        name="food101",
        identity={"builder": _BUILDER, "examples": counts},
        load_class_names=lambda: tuple(builder.info.features["label"].names),
        load_split=split,
    )


def _prepared(open_builder: Callable[[], "tfds.core.DatasetBuilder"]) -> "tfds.core.DatasetBuilder":
    """Returns the builder with its data on disk, downloaded first if need be.

    Raises:
        OSError: the disk has too little room.
        RuntimeError: the download or the preparation failed.
    """
    builder = open_builder()
    if builder.is_prepared():
        return builder
    folder = Path(builder.data_path).parent.parent
    with locked(folder):
        builder = open_builder()
        if builder.is_prepared():
            return builder
        free = shutil.disk_usage(folder).free
        if free < _PREPARE_BYTES:
            raise OSError(
                f"Food-101 needs {_PREPARE_BYTES / 1e9:.0f} GB to be downloaded and prepared in {folder}, "
                f"and {free / 1e9:.1f} GB are free there. Free some, or set config.data.path to a folder on "
                f"another disk"
            )
        log.warning(
            "Downloading Food-101 with TensorFlow Datasets: %.1f GB from a slow academic host, to %s. Its "
            "preparation takes up to %.0f GB there (%.0f GB are free); afterwards %s may be deleted.",
            _DOWNLOAD_BYTES / 1e9,
            folder,
            _PREPARE_BYTES / 1e9,
            free / 1e9,
            folder / "downloads",
        )
        try:
            if not any(path.is_file() for path in (folder / "downloads").rglob("*food-101*.tar.gz")):
                _check_reachable(_URL)
            with _extraction_without_tensorflow():
                builder.download_and_prepare()
        except Exception as error:
            raise RuntimeError(
                f"TensorFlow Datasets could not download and prepare Food-101 in {folder}: {error}. What it "
                f"downloaded whole is kept there. To use a copy of food-101.tar.gz instead, set "
                f"config.data.source to 'archive' and config.data.path to the file"
            ) from error
        return builder


def _check_reachable(url: str) -> None:
    """Raises ConnectionError where no connection can be made, which TFDS would say after minutes of retries."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT).close()
    except OSError as error:
        if isinstance(error, URLError) and not isinstance(error, HTTPError):
            raise ConnectionError(f"{url} cannot be reached ({error.reason})") from error
        log.debug("%s answers a HEAD request with %r", url, error)  # but it answers


@contextmanager
def _extraction_without_tensorflow() -> Iterator[None]:
    """Lets TFDS extract with plain `open` where it would import TensorFlow (its GitHub issue 11058)."""
    from tensorflow_datasets.core.download import extractor

    lazy_tensorflow = extractor.tf
    extractor.tf = SimpleNamespace(
        io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)), compat=SimpleNamespace(as_text=os.fsdecode)
    )
    try:
        yield
    finally:
        extractor.tf = lazy_tensorflow
