"""Classifier-free guidance against latent-diffusion's DDIM sampler, for every case of a golden directory.

Its PLMS sampler has no counterpart here; what those cases hold of schedules is compared all the same.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.denoiser import fixed_large, make_denoiser, read_eps
from fooddiff.diffusion.discrete import make_process, make_tables, transition_at
from fooddiff.diffusion.guidance import guided
from fooddiff.diffusion.samplers import ddim_step
from fooddiff.diffusion.schedule import MAX_BETA
from tests import golden_cases
from tests.golden_cases import Case, Tolerance, check, compare, example_size, nchw, nhwc, perturbed

MANIFESTS = golden_cases.cases_of_kind("cfg")
CASES = [golden_cases.part(manifest, name) for manifest in MANIFESTS for name in manifest.config.get("cases", {})]
COMBINED = [manifest for manifest in MANIFESTS if "combine_schedule" in manifest.config]
if not MANIFESTS:
    pytest.skip(f"{golden_cases.GOLDEN} has nothing of kind cfg", allow_module_level=True)

TABLES = Tolerance(1e-6, "of the entry", lambda golden, name: np.abs(golden[name]))
ROOTS = Tolerance(
    1e-6,
    "and the rounding of 1 - alpha_bar, which the reference has in float32",
    lambda golden, name: 1 + 2.0**-24 / np.sqrt(1 - golden["ddim_alphas_prev"]) / 1e-6,
)
EXACT = Tolerance(0.0, "", lambda golden, name: np.ones(()))
STEPS = Tolerance(
    5e-5,
    "of the example's largest entry above 1",
    lambda golden, name: example_size(golden[name].reshape(-1, *golden[name].shape[-3:])).reshape(
        *golden[name].shape[:-3], 1, 1, 1
    ),
)


def ldm_betas(beta_schedule: str, timesteps: int, linear_start: float, linear_end: float) -> np.ndarray:
    """latent-diffusion's schedules, float64: its "linear" is linear in the root of beta."""
    match beta_schedule:
        case "linear":
            return np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
        case "sqrt_linear":
            return np.linspace(linear_start, linear_end, timesteps)
        case "sqrt":
            return np.linspace(linear_start, linear_end, timesteps) ** 0.5
        case "cosine":
            alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, MAX_BETA)
    raise ValueError(f'beta_schedule is {beta_schedule!r}, expected "linear", "sqrt_linear", "sqrt" or "cosine"')


