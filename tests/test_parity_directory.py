"""The golden tests follow the directory that they are pointed at: any names, and no difference goes unnoticed."""

import json
import os
import re
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

COMPARISONS = "reference or checkpoint"  # the tests that compare; the others are of the comparisons themselves

pytestmark = pytest.mark.long


def run(directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", *FILES, "-k", COMPARISONS, "-n0", "-vv", "--tb=short",
            "-p", "no:cacheprovider",
        ],
        env=os.environ | {"FOODDIFF_GOLDEN_DIR": str(directory)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


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


def test_every_case_is_run_by_its_name_and_changed_arrays_fail(renamed):
    """In each array of `changes` one entry, the largest, is moved by ten times its tolerance; all other cases pass."""
    case, *others = json.loads((renamed / "diffusion.json").read_text())["cases"]
    unet = json.loads((renamed / "trajectory.json").read_text())["unet"]
    changes = [
        ("diffusion.npz", f"{case}/posterior_mean_coef1", 1e-11),
        ("diffusion.npz", f"{case}/p_sample", 1e-4),
        (f"unet_{unet}.npz", "out", 1e-3),
        ("trajectory.npz", "loss", 1e-2),
    ]
    failing = [(case, "posterior_mean_coef1"), (case, "p_sample"), (unet, "out"), ("trajectory", "loss")]
    passing = [f"test_equals_reference[{other}]" for other in others]
    unets = {path.stem.removeprefix("unet_") for path in renamed.glob("unet_*.json")}
    passing += [f"test_equals_reference[{other}]" for other in unets - {unet}]
    checkpoints = [f"test_openai_checkpoint[{path.name}]" for path in renamed.glob("*.pt")]
    for path in manifests_with_kind(renamed):
        manifest = json.loads(path.read_text())
        cases = list(manifest.get("cases", {}))
        changed = next(iter(cases), path.stem)
        for array, relative in CHANGED[manifest["kind"]]:
            changes.append((path.with_suffix(".npz").name, f"{changed}/{array}" if cases else array, relative))
            failing.append((changed, array))
        passing += [f"reference[{other}]" for other in [*cases[1:], *manifest.get("network_cases", {})]]
        if "checkpoint" in manifest:
            checkpoints.append(f"test_checkpoint[{path.stem}]")
    for file, array, relative in changes:
        with np.load(renamed / file, allow_pickle=False) as stored:
            arrays = dict(stored)
        entry = np.unravel_index(np.abs(arrays[array]).argmax(), arrays[array].shape)
        arrays[array][entry] *= 1 + relative
        np.savez(renamed / file, **arrays)
    result = run(renamed)
    assert result.returncode == 1
    for owner, name in failing:
        assert f"{owner}/{name}: " in result.stdout
    for test in passing:
        assert f"{test} PASSED" in result.stdout
    for test in checkpoints:  # some are of the cases that were changed
        assert f"{test} PASSED" in result.stdout or f"{test} FAILED" in result.stdout
    changed = {array for _, array in failing}
    _, *failures = re.split(r"\n_{3,} (\S+) _{3,}\n", result.stdout)
    comparisons = {test: text for test, text in zip(failures[::2], failures[1::2], strict=True) if "reference[" in test}
    assert comparisons
    for test, text in comparisons.items():  # of what a changed case holds, nothing else differs
        differing = re.findall(r"^E\s+(?:AssertionError: )?[^/\s]+/(\S+): \S+, allowed", text, re.MULTILINE)
        assert set(differing) & changed, test
        assert set(differing) <= changed, test
