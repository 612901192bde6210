"""Reads golden directories: arrays of the reference implementation and the manifests that say how they came about.

The directory is tests/golden, or the one that the environment variable FOODDIFF_GOLDEN_DIR names. Its format is written
down in tests/golden/README.md. Everything about a case comes from the manifests; the tests know only the format.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.denoiser import (
    Denoiser,
    eps_error,
    fixed_large,
    fixed_small,
    learned_range,
    make_denoiser,
    read_eps,
    read_x0,
    x0_error,
)
from fooddiff.diffusion.discrete import GaussianDiffusion, make_process, make_tables
from fooddiff.diffusion.losses import hybrid_loss, mse_loss, vlb_loss
from fooddiff.diffusion.schedule import cosine_betas, evenly_spaced, integer_stride, linear_betas

GOLDEN = Path(os.environ.get("FOODDIFF_GOLDEN_DIR") or Path(__file__).parent / "golden").resolve()
if not any(GOLDEN.glob("*.json")):
    raise FileNotFoundError(f"{GOLDEN} holds no manifest (*.json), so there is nothing to compare with")
DEAR = () if os.environ.get("FOODDIFF_GOLDEN_DIR") else (pytest.mark.slow,)  # arrays that are asked for are all checked


KINDS = {
    "adm_unet", "adm_classifier", "superres", "adm_guidance", "ldm_autoencoder_kl", "ldm_autoencoder_vq",
    "ldm_vq_model", "ldm_discriminator", "taesd", "cfg",
}  # fmt: skip
"""What a manifest's `kind` may be."""


class Case(NamedTuple):
    """One case: its name, its entry in a manifest, and its arrays in the reference's layout (NCHW, OIHW)."""

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]


def by_name(cases: list[Case]) -> dict[str, Any]:
    """The keyword arguments of `pytest.mark.parametrize` that run a test once per case, under the case's name."""
    return {"argnames": "case", "argvalues": cases, "ids": [case.name for case in cases]}