def keep(steps: int, timesteps: int) -> list[int]:
    """Its sampler visits the multiples of T // S, plus one, and ends at timestep 0 instead of x_0."""
    return [0, *(t + 1 for t in range(0, timesteps, timesteps // steps))]


def network(x_t, t, cond):
    """The formula of the golden arrays."""
    return 0.5 * x_t + 0.3 * jnp.sin(t[:, None, None, None] / 100) + 0.4 * jnp.tanh(x_t + cond["c"])


def tables_of(case: Case) -> dict[str, np.ndarray]:
    betas = ldm_betas(**case.config["schedule"])
    kept = make_tables(betas, keep(case.config["S"], len(betas)), rescale_timesteps=False)
    alpha_bar = kept.sqrt_alpha_bar**2
    return dict(
        alphas_cumprod=np.cumprod(1 - betas),
        ddim_timesteps=kept.timesteps[1:],
        ddim_alphas=alpha_bar[1:],
        ddim_alphas_prev=alpha_bar[:-1],
        ddim_sigmas=case.config["eta"] * np.exp(kept.posterior_log_var[1:] / 2),
        ddim_sqrt_one_minus_alphas=np.sqrt(1 - alpha_bar[1:]),
    )


def loop_of(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(timesteps, arrays) of every iteration of its DDIM loop."""
    config, arrays = case.config, case.arrays
    betas = ldm_betas(**config["schedule"])
    process = make_process(betas, keep(config["S"], len(betas)), rescale_timesteps=False)
    denoise = make_denoiser(network, read_eps, fixed_large)
    given = {name: jnp.asarray(nhwc(arrays[name])) for name in ("x_T", "cond", "uncond", "noise") if name in arrays}

    def without_condition(x_t, level, cond):
        return denoise(x_t, level, {"c": given["uncond"]})

    guide = guided(denoise, without_condition, scale=config["scale"]) if "uncond" in given else denoise
    x_t, found = given["x_T"], []
    noises = given.get("noise", jnp.zeros((config["steps"], *x_t.shape)))
    for iteration, t in enumerate(range(config["steps"], 0, -1)):
        here = transition_at(process, jnp.full((len(x_t),), t))
        prediction = guide(x_t, here.level, {"c": given["cond"]})
        x_t = ddim_step(prediction, x_t, here, noises[iteration], eta=config["eta"])
        found.append((here.level.network_time[0], prediction.eps, x_t, prediction.x_0))
    model_t, *images = (np.stack(values) for values in zip(*found, strict=True))
    return {"model_t": model_t}, dict(zip(("eps", "x", "pred_x0"), map(nchw, images), strict=True))


def combined(manifest: Case) -> dict[str, np.ndarray]:
    """Two predictions of eps at one level, guided at several scales."""
    config, arrays = manifest.config, golden_cases.below(manifest.arrays, "combine")
    betas = ldm_betas(**config["combine_schedule"])
    process = make_process(betas, keep(config["combine_S"], len(betas)), rescale_timesteps=False)
    x, e_uncond, e_cond = (jnp.asarray(nhwc(arrays[name])) for name in ("x", "e_uncond", "e_cond"))
    here = transition_at(process, jnp.full((len(x),), config["combine_index"] + 1))

    def predicts(eps):
        return make_denoiser(lambda *_: eps, read_eps, fixed_large)

    found = []
    for scale in arrays["scale"]:
        prediction = guided(predicts(e_cond), predicts(e_uncond), scale=float(scale))(x, here.level, {})
        found.append((prediction.eps, ddim_step(prediction, x, here, jnp.zeros_like(x), eta=0.0), prediction.x_0))
    return {
        name: nchw(np.stack(values))
        for name, values in zip(("e", "x_prev", "pred_x0"), zip(*found, strict=True), strict=True)
    }


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    """(ours, golden, tolerance) of the tables and, for DDIM, of the loop."""
    tables = tables_of(case)
    times = {"ddim_timesteps": tables.pop("ddim_timesteps")}
    roots = {name: tables.pop(name) for name in ("ddim_sigmas", "ddim_sqrt_one_minus_alphas")}
    groups = [(tables, case.arrays, TABLES), (roots, case.arrays, ROOTS), (times, case.arrays, EXACT)]
    if case.config["sampler"] == "ddim":
        times, images = loop_of(case)
        groups += [(times, case.arrays, EXACT), (images, case.arrays, STEPS)]
    return groups


@pytest.fixture(scope="module")
def report():
    errors = []
    yield errors
    golden_cases.print_report(errors)


def test_loops_equal_the_reference(case, computed, report):
    errors = [error for group in computed for error in compare(case.name, *group)]
    report += errors
    check(errors)


def test_every_array_is_compared(case, computed):
    of_plms = {"model_t", "eps", "x", "pred_x0"} if case.config["sampler"] == "plms" else set()
    inputs = {"x_T", "cond", "uncond", "noise"}
    assert case.arrays.keys() - inputs - of_plms == {name for ours, _, _ in computed for name in ours}


def test_perturbed_arrays_fail(case, computed):
    for ours, golden, tolerance in computed:
        for array in ours.keys() & golden.keys():
            moved = perturbed(golden, array, tolerance if tolerance.value else Tolerance(1e-3, "", tolerance.scale))
            with pytest.raises(AssertionError, match=f"{case.name}/{array}: "):
                check(compare(case.name, {array: ours[array]}, moved, tolerance))


@pytest.mark.parametrize(**golden_cases.by_name(COMBINED))
def test_combinations_equal_the_reference(case, report):
    golden = golden_cases.below(case.arrays, "combine")
    ours = combined(case)
    errors = compare(case.name, ours, golden, STEPS)
    report += errors
    check(errors)
    for array in ours:
        with pytest.raises(AssertionError, match=f"{case.name}/{array}: "):
            check(compare(case.name, ours, perturbed(golden, array, STEPS), STEPS))


@pytest.mark.parametrize(**golden_cases.by_name(MANIFESTS))
def test_schedules_equal_the_reference(case):
    for name, golden in golden_cases.below(case.arrays, "beta_schedules").items():
        schedule, timesteps, start, end = name.split("|")
        np.testing.assert_allclose(ldm_betas(schedule, int(timesteps), float(start), float(end)), golden, atol=1e-12)
    for name, golden in golden_cases.below(case.arrays, "ddim_timesteps").items():
        method, steps, timesteps = name.split("|")
        if method == "uniform":
            assert keep(int(steps), int(timesteps))[1:] == list(golden)
