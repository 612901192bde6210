"""The evaluator's commands: `python -m fooddiff.eval images A B` and `... stats IMAGES OUT.npz`.

Owns the flags. Every subcommand is a function of its parsed flags.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from fooddiff import build
from fooddiff.commands.terminal import session
from fooddiff.commands.workdir import versions
from fooddiff.eval import inception, resize, results
from fooddiff.eval.evaluate import METRICS, Extractor, evaluate, make_extractor, stats_of, stats_provenance
from fooddiff.eval.images import ImageSet, open_images
from fooddiff.eval.stats import write_stats
from fooddiff.eval.weights import BY_HAND, GENUINE_URLS, load_inception

RESIZE = {rule.__name__: rule for rule in (resize.tf1, resize.half_pixel, resize.clean_bicubic)}

_TABLE_WIDTH = 160  # columns: a row that is folded cannot be pasted


def main(argv: Sequence[str]) -> None:
    """Runs one subcommand."""
    flags = _parser().parse_args(argv)
    with session():
        flags.run(flags)


def images(flags: argparse.Namespace) -> None:
    """Scores the images A against the images or statistics B; prints a table and writes one JSON file."""
    extractor = _extractor(flags)
    samples = _open(flags.a, flags)
    reference = Path(flags.b) if _holds_stats(flags.b) else _open(flags.b, flags)
    record = evaluate(
        samples,
        reference,
        extractor,
        metrics=tuple(flags.metrics),
        kid_subsets=flags.kid_subsets,
        kid_subset_size=flags.kid_subset_size,
        seed=flags.seed,
        made_by={},
        versions=versions(),
    )
    path = flags.out / f"{record['samples']['name']}-vs-{record['reference']['name']}.json".replace(" ", "-")
    results.write_record(path, record)
    results.print_table(record, Console(width=max(Console().width, _TABLE_WIDTH)))
    for result in record["results"]:
        for warning in result["warnings"]:
            Console(stderr=True).print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    print(f"written to {path}")


def stats(flags: argparse.Namespace) -> None:
    """Writes the mean and covariance of one feature of a set of images as an npz with `mu, sigma`."""
    extractor, images = _extractor(flags), _open(flags.images, flags)
    (name,) = extractor.names
    write_stats(flags.out, stats_of(extractor, images, name), stats_provenance(extractor, images, name))
    print(f"mu and sigma of feature {name} of {len(images.pixels):,} images written to {flags.out}")


def _extractor(flags: argparse.Namespace) -> Extractor:
    if flags.weights is None:
        raise ValueError(f"no Inception weights are given. To download them: --weights {GENUINE_URLS[0]}\n{BY_HAND}")
    names = tuple(dict.fromkeys(flags.features))
    weights = load_inception(flags.weights, names, cache_dir=flags.cache_dir, sha256=flags.weights_sha256)
    return make_extractor(
        weights, names, resize=RESIZE[flags.resize], batch_size=flags.batch_size, cache_dir=flags.cache_dir
    )


def _open(spec: str, flags: argparse.Namespace) -> ImageSet:
    return open_images(spec, sources=build.SOURCES, image_size=flags.image_size, cache_dir=flags.cache_dir)


def _holds_stats(spec: str) -> bool:
    if not spec.endswith(".npz") or not Path(spec).is_file():
        return False
    try:
        with np.load(spec, allow_pickle=False) as file:
            return "mu" in file and "arr_0" not in file
    except Exception as error:
        raise ValueError(f"{spec} cannot be read as an npz file: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fooddiff.eval", description="Scores images.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--resize", choices=RESIZE, default="tf1", help="how images become 299x299 (default: tf1)")
    common.add_argument("--weights", metavar="PATH_OR_URL", help="Inception weights: .pth, .npz, .safetensors or a URL")
    common.add_argument("--weights_sha256", metavar="HEX", help="what the SHA-256 of the weights must be")
    common.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    common.add_argument("--image_size", type=int, default=64, help="pixels to which a SOURCE is brought (default: 64)")
    common.add_argument(
        "--cache_dir",
        type=Path,
        default=Path("~/.cache/fooddiff").expanduser(),
        help="features, weights, decoded data",
    )
    what = "a folder of images, an npz with arr_0, or SOURCE:PATH:SPLIT such as archive:food-101.tar.gz:test"

    command = subcommands.add_parser("images", parents=[common], help="score images A against images or statistics B")
    command.set_defaults(run=images)
    command.add_argument("a", metavar="A", help=what)
    command.add_argument("b", metavar="B", help=f"{what}, or an npz with mu and sigma")
    command.add_argument("--features", nargs="+", choices=inception.DIMENSIONS, default=["64"], help="default: 64")
    command.add_argument("--metrics", nargs="+", choices=METRICS, default=["fd"], help="default: fd")
    command.add_argument("--kid_subsets", type=int, default=100, help="subsets of the kernel distance (default: 100)")
    command.add_argument("--kid_subset_size", type=int, default=1000, help="their size (default: 1000, or all)")
    command.add_argument("--seed", type=int, default=0, help="of the draws of those subsets (default: 0)")
    command.add_argument("--out", type=Path, default=Path("eval"), help="folder of the JSON record (default: eval)")

    command = subcommands.add_parser("stats", parents=[common], help="write reference statistics of images")
    command.set_defaults(run=stats)
    command.add_argument("images", metavar="IMAGES", help=what)
    command.add_argument("out", metavar="OUT.npz", type=Path, help="the file to write")
    command.add_argument("--features", nargs=1, choices=inception.DIMENSIONS, default=["64"], help="default: 64")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
