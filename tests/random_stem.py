"""Random weights of the network's first three blocks, under their published names."""

import numpy as np

from fooddiff.eval.inception import required_parameters


def random_stem() -> dict[str, np.ndarray]:
    """All that 64 features need: 29,024 numbers."""
    g = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith("conv.weight"):
            return g.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        return g.uniform(0.5, 1.5, size=shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in required_parameters(("64",)).items()}
