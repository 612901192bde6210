"""Draws orders one step after the other, so that somebody can look on, or leave."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fooddiff import build
from fooddiff.api import Model
from fooddiff.arrays import Params
from fooddiff.demo.orders import MAX_STEPS, Menu, Order
from fooddiff.runs.load import class_ids
from fooddiff.sample.generate import Stepper, sample_ids
from fooddiff.sample.spec import SamplerSpec

BATCH_SIZES = (16, 4, 1)  # images per device that a program is compiled for
USUAL_STEPS = 50  # where the model's config says none
PREVIEWS = 12  # looks at a batch on its way

LABELS = "label.embedding"  # the class embedding's name among the parameters, [classes or classes + 1, features]


class Look(NamedTuple):
    """Some images of an order between two steps."""

    first: int  # their place among the order's images
    done: int  # steps taken; 0: the first may take long, while its program is compiled
    steps: int  # steps in all
    images: np.ndarray | None  # uint8[n, h, w, 3]: x_0 as it is predicted, and at the end as it is; None: not shown


class Painter:
    """Draws with one model."""

    def __init__(self, model: Model):
        """Takes a class-conditional model.

        Raises:
            ValueError: the model knows no classes.
        """
        if model.trained.model.num_classes is None:
            raise ValueError("this model knows no classes, and the demo is about choosing them: name another --workdir")
        self.model = model
        self._steppers: dict[SamplerSpec, Stepper] = {}
        self.menu = menu_of(model)

    def paint(self, order: Order) -> Iterator[Look]:
        """Draws an order.

        Its images are those of `Model.sample`, up to the rounding of another program.

        Yields:
            After each step where its images are; a caller who asks for no more has stopped the work.
        """
        model = self.model.trained.model
        names, stepper = self.model.class_names, self._stepper(order.spec)
        steps = jax.tree.map(np.asarray, model.steps(order.spec))
        count = len(steps.remaining)
        shown = {round(count * (i + 1) / PREVIEWS) for i in range(PREVIEWS)} | {count}
        wanted = class_ids(names, order.dishes)
        params, key = self.model.trained.params, jax.random.key(order.seed)
        if order.mixes:
            params = mixed(params, wanted, names.index(order.mix), order.share / 100)
        ids = sample_ids(wanted, order.number)
        for first, size in batches(len(ids), self.model.mesh.size):
            chunk = ids[first : first + size]
            padded = np.resize(chunk, (size, 2))
            yield Look(first, 0, count, None)
            descent = stepper.begin(key, padded)
            for i in range(count):
                here = jax.tree.map(lambda field: field[i : i + 1], steps)  # noqa: B023 (called at once)
                descent = stepper.advance(params, key, padded, descent, here, order.spec.guidance)
                done = i + 1
                seen = jax.block_until_ready(descent.x_t if done == count else descent.x_0)
                images = np.asarray(stepper.decode(params, seen))[: len(chunk)] if done in shown else None
                yield Look(first, done, count, images)

    def _stepper(self, spec: SamplerSpec) -> Stepper:
        """The compiled steps of a spec; those that differ only in numbers that the program is handed share them."""
        program = replace(spec, steps=None, spacing="time", guidance=1.0 if spec.guidance == 1 else 2.0)
        if program not in self._steppers:
            self._steppers[program] = build.make_stepwise_sampler(self.model.trained.model, self.model.mesh, spec)
        return self._steppers[program]


def menu_of(model: Model) -> Menu:
    """What a model can draw."""
    trained = model.trained
    usual = build.sampler_spec(trained.config.sample)
    process = trained.model.process
    max_steps = MAX_STEPS if process is None else min(MAX_STEPS, len(process.timesteps))
    usual = replace(usual, steps=min(usual.steps or USUAL_STEPS, max_steps), classifier_scale=0.0)
    return Menu(model.class_names, tuple(build.SAMPLERS), usual, max_steps, trained.model.null_label is not None)


def batches(n: int, devices: int) -> Iterator[tuple[int, int]]:
    """Divides n images into batches of few sizes: (first image, size), of which the last may be more than is left."""
    first, sizes = 0, [size * devices for size in BATCH_SIZES]
    while first < n:
        size = next((size for size in sizes if size <= n - first), sizes[-1])
        yield first, size
        first += size


def mixed(params: Params, dishes: list[int], other: int, share: float) -> Params:
    """The network with other embeddings of some classes: on the straight line from each to that of another class.

    The noise stays that of the class itself, so that a picture changes its dish and not its composition.

    Args:
        params: of a network with a class embedding.
        dishes: the classes to change.
        other: the class they are mixed with.
        share: of the other class, from 0 to 1.
    """
    table = params[LABELS]
    here, there = np.array(dishes), np.array([other])
    return {**params, LABELS: table.at[here].set((1 - share) * table[here] + share * table[there])}
