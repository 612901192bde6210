"""The flags of `run_train.py` and `run_sample.py`. What a misspelt flag gets is said before JAX is imported."""

from collections.abc import Sequence
from pathlib import Path

from fooddiff.commands import flags as shared
from fooddiff.commands import terminal


def train(argv: Sequence[str] | None = None) -> None:
    """Trains a config."""
    parser = shared.Parser(description="Trains a model. The same command resumes a run that was interrupted.")
    parser.add_argument(
        "--config", required=True, metavar="FILE.py",
        help="for instance configs/digits.py; --config.field=value changes a field of it",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, help="where the run's files go")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters, FLOP, memory and the data plan, time steps, and stop",
    )
    parser.add_argument("--helpconfig", action="store_true", help="print all fields of the config, and stop")
    shared.add_distributed(parser)
    flags = shared.parse(parser, argv)
    with terminal.plain_errors():
        config = shared.load_config(flags.config, flags.overrides)
        if flags.helpconfig:
            shared.print_fields(config)
            return
        if flags.workdir is None and not flags.dry_run:
            raise ValueError("--workdir is missing: where should the run's files go? For instance --workdir=runs/first")
    with terminal.session(distributed=flags.distributed):
        from fooddiff.commands import dry_run, train

        if flags.dry_run:
            dry_run.run(config)
        else:
            train.run(config, flags.workdir)


def sample(argv: Sequence[str] | None = None) -> None:
    """Samples from a trained run, or with the weights that come with the package."""
    parser = shared.Parser(description="Samples images from a trained run.")
    shared.add_distributed(parser)
    shared.add_run(parser, required=False)
    images = parser.add_argument_group("images")
    images.add_argument("--classes", type=shared.names, default=[], help="class names with commas; all if not given")
    images.add_argument("--per_class", type=int, default=8, help="images per class (default: 8)")
    images.add_argument(
        "--seed", type=shared.seed, default=0, help="image i of a class depends on (seed, class, i) only"
    )
    images.add_argument("--batch_size", type=int, default=64, help="images per call of the compiled sampler")
    images.add_argument("--single_files", action="store_true", help="also write every image as a PNG of its own")
    images.add_argument("--out", type=Path, help="where the files go; samples of the workdir if not given")
    shared.add_sampling(parser)
    shared.add_guide(parser)
    flags = shared.parse(parser, argv)
    with terminal.session(distributed=flags.distributed):
        from fooddiff.api import shipped_weights
        from fooddiff.commands import sample

        shipped = flags.workdir is None
        sample.run(
            shipped_weights() if shipped else flags.workdir,
            step=flags.step,
            weights=flags.weights,
            classes=flags.classes,
            per_class=flags.per_class,
            spec=shared.sampling(flags),
            guide=flags.guide,
            guide_step=flags.guide_step,
            classifier=flags.classifier,
            upsample=flags.upsample,
            seed=flags.seed,
            batch_size=flags.batch_size,
            single_files=flags.single_files,
            out=Path("samples") if shipped and flags.out is None else flags.out,
        )
