"""Feeds mutated files to every reader: `python -m tests.fuzz --inputs=10000 --seed=0`.

A reader may accept a file, or refuse it with a ValueError or OSError. Anything else is a crash, and more than ten
seconds a hang; both are printed with the seed that repeats them.
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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from fooddiff.commands.workdir import read_config
from fooddiff.convert.torch_zip import write_state_dict
from fooddiff.data import sources
from fooddiff.data.preprocess import to_pixels
from fooddiff.data.sources.source import checked_class_names, open_image
from fooddiff.eval.images import open_images
from fooddiff.eval.stats import Stats, read_stats, write_stats
from fooddiff.eval.weights import load_inception
from fooddiff.model.torch_file import load_state_dict
from fooddiff.train.record import read_scalars
from tests.random_stem import random_stem
from tests.tiny_food101 import jpeg, tiny_food101, write_tar

SECONDS = 10


class Reader(NamedTuple):
    """A reader and a good input."""

    file: str  # what the input is called
    good: bytes
    read: Callable[[Path], object]


class Hang(BaseException):
    """A reader took too long."""


def readers() -> dict[str, Reader]:
    """Every reader of files that a user may have from somebody else."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def written(name: str, write: Callable[[Path], object]) -> bytes:
            write(folder / name)
            return (folder / name).read_bytes()

        arrays = {"a.weight": np.ones((4, 3, 3, 3), np.float32), "b.bias": np.arange(5, dtype=np.float32)}
        statistics = Stats(10, np.zeros(4), np.eye(4))
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
        metrics = "".join(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(1, 9))
        png = io.BytesIO()
        to_image(images[0]).save(png, "PNG")
        return {
            "archive.tar.gz": Reader("food.tar.gz", written("food.tar.gz", _write_archive), _read_archive),
            "archive.tar": Reader("food.tar", written("food.tar", lambda p: _write_archive(p, "w")), _read_archive),
            "JPEG": Reader("image.jpg", jpeg(0), _read_image),
            "PNG": Reader("image.png", png.getvalue(), _read_image),
            "images.npz": Reader(
                "images.npz", written("images.npz", lambda p: np.savez(p, images, np.arange(3))), _read_images
            ),
            "packed images.npz": Reader(
                "images.npz", written("packed.npz", lambda p: np.savez_compressed(p, images)), _read_images
            ),
            "statistics.npz": Reader(
                "stats.npz", written("stats.npz", lambda p: write_stats(p, statistics, {})), read_stats
            ),
            "state dict .pt": Reader(
                "model.pt", written("model.pt", lambda p: write_state_dict(p, arrays)), load_state_dict
            ),
            "Inception .npz": Reader(
                "stem.npz", written("stem.npz", lambda p: np.savez(p, **random_stem())), _read_inception
            ),
            "Inception .safetensors": Reader(
                "stem.safetensors",
                written("stem.safetensors", lambda p: safetensors.numpy.save_file(random_stem(), p)),
                _read_inception,
            ),
            "metrics.jsonl": Reader("metrics.jsonl", metrics.encode(), lambda path: read_scalars(path.parent)),
            "config.json": Reader("config.json", json.dumps({"seed": 1, "data": {"x": [1]}}).encode(), read_config),
            "class names": Reader("classes.txt", b"pizza\nsushi\ncr\xc3\xa8me\n", _read_class_names),
        }


def to_image(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(pixels)


def _write_archive(path: Path, mode: str = "w:gz") -> None:
    write_tar(path, tiny_food101(), mode)


def _read_archive(path: Path) -> None:
    source = sources.archive(path)
    for split in ("train", "test"):
        for _, decode in source.split(split).read():
            to_pixels(decode(), 8)


def _read_image(path: Path) -> None:
    to_pixels(open_image(path.read_bytes()), 8)


def _read_images(path: Path) -> None:
    pixels = open_images(str(path), sources={}, image_size=8, cache_dir=path.parent).pixels
    assert pixels[0 : len(pixels)].dtype == np.uint8


def _read_inception(path: Path) -> None:
    load_inception(path, ("64",), cache_dir=path.parent)


def _read_class_names(path: Path) -> None:
    checked_class_names(path.read_text(encoding="utf-8").splitlines(), path)


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Changes a file in one to three of the ways in which files go bad, or are made to."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(result) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 512)), len(result) - at)
        match rng.randrange(8):
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
    return bytes(result)


def run(inputs: int, seed: int, console: Console) -> int:
    """Feeds `inputs` mutated files, spread evenly over the readers, and prints what became of them.

    Returns:
        How many crashed a reader or made it hang.
    """
    cases = readers()
    goods = [reader.good for reader in cases.values()]
    table = Table("reader", "inputs", "accepted", "refused", "crashed", "hung", title=f"{inputs:,} inputs, seed {seed}")
    bad, started, memory = 0, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _raise_hang)
    for name, reader in cases.items():
        count = Counter()
        for number in range(inputs // len(cases)):
            which = f"{seed}/{name}/{number}"
            count[outcome := _feed(reader, mutate(reader.good, goods, random.Random(which)), console, which)] += 1
            bad += outcome in ("crashed", "hung")
        row = (count.total(), *(count[what] for what in ("accepted", "refused", "crashed", "hung")))
        table.add_row(name, *(f"{number:,}" for number in row))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    table.caption = f"{time.perf_counter() - started:.0f} s, peak memory grew by {grown:.0f} MB"
    console.print(table)
    return bad


def _feed(reader: Reader, content: bytes, console: Console, which: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.file
        path.write_bytes(content)
        signal.alarm(SECONDS)
        try:
            reader.read(path)
        except (ValueError, OSError):
            return "refused"
        except Hang:
            console.print(f"{which} hung")
            return "hung"
        except BaseException as error:
            console.print(f"{which} crashed: {type(error).__name__}: {error}", markup=False)
            return "crashed"
        finally:
            signal.alarm(0)
    return "accepted"


def _raise_hang(*_) -> None:
    raise Hang


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    sys.exit(run(flags.inputs, flags.seed, Console()) > 0)
