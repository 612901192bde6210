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
from fooddiff.commands import sweep as sweeping
from fooddiff.commands.signals import graceful_stop, stop_if_asked
from fooddiff.commands.terminal import session
from fooddiff.data.sources import SPLITS
from fooddiff.eval import inception, results
from fooddiff.eval.evaluate import METRICS, Extractor, evaluate, make_extractor, stats_of, stats_provenance
from fooddiff.eval.images import ImageSet, open_images
from fooddiff.eval.stats import write_stats
from fooddiff.eval.weights import BY_HAND, GENUINE_URLS, load_inception
from fooddiff.files.npz import npz_names
from fooddiff.runs.workdir import versions

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand."""
    flags = _parser().parse_args(argv)
    with session(distributed=flags.distributed), graceful_stop() as stop_signal:
        flags.stop_if_asked = partial(stop_if_asked, stop_signal)
        flags.run(flags)


def run(flags: argparse.Namespace) -> None:
    """Scores class-balanced samples of a checkpoint against a reference."""
    scorer.run(
        flags.workdir,
        _scoring(flags, shared.sampling(flags)),
        step=flags.step,
        weights=flags.weights,
        reference=_reference(flags.reference, flags),
        guide=flags.guide,
        guide_step=flags.guide_step,
        classifier=flags.classifier,
    )


def sweep(flags: argparse.Namespace) -> None:
    """Scores a checkpoint under every combination of samplers, steps, guidance and intervals: one table."""
    sweeping.run(
        flags.workdir,
        _scoring(flags, shared.fixed(flags)),
        shared.sweep(flags),
        step=flags.step,
        weights=flags.weights,
        reference=_reference(flags.reference, flags),
        guide=flags.guide,
        guide_step=flags.guide_step,
        classifier=flags.classifier,
    )


def follow(flags: argparse.Namespace) -> None:
    """Scores every new checkpoint of a training that goes on in another process."""
    scorer.follow(
        flags.workdir,
        _scoring(flags, shared.sampling(flags)),
        weights=flags.weights,
        reference=_reference(flags.reference, flags),
        poll_seconds=flags.poll_seconds,
        stop_if_asked=flags.stop_if_asked,
    )


def images(flags: argparse.Namespace) -> None:
    """Scores images A against images or statistics B."""
    extractor = _extractor(flags)
    record = evaluate(
        _open(flags.a, flags),
        _reference(flags.b, flags),
        extractor,
        metrics=tuple(flags.metrics),
        kid_subsets=flags.kid_subsets,
        kid_subset_size=flags.kid_subset_size,
        seed=flags.seed,
        made_by={},
        versions=versions(),
    )
    path = flags.out / f"{record['samples']['name']}-vs-{record['reference']['name']}.json".replace(" ", "-")
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
    (name,) = extractor.names
    found = stats_of(extractor, images, name)
    processes.on_first(lambda: write_stats(flags.out, found, stats_provenance(extractor, images, name)))
    log.info("wrote %s: mu and sigma of feature %s of %s images", flags.out, name, f"{len(images.pixels):,}")


def bpd(flags: argparse.Namespace) -> None:
    """Evaluates the likelihood bound of a trained model on a split of its data and writes one JSON file."""
    likelihood.run(
        flags.workdir,
        step=flags.step,
        weights=flags.weights,
        split=flags.split,
        count=flags.count,
        batch_size=flags.batch_size,
        seed=flags.seed,
        data_path=flags.data_path,
        cache_dir=flags.cache_dir,
        out=flags.out,
        stop_if_asked=flags.stop_if_asked,
    )


def reconstructions(flags: argparse.Namespace) -> None:
    """Scores what an autoencoder makes of images: PSNR, SSIM and distances."""
    autoencoders.run(
        flags.workdir,
        _extractor(flags),
        step=flags.step,
        weights=flags.weights,
        reference=None if flags.reference is None else _open(flags.reference, flags),
        metrics=flags.metrics,
        kid_subsets=flags.kid_subsets,
        kid_subset_size=flags.kid_subset_size,
        seed=flags.seed,
        batch_size=flags.batch_size,
    )


def agreement(flags: argparse.Namespace) -> None:
    """Counts the samples of a checkpoint in which a classifier of real images reads the class asked for."""
    classes.run(
        flags.workdir,
        flags.judge,
        step=flags.step,
        weights=flags.weights,
        sampling=shared.sampling(flags),
        guide=flags.guide,
        guide_step=flags.guide_step,
        classifier=flags.classifier,
        per_class=flags.per_class,
        seed=flags.seed,
        batch_size=flags.batch_size,
        cache_dir=flags.cache_dir,
        stop_if_asked=flags.stop_if_asked,
    )


def _scoring(flags: argparse.Namespace, sampling: Mapping[str, Any]) -> scorer.Scoring:
    return scorer.Scoring(
        extractor=_extractor(flags),
        metrics=tuple(flags.metrics),
        kid_subsets=flags.kid_subsets,
        kid_subset_size=flags.kid_subset_size,
        per_class=flags.per_class,
        sampling=sampling,
        seed=flags.seed,
        batch_size=flags.batch_size,
    )


def _reference(spec: str | None, flags: argparse.Namespace) -> ImageSet | Path | None:
    if spec is None:
        return None
    return Path(spec) if _holds_stats(spec) else _open(spec, flags)


def _extractor(flags: argparse.Namespace) -> Extractor:
    if flags.inception is None:
        raise ValueError(f"no Inception weights are given. To download them: --inception {GENUINE_URLS[0]}\n{BY_HAND}")
    names = tuple(dict.fromkeys(flags.features))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fooddiff.eval", description="Scores models and images.")
    shared.add_distributed(parser)
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "a folder of images, an npz with arr_0, or SOURCE:PATH:SPLIT such as archive:food-101.tar.gz:test"
    features, metrics, scoring = _feature_flags(), _metric_flags(), _scoring_flags(what, shared.add_sampling)

    command = subcommands.add_parser("run", parents=[scoring, metrics, features], help=run.__doc__)
    shared.add_checkpoint(command)
    shared.add_guide(command)
    command.set_defaults(run=run)

    swept = _scoring_flags(what, shared.add_sweep)
    command = subcommands.add_parser("sweep", parents=[swept, metrics, features], help=sweep.__doc__)
    shared.add_checkpoint(command)
    shared.add_guide(command)
    command.set_defaults(run=sweep)

    command = subcommands.add_parser("follow", parents=[scoring, metrics, features], help=follow.__doc__)
    shared.add_run(command)
    command.set_defaults(run=follow)
    command.add_argument("--poll_seconds", type=float, default=30.0, help="between two looks (default: 30)")

    command = subcommands.add_parser("agreement", help=agreement.__doc__)
    shared.add_checkpoint(command)
    command.set_defaults(run=agreement)
    command.add_argument("--judge", type=Path, required=True, help="workdir or file of the classifier that judges")
    command.add_argument(
        "--per_class", type=int, help="samples of each class; as many as the test split has if not given"
    )
    command.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    command.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    command.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/fooddiff").expanduser(), help="what was classified already"
    )
    shared.add_sampling(command)
    shared.add_guide(command)

    command = subcommands.add_parser("images", parents=[metrics, features], help=images.__doc__)
    command.set_defaults(run=images)
    command.add_argument("a", metavar="A", help=what)
    command.add_argument("b", metavar="B", help=f"{what}, or an npz with mu and sigma")
    command.add_argument("--out", type=Path, default=Path("eval"), help="folder of the JSON record (default: eval)")

    command = subcommands.add_parser("compare", help=compare.__doc__)
    command.set_defaults(run=compare)
    command.add_argument("a", metavar="A", type=Path, help="WORKDIR/eval/....json")
    command.add_argument("b", metavar="B", type=Path, help="another, with the same seed and as many samples per class")

    command = subcommands.add_parser("stats", parents=[features], help=stats.__doc__)
    command.set_defaults(run=stats)
    command.add_argument("images", metavar="IMAGES", help=what)
    command.add_argument("out", metavar="OUT.npz", type=Path, help="the file to write")
    command.add_argument("--features", nargs=1, choices=inception.DIMENSIONS, default=["64"], help="default: 64")

    command = subcommands.add_parser("bpd", help=bpd.__doc__)
    shared.add_checkpoint(command)
    command.set_defaults(run=bpd)
    command.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    command.add_argument("--count", type=int, help="images, spread evenly over the classes; all if not given")
    command.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    command.add_argument("--data_path", help="where the data are, if not where the checkpoint's config says")
    command.add_argument("--cache_dir", help="decoded data; the checkpoint's config says where if not given")
    command.add_argument("--out", type=Path, help="the file to write; WORKDIR/eval/bpd_....json if not given")

    command = subcommands.add_parser("reconstructions", parents=[metrics, features], help=reconstructions.__doc__)
    shared.add_checkpoint(command)
    command.set_defaults(run=reconstructions)
    command.add_argument("--reference", help=f"{what}; the test split of the run's data if not given")
    return parser


def _feature_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--inception", metavar="PATH_OR_URL", help="its weights: .pth, .npz, .safetensors or a URL")
    flags.add_argument("--inception_sha256", metavar="HEX", help="what the SHA-256 of the weights must be")
    flags.add_argument("--resize", choices=build.RESIZE, default="tf1", help="how images become 299x299 (default: tf1)")
    flags.add_argument("--batch_size", type=int, default=64, help="images per network call (default: 64)")
    flags.add_argument("--image_size", type=int, default=64, help="pixels to which a SOURCE is brought (default: 64)")
    flags.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/fooddiff").expanduser(), help="features, weights, decoded data"
    )
    return flags


def _metric_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--features", nargs="+", choices=inception.DIMENSIONS, default=["64"], help="default: 64")
    flags.add_argument("--metrics", nargs="+", choices=METRICS, default=["fd"], help="default: fd")
    flags.add_argument("--kid_subsets", type=int, default=100, help="subsets of the kernel distance (default: 100)")
    flags.add_argument("--kid_subset_size", type=int, default=1000, help="their size (default: 1000, or all)")
    flags.add_argument("--seed", type=int, default=0, help="of samples and of those subsets (default: 0)")
    return flags


def _scoring_flags(what: str, add_sampling: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--reference", help=f"{what}, or an npz with mu and sigma; the test split of the run's data if not given"
    )
    flags.add_argument("--per_class", type=int, help="samples of each class; as many as the reference has if not given")
    add_sampling(flags)
    return flags
