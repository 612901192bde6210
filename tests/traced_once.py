"""Equal configs share their programs: a process traces, lowers and loads each of them once, in whatever test."""

import json
from collections.abc import Callable

import pytest

from fooddiff import build


def remembered(function: Callable, name: Callable[..., object]) -> Callable:
    """The function with a memory: arguments of the same name get the same value."""
    values = {}

    def remembering(*arguments, **options):
        try:
            key = name(*arguments, **options)
        except ArithmeticError:  # a config with numbers that cannot be, as the function is to say
            return function(*arguments, **options)
        if key not in values:
            values[key] = arguments, options, function(*arguments, **options)  # what an id names stays alive
        return values[key][-1]

    return remembering


def of_config(config, *others) -> tuple:
    return json.dumps(config.to_dict(), default=repr), *others


def of_model(config) -> str:
    """Names what models are made of."""
    settings = config.to_dict()
    sections = [settings.get(section) for section in ("model", "diffusion", "codec", "low_res")]
    return json.dumps([sections, settings["data"]["image_size"]], default=repr)


def of_sampler(model, mesh, spec, **others) -> tuple:
    return id(model), mesh, spec, *((kind, id(other)) for kind, other in others.items())


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    with pytest.MonkeyPatch.context() as patch:
        for task, maker in build.TASKS.items():
            patch.setitem(build.TASKS, task, maker._replace(model=remembered(maker.model, of_model)))
        for name, key in {
            "make_training": of_config,
            "make_sampler": of_sampler,
            "make_one_step": lambda model, mesh: (id(model), mesh),
        }.items():
            patch.setattr(build, name, remembered(getattr(build, name), key))
        yield
