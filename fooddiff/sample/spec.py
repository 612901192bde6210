"""How images are drawn, as one value: the same in a config, in flags, in records and on the report's page."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A sampler with its settings. `build.make_sampler` checks them."""

    sampler: str = "ancestral"  # or ddim, dpmpp_2m, sde_dpmpp_2m, heun
    steps: int | None = None  # levels along the way; None takes every timestep of a discrete process
    spacing: str = "time"  # of these levels: evenly in time or in log_snr, or karras
    eta: float = 0.0  # stochasticity, from 0 to 1: of ddim the noise, of heun the churn
    guidance: float = 1.0  # scale of guidance, classifier-free or by a guide; 1 is off and costs nothing
    interval: tuple[float, ...] | None = None  # log SNRs (low, high) between which to guide; None: everywhere
    rescale: float = 0.0  # share of the guided x_0's deviation that is brought back, from 0 to 1
    classifier_scale: float = 0.0  # of the gradient of a classifier; 0 is none

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "SamplerSpec":
        """Reads what `to_json` gave, from a file: JSON has lists for tuples."""
        interval = settings.get("interval")
        return cls(**{**settings, "interval": interval and tuple(interval)})

    @property
    def name(self) -> str:
        """A short name for files: the sampler, its steps and whatever is not as usual."""
        changed = [f"{name}{_text(value, 'to')}" for name, value in self._changed()]
        return "_".join([f"{self.sampler}-{'all' if self.steps is None else self.steps}", *changed])

    @property
    def title(self) -> str:
        """The same for a reader."""
        changed = [f"{name.replace('_', ' ')} {_text(value, ' to ')}" for name, value in self._changed()]
        return ", ".join([self.sampler, f"{'all' if self.steps is None else self.steps} steps", *changed])

    def _changed(self) -> list[tuple[str, Any]]:
        return [
            (field.name, value)
            for field in fields(self)
            if field.name not in ("sampler", "steps") and (value := getattr(self, field.name)) != field.default
        ]

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types; without a classifier as they were before there was one, for names hold it."""
        settings = asdict(self)
        if not self.classifier_scale:
            del settings["classifier_scale"]
        return settings


def _text(value: Any, to: str) -> str:
    if isinstance(value, tuple):
        return to.join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
