"""Where the Inception weights come from, and how a number says which they were.

Owns the genuine file's address and hash, the download, the conversion cache and the naming of metrics. The
genuine file is a pickle; it is read without running any code from it (fooddiff.files.torch_file).
"""

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from tqdm.auto import tqdm

from fooddiff.eval import inception
from fooddiff.files.atomic import atomic_path
from fooddiff.files.hashes import sha256_of
from fooddiff.files.lock import locked
from fooddiff.files.npz import read_npz
from fooddiff.files.safetensors_file import read_tensors
from fooddiff.files.torch_file import load_state_dict

GENUINE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
GENUINE_URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
"""Two addresses of the same bytes: the TensorFlow graph's weights of 2015-12-05 in torch's format, 96 MB."""

BY_HAND = (
    f"By hand: get {GENUINE_URLS[0]} or the same bytes from {GENUINE_URLS[1]} with a browser "
    f"(SHA-256 {GENUINE_SHA256}), copy the file here and give its path: --inception PATH"
)

_TORCH_SUFFIXES = (".pth", ".pt")
_SUFFIXES = (*_TORCH_SUFFIXES, ".npz", ".safetensors")
_BLOCK = 1 << 20  # bytes per read of a download
_TIMEOUT = 30  # seconds without an answer or a byte


class InceptionWeights(NamedTuple):
    """Parameters of the network and what they are."""

    params: inception.Params
    name: str
    sha256: str  # of the file that the user named or that was downloaded
    genuine: bool  # whether this is the file that published FIDs use


def load_inception(
    source: str | os.PathLike,
    names: tuple[str, ...],
    *,
    cache_dir: str | os.PathLike,
    sha256: str | None = None,
) -> InceptionWeights:
    """Loads the parameters that some features need.

    A torch file is converted once: the needed part is kept as safetensors in the cache, under the file's hash.

    Args:
        source: a `.pth` or `.pt` file, an `.npz` or `.safetensors` file with the same parameter names (only
            those that the features need), or a URL of such a file.
        names: feature names, keys of `inception.DIMENSIONS`.
        cache_dir: where downloads and conversions are kept.
        sha256: what the file's SHA-256 must be, in lower-case hexadecimal. A URL needs it, except the two of
            `GENUINE_URLS`, whose hash is known.

    Returns:
        The weights. `genuine` is true only for the file with `GENUINE_SHA256`.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the download failed; what has arrived is kept and the next call goes on from there.
        ValueError: the hash or the format is wrong, or parameters are missing, misshapen or not finite.
    """
    required = inception.required_parameters(names)
    cache_dir = Path(cache_dir)
    source = os.fspath(source)
    address = urllib.parse.urlsplit(source)
    is_url = address.scheme in ("http", "https")
    path = cache_dir / Path(address.path).name if is_url else Path(source)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{source} has no known suffix; Inception weights are one of {', '.join(_SUFFIXES)}")
    if is_url:
        digest = sha256 or (GENUINE_SHA256 if source in GENUINE_URLS else None)
        if digest is None:
            raise ValueError(f"the SHA-256 of {source} is not known here; give it too: --inception_sha256 HEX")
        if not _converted(cache_dir, digest, names).exists():
            _download(source, path, digest)
    else:
        if not path.is_file():
            raise FileNotFoundError(f"there are no Inception weights at {source}. {BY_HAND}")
        digest = sha256_of(path)
        if sha256 not in (None, digest):
            raise ValueError(f"{source} has SHA-256 {digest}, expected {sha256}: it is another or a damaged file")
    converted = _converted(cache_dir, digest, names)
    arrays = _read(converted if converted.exists() else path, required)
    _check(arrays, required, path)
    if path.suffix in _TORCH_SUFFIXES and not converted.exists():
        with atomic_path(converted) as temporary:
            safetensors.numpy.save_file({name: np.ascontiguousarray(arrays[name]) for name in required}, temporary)
    return InceptionWeights(inception.fold(arrays, names), path.stem, digest, digest == GENUINE_SHA256)


def metric_name(metric: str, feature: str, weights: InceptionWeights) -> str:
    """The only place where a metric gets its name.

    Args:
        metric: "FD" (Fréchet distance), "KD" (kernel distance), "IS" (Inception Score), "Precision" or "Recall".
        feature: a key of `inception.DIMENSIONS`.
        weights: what the features were computed with.

    Returns:
        "FID-64", "KID-2048", "Precision-2048", "sFID" (of the feature "spatial") or "IS" with the genuine weights;
        otherwise the number is no Inception number as published, and the name says what it is: "FD-64[my_stem
        d11d89b6]".
    """
    known = {"FD": "FID", "KD": "KID"}.get(metric, metric) if weights.genuine else metric
    name = {"spatial": f"s{known}", "logits_unbiased": known}.get(feature, f"{known}-{feature}")
    return name if weights.genuine else f"{name}[{weights.name} {weights.sha256[:8]}]"


def _converted(cache_dir: Path, sha256: str, names: tuple[str, ...]) -> Path:
    """The features are nested: what the deepest one needs serves all shallower ones."""
    deepest = max(names, key=list(inception.DIMENSIONS).index)
    return cache_dir / f"inception-{sha256}-{deepest}.safetensors"


def _read(path: Path, required: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Those of the required parameters that the file has."""
    if path.suffix == ".npz":
        return read_npz(path, required)
    read = load_state_dict if path.suffix in _TORCH_SUFFIXES else read_tensors
    return read(path, wanted=lambda name: name in required)


def _check(arrays: Mapping[str, np.ndarray], required: Mapping[str, tuple[int, ...]], path: Path) -> None:
    missing = [name for name in required if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(required)} parameters that the features need, first "
            f"{missing[0]}; ask for shallower features or give the full weights. {BY_HAND}"
        )
    for name, shape in required.items():
        value = arrays[name]
        if value.shape != shape or value.dtype.kind != "f":
            raise ValueError(f"{path}: {name} is {value.dtype} {list(value.shape)}, expected floats {list(shape)}")
        if not np.isfinite(value).all() or (name.endswith("running_var") and (value < 0).any()):
            raise ValueError(f"{path}: {name} holds values that no trained network has (NaN, infinite or negative)")


def _download(url: str, path: Path, sha256: str) -> None:
    """Fetches a file unless it is there; goes on where an earlier attempt stopped. A wrong hash raises."""
    with locked(path.parent):
        if path.exists() and sha256_of(path) == sha256:
            return
        partial = path.with_name(path.name + ".part")
        try:
            _fetch(url, partial)
        except (OSError, urllib.error.URLError) as error:
            raise ConnectionError(f"{url} could not be downloaded ({error}). {BY_HAND}") from error
        found = sha256_of(partial)
        if found != sha256:
            partial.unlink()
            raise ValueError(f"{url} gave a file with SHA-256 {found}, expected {sha256}; it was removed. {BY_HAND}")
        os.replace(partial, path)


def _fetch(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the range begins at the end: everything is here, and its hash will tell
            return
        raise
    with response, open(partial, "ab" if response.status == 206 else "wb") as file:
        have = file.tell()
        left = response.headers["Content-Length"]
        size = have + int(left) if left else None
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=partial.stem) as bar:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if size is not None and partial.stat().st_size < size:
        raise ConnectionError(
            f"the connection ended after {partial.stat().st_size} of {size} bytes; run again to go on"
        )
