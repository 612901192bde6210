"""The schema of settings: which fields a section has, of which types, and what to say of one that cannot be.

A section is the keyword arguments of one function, so a misspelt field is an error that lists the right ones.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any, get_args, get_origin

MAX_SEED = 2**32 - 1  # random keys are made of 32 bits: larger seeds would repeat others


class ConfigError(ValueError):
    """A config value that cannot be; the message names it and what is allowed."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about a name that is not known: ": did you mean ...?", or "" where no known one is near.

    A dotted name is near those with the same last part, too.
    """
    near = difflib.get_close_matches(name.lower().replace(" ", "_"), known, n=1)
    near += [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
    return f": did you mean {near[0]}?" if near else ""


def choose(section: str, value: str, table: Mapping[str, Any]) -> Any:
    """Looks up a config string.

    Raises:
        ConfigError: the value is not in the table; lists those that are.
    """
    if not isinstance(value, str) or value not in table:
        near = did_you_mean(str(value), table)
        raise ConfigError(f"config.{section} is {value!r}, expected one of {', '.join(table)}{near}")
    return table[value]


def check_fields(function: Callable, section: str, values: Mapping[str, Any], *, given: Collection[str] = ()) -> None:
    """Checks that a config section fills the keyword-only parameters of a function, with values of their types.

    Args:
        function: what the section's fields are the arguments of.
        section: its name, for messages.
        values: the section.
        given: parameters that do not come from the config.

    Raises:
        ConfigError: an unknown or missing field, or a value of another type; names what is right.
    """
    parameters = inspect.signature(function).parameters.items()
    fields = {name: p for name, p in parameters if p.kind is p.KEYWORD_ONLY and name not in given}
    check_known(section, values, fields)
    if missing := [name for name, p in fields.items() if p.default is p.empty and name not in values]:
        raise ConfigError(f"config.{section} lacks {', '.join(missing)}")
    for name, value in values.items():
        check_type(f"{section}.{name}", value, fields[name].annotation)


def check_known(section: str, values: Collection[str], known: Collection[str]) -> None:
    """Raises ConfigError if a section, or with "" the config itself, has a field that is not known."""
    if unknown := sorted(set(values) - set(known)):
        where = f"config.{section}" if section else "config"
        near = did_you_mean(unknown[0], known)
        raise ConfigError(
            f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(known) or 'none'}{near}"
        )


def check_type(name: str, value: Any, expected: type | UnionType) -> None:
    """Raises ConfigError unless a config value has a type such as `int`, `float | None` or `tuple[int, ...]`."""
    if not _has_type(value, expected):
        raise ConfigError(f"config.{name} is {value!r}, expected {inspect.formatannotation(expected)}")


def _has_type(value: Any, expected: type | UnionType) -> bool:
    """Floats are finite, integers have 32 bits and are floats, too, and JSON has made lists of tuples."""
    if isinstance(expected, UnionType):
        return any(_has_type(value, one) for one in get_args(expected))
    if get_origin(expected) is tuple:
        return isinstance(value, tuple | list) and all(_has_type(item, get_args(expected)[0]) for item in value)
    if expected is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if expected is int:
        return type(value) is int and abs(value) < 2**32
    return type(value) is expected


def construct(
    function: Callable, section: str, values: Mapping[str, Any], *, given: Mapping[str, Any] | None = None
) -> Any:
    """Calls a constructor with a config section as keyword arguments, besides what is `given`.

    Raises:
        ConfigError: an unknown or missing field, or a value that the constructor refuses.
    """
    given = given or {}
    check_fields(function, section, values, given=given)
    try:
        return function(**values, **given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{section}: {error}") from error


def check_positive(name: str, value: int) -> None:
    """Raises ConfigError unless a config number is an integer of at least 1."""
    check_type(name, value, int)
    if value < 1:
        raise ConfigError(f"config.{name} is {value}, expected at least 1")


def check_batch_size(name: str, value: int, devices: int) -> None:
    """Raises ConfigError unless a config number is a positive multiple of the number of devices."""
    check_positive(name, value)
    if value % devices:
        raise ConfigError(f"config.{name} {value} cannot be divided among {devices} devices")


def check_counts(prefix: str = "", /, **counts: int | None) -> None:
    """Raises ValueError unless every number that is given is at least 1; the prefix stands before its name."""
    if bad := [f"{prefix}{name} is {n}, expected at least 1" for name, n in counts.items() if n is not None and n < 1]:
        raise ValueError(bad[0])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
