"""The smallest config and model that still have every part, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from ml_collections import ConfigDict

from configs import digits
from fooddiff.commands import scorer
from fooddiff.settings import flatten


def config(workspace, **overrides) -> ConfigDict:
    """configs/digits.py with four timesteps and one narrow level; overrides are dotted names with __ for dots."""
    config = digits.get_config()
    config.data.cache_dir = str(workspace / "cache")
    config.diffusion.timesteps = 4
    config.model.channel_mult = (1,)
    config.model.attention_resolutions = ()
    config.optimizer.warmup_steps = 0
    config.train.steps = 4
    config.train.batch_size = 4
    config.train.checkpoint_every = 2
    config.sample.every_steps = 4
    config.eval.every_steps = 2
    config.eval.cache_dir = str(workspace / "cache")
    config.sample.steps = None  # every timestep
    config.sample.per_class = 1
    config.sample.batch_size = 4
    config.sample.classes = ("3", "1")
    config.log.every_steps = 2
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def command(config: ConfigDict, workdir) -> list[str]:
    """The command line that trains what `config` makes."""
    changes = [f"--config.{name}={value}" for name, value in flatten(config.to_dict()).items()]
    return ["run_train.py", "--config=configs/digits.py", f"--workdir={workdir}", *changes]


@contextmanager
def small_reference(n: int) -> Iterator[None]:
    """Lets evaluations take the first images of the test split for all of it: features cost more than training."""
    whole = scorer.reference_of

    def first_images(*arguments, **options):
        reference = whole(*arguments, **options)
        return replace(
            reference,
            identity=reference.identity | {"sha256": f"the first {n}"},
            pixels=reference.pixels[:n],
            labels=reference.labels[:n],
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "reference_of", first_images)
        yield
