"""The evaluator's commands: `python -m fooddiff.eval images A B`, `... stats IMAGES OUT.npz`, `... bpd --workdir=...`.

Owns the flags. Every subcommand is a function of its parsed flags.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fooddiff import build, processes
from fooddiff.commands import agreement as classes
from fooddiff.commands import flags as shared
from fooddiff.commands import likelihood, scorer
from fooddiff.commands import reconstructions as autoencoders
from fooddiff.commands import superres as upsamplers
from fooddiff.commands import sweep as sweeping
from fooddiff.commands.signals import graceful_stop, stop_if_asked
from fooddiff.commands.terminal import session
from fooddiff.data.sources import SPLITS
from fooddiff.eval import inception, results
from fooddiff.eval.evaluate import METRICS, Extractor, make_extractor, stats_of, stats_provenance
from fooddiff.eval.images import ImageSet, open_images
from fooddiff.eval.stats import write_stats
from fooddiff.eval.weights import BY_HAND, GENUINE_URLS, load_inception
from fooddiff.files.hashes import sha256_of_json
from fooddiff.files.npz import npz_names
from fooddiff.settings import check_counts

log = logging.getLogger(__name__)

CACHE = Path("~/.cache/fooddiff").expanduser()
IMAGES = "a folder of images, an npz with arr_0, or SOURCE:PATH:SPLIT such as archive:food-101.tar.gz:test"

# Flags that become arguments of the same names.
CHECKPOINT = ("step", "weights")
GUIDES = ("guide", "guide_step", "classifier", "upsample")
MEASURES = ("metrics", "kid_subsets", "kid_subset_size", "seed")
COUNTS = ("kid_subsets", "kid_subset_size", "batch_size", "image_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand."""
    flags = shared.parse(_parser(), argv)
    with session(distributed=flags.distributed), graceful_stop() as stop_signal:
        flags.stop_if_asked = partial(stop_if_asked, stop_signal)
        flags.run(flags)


def run(flags: argparse.Namespace) -> None:
    """Scores class-balanced samples of a checkpoint against a reference."""
    scorer.run(
        flags.workdir,
        _scoring(flags, shared.sampling(flags)),
        reference=_reference(flags.reference, flags),
        **_named(flags, *CHECKPOINT, *GUIDES, "data_path"),
    )


def sweep(flags: argparse.Namespace) -> None:
    """Scores a checkpoint under every combination of samplers, steps and guidance: one table."""
    sweeping.run(
        flags.workdir,
        _scoring(flags, shared.fixed(flags)),
        shared.sweep(flags),
        reference=_reference(flags.reference, flags),
        **_named(flags, *CHECKPOINT, *GUIDES, "data_path", "judge"),
    )


def follow(flags: argparse.Namespace) -> None:
    """Scores every new checkpoint of a training that goes on in another process."""
    scorer.follow(
        flags.workdir,
        _scoring(flags, shared.sampling(flags)),
        reference=_reference(flags.reference, flags),
        **_named(flags, "weights", "data_path", "poll_seconds", "stop_if_asked"),
    )


def images(flags: argparse.Namespace) -> None:
    """Scores images A against images or statistics B."""
    record = _measures(flags).evaluate(_open(flags.a, flags), _reference(flags.b, flags), made_by={})
    names = f"{record['samples']['name']}-vs-{record['reference']['name']}".replace(" ", "-")
    how = [record[part]["identity"]["sha256"] for part in ("samples", "reference")]
    how += [record["inception"]["sha256"], record["resize"], flags.features, _named(flags, *MEASURES)]
    path = flags.out / f"{names}_{sha256_of_json(how)[:8]}.json"
    processes.on_first(lambda: results.write_record(path, record))
    scorer.print_record(record)
    log.info("wrote %s", path)


def compare(flags: argparse.Namespace) -> None:
    """Compares two records of samples that came from the same noise, in pairs."""
    a, b = (results.read_record(path) for path in (flags.a, flags.b))
    results.print_differences(a, b, Console(width=max(Console().width, 120)))