def through(cases: list[Case], quick: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments of a fixture that goes through cases, of which those without a quick name are `DEAR`."""
    marked = [pytest.param(case, id=case.name, marks=[] if case.name in quick else DEAR) for case in cases]
    return {"scope": "module", "params": marked}


def diffusion_cases(directory: Path = GOLDEN) -> list[Case]:
    """The cases of diffusion.json."""
    arrays = _load_arrays(directory / "diffusion.npz")
    return [
        Case(name, config, below(arrays, name))
        for name, config in _load_json(directory / "diffusion.json")["cases"].items()
    ]


def spacing_cases(directory: Path = GOLDEN) -> dict[str, list[int]]:
    """ "T|sections" -> the kept timesteps."""
    return _load_json(directory / "diffusion.json")["space_timesteps"]


def resampler_arrays(directory: Path = GOLDEN) -> dict[str, np.ndarray]:
    """What was fed to the loss-second-moment sampler and its weights afterwards."""
    return below(_load_arrays(directory / "diffusion.npz"), "resampler")


def unet_cases(directory: Path = GOLDEN) -> list[Case]:
    """The cases unet_<name>.json."""
    return [case._replace(name=case.name.removeprefix("unet_")) for case in _cases_named("unet_*", directory)]


def trajectory_cases(directory: Path = GOLDEN) -> list[Case]:
    """The case trajectory.json."""
    return _cases_named("trajectory*", directory)


def cases_of_kind(kind: str, directory: Path = GOLDEN) -> list[Case]:
    """The cases of all manifests that name this kind."""
    return [
        Case(path.stem, manifest, _load_arrays(path.with_suffix(".npz")))
        for path, manifest in manifests(directory).items()
        if manifest.get("kind") == kind
    ]


def manifests(directory: Path = GOLDEN, names: str = "*") -> dict[Path, dict[str, Any]]:
    """What the files <names>.json hold."""
    return {path: _load_json(path) for path in sorted(directory.glob(f"{names}.json"))}


def _cases_named(names: str, directory: Path) -> list[Case]:
    """The cases of manifests that go by their file's name: a kind takes them whatever it is."""
    return [
        Case(path.stem, manifest, _load_arrays(path.with_suffix(".npz")))
        for path, manifest in manifests(directory, names).items()
        if "kind" not in manifest
    ]


def part(manifest: Case, name: str) -> Case:
    """One of several cases of a manifest, with its own arrays."""
    entries = manifest.config.get("cases", {}) | manifest.config.get("network_cases", {})
    return Case(name, entries[name], below(manifest.arrays, name))


def checkpoint_files(directory: Path = GOLDEN) -> list[Path]:
    """The state dicts in OpenAI's file format that no manifest of a kind calls its own."""
    owned = {manifest.get("checkpoint") for manifest in manifests(directory).values()}
    return [path for path in sorted(directory.glob("*.pt")) if path.name not in owned]


def weights(case: Case, folder: str = "weights") -> dict[str, np.ndarray]:
    """A network's parameters under the reference's names, in float32."""
    return {name: value.astype(np.float32) for name, value in below(case.arrays, folder).items()}


# From the reference's arguments to ours


def kept_timesteps(steps: int, sections: str) -> list[int] | None:
    """Reads the reference's strings: "" keeps all, "ddim20" has a fixed stride, "10,15,5" is evenly spaced."""
    if not sections:
        return None
    if sections.startswith("ddim"):
        return integer_stride(steps, int(sections.removeprefix("ddim")))
    return evenly_spaced(steps, [int(count) for count in sections.split(",")])


def make_case_tables(config: Mapping[str, Any], build: Callable = make_tables) -> GaussianDiffusion:
    """The float64 tables (`make_tables`) or the process (`make_process`) of a case."""
    steps = config.get("steps", 1000)
    betas = {"linear": linear_betas, "cosine": cosine_betas}[config.get("noise_schedule", "linear")](steps)
    keep = kept_timesteps(steps, config.get("timestep_respacing", ""))
    return build(betas, keep, rescale_timesteps=config.get("rescale_timesteps", False))


def make_case_process(config: Mapping[str, Any]) -> GaussianDiffusion:
    """The float32 process of a case."""
    return make_case_tables(config, make_process)


def make_case_denoiser(config: Mapping[str, Any], apply: Callable) -> Denoiser:
    """The network of a case, read as what it predicts."""
    if config.get("learn_sigma", False):
        log_var = learned_range
    else:
        log_var = fixed_small if config.get("sigma_small", False) else fixed_large
    return make_denoiser(apply, read_x0 if config.get("predict_xstart", False) else read_eps, log_var)


def probe(config: Mapping[str, Any]) -> Callable:
    """The "network" of the golden arrays: eps and, when the variance is learned, its channels."""

    def apply(x_t, t, cond):
        s = t[:, None, None, None]
        eps = 0.7 * x_t + 0.2 * jnp.sin(s / 100)
        v = [jnp.tanh(x_t) * jnp.cos(s / 50)] if config.get("learn_sigma", False) else []
        return jnp.concatenate([eps, *v], axis=-1)

    return apply


def tables(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our float64 tables under the reference's names."""
    ours = make_case_tables(config)
    alpha_bar = ours.sqrt_alpha_bar**2
    return dict(
        timestep_map=ours.timesteps,
        betas=np.exp(ours.log_beta),
        alphas_cumprod=alpha_bar,
        alphas_cumprod_prev=np.append(1.0, alpha_bar[:-1]),
        log_snr=ours.log_snr,
        sqrt_alphas_cumprod=ours.sqrt_alpha_bar,
        sqrt_one_minus_alphas_cumprod=ours.sqrt_one_minus_alpha_bar,
        sqrt_recip_alphas_cumprod=ours.sqrt_recip_alpha_bar,
        sqrt_recipm1_alphas_cumprod=ours.sqrt_recipm1_alpha_bar,
        posterior_variance=np.append(0.0, np.exp(ours.posterior_log_var[1:])),
        posterior_log_variance_clipped=ours.posterior_log_var,
        posterior_mean_coef1=ours.posterior_coef_x0,
        posterior_mean_coef2=ours.posterior_coef_xt,
    )


def vb_weight(config: Mapping[str, Any], num_timesteps: int) -> float:
    """The weight of the bound in the reference's hybrid objective."""
    return num_timesteps / 1000 if config.get("rescale_learned_sigmas", False) else 1.0


def make_case_loss(config: Mapping[str, Any], num_timesteps: int) -> Callable:
    """The objective of a case: (denoise, x_0, step, eps, cond) -> terms."""
    error = x0_error if config.get("predict_xstart", False) else eps_error
    if config.get("use_kl", False):
        return partial(vlb_loss, error, num_timesteps=num_timesteps)
    if config.get("learn_sigma", False):
        return partial(hybrid_loss, error, vb_weight=vb_weight(config, num_timesteps))
    return partial(mse_loss, error)


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our UNet, from those of the reference's UNetModel (of either repository)."""
    return _network_arguments(config) | dict(
        out_channels=config["out_channels"],
        stem_channels=int(config.get("channel_mult", (1,))[0] * config["model_channels"]),
        num_heads_upsample=_given(config.get("num_heads_upsample", -1)),
        num_classes=config.get("num_classes"),
    )


def classifier_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our classifier, from those of the reference's EncoderUNetModel."""
    return _network_arguments(config) | dict(num_classes=config["out_channels"], pool=config.get("pool", "adaptive"))


def _network_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Attention comes as downsampling rates; one that never occurs has no effect there."""
    refuse_others(config, dims=2, use_fp16=False)
    size, channel_mult = config["image_size"], config.get("channel_mult", (1, 2, 4, 8))
    rates = {2**level for level in range(len(channel_mult))} & set(config["attention_resolutions"])
    return dict(
        image_size=size,
        in_channels=config["in_channels"],
        model_channels=config["model_channels"],
        channel_mult=tuple(channel_mult),
        num_res_blocks=config["num_res_blocks"],
        attention_resolutions=tuple(size // rate for rate in rates),
        num_heads=config.get("num_heads", 1),
        head_channels=_given(config.get("num_head_channels", -1)),
        new_attention_order=config.get("use_new_attention_order", False),
        resblock_updown=config.get("resblock_updown", False),
        conv_resample=config.get("conv_resample", True),
        scale_shift_norm=config.get("use_scale_shift_norm", False),
        dropout=config.get("dropout", 0.0),
    )


def refuse_others(config: Mapping[str, Any], **only: Any) -> None:
    """Raises ValueError where an argument of the reference is not the only value that has a counterpart here."""
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, but only {value!r} has a counterpart here")


def _given(value: int) -> int | None:
    """The reference writes -1 for "not given"."""
    return None if value == -1 else value


def nhwc(images: np.ndarray) -> np.ndarray:
    """[.., c, h, w] to [.., h, w, c]."""
    return np.moveaxis(images, -3, -1)


def nchw(images: np.ndarray) -> np.ndarray:
    """[.., h, w, c] to [.., c, h, w]."""
    return np.moveaxis(np.asarray(images), -1, -3)


# Comparing

Arrays = Mapping[str, np.ndarray]


class Tolerance(NamedTuple):
    """The allowed absolute difference: `value` times `scale(golden arrays, name)`."""

    value: float
    unit: str  # what `scale` is, in words
    scale: Callable[[Arrays, str], np.ndarray]


def largest_entry(golden: Arrays, name: str) -> np.ndarray:
    """The scale "of the largest entry"."""
    return np.abs(golden[name]).max()


def example_size(array: np.ndarray) -> np.ndarray:
    """max(1, largest |entry|) of each example: near 1e4, float32 cannot be right to 1e-5."""
    largest = np.abs(array).reshape(len(array), -1).max(axis=1)
    return np.maximum(1, largest).reshape(-1, *[1] * (array.ndim - 1))


def _gradient_size(golden: Arrays, name: str) -> np.ndarray:
    """The tensor's largest entry, plus a thousandth of the largest one of the whole network.

    The second term matters for gradients that are zero in exact arithmetic, such as that of a convolution's bias in
    front of a group norm with one channel per group: the norm subtracts it again. What float32 leaves there is the
    rounding of much larger sums that cancel, so it has no relative precision.
    """
    kind = name.split("/")[0] + "/"
    largest = max(np.abs(value).max() for other, value in golden.items() if other.startswith(kind))
    return np.abs(golden[name]).max() + 1e-3 * largest


GRADIENTS = Tolerance(1e-3, "of the tensor's largest entry + 0.001 of the network's", _gradient_size)
"""For the gradients of parameters and their norms."""


class Error(NamedTuple):
    """How far one array is from its golden array."""

    case: str
    name: str
    tolerance: Tolerance
    reached: float  # in the unit of the tolerance; above its value fails


def compare(case: str, ours: Arrays, golden: Arrays, tolerance: Tolerance) -> list[Error]:
    """Compares all of `ours` that is in `golden`. Other shapes, NaN and infinities never agree."""
    errors = []
    for name in ours.keys() & golden.keys():
        actual, expected = np.asarray(ours[name], np.float64), np.asarray(golden[name], np.float64)
        assert actual.shape == expected.shape, f"{case}/{name}: {actual.shape}, golden is {expected.shape}"
        difference = np.abs(actual - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = np.where(difference == 0, 0, difference / tolerance.scale(golden, name))
        errors.append(Error(case, name, tolerance, float(np.nan_to_num(reached, nan=np.inf).max(initial=0))))
    return errors


def check(errors: list[Error]) -> None:
    """Fails with every array that is off, worst first."""
    bad = sorted((error for error in errors if error.reached > error.tolerance.value), key=lambda e: -e.reached)
    lines = [f"{e.case}/{e.name}: {e.reached:.2g}, allowed {e.tolerance.value:g} {e.tolerance.unit}" for e in bad]
    assert not bad, "\n".join(["differs from the golden arrays:", *lines])


def perturbed(golden: Arrays, name: str, tolerance: Tolerance) -> dict[str, np.ndarray]:
    """`golden` with the largest entry of one array moved by ten times its tolerance, or by 1 where that is zero."""
    array = np.array(golden[name], np.float64)
    entry = np.unravel_index(np.abs(array).argmax(), array.shape)
    allowed = np.broadcast_to(tolerance.value * tolerance.scale(golden, name), array.shape)
    array[entry] += 10 * allowed[entry] or 1
    return {**golden, name: array}


@pytest.fixture(scope="module")
def report():
    """Takes the errors of a module's tests, and prints them at its end."""
    errors = []
    yield errors
    print_report(errors)


def check_equal(case: Case, computed: Iterable[tuple[Arrays, Tolerance]], report: list[Error]) -> None:
    """Compares everything that was computed for a case with its golden arrays, and reports how near it is."""
    errors = [error for ours, tolerance in computed for error in compare(case.name, ours, case.arrays, tolerance)]
    report += errors
    check(errors)


def check_perturbed(case: Case, computed: Iterable[tuple[Arrays, Tolerance]]) -> None:
    """Ten times the tolerance, in one entry of any golden array, must be noticed."""
    for ours, tolerance in computed:
        for name in ours.keys() & case.arrays.keys():
            errors = compare(case.name, {name: ours[name]}, perturbed(case.arrays, name, tolerance), tolerance)
            with pytest.raises(AssertionError, match=f"{case.name}/{name}: "):
                check(errors)


def same_arrays(a: Arrays, b: Arrays) -> bool:
    """Whether two dicts hold the same names and, bit for bit, the same arrays."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def print_report(errors: list[Error]) -> None:
    """Prints the cases, and per quantity the largest error over all of them, as a Markdown table."""
    print("cases:", ", ".join(dict.fromkeys(error.case for error in errors)))
    print("| quantity | allowed | reached | in case |")
    print("|--|--|--|--|")
    quantities = sorted({error.name.split("/")[0] for error in errors})
    for quantity in quantities:
        worst = max((e for e in errors if e.name.split("/")[0] == quantity), key=lambda e: e.reached)
        tolerance = worst.tolerance
        print(f"| {quantity} | {tolerance.value:g} {tolerance.unit} | {worst.reached:.1e} | {worst.case} |")


def _load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays `<prefix>/<name>`, by name."""
    prefix += "/"
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
