"""Feeds mutated files to every reader: `python -m tests.fuzz --inputs=10000 --seed=0`.

A reader may accept a file, or refuse it with one of `REFUSALS` whose message names the file, or the setting to change,
in printable characters. Anything else is a crash, and more than ten seconds a hang: of each kind the smallest input is
printed, and the name that repeats it.
"""

import argparse
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from PIL import Image
from rich.console import Console
from rich.table import Table

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from fooddiff.data.preprocess import to_pixels
from fooddiff.data.sources.source import read_class_names, read_image
from fooddiff.eval.images import open_images
from fooddiff.eval.stats import Stats, read_stats, write_stats
from fooddiff.eval.weights import load_inception
from fooddiff.files.torch_file import load_state_dict
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.runs.record import read_scalars
from fooddiff.runs.weights_file import read_weights, write_weights
from fooddiff.runs.workdir import read_config, to_json
from tests import tiny
from tests.random_stem import random_stem
from tests.test_files_torch_file import dump, legacy_bytes, of
from tests.tiny_food101 import jpeg, tiny_food101, write_tar

REFUSALS = (ValueError, OSError)
OUTCOMES = ("accepted", "refused", "crashed", "hung")
SECONDS = 10


class Reader(NamedTuple):
    """A reader and a good input."""

    file: str  # what the input is called
    good: bytes
    read: Callable[[Path], object]
    wrap: Callable[[bytes], bytes] = bytes  # after a mutation: puts checksums right, which would hide the rest


class Hang(BaseException):
    """A reader took too long."""


