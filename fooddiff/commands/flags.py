"""Flags that several commands share, and config files among them: `--config=FILE.py --config.field=value`.

All commands use argparse, which knows subcommands; ml_collections reads the changes of a config's fields.
"""

import argparse
import importlib.util
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import MAX_SEED, did_you_mean, flatten

SWEPT = ("sampler", "steps", "guidance", "interval", "classifier_scale")


class _Help(argparse.HelpFormatter):
    """Help whose first line has only what a command cannot do without."""

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        shown = [action for action in actions if action.required]
        if prefix is None:  # it is "" where argparse asks for the name of a subcommand
            shown.append(argparse.Action([], "flags", metavar="[--flag=value ...]"))
        super().add_usage(usage, shown, [], prefix)


class Parser(argparse.ArgumentParser):
    """argparse with short help and short errors that name what was probably meant; subcommands are of this class, too.

    Flags are written out. `--config.field=value` is left over where there is a flag --config.
    """

    def __init__(self, **kwargs: Any):
        """Takes what argparse does."""
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Parses flags; a subcommand's are parsed by this method of its own."""
        flags, rest = super().parse_known_args(args, namespace)
        overrides = [one for one in rest if one.startswith("--config.")] if "config" in flags else []
        strange = [one for one in rest if one.startswith("--") and one not in overrides]
        if rest and rest[0] not in overrides:
            strange.append(rest[0])
        for argument in strange:
            name = argument.partition("=")[0]
            if not name.startswith("-"):
                self.error(f"unexpected argument {argument!r}")
            self.error(f"no flag {name}{did_you_mean(name, self._option_string_actions)}")
        return flags, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = did_you_mean(str(value), action.choices)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(action.choices)}{near}")

    def error(self, message: str) -> NoReturn:
        """Ends the command with one line and status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help lists all)\n")


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses flags; every `--config.field=value` is left for `load_config` as `overrides`.

    The home folder may be written as ~ after an equals sign, too, where shells leave it as it is.

    Args:
        parser: knows a flag --config where fields may be changed.
        argv: the arguments; None takes those of this process.
    """
    given = sys.argv[1:] if argv is None else argv
    home = [re.sub(r"^(--[^=]+=)~(?=/|$)", lambda flag: flag[1] + str(Path.home()), one) for one in given]
    flags, flags.overrides = parser.parse_known_args(home)
    return flags


