"""The Python API: `model = fooddiff.load(path)`, `images = model.sample(classes=["pizza"], per_class=8)`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from fooddiff import build, parallel
from fooddiff.runs.load import TrainedModel, check_draws, class_ids, load_trained, make_guide
from fooddiff.sample.generate import Draw, draw_batches, sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import MAX_SEED, check_counts

__all__ = ["Model", "load"]

SHIPPED = Path(__file__).parent / "weights" / "food101_cheap.safetensors"


@dataclass(frozen=True)
class Model:
    """A trained model that draws images."""

    trained: TrainedModel
    mesh: jax.sharding.Mesh
    _compiled: dict[tuple[SamplerSpec, str], Draw] = field(default_factory=dict, repr=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it knows."""
        return self.trained.class_names

    def sample(
        self,
        *,
        classes: Sequence[str] = (),
        per_class: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        sampler: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        guide: "Model | None" = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
    ) -> np.ndarray:
        """Draws images. Image i of a class depends on the seed, the class and i alone.

        Args:
            classes: class names; empty takes all.
            per_class: images of each class.
            seed: of the noise.
            batch_size: images per call of the compiled sampler.
            sampler: and what follows: see `SamplerSpec`; None takes what the model's config says.
            steps: levels of noise along the way.
            spacing: of these levels.
            eta: stochasticity of ddim and heun.
            guidance: scale of guidance; 1 is off.
            guide: a model to move away from, for instance of an early checkpoint; None takes the null label.
            interval: log SNRs between which to guide.
            rescale: share of a guided image's deviation that is brought back.

        Returns:
            uint8[len(classes) * per_class, h, w, 3], class by class.

        Raises:
            ValueError: an unknown class or sampler, a number out of range, or a guide of other images or classes.
        """
        check_counts(per_class=per_class, batch_size=batch_size)
        if isinstance(classes, str):
            raise ValueError(f"classes is {classes!r}, expected a list of names: [{classes!r}]")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}, expected an integer from 0 to {MAX_SEED}")
        changes = dict(
            sampler=sampler, steps=steps, spacing=spacing, eta=eta,
            guidance=guidance, interval=interval, rescale=rescale,
        )  # fmt: skip
        spec = build.sampler_spec(self.trained.config.sample, **changes)
        by = None if guide is None else make_guide(guide.trained, self.trained)
        kind = (spec, "" if by is None else json.dumps(by.identity["recipe"], sort_keys=True))
        if kind not in self._compiled:
            self._compiled[kind] = build.make_sampler(self.trained.model, self.mesh, spec, guide=by and by.model)
        ids = sample_ids(class_ids(self.class_names, tuple(classes) or self.class_names), per_class)
        batch_size = parallel.divisible(min(batch_size, len(ids)), self.mesh)
        params = self.trained.params if by is None else build.GuidedParams(self.trained.params, by.params, None)
        return np.concatenate(list(draw_batches(self._compiled[kind], params, jax.random.key(seed), ids, batch_size)))


def load(path: str | Path | None = None, *, step: int | None = None, weights: str = "ema") -> Model:
    """Loads a model.

    Args:
        path: a run's workdir or a .safetensors file of `python -m fooddiff.convert export` or `... average`; None takes
            the weights that come with the package.
        step: which checkpoint of a workdir; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>" of a workdir.

    Returns:
        The model, on all devices.

    Raises:
        FileNotFoundError: no such workdir, file or checkpoint.
        ValueError: the file is damaged or of another program, there are no such weights, or the model is one for
            super-resolution, which draws nothing by itself.
    """
    path = shipped_weights() if path is None else Path(path)
    mesh = parallel.make_mesh()
    trained = load_trained(path, step=step, weights=weights, mesh=mesh)
    check_draws(trained)
    return Model(trained, mesh)


def shipped_weights() -> Path:
    """The file of weights that comes with the package.

    Raises:
        FileNotFoundError: this version has none.
    """
    if not SHIPPED.is_file():
        raise FileNotFoundError("no weights come with this version: name a workdir or a .safetensors file")
    return SHIPPED
