"""Weights in and out: `python -m fooddiff.convert import FILE --workdir=...`, `... export` and `... average`.

Owns the flags. Every subcommand is a function of its parsed flags.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fooddiff import build
from fooddiff.commands import flags as shared
from fooddiff.commands.terminal import session
from fooddiff.convert import averaging, exporting, importing


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand."""
    flags = shared.parse(_parser(), argv)
    with session(distributed=False):
        flags.run(flags)


def import_file(flags: argparse.Namespace) -> None:
    """Makes a workdir from a file of ours or OpenAI's, a folder of diffusers, or an autoencoder (TAESD: two files)."""
    ours = flags.file.suffix == ".safetensors"
    config = None if flags.config is None else shared.load_config(flags.config, flags.overrides)
    if config is not None and build.task_of(config) == "autoencoder":
        if flags.class_names is not None:
            raise ValueError("--class_names is given, but an autoencoder has no classes")
        if flags.decoder is not None:
            importing.import_taesd(flags.file, flags.decoder, flags.workdir, config)
        else:
            importing.import_ldm(flags.file, flags.workdir, config)
    elif flags.decoder is not None:
        raise ValueError("--decoder is for TAESD: expected a config of it, --config=configs/autoencoder.py:taesd")
    elif ours and (flags.config or flags.overrides or flags.class_names):
        raise ValueError(f"{flags.file} brings its own config and class names: leave out --config and --class_names")
    elif ours:
        importing.import_safetensors(flags.file, flags.workdir)
    elif config is None:
        raise ValueError("--config is missing: which model is in it? For instance configs/openai_imagenet64.py")
    else:
        load = importing.import_diffusers if flags.file.is_dir() else importing.import_openai
        load(flags.file, flags.workdir, config, flags.class_names)


def export_file(flags: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to a file or a folder."""
    exporting.export(
        flags.workdir, step=flags.step, weights=flags.weights, out=flags.out, format=flags.format, half=flags.half
    )


def average(flags: argparse.Namespace) -> None:
    """Rebuilds an average of another length from the power averages in a run's checkpoints."""
    averaging.average(flags.workdir, length=flags.length, step=flags.step, out=flags.out, half=flags.half)


def _parser() -> shared.Parser:
    parser = shared.Parser(prog="python -m fooddiff.convert", description="Brings weights in and out.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = subcommands.add_parser(
        "import", help="make a workdir from OpenAI's .pt, our .safetensors, a UNet2DModel of diffusers, an autoencoder"
    )
    command.set_defaults(run=import_file)
    command.add_argument(
        "file", metavar="FILE", type=Path, help="the weights: .safetensors, .pt, .pth, .ckpt, or a folder"
    )
    command.add_argument("--workdir", type=Path, required=True, help="where the run's files go")
    command.add_argument(
        "--config",
        metavar="FILE.py",
        help="of the model in it, unless it is our own .safetensors; --config.field=value changes a field of it",
    )
    command.add_argument("--decoder", metavar="FILE.pth", type=Path, help="of a TAESD; FILE is then its encoder")
    command.add_argument(
        "--class_names", type=Path, help="text file, the name of class 0 in the first line; numbered if not given"
    )

    command = subcommands.add_parser(
        "export", help="write a checkpoint's weights for other programs, with a model card"
    )
    command.set_defaults(run=export_file)
    shared.add_run(command)
    command.add_argument(
        "--out", type=Path, required=True, help="what to write: a .safetensors file, OpenAI's .pt, or a folder"
    )
    command.add_argument(
        "--format",
        choices=exporting.FORMATS,
        help="diffusers or stablehlo for a folder; of a file its suffix says it",
    )
    command.add_argument("--half", action="store_true", help="store a .safetensors file as float16")

    command = subcommands.add_parser(
        "average", help="rebuild an average of any length from the power averages of a run"
    )
    command.set_defaults(run=average)
    command.add_argument("--workdir", type=Path, required=True, help="the run's directory")
    command.add_argument("--length", type=float, required=True, help="as a share of the training, 0.001 to 0.28")
    command.add_argument("--step", type=int, help="up to which checkpoint; the newest if not given")
    command.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    command.add_argument("--half", action="store_true", help="store it as float16")
    return parser
