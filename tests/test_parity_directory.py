"""The golden tests follow the directory that they are pointed at: any names, and no difference goes unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
FILES = [
    TESTS / f"test_golden_{part}.py" for part in ("diffusion", "unet", "trajectory", "adm", "guidance", "ldm", "cfg")
]

CHANGED = {
    "adm_unet": [("out", 2e-4), ("grad_x", 5e-4)],
    "adm_classifier": [("logits", 1e-4)],
    "superres": [("upsampled", 1e-4), ("grad_low_res", 5e-4)],
    "adm_guidance": [("p_sample_clip0", 1e-4)],
    "cfg": [("x", 5e-4)],
    "ldm_autoencoder_kl": [("kl", 2e-4), ("gaussian/kl_to_other", 1e-4)],
    "ldm_autoencoder_vq": [("legacy/grad_codebook", 1e-5)],
    "ldm_vq_model": [("reconstruction", 2e-4)],
    "ldm_discriminator": [("adaptive_weight", 2e-4)],
    "taesd": [("latents", 2e-4), ("decoded", 2e-4)],
}  # kind of manifest: arrays, and ten times the tolerance

pytestmark = pytest.mark.slow


def run(directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *FILES, "-n0", "-vv", "--tb=short", "-p", "no:cacheprovider"],
        env=os.environ | {"FOODDIFF_GOLDEN_DIR": str(directory)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def manifests_with_kind(directory: Path) -> list[Path]:
    """The manifests that say what kind they are, whatever their names."""
    return [path for path in sorted(directory.glob("*.json")) if "kind" in json.loads(path.read_text())]


@pytest.fixture
def renamed(tmp_path):
    """A copy of the golden directory in which every case has another name."""
    source, target = TESTS / "golden", tmp_path / "renamed"
    target.mkdir()
    manifest = json.loads((source / "diffusion.json").read_text())
    manifest["cases"] = {f"other_{name}": config for name, config in manifest["cases"].items()}
    (target / "diffusion.json").write_text(json.dumps(manifest))
    with np.load(source / "diffusion.npz", allow_pickle=False) as arrays:
        renamed = {name if name.startswith("resampler") else f"other_{name}": arrays[name] for name in arrays}
    np.savez(target / "diffusion.npz", **renamed)
    for path in [*source.glob("unet_*"), *source.glob("openai_unet_*.pt")]:
        shutil.copy(path, target / path.name.replace("unet_", "unet_other_"))
    for path in manifests_with_kind(source):
        manifest = json.loads(path.read_text())
        if "checkpoint" in manifest:
            shutil.copy(source / manifest["checkpoint"], target / f"other_{manifest['checkpoint']}")
            manifest["checkpoint"] = f"other_{manifest['checkpoint']}"
        for case in manifest.get("network_cases", {}).values():
            case |= {network: f"other_{case[network]}" for network in ("unet", "classifier")}
        (target / f"other_{path.name}").write_text(json.dumps(manifest))
        shutil.copy(path.with_suffix(".npz"), target / f"other_{path.stem}.npz")
    trajectory = json.loads((source / "trajectory.json").read_text())
    trajectory["unet"] = f"other_{trajectory['unet']}"
    (target / "trajectory.json").write_text(json.dumps(trajectory))
    shutil.copy(source / "trajectory.npz", target)
    return target


def test_other_names_of_cases(renamed):
    result = run(renamed)
    assert result.returncode == 0, result.stdout[-3000:]
    for name in json.loads((renamed / "diffusion.json").read_text())["cases"]:
        assert f"test_equals_reference[{name}] PASSED" in result.stdout
    for path in renamed.glob("unet_*.json"):
        assert f"test_equals_reference[{path.stem.removeprefix('unet_')}] PASSED" in result.stdout
    for path in manifests_with_kind(renamed):
        manifest = json.loads(path.read_text())
        cases = {**manifest.get("cases", {}), **manifest.get("network_cases", {})} or [path.stem]
        for case in cases:
            assert f"reference[{case}] PASSED" in result.stdout
        if "checkpoint" in manifest:
            assert f"test_checkpoint[{path.stem}] PASSED" in result.stdout
    for path in renamed.glob("*.pt"):
        assert f"test_openai_checkpoint[{path.name}] PASSED" in result.stdout


def test_changed_files_fail(renamed):
    """In each of these arrays one entry, the largest, is moved by ten times its tolerance."""
    case = next(iter(json.loads((renamed / "diffusion.json").read_text())["cases"]))
    unet = json.loads((renamed / "trajectory.json").read_text())["unet"]
    changes = [
        ("diffusion.npz", f"{case}/posterior_mean_coef1", 1e-11),
        ("diffusion.npz", f"{case}/p_sample", 1e-4),
        (f"unet_{unet}.npz", "out", 1e-3),
        ("trajectory.npz", "loss", 1e-2),
    ]
    expected = [(case, "posterior_mean_coef1"), (case, "p_sample"), (unet, "out"), ("trajectory", "loss")]
    for path in manifests_with_kind(renamed):
        manifest = json.loads(path.read_text())
        first = next(iter(manifest.get("cases", {})), None)
        for array, relative in CHANGED[manifest["kind"]]:
            changes.append((path.with_suffix(".npz").name, f"{first}/{array}" if first else array, relative))
            expected.append((first or path.stem, array))
    for file, array, relative in changes:
        with np.load(renamed / file, allow_pickle=False) as stored:
            arrays = dict(stored)
        entry = np.unravel_index(np.abs(arrays[array]).argmax(), arrays[array].shape)
        arrays[array][entry] *= 1 + relative
        np.savez(renamed / file, **arrays)
    result = run(renamed)
    assert result.returncode == 1
    for owner, name in expected:
        assert f"{owner}/{name}: " in result.stdout
