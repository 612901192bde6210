"""Runs in an environment with torch-fidelity, never in ours: its numbers for two sets of images.

    python fidelity_scores.py WEIGHTS.pth A.npz B.npz DEEP OUT.npz

The first DEEP images of each set are scored with deep features, all of them with those of 64 dimensions. OUT holds the
numbers and, as "spatial", what the first 7 channels of Mixed_6d's first branch show of A. torchvision, which
torch-fidelity imports for data sets that are not used here, need not be there.
"""

import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import torch

if importlib.util.find_spec("torchvision") is None:

    class Absent(types.ModuleType):
        """A module that has a class for every name."""

        def __getattr__(self, name):
            return type(name, (), {})

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = Absent(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name].__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric


@torch.no_grad()
def score(weights, a, b, deep):
    """All numbers by name."""
    a, b = (torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) for path in (a, b))
    shallow, full = (
        FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=weights).eval()
        for names in (["64"], ["2048", "logits_unbiased"])
    )
    spatial = []
    full.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: spatial.append(out[:, :7]))
    x, y = (shallow(images)[0] for images in (a, b))
    (x_deep, logits), (y_deep, _) = (full(images[:deep]) for images in (a, b))
    found = {"spatial": spatial[0].permute(0, 2, 3, 1).flatten(1).numpy()}
    found["fid"] = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), False)
    found["isc"] = isc_features_to_metric(logits, splits=1, shuffle=False)
    for name, (f, g) in {"64": (x, y), "2048": (x_deep, y_deep)}.items():
        found[f"kid-{name}"] = kid_features_to_metric(f, g, kid_subsets=1, kid_subset_size=len(f), verbose=False)
        found[f"prc-{name}"] = prc_features_to_metric(f, g, verbose=False)
    return {
        f"{name}/{key}" if isinstance(value, dict) else name: number
        for name, value in found.items()
        for key, number in (value.items() if isinstance(value, dict) else [("", value)])
    }


if __name__ == "__main__":
    weights, a, b, deep, out = sys.argv[1:]
    np.savez(out, **score(weights, a, b, int(deep)))
