"""Class-conditional image generation with diffusion models on Food-101 at 64x64, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fooddiff.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """Imports the API, and JAX with it, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fooddiff import api

    return getattr(api, name)