def load_config(config: str, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config file, which may import its neighbours as `from configs import ...`.

    Args:
        config: FILE.py or FILE.py:ARGUMENT.
        overrides: each `--config.field=value`, or in two parts. `=None` is nothing, of which `build` says where it may
            stand, and never a text.

    Raises:
        ValueError: no such field, a value of another type, or an argument that the file refuses.
        OSError: no such file.
    """
    file, colon, argument = config.partition(":")
    get_config = _get_config(Path(file))
    if colon and not inspect.signature(get_config).parameters:
        raise ValueError(f"{file} takes no argument, got {argument!r} after the colon")
    made = get_config(argument) if colon else get_config()
    known = flatten(made.to_dict())
    for override in overrides:
        if not (named := re.match(r"--config\.([^=[]*)", override)):
            continue  # a value that stands after its flag
        name = named[1]
        if name not in known and not any(field.startswith(f"{name}.") for field in known):
            near = did_you_mean(name, known)
            raise ValueError(f"the config has no field {name}{near} (run_train.py --helpconfig lists all)")
    emptied = [f"--config.{name}=None" for name in known if f"--config.{name}=None" in overrides]
    argv = ["fooddiff", *(override for override in overrides if override not in emptied)]
    values = absl_flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict("config", made, flag_values=values, sys_argv=argv)
        _, *rest = values(argv)
    except absl_flags.Error as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unexpected arguments: {' '.join(rest)} (a config's fields are written --config.field=value)")
    holder.value.update_from_flattened_dict(
        {override.removeprefix("--config.").removesuffix("=None"): None for override in emptied}
    )
    return holder.value


def _get_config(path: Path) -> Callable[..., ConfigDict]:
    """The function of that name in a file."""
    if not path.is_file():
        near = did_you_mean(str(path), [str(other) for other in path.parent.glob("*.py")])
        raise FileNotFoundError(f"no config file {path}{near}")
    if path.suffix != ".py":
        raise ValueError(f"{path} is no config file, which is Python such as configs/hybrid.py")
    spec = importlib.util.spec_from_file_location("the_config", path)
    module = importlib.util.module_from_spec(spec)
    with _importable(path.resolve().parent.parent):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config, so it is no config file")
    return module.get_config


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def print_fields(config: ConfigDict) -> None:
    """Prints every field of a config as the flag that sets it."""
    for name, value in flatten(config.to_dict()).items():
        print(f"--config.{name}={value}")


def add_distributed(parser: Parser) -> None:
    """Adds the flag of a command that several processes can share."""
    parser.add_argument(
        "--distributed", action="store_true", help="this is one of several processes that work together"
    )


def add_run(parser: Parser, *, required: bool = True, step: bool = True) -> None:
    """Adds the flags that name weights.

    Args:
        parser: of a command.
        required: without, the run may be left out.
        step: without, the command chooses the checkpoint itself.
    """
    otherwise = "" if required else "; the weights that come with the package if not given"
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workdir", type=Path, required=required, help=f"its directory, or an exported file of weights{otherwise}"
    )
    if step:
        group.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    group.add_argument(
        "--weights", default="ema", help="raw, ema (the first rate of the config), ema_<rate> or power_<length>"
    )


def add_sampling(parser: Parser) -> None:
    """Adds the fields of `SamplerSpec`."""
    group = parser.add_argument_group("sampling", "as config.sample of the run says where it is not given")
    group.add_argument("--sampler", help="ancestral, ddim, dpmpp_2m, sde_dpmpp_2m or heun")
    group.add_argument("--steps", type=int, help="levels of noise along the way")
    group.add_argument("--guidance", type=float, help="scale of guidance; 1 is off")
    group.add_argument("--interval", type=_interval, help="log SNRs between which to guide, for instance -4,4")
    group.add_argument("--classifier_scale", type=float, help="scale of the gradient of --classifier; 0 is none")
    _add_fine_points(group)


def add_sweep(parser: Parser) -> None:
    """Adds lists of values of the main fields of `SamplerSpec`, and its other fields."""
    group = parser.add_argument_group(
        "sampling", "every combination; as config.sample of the run says what is not given"
    )
    group.add_argument("--samplers", dest="sampler", type=names, help="for instance ancestral,dpmpp_2m")
    group.add_argument("--step_counts", dest="steps", type=_counts, help="levels of noise, for instance 10,20,50")
    group.add_argument("--guidances", dest="guidance", type=_numbers, help="scales, for instance 1,2,3; 1 is off")
    group.add_argument("--intervals", dest="interval", type=_intervals, help="of log SNRs, for instance all,-4:4")
    group.add_argument(
        "--classifier_scales", dest="classifier_scale", type=_numbers,
        help="of the gradient of --classifier, for instance 0,1,2; 0 is none",
    )  # fmt: skip
    _add_fine_points(group)


def _add_fine_points(group: Any) -> None:
    group.add_argument("--spacing", help="of these levels: evenly in time or log_snr, or karras")
    group.add_argument("--eta", type=float, help="stochasticity of ddim and heun, from 0 to 1")
    group.add_argument("--rescale", type=float, help="share of a guided image's deviation that is brought back, 0 to 1")


def add_guide(parser: Parser) -> None:
    """Adds the flags that name other networks that guide, or enlarge what is drawn."""
    group = parser.add_argument_group("other networks", "that take part, with their averaged weights")
    group.add_argument("--guide", type=Path, help="workdir or file of a model from which --guidance moves away")
    group.add_argument("--guide_step", type=int, help="which checkpoint of that workdir; the newest if not given")
    group.add_argument("--classifier", type=Path, help="workdir or file of a classifier of noisy images")
    group.add_argument("--upsample", type=Path, help="workdir or file of a model for super-resolution: a cascade")


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


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of a few names, with commas."""

    def read(text: str) -> list[str]:
        found = list(dict.fromkeys(names(text)))
        for name in found:
            if name not in known:
                near = did_you_mean(name, known)
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}{near}")
        return found

    return read


def seed(text: str) -> int:
    """The type of a flag that takes what random keys are made from, an integer from 0 to `MAX_SEED`."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to {MAX_SEED}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [int(count) for count in names(text)]


def _intervals(text: str) -> list[tuple[float, ...] | None]:
    return [None if one == "all" else _interval(one.replace(":", ",")) for one in names(text)]


def _interval(text: str) -> tuple[float, ...]:
    try:
        low, high = map(float, text.split(","))
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no interval, expected LOW,HIGH (or LOW:HIGH in a list)")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,3") from None
