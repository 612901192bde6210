"""Weights in and out: `python -m fooddiff.convert import FILE --workdir=...` and `... export --workdir=... --out=...`.

Owns the flags. Every subcommand is a function of its parsed flags.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from fooddiff.commands.terminal import session
from fooddiff.convert import exporting, importing


def main(argv: Sequence[str]) -> None:
    """Runs one subcommand."""
    parser = _parser()
    flags, overrides = parser.parse_known_args(argv)
    flags.overrides = [argument for argument in overrides if argument.startswith("--config.") and "config" in flags]
    if unknown := [argument for argument in overrides if argument not in flags.overrides]:
        parser.error(f"unexpected arguments: {' '.join(unknown)} (a config's fields are written --config.field=value)")
    with session(distributed=False):
        flags.run(flags)


def import_file(flags: argparse.Namespace) -> None:
    """Makes a workdir from a `.pt` file of OpenAI's or from a `.safetensors` file of our own."""
    if flags.file.suffix != ".safetensors":
        config = load_config(flags.config, flags.overrides)
        importing.import_openai(flags.file, flags.workdir, config, flags.class_names)
    elif flags.config or flags.overrides or flags.class_names:
        raise ValueError(f"{flags.file} brings its own config and class names: leave out --config and --class_names")
    else:
        importing.import_safetensors(flags.file, flags.workdir)


def export_file(flags: argparse.Namespace) -> None:
    """Writes a checkpoint's weights to a file."""
    exporting.export(flags.workdir, step=flags.step, weights=flags.weights, out=flags.out, half=flags.half)


def load_config(config: str | None, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config file as run_train.py does.

    Args:
        config: FILE.py or FILE.py:ARGUMENT.
        overrides: each `--config.field=value`.

    Raises:
        ValueError: there is no config, no such field, or a value of another type.
        OSError: no such file.
    """
    if config is None:
        raise ValueError("--config is missing: which model is in the file? For instance configs/openai_imagenet64.py")
    argv = ["convert", f"--config={config}", *overrides]
    values = absl_flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except AttributeError as error:
        raise ValueError(f"the config has no such field: {error}") from error
    except absl_flags.Error as error:
        raise ValueError(str(error)) from error
    return holder.value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fooddiff.convert", description="Brings weights in and out.", allow_abbrev=False
    )
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = subcommands.add_parser(
        "import",
        help="make a workdir from OpenAI's .pt or from an exported .safetensors",
        allow_abbrev=False,
    )
    command.set_defaults(run=import_file)
    command.add_argument("file", metavar="FILE", type=Path, help="the weights: .safetensors, else OpenAI's .pt")
    command.add_argument("--workdir", type=Path, required=True, help="where the run's files go")
    command.add_argument(
        "--config", metavar="FILE.py", help="of the model in a .pt; --config.field=value changes a field of it"
    )
    command.add_argument(
        "--class_names", type=Path, help="text file, the name of class 0 in the first line; numbered if not given"
    )

    command = subcommands.add_parser("export", help="write a checkpoint's weights to one file", allow_abbrev=False)
    command.set_defaults(run=export_file)
    command.add_argument("--workdir", type=Path, required=True, help="the run's directory")
    command.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    command.add_argument("--weights", default="ema", help="raw, ema (the first rate of the config) or ema_<rate>")
    command.add_argument("--out", type=Path, required=True, help="the file to write: .safetensors, or OpenAI's .pt")
    command.add_argument("--half", action="store_true", help="store a .safetensors file as float16")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
