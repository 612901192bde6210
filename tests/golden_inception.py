"""The golden Inception network: its weights by the recipe of tests/golden/README.md, and its arrays."""

import functools
import json
import zlib

import numpy as np

from tests.golden_cases import GOLDEN


@functools.cache
def manifest():
    return json.loads((GOLDEN / "inception.json").read_text())


@functools.cache
def arrays():
    with np.load(GOLDEN / "inception.npz") as file:
        return dict(file)


@functools.cache
def golden_weights():
    """The recipe of the golden directory's README."""

    def draw(name, shape):
        g = np.random.default_rng([manifest()["seed"], zlib.crc32(name.encode())])
        if name.endswith("conv.weight"):
            return g.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        if name == "fc.weight":
            return g.normal(size=shape) * np.sqrt(1 / shape[1])
        if name.endswith(("bn.weight", "running_var")):
            return g.uniform(0.5, 1.5, size=shape)
        return g.normal(size=shape) * 0.1

    return {name: draw(name, shape).astype(np.float32) for name, shape in manifest()["shapes"].items()}