def stats(flags: argparse.Namespace) -> None:
    """Writes mean and covariance of one feature of images as an npz with mu and sigma."""
    extractor, images = _extractor(flags), _open(flags.images, flags)
    if len(extractor.names) > 1:
        raise ValueError(f"--features is {','.join(extractor.names)}, expected one: a file holds the statistics of one")
    (name,) = extractor.names
    found = stats_of(extractor, images, name)
    processes.on_first(lambda: write_stats(flags.out, found, stats_provenance(extractor, images, name)))
    log.info("wrote %s: mu and sigma of feature %s of %s images", flags.out, name, f"{len(images.pixels):,}")


def bpd(flags: argparse.Namespace) -> None:
    """Evaluates the likelihood bound of a trained model on a split of its data and writes one JSON file."""
    names = (*CHECKPOINT, "split", "count", "batch_size", "seed", "data_path", "cache_dir", "out", "stop_if_asked")
    likelihood.run(flags.workdir, **_named(flags, *names))


def reconstructions(flags: argparse.Namespace) -> None:
    """Scores what an autoencoder makes of images: PSNR, SSIM and distances."""
    autoencoders.run(
        flags.workdir,
        _measures(flags),
        reference=None if flags.reference is None else _open(flags.reference, flags),
        **_named(flags, *CHECKPOINT, "batch_size"),
    )


def superres(flags: argparse.Namespace) -> None:
    """Scores what a model for super-resolution makes of small test images, and bicubic interpolation."""
    upsamplers.run(
        flags.workdir,
        _measures(flags),
        sampling=shared.sampling(flags),
        **_named(flags, *CHECKPOINT, "data_path", "per_class", "batch_size", "stop_if_asked"),
    )


def agreement(flags: argparse.Namespace) -> None:
    """Counts the samples of a checkpoint in which a classifier of real images reads the class asked for."""
    classes.run(
        flags.workdir,
        flags.judge,
        sampling=shared.sampling(flags),
        **_named(
            flags, *CHECKPOINT, *GUIDES, "data_path", "per_class", "seed", "batch_size", "cache_dir", "stop_if_asked"
        ),
    )


def _scoring(flags: argparse.Namespace, sampling: Mapping[str, Any]) -> scorer.Scoring:
    check_counts("--", **_named(flags, *COUNTS, "per_class"))
    return scorer.Scoring(
        extractor=_extractor(flags), sampling=sampling, **_named(flags, *MEASURES, "per_class", "batch_size")
    )


def _measures(flags: argparse.Namespace) -> scorer.Measures:
    check_counts("--", **_named(flags, *COUNTS))
    return scorer.Measures(extractor=_extractor(flags), **_named(flags, *MEASURES))


def _named(flags: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in names}


def _reference(spec: str | None, flags: argparse.Namespace) -> ImageSet | Path | None:
    if spec is None:
        return None
    return Path(spec) if _holds_stats(spec) else _open(spec, flags)


def _extractor(flags: argparse.Namespace) -> Extractor:
    if flags.inception is None:
        raise ValueError(f"no Inception weights are given. To download them: --inception {GENUINE_URLS[0]}\n{BY_HAND}")
    names = tuple(flags.features)
    weights = load_inception(flags.inception, names, cache_dir=flags.cache_dir, sha256=flags.inception_sha256)
    return make_extractor(
        weights,
        names,
        resize=build.RESIZE[flags.resize],
        batch_size=flags.batch_size,
        cache_dir=flags.cache_dir,
        after_chunk=flags.stop_if_asked,
    )


def _open(spec: str, flags: argparse.Namespace) -> ImageSet:
    return open_images(spec, sources=build.SOURCES, image_size=flags.image_size, cache_dir=flags.cache_dir)


def _holds_stats(spec: str) -> bool:
    if not spec.endswith(".npz") or not Path(spec).is_file():
        return False
    return "mu" in npz_names(Path(spec))


