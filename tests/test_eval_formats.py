"""Formats and numbers of other evaluators: guided-diffusion's references and names, torch-fidelity side by side."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from fooddiff.commands.eval import main
from fooddiff.eval import inception, resize
from fooddiff.eval.distances import frechet_distance, inception_score
from fooddiff.eval.evaluate import Extractor, evaluate
from fooddiff.eval.images import open_images
from fooddiff.eval.stats import Stats
from fooddiff.eval.weights import InceptionWeights, metric_name
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.xla import jit
from tests.golden_inception import golden_weights

PYTHON = os.environ.get("FOODDIFF_REFERENCE_PYTHON")
PEER = Path(__file__).parent / "peers" / "fidelity_scores.py"
GENUINE = InceptionWeights({}, "inception", "6726825d", True)


def fake(names, tmp_path):
    """An extractor whose features are single pixels, so that it costs nothing."""

    def extract(batches):
        for batch in batches:
            flat = batch.reshape(len(batch), -1).astype(np.float32) / 255
            yield {name: flat[:, i : i + 4] for i, name in enumerate(names)}

    return Extractor(
        weights=GENUINE, names=names, resize="tf1", extract=extract, cache_dir=tmp_path, after_chunk=lambda: None
    )


def pictures(n, seed, size=8):
    """Smooth pictures, so that features of different seeds differ."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, size // 4, size // 4, 3)) * (0.9 + 0.1 * seed)
    return np.repeat(np.repeat(np.clip(coarse, 0, 255), 4, 1), 4, 2).astype(np.uint8)


def score(samples, reference, names, metrics, tmp_path):
    opened = open_images(str(samples), sources={}, image_size=8, cache_dir=tmp_path)
    return evaluate(
        opened, reference, fake(names, tmp_path), metrics=metrics, kid_subsets=2, kid_subset_size=5, seed=0, made_by={},
        versions={},
    )["results"]  # fmt: skip


