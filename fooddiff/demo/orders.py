"""What a visitor asks for, read from a query string that may come from anybody. Owns the limits and what is said."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import MAX_SEED, did_you_mean

MAX_IMAGES = 128  # of one order
MAX_STEPS = 500
MAX_IMAGE_STEPS = 8000  # images times steps of one order, minutes on two CPU cores
MAX_GUIDANCE = 20.0

ALL = "*"  # in the place of a dish: one of each
FIELDS = ("dish", "number", "seed", "sampler", "steps", "guidance", "mix", "share")
NUMBER = 2  # images of each dish, where nothing is said


class OrderError(ValueError):
    """An order that cannot be taken; the message is for the visitor."""


class Menu(NamedTuple):
    """What a model can draw, and how it draws where nothing is said."""

    class_names: tuple[str, ...]
    samplers: tuple[str, ...]
    usual: SamplerSpec  # with a number of steps
    max_steps: int
    guides: bool  # whether guidance other than 1 is possible


@dataclass(frozen=True, kw_only=True)
class Order:
    """A drawing as one value: the same order is the same images."""

    dishes: tuple[str, ...]
    number: int  # images of each dish
    seed: int
    spec: SamplerSpec
    mix: str | None = None  # a dish that each of `dishes` is mixed with
    share: int = 0  # of `mix`, in percent

    @property
    def mixes(self) -> bool:
        """Whether the images are of anything but `dishes`."""
        return self.mix is not None and self.share > 0

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the dishes is to be called in a grid."""
        if not self.mixes:
            return self.dishes
        return tuple(f"{dish}_{100 - self.share}%_{self.mix}_{self.share}%" for dish in self.dishes)


def read_order(query: Iterable[tuple[str, str]], menu: Menu) -> Order:
    """Reads an order.

    Args:
        query: names and values of `FIELDS`; "dish" may be given several times. What is missing is as usual.
        menu: what there is.

    Raises:
        OrderError: an unknown name, a bad number, or more than the limits allow.
    """
    given: dict[str, list[str]] = {}
    for name, value in query:
        given.setdefault(name, []).append(value.strip())
    if unknown := [name for name in given if name not in FIELDS]:
        raise OrderError(f"an order has no {unknown[0]!r}: it has {', '.join(FIELDS)}")
    if repeated := [name for name, values in given.items() if len(values) > 1 and name != "dish"]:
        raise OrderError(f"{repeated[0]!r} is given more than once")
    one = {name: values[0] for name, values in given.items()}

    dishes = _dishes(given.get("dish", [menu.class_names[0]]), menu)
    number = _whole("number", one.get("number", "1" if given.get("dish") == [ALL] else str(NUMBER)), 1, MAX_IMAGES)
    if (images := len(dishes) * number) > MAX_IMAGES:
        raise OrderError(f"{len(dishes)} dishes times {number} is {images} images: at most {MAX_IMAGES} at a time")
    spec = _spec(one, menu)
    if images * spec.steps > MAX_IMAGE_STEPS:
        raise OrderError(
            f"{images} images in {spec.steps} steps is too much at a time: for so many images at most "
            f"{MAX_IMAGE_STEPS // images} steps"
        )
    mix = one.get("mix") or None
    return Order(
        dishes=dishes,
        number=number,
        seed=_whole("seed", one.get("seed", "0"), 0, MAX_SEED),
        spec=spec,
        mix=mix and _known("dish", mix, menu.class_names),
        share=_whole("share", one.get("share", "50" if mix else "0"), 0, 100),
    )


def _dishes(wanted: Sequence[str], menu: Menu) -> tuple[str, ...]:
    if list(wanted) == [ALL]:
        return menu.class_names
    if not any(wanted):
        raise OrderError("choose a dish first")
    return tuple(dict.fromkeys(_known("dish", dish, menu.class_names) for dish in wanted))


def _spec(one: dict[str, str], menu: Menu) -> SamplerSpec:
    usual = menu.usual
    sampler = _known("sampler", one.get("sampler", usual.sampler), menu.samplers)
    guidance = _real("guidance", one.get("guidance", str(usual.guidance)), 0, MAX_GUIDANCE)
    if guidance != 1 and not menu.guides:
        raise OrderError(f"guidance is {guidance:g}, but this model was trained without it: it takes 1 only")
    spec = replace(
        usual,
        sampler=sampler,
        steps=_whole("steps", one.get("steps", str(usual.steps)), 2, menu.max_steps),
        guidance=guidance,
        eta=usual.eta if sampler == usual.sampler else 0.0,  # which other samplers may not have
    )
    return replace(spec, interval=None, rescale=0.0) if guidance == 1 else spec


def _known(what: str, name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    raise OrderError(f"there is no {what} {name[:60]!r}{did_you_mean(name, names)}")


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) <= 20 and low <= int(text) <= high):
        raise OrderError(f"{name} is {text[:60]!r}: expected a whole number from {low} to {high}")
    return int(text)


def _real(name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise OrderError(f"{name} is {text[:60]!r}: expected a number from {low:g} to {high:g}")
    return value


def query_of(order: Order, menu: Menu) -> str:
    """The query string of an order, from which `read_order` reads the same one."""
    dishes = (ALL,) if order.dishes == menu.class_names else order.dishes
    spec = order.spec
    fields = [("dish", dish) for dish in dishes]
    fields += [("number", order.number), ("seed", order.seed), ("sampler", spec.sampler), ("steps", spec.steps)]
    fields += [("guidance", f"{spec.guidance!r}")]
    if order.mix is not None:
        fields += [("mix", order.mix), ("share", order.share)]
    return urlencode(fields, safe=ALL)


def command_of(order: Order, menu: Menu, workdir: Path, *, step: int, weights: str) -> str | None:
    """The command line that draws the same images, or None for a mix, which has none."""
    if order.mixes:
        return None
    spec, usual = order.spec, menu.usual
    classes = [] if order.dishes == menu.class_names else [f"--classes={','.join(order.dishes)}"]
    words = [
        "python", "run_sample.py", f"--workdir={workdir}", f"--step={step}", f"--weights={weights}", *classes,
        f"--per_class={order.number}", f"--seed={order.seed}", f"--sampler={spec.sampler}", f"--steps={spec.steps}",
        f"--guidance={spec.guidance!r}",
    ]  # fmt: skip
    words += [f"--eta={spec.eta!r}"] * (spec.eta != usual.eta)
    words += ["--out=samples"] * workdir.is_file()  # rather than beside the file, which may be the package's
    return shlex.join(words)