def _parser() -> shared.Parser:
    parser = shared.Parser(prog="python -m fooddiff.eval", description="Scores models and images.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[[argparse.Namespace], None], *adders: Callable[[shared.Parser], None]) -> shared.Parser:
        command = subcommands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        for adder in (shared.add_distributed, *adders):
            adder(command)
        return command

    scores = (_add_metrics, _add_features)
    add(run, shared.add_run, _add_samples, *scores, shared.add_sampling, shared.add_guide)
    command = add(sweep, shared.add_run, _add_samples, *scores, shared.add_sweep, shared.add_guide)
    command.add_argument("--judge", type=Path, help="workdir or file of a classifier of real images: class agreement")

    command = add(follow, partial(shared.add_run, step=False), _add_samples, *scores, shared.add_sampling)
    command.add_argument("--poll_seconds", type=float, default=30.0, help="between two looks (default: 30)")

    command = add(agreement, shared.add_run, shared.add_sampling, shared.add_guide)
    command.add_argument("--judge", type=Path, required=True, help="workdir or file of the classifier that judges")
    _add_data_path(command)
    command.add_argument(
        "--per_class", type=int, help="samples of each class; as many as the test split has if not given"
    )
    command.add_argument("--seed", type=shared.seed, default=0, help="of the samples (default: 0)")
    command.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    command.add_argument("--cache_dir", type=Path, default=CACHE, help="what was classified already")

    command = add(images, *scores)
    command.add_argument("a", metavar="A", help=IMAGES)
    command.add_argument("b", metavar="B", help=f"{IMAGES}, or an npz with mu and sigma")
    command.add_argument("--out", type=Path, default=Path("eval"), help="folder of the JSON record (default: eval)")

    command = add(compare)
    command.add_argument("a", metavar="A", type=Path, help="WORKDIR/eval/....json")
    command.add_argument("b", metavar="B", type=Path, help="another, with the same seed and as many samples per class")

    command = add(stats, _add_features)
    command.add_argument("images", metavar="IMAGES", help=IMAGES)
    command.add_argument("out", metavar="OUT.npz", type=Path, help="the file to write")

    command = add(bpd, shared.add_run)
    command.add_argument("--split", choices=SPLITS, default="test", help="train or test (default: test)")
    command.add_argument("--count", type=int, help="images, spread evenly over the classes; all if not given")
    command.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    command.add_argument("--seed", type=shared.seed, default=0, help="of the noise (default: 0)")
    _add_data_path(command)
    command.add_argument("--cache_dir", help="decoded data; the checkpoint's config says where if not given")
    command.add_argument("--out", type=Path, help="the file to write; WORKDIR/eval/bpd_....json if not given")

    command = add(reconstructions, shared.add_run, *scores)
    command.add_argument("--reference", help=f"{IMAGES}; the test split of the run's data if not given")

    command = add(superres, shared.add_run, *scores, shared.add_sampling)
    _add_data_path(command)
    command.add_argument("--per_class", type=int, help="test images of each class, the first ones; all if not given")
    return parser


def _add_samples(parser: shared.Parser) -> None:
    group = parser.add_argument_group("samples")
    group.add_argument("--per_class", type=int, help="samples of each class; as many as the reference has if not given")
    group.add_argument(
        "--reference", help=f"{IMAGES}, or an npz with mu and sigma; the test split of the run's data if not given"
    )
    _add_data_path(group)


def _add_data_path(parser: Any) -> None:
    parser.add_argument("--data_path", help="where the run's data are, if not where its config says")


def _add_metrics(parser: shared.Parser) -> None:
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--metrics", type=shared.some_of(METRICS), default=["fd"], help=f"of {','.join(METRICS)} (default: fd)"
    )
    group.add_argument("--kid_subsets", type=int, default=100, help="subsets of the kernel distance (default: 100)")
    group.add_argument("--kid_subset_size", type=int, default=1000, help="their size (default: 1000, or all)")
    group.add_argument("--seed", type=shared.seed, default=0, help="of samples and of those subsets (default: 0)")


def _add_features(parser: shared.Parser) -> None:
    group = parser.add_argument_group("features", "of the Inception network")
    group.add_argument("--inception", metavar="PATH_OR_URL", help="its weights: .pth, .npz, .safetensors or a URL")
    group.add_argument("--inception_sha256", metavar="HEX", help="what the SHA-256 of the weights must be")
    group.add_argument(
        "--features", type=shared.some_of(inception.DIMENSIONS), default=["64"],
        help=f"of {','.join(inception.DIMENSIONS)} (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--resize", metavar="RULE", choices=build.RESIZE, default="tf1",
        help=f"how images become 299x299: {', '.join(build.RESIZE)} (default: tf1)",
    )  # fmt: skip
    group.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    group.add_argument("--image_size", type=int, default=64, help="pixels to which a SOURCE is brought (default: 64)")
    group.add_argument("--cache_dir", type=Path, default=CACHE, help="features, weights, decoded data")
