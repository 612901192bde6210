"""Inception features per second, against torch-fidelity's on images of the same size."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fooddiff.bench.measure import Quantity, interleaved, quantity, ratios, timed
from fooddiff.bench.reference import Peer, started
from fooddiff.eval import inception, resize
from fooddiff.eval.extract import make_extract
from fooddiff.files.torch_zip import write_state_dict

CASES = (("64", 64), ("2048", 32))  # feature, images per call
IMAGE_SIZE = 64


def run(*, repetitions: int, peer: Peer | None) -> dict[str, Quantity]:
    """Times features of random images, which is as much work as those of photographs, with random weights.

    Args:
        repetitions: rounds that count.
        peer: an environment with torch-fidelity, if it is to be compared.

    Returns:
        The numbers by name.
    """
    numbers = {}
    weights = _random_weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        write_state_dict(path, weights)
        for feature, batch_size in CASES:
            images = np.random.default_rng(0).integers(0, 256, (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            params = inception.fold(weights, (feature,))
            extract = make_extract(params, (feature,), resize=resize.tf1, batch_size=batch_size)
            tasks = {"ours": lambda extract=extract, images=images: timed(lambda: list(extract([images])))}
            with ExitStack() as stack:
                if peer is not None:
                    settings = {
                        "task": "inception", "weights": str(path), "feature": feature,
                        "batch_size": batch_size, "image_size": IMAGE_SIZE,
                    }  # fmt: skip
                    tasks["reference"] = stack.enter_context(started(peer, settings))
                seconds = interleaved(tasks, repetitions)
            numbers[f"{feature} features"] = quantity([batch_size / each for each in seconds["ours"]], "images/s")
            if peer is not None:
                numbers[f"{feature} features, torch-fidelity"] = quantity(
                    [batch_size / each for each in seconds["reference"]], "images/s"
                )
                numbers[f"{feature} features, ratio"] = ratios(seconds["ours"], seconds["reference"])
    return numbers


def _random_weights() -> dict[str, np.ndarray]:
    """Everything that the full network has, of a size that keeps features finite."""
    g = np.random.default_rng(0)
    shapes = inception.required_parameters(("2048",)) | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("conv.weight"):
            return g.normal(scale=np.sqrt(2 / np.prod(shape[1:])), size=shape)
        return g.uniform(0.5, 1.5, size=shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
