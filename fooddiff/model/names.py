"""What the converters of other programs' state dicts have in common."""

from collections.abc import Callable, Mapping

import numpy as np

from fooddiff.arrays import Params


def check_fit(state_dict: Mapping[str, np.ndarray], export: Callable[[Params], Mapping[str, np.ndarray]], like: Params):
    """Refuses a state dict whose names and shapes are not those that our parameters get there.

    Args:
        state_dict: arrays by the other program's names.
        export: our parameters -> arrays by these names.
        like: our parameters, or their shapes (`abstract_params`).

    Raises:
        ValueError: the file is of another architecture; names the first tensors that do not fit.
    """
    weightless = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in like.items()}
    expected = {name: value.shape for name, value in export(weightless).items()}
    found = {name: value.shape for name, value in state_dict.items()}
    if problems := misfits(expected, found, "the file"):
        raise ValueError(f"the checkpoint is of another architecture: {problems}")


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> str:
    """How many of the shapes that were found somewhere are not as expected, and the first of them; "" if all are."""
    problems = [
        f"{name}: the model has {expected.get(name, 'none')}, {where} has {found.get(name, 'none')}"
        for name in expected | found
        if expected.get(name) != found.get(name)
    ]
    return "\n  ".join([f"{len(problems)} tensors do not fit, first", *problems[:5]]) if problems else ""