@pytest.fixture
def reference(tmp_path):
    """An npz as guided-diffusion publishes them: statistics of one set, and images that may be of another."""
    rng = np.random.default_rng(1)
    stats = [Stats(None, rng.normal(size=4), np.cov(rng.normal(size=(4, 9)))) for _ in range(2)]
    (mu, sigma), (mu_s, sigma_s) = ((each.mean, each.cov) for each in stats)
    np.savez(tmp_path / "ref.npz", arr_0=pictures(20, 1), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(tmp_path / "ours.npz", pictures(30, 0), np.arange(30))
    return stats


def test_a_reference_of_guided_diffusion_gives_its_five_numbers(reference, tmp_path):
    names = ("2048", "spatial", "logits_unbiased")
    results = score(tmp_path / "ours.npz", tmp_path / "ref.npz", names, ("fd", "pr", "is"), tmp_path)
    numbers = {result["metric"]: result["value"] for result in results}
    assert list(numbers) == ["FID-2048", "Precision-2048", "Recall-2048", "sFID", "sPrecision", "sRecall", "IS"]
    flat = pictures(30, 0).reshape(30, -1).astype(np.float32) / 255
    for name, start, stats in (("FID-2048", 0, reference[0]), ("sFID", 1, reference[1])):
        part = np.asarray(flat[:, start : start + 4], np.float64)
        ours = Stats(30, part.mean(axis=0), np.cov(part.T))
        assert numbers[name] == pytest.approx(frechet_distance(ours, stats), rel=1e-6)


def test_statistics_without_images_serve_fd_alone(reference, tmp_path):
    np.savez(tmp_path / "alone.npz", mu=reference[0].mean, sigma=reference[0].cov)
    assert score(tmp_path / "ours.npz", tmp_path / "alone.npz", ("2048",), ("fd",), tmp_path)
    with pytest.raises(ValueError, match="only fd"):
        score(tmp_path / "ours.npz", tmp_path / "alone.npz", ("2048",), ("fd", "pr"), tmp_path)


@pytest.mark.parametrize(
    ("names", "metrics", "message"),
    [
        (("2048",), ("is",), "belong together"),
        (("logits",), ("fd",), "belong together"),
        (("2048", "logits"), ("is",), "other features than logits"),
        (("logits",), ("fd", "is"), "other features than logits"),
    ],
)
def test_metrics_and_features_must_fit(reference, tmp_path, names, metrics, message):
    with pytest.raises(ValueError, match=message):
        score(tmp_path / "ours.npz", tmp_path / "ref.npz", names, metrics, tmp_path)


def test_inception_score_counts_classes_that_are_equally_frequent():
    certain = np.repeat(np.eye(5), 4, axis=0) * 1e3
    assert inception_score(certain).value == pytest.approx(5)
    assert inception_score(np.zeros((6, 5))).value == pytest.approx(1)
    halves = inception_score(certain, split=8)
    assert (halves.value, halves.error) == (pytest.approx((2 + 2 + 1) / 3), pytest.approx(np.std([2, 2, 1])))


def test_names_say_which_weights():
    other = GENUINE._replace(genuine=False)
    assert metric_name("FD", "spatial", GENUINE) == "sFID"
    assert metric_name("FD", "spatial", other) == "sFD[inception 6726825d]"
    assert metric_name("IS", "logits_unbiased", other) == "IS[inception 6726825d]"
    assert metric_name("IS", "logits", GENUINE) == "IS-logits"


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON is None, reason="FOODDIFF_REFERENCE_PYTHON names no Python of an environment with torch-fidelity"
)
def test_torch_fidelity_gives_the_same_numbers(tmp_path):
    deep = 12
    write_state_dict(tmp_path / "random.pth", golden_weights())
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", pictures(70, seed, 32))
        np.savez(tmp_path / f"{name}_deep.npz", pictures(70, seed, 32)[:deep])
    files = [tmp_path / name for name in ("random.pth", "a.npz", "b.npz")]
    subprocess.run(
        [PYTHON, PEER, *files, str(deep), tmp_path / "theirs.npz"],
        check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    theirs, ours = dict(np.load(tmp_path / "theirs.npz")), {}
    common = [
        f"--inception={tmp_path / 'random.pth'}",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--out={tmp_path / 'out'}",
    ]
    for which, features, metrics in (
        ("", "64", "fd,kd,pr"),
        ("_deep", "2048,logits_unbiased", "kd,pr,is"),
    ):
        sets = [str(tmp_path / f"{name}{which}.npz") for name in "ab"]
        main(["images", *sets, "--batch_size=12", *common, f"--features={features}", f"--metrics={metrics}"])
        (path,) = (tmp_path / "out").glob(f"a{which}-vs-b{which}_*.json")
        record = json.loads(path.read_text())
        whole = [result for result in record["results"] if "subsets" not in result["metric"]]
        ours |= {result["metric"].split("[")[0]: result["value"] for result in whole}
    named = {
        "FD-64": "fid/frechet_inception_distance",
        "IS": "isc/inception_score_mean",
        **{f"KD-{d}": f"kid-{d}/kernel_inception_distance_mean" for d in (64, 2048)},
        **{f"Precision-{d}": f"prc-{d}/precision" for d in (64, 2048)},
        **{f"Recall-{d}": f"prc-{d}/recall" for d in (64, 2048)},
    }
    for metric, name in named.items():
        print(f"{metric}: ours {ours[metric]:.7g}, torch-fidelity {float(theirs[name]):.7g}")
    for metric, name in named.items():
        assert ours[metric] == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-6), metric

    params = inception.fold(golden_weights(), ("spatial",))
    network = jit(partial(inception.features, names=("spatial",), resize=resize.tf1))
    found = network(jax.device_put(params), pictures(70, 0, 32)[:deep])["spatial"]
    np.testing.assert_allclose(found, theirs["spatial"], atol=1e-4 * np.abs(theirs["spatial"]).max())
