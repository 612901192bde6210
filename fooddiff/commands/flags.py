"""Flags that several commands share, and config files among them: `--config=FILE.py --config.field=value`.

All commands use argparse, which knows subcommands; ml_collections reads the config and the changes of its fields.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from fooddiff.sample.spec import SamplerSpec

SWEPT = ("sampler", "steps", "guidance", "interval")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses flags; `--config.field=value` and what follows is left for `load_config` as `overrides`.

    Args:
        parser: made with allow_abbrev=False; knows a flag --config where fields may be changed.
        argv: the arguments; None takes those of this process.
    """
    flags, flags.overrides = parser.parse_known_args(argv)
    if flags.overrides and not ("config" in flags and flags.overrides[0].startswith("--config.")):
        parser.error(
            f"unexpected arguments: {' '.join(flags.overrides)} (a config's fields are written --config.field=value)"
        )
    return flags


def load_config(config: str, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config file.

    Args:
        config: FILE.py or FILE.py:ARGUMENT.
        overrides: each `--config.field=value`.

    Raises:
        ValueError: no such field, a value of another type, or an argument that is none of these.
        OSError: no such file.
    """
    argv = ["fooddiff", f"--config={config}", *overrides]
    values = absl_flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        _, *rest = values(argv)
    except AttributeError as error:
        raise ValueError(f"the config has no such field: {error}") from error
    except absl_flags.Error as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unexpected arguments: {' '.join(rest)} (a config's fields are written --config.field=value)")
    return holder.value


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of a command that several processes can share."""
    parser.add_argument(
        "--distributed", action="store_true", help="this is one of several processes that work together"
    )


def add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the flags that name a run and one of its sets of weights; the run may be left out unless it is required."""
    otherwise = "" if required else "; the weights that come with the package if not given"
    parser.add_argument(
        "--workdir", type=Path, required=required,
        help=f"the run's directory, or a file of weights that was exported{otherwise}",
    )  # fmt: skip
    parser.add_argument(
        "--weights", default="ema", help="raw, ema (the first rate of the config), ema_<rate> or power_<length>"
    )


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the flags that name a run's weights at one step."""
    add_run(parser, required=required)
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `SamplerSpec`."""
    group = parser.add_argument_group("sampling", "as config.sample of the run says where it is not given")
    group.add_argument("--sampler", help="ancestral, ddim, dpmpp_2m, sde_dpmpp_2m or heun")
    group.add_argument("--steps", type=int, help="levels of noise along the way")
    group.add_argument("--guidance", type=float, help="scale of guidance; 1 is off")
    group.add_argument("--interval", type=_numbers, help="log SNRs between which to guide, for instance -4,4")
    _add_fine_points(group)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Adds lists of values of the main fields of `SamplerSpec`, and its other fields."""
    group = parser.add_argument_group(
        "sampling", "every combination; as config.sample of the run says what is not given"
    )
    group.add_argument("--samplers", dest="sampler", type=names, help="for instance ancestral,dpmpp_2m")
    group.add_argument("--step_counts", dest="steps", type=_counts, help="levels of noise, for instance 10,20,50")
    group.add_argument("--guidances", dest="guidance", type=_numbers, help="scales, for instance 1,2,3; 1 is off")
    group.add_argument("--intervals", dest="interval", type=_intervals, help="of log SNRs, for instance all,-4:4")
    _add_fine_points(group)


def _add_fine_points(group: Any) -> None:
    group.add_argument("--spacing", help="of these levels: evenly in time or log_snr, or karras")
    group.add_argument("--eta", type=float, help="stochasticity of ddim and heun, from 0 to 1")
    group.add_argument("--rescale", type=float, help="share of a guided image's deviation that is brought back, 0 to 1")
    group.add_argument("--classifier_scale", type=float, help="scale of the gradient of --classifier; 0 is none")


def add_guide(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name other networks that guide."""
    group = parser.add_argument_group("guides", "other networks that take part, with their averaged weights")
    group.add_argument("--guide", type=Path, help="workdir or file of a model from which --guidance moves away")
    group.add_argument("--guide_step", type=int, help="which checkpoint of that workdir; the newest if not given")
    group.add_argument("--classifier", type=Path, help="workdir or file of a classifier of noisy images")


def sampling(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplerSpec` as they were given; None where they were not."""
    return {field.name: getattr(flags, field.name) for field in fields(SamplerSpec)}


def sweep(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of the lists of `add_sweep`, as fields of `SamplerSpec`."""
    lists = {name: getattr(flags, name) for name in SWEPT if getattr(flags, name) is not None}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def fixed(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplerSpec` that all combinations have in common."""
    return {name: value for name, value in sampling(flags).items() if name not in SWEPT}


def names(text: str) -> list[str]:
    """Splits names at commas."""
    return [name.strip() for name in text.split(",")]


def _counts(text: str) -> list[int]:
    return [int(count) for count in names(text)]


def _intervals(text: str) -> list[tuple[float, ...] | None]:
    return [None if one == "all" else tuple(map(float, one.split(":"))) for one in names(text)]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))
