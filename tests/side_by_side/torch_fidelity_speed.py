"""Images per second of our Inception features over torch-fidelity's: same images, weights and process, alternating.

In an environment with this project's packages, add the peer and run from the project's root:

    pip install torch==2.13.0 && pip install --no-deps torch-fidelity==0.4.0
    python -m tests.side_by_side.torch_fidelity_speed
"""

import importlib.util
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

from fooddiff.eval import inception, resize
from fooddiff.eval.extract import make_extract
from tests.golden_inception import arrays, golden_weights

CASES = (("64", 64, 9), ("2048", 32, 5))  # feature, batch size, repetitions
WARM_UP = 2


def enter_torch_fidelity() -> None:
    """Makes the peer's modules importable without its top level, which needs torchvision."""
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package


def torch_fidelity_extractor(weights: Path, feature: str):
    """Builds the peer's network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", [feature], feature_extractor_weights_path=str(weights))
    return network.eval()


def main() -> None:
    """Prints one line per feature."""
    enter_torch_fidelity()
    weights = golden_weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, path)
        for feature, batch_size, repetitions in CASES:
            images = arrays()["set_a"][:batch_size]
            network = torch_fidelity_extractor(path, feature)
            nchw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
            extract = make_extract(
                inception.fold(weights, (feature,)), (feature,), resize=resize.tf1, batch_size=batch_size
            )

            def theirs(network=network, nchw=nchw):
                with torch.no_grad():
                    return network(nchw)[0].numpy()

            def ours(extract=extract, images=images, feature=feature):
                return next(iter(extract([images])))[feature]

            difference = np.abs(theirs() - ours()).max() / np.abs(theirs()).max()
            seconds = np.array([[timed(theirs), timed(ours)] for _ in range(WARM_UP + repetitions)])[WARM_UP:]
            rates, ratios = batch_size / np.median(seconds, axis=0), seconds[:, 0] / seconds[:, 1]
            print(
                f"{feature} features, batch {batch_size}: torch-fidelity {rates[0]:.1f}, ours {rates[1]:.1f} images/s; "
                f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}, {repetitions} repetitions); "
                f"largest difference {difference:.1e} of the largest entry"
            )


def timed(call) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