def readers() -> dict[str, Reader]:
    """Every reader of files that a user may have from somebody else."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def reader(file: str, write: Callable[[Path], object], read: Callable[[Path], object]) -> Reader:
            write(folder / file)
            return Reader(file, (folder / file).read_bytes(), read)

        def save(content: bytes) -> Callable[[Path], object]:
            return lambda path: path.write_bytes(content)

        tensors = {"a.weight": np.ones((4, 3, 3, 3), np.float32), "b.bias": np.arange(5, dtype=np.float32)}
        statistics = Stats(10, np.zeros(4), np.eye(4))
        older = legacy_bytes({name: of(value, name) for name, value in tensors.items()})
        program, storages = dump({name: of(value, name) for name, value in tensors.items()}, legacy=False)
        storages = {f"archive/data/{key}": storage.content for key, storage in storages.items()}
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
        picture = Image.fromarray(images[0])
        metrics = "".join(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(1, 9))
        about = {"config": to_json(tiny.config(folder)), "class_names": [str(y) for y in range(10)], "step": 1}
        described = about | {"weights": "raw", "images_seen": 0}
        inside = {
            "array in images.npz": Reader("images.npz", _npy(images), _read_images, _zipped("arr_0.npy")),
            "labels in images.npz": Reader(
                "images.npz", _npy(np.arange(3)), _read_images, _zipped("arr_1.npy", {"arr_0.npy": _npy(images)})
            ),
            "array in statistics.npz": Reader(
                "stats.npz", _npy(statistics.cov), read_stats, _zipped("sigma.npy", {"mu.npy": _npy(statistics.mean)})
            ),
            "pickle in .pt": Reader("model.pt", program, load_state_dict, _zipped("archive/data.pkl", storages)),
            "chunks of PNG": Reader("image.png", _saved(picture, "PNG"), _read_image, _with_png_checksums),
        }
        return inside | {
            "archive.tar.gz": reader("food.tar.gz", lambda p: write_tar(p, tiny_food101()), _read_archive),
            "archive.tar": reader("food.tar", lambda p: write_tar(p, tiny_food101(), "w"), _read_archive),
            "JPEG": reader("image.jpg", save(jpeg(0)), _read_image),
            "PNG": reader("image.png", picture.save, _read_image),
            "WebP": reader("image.webp", picture.save, _read_image),
            "images.npz": reader("images.npz", lambda p: np.savez(p, images, np.arange(3)), _read_images),
            "packed images.npz": reader("packed.npz", lambda p: np.savez_compressed(p, images), _read_images),
            "statistics.npz": reader("stats.npz", lambda p: write_stats(p, statistics, {"feature": "64"}), read_stats),
            "state dict .pt": reader("model.pt", lambda p: write_state_dict(p, tensors), load_state_dict),
            "older state dict .pt": reader("older.pt", save(older), load_state_dict),
            "exported .safetensors": reader(
                "model.safetensors", lambda p: write_weights(p, tensors, described, half=False), read_weights
            ),
            "Inception .npz": reader("stem.npz", lambda p: np.savez(p, **random_stem()), _read_inception),
            "Inception .safetensors": reader(
                "stem.safetensors", lambda p: safetensors.numpy.save_file(random_stem(), p), _read_inception
            ),
            "metrics.jsonl": reader("metrics.jsonl", save(metrics.encode()), lambda p: read_scalars(p.parent)),
            "config.json": reader("config.json", save(json.dumps(about).encode()), read_config),
            "class names": reader("classes.txt", save("pizza\nsushi\ncrème\n".encode()), read_class_names),
        }


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def _zipped(name: str, others: Mapping[str, bytes] = MappingProxyType({})) -> Callable[[bytes], bytes]:
    """Makes a zip archive of a member and others."""

    def wrap(content: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for member, data in {**others, name: content}.items():
                archive.writestr(member, data)
        return file.getvalue()

    return wrap


def _with_png_checksums(content: bytes) -> bytes:
    """Computes the checksum of every chunk anew, as far as lengths make sense."""
    result, at = bytearray(content), 8
    while at + 12 <= len(result):
        end = at + 8 + int.from_bytes(result[at : at + 4])
        result[end : end + 4] = zlib.crc32(result[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(result)


def _read_archive(path: Path) -> None:
    for split in sources.SPLITS:
        load_dataset(sources.archive(path), split, image_size=8, cache_dir=path.parent / "cache")


def _read_image(path: Path) -> None:
    _read_images(path.parent)
    to_pixels(read_image(path), 8)


def _read_images(path: Path) -> None:
    pixels = open_images(str(path), sources={}, image_size=8, cache_dir=path.parent).pixels
    assert pixels[0 : len(pixels)].dtype == np.uint8


def _read_inception(path: Path) -> None:
    load_inception(path, ("64",), cache_dir=path.parent)


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Changes a file in one to three of the ways in which files go bad, or are made to."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(result) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 512)), len(result) - at)
        match rng.randrange(9):
            case 0:
                if result:
                    result[at % len(result)] ^= 1 << rng.randrange(8)
            case 1:
                del result[at:]
            case 2:
                del result[at : at + size]
            case 3:
                result[at:at] = rng.randbytes(size)
            case 4:
                result[at : at + size] = rng.randbytes(size)
            case 5:  # what lengths and counts look like when they lie
                result[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
            case 6:
                result[at:at] = result[at : at + size] * rng.choice((1, 2, 100))
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                result[at : at + size] = other[start : start + rng.choice((16, 256, 4096))]
            case 8:  # members of a tar archive are blocks of 512 bytes
                start, end = sorted(rng.randrange(len(result) // 512 + 1) * 512 for _ in range(2))
                result[at // 512 * 512 : at // 512 * 512] = result[start:end]
    return bytes(result)


def run(inputs: int, seed: int, console: Console) -> int:
    """Feeds `inputs` mutated files, spread evenly over the readers, and prints what became of them.

    Returns:
        How many crashed a reader or made it hang.
    """
    cases = readers()
    goods = [reader.good for reader in cases.values()]
    table = Table("input", "inputs", *OUTCOMES, "seconds", "MB", title=f"{inputs:,} inputs, seed {seed}")
    bad, smallest = Counter(), {}
    previous = signal.signal(signal.SIGALRM, _raise_hang)
    for name, reader in cases.items():
        count, started, memory = Counter(), time.perf_counter(), _peak_megabytes()
        for number in range(inputs // len(cases)):
            which = f"{seed}/{name}/{number}"
            content = reader.wrap(mutate(reader.good, goods, random.Random(which)))
            outcome, reason = _feed(reader, content)
            count[outcome] += 1
            if outcome in ("crashed", "hung"):
                kind = f"{name} {outcome}: {reason.partition(':')[0]}"
                bad[kind] += 1
                smallest[kind] = min(smallest.get(kind, (content, which, reason)), (content, which, reason), key=_size)
        table.add_row(
            name, *(f"{n:,}" for n in (count.total(), *(count[what] for what in OUTCOMES))),
            f"{time.perf_counter() - started:.0f}", f"+{_peak_megabytes() - memory:.0f}",
        )  # fmt: skip
    signal.signal(signal.SIGALRM, previous)
    console.print(table)
    for kind, (content, which, reason) in smallest.items():
        console.print(f"{bad[kind]} x {kind}. {which}: {reason}\n{content.hex()}", markup=False, soft_wrap=True)
    return bad.total()


def _feed(reader: Reader, content: bytes) -> tuple[str, str]:
    """Feeds one file: what became of it, and why."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.file
        path.write_bytes(content)
        signal.alarm(SECONDS)
        try:
            reader.read(path)
        except REFUSALS as error:
            message = str(error)
            if path.name not in message and "config." not in message:
                return "crashed", f"{type(error).__name__} that names nothing: {message}"
            if not message.replace("\n", "").isprintable():
                return "crashed", f"{type(error).__name__} that is not printable: {message!a}"
            return "refused", message
        except Hang:
            return "hung", ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust code is no Exception
            return "crashed", f"{type(error).__name__}: {error!a}"
        finally:
            signal.alarm(0)
    return "accepted", ""


def _size(example: tuple[bytes, str, str]) -> int:
    return len(example[0])


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _raise_hang(*_) -> None:
    raise Hang


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    sys.exit(run(flags.inputs, flags.seed, Console()) > 0)
