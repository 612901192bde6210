"""Guidance by a classifier against guided-diffusion's arrays, for every case of a golden directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.discrete import transition_at, transitions
from fooddiff.diffusion.guidance import classifier_gradient, classifier_guided, without_last
from fooddiff.diffusion.level import q_posterior
from fooddiff.diffusion.samplers import ancestral, ancestral_step, begin, ddim, ddim_step
from fooddiff.model.classifier import Classifier
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.openai import from_openai
from fooddiff.model.unet import UNet
from fooddiff.train.tasks.classifier import log_prob
from tests import golden_cases
from tests.golden_cases import Case, Tolerance, check, compare, example_size, nchw, nhwc, perturbed, probe, tables

MANIFESTS = golden_cases.cases_of_kind("adm_guidance")
CASES = [golden_cases.part(manifest, name) for manifest in MANIFESTS for name in manifest.config.get("cases", {})]
NETWORK_CASES = [golden_cases.part(each, name) for each in MANIFESTS for name in each.config.get("network_cases", {})]
if not MANIFESTS:
    pytest.skip(f"{golden_cases.GOLDEN} has nothing of kind adm_guidance", allow_module_level=True)

INPUTS = {"x_t", "t", "y", "noise", "loop_x_T", "loop_y", "loop_noise", "x_T"}
STORED_TABLES = {
    "timestep_map", "betas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance",
    "posterior_log_variance_clipped",
}  # fmt: skip
MAX_LOOP = 40  # timesteps of a case that has whole runs
KINDS = {"unet": "adm_unet", "classifier": "adm_classifier"}
ETAS = (0.0, 0.5, 1.0)


def in_examples(value: float, *, after_clipping: float = 0.0) -> Tolerance:
    """A tolerance in the unit max(1, the example's largest entry).

    What was clipped keeps the rounding of x_0 before it, which is 1e4 at the last timesteps of the cosine schedule.
    """

    def scale(golden, name):
        size = example_size(golden[name])
        if after_clipping:
            before = example_size(golden["pred_xstart_clip0"]).reshape(-1, *[1] * (golden[name].ndim - 1))
            size = size + after_clipping / value * before
        return size

    return Tolerance(value, "of the example's largest entry above 1", scale)


def in_ddim_steps(value: float, *, after_clipping: float) -> Tolerance:
    """The same, and the rounding of the reference's own float32 in its coefficient of eps.

    It takes the root of 1 - alpha_bar - sigma^2 of the next step, which cancels next to the data and, for eta = 1, next
    to the noise; where x_0 is clipped, eps is in the hundreds next to the data.
    """
    others = in_examples(value, after_clipping=after_clipping)
    unit = 2.0**-24

    def scale(golden, name):
        eta, clip = name.removeprefix("ddim_eta").split("_clip")
        alpha_bar, after = (golden[table][golden["t"]] for table in ("alphas_cumprod", "alphas_cumprod_prev"))
        signal, sigma = (root.reshape(-1, 1, 1, 1) for root in (alpha_bar**0.5, (1 - alpha_bar) ** 0.5))
        eps = np.abs(golden["x_t"] - signal * golden[f"cond_score_pred_xstart_clip{clip}"]) / sigma
        kept = (1 - after) * (1 - float(eta) ** 2 * (1 - alpha_bar / after) / (1 - alpha_bar))
        rounding = np.where(golden["t"] > 0, unit / np.maximum(kept, unit) ** 0.5, 0) * eps.max(axis=(1, 2, 3))
        return others.scale(golden, name) + rounding.reshape(-1, 1, 1, 1) / value

    return others._replace(scale=scale)


TABLES = Tolerance(1e-12, "of the entry", lambda golden, name: np.abs(golden[name]))
FORMULAS = in_examples(1e-5, after_clipping=1e-6)
DDIM_STEPS = in_ddim_steps(3e-5, after_clipping=1e-6)
LOOPS = in_examples(1e-4)
SAMPLES = Tolerance(
    2e-3, "of the largest entry above 1", lambda golden, name: np.maximum(1, np.abs(golden[name]).max())
)
TIMES = Tolerance(1e-5, "of the entry above 1", lambda golden, name: np.maximum(1, golden[name]))
GRADIENTS = Tolerance(5e-3, "of the largest entry", golden_cases.largest_entry)


def fixed_small(config) -> bool:
    """Whether the variance is the posterior's, zero at t = 0."""
    return config.get("sigma_small", False) and not config.get("learn_sigma", False)


def formula(x_t, level, cond):
    """The gradient of the formula cases."""
    y, s = (value[:, None, None, None] for value in (cond["y"], level.network_time))
    return (0.25 * y - 0.5 - x_t) * (0.5 + 0.3 * jnp.cos(s / 200))


def steps_of(case: Case) -> dict[str, np.ndarray]:
    """One step from x_t, operation by operation as the reference computes."""
    config, arrays = case.config["diffusion"], case.arrays
    here = transition_at(golden_cases.make_case_process(config), jnp.asarray(arrays["t"], jnp.int32))
    x_t, noise = (jnp.asarray(nhwc(arrays[name])) for name in ("x_t", "noise"))
    cond = {"y": jnp.asarray(arrays["y"], jnp.float32)}
    network = probe(config)
    denoise = golden_cases.make_case_denoiser(config, network)
    gradient = without_last(formula) if fixed_small(config) else formula
    log_var = jnp.broadcast_to(denoise(x_t, here.level, cond).log_var, x_t.shape)
    at_first = (here.level.index == 0)[:, None, None, None]
    found = dict(
        model_out=network(x_t, here.level.network_time, cond),
        gradient=formula(x_t, here.level, cond),
        log_variance=log_var,
        variance=jnp.where(at_first & fixed_small(config), 0, jnp.exp(log_var)),
    )
    for clip, one in enumerate((denoise, clipped(denoise))):
        prediction, scored = (each(x_t, here.level, cond) for each in (one, classifier_guided(one, formula)))
        pull = gradient(x_t, here.level, cond)
        own = dict(
            pred_xstart=prediction.x_0,
            mean=q_posterior(here, prediction.x_0, x_t).mean,
            cond_mean=ancestral_step(prediction, x_t, here, jnp.zeros_like(noise), pull=pull),
            p_sample=ancestral_step(prediction, x_t, here, noise, pull=pull),
            cond_score_pred_xstart=scored.x_0,
            cond_score_mean=q_posterior(here, scored.x_0, x_t).mean,
            **{f"ddim_eta{eta}": ddim_step(scored, x_t, here, noise, eta=eta) for eta in ETAS},
        )
        found |= {f"{name}_clip{clip}": value for name, value in own.items()}
    return {name: nchw(value) for name, value in found.items()} | {"model_t": np.asarray(here.level.network_time)}


def loops(case: Case) -> dict[str, np.ndarray]:
    """Whole sampling runs."""
    config, arrays = case.config["diffusion"], case.arrays
    process = golden_cases.make_case_process(config)
    denoise = clipped(golden_cases.make_case_denoiser(config, probe(config)))
    noises = jnp.asarray(nhwc(arrays["loop_noise"])[::-1])  # stored by iteration, T-1 first
    given = (transitions(process), begin(jnp.asarray(nhwc(arrays["loop_x_T"]))), lambda t: noises[t])
    cond = {"y": jnp.asarray(arrays["loop_y"], jnp.float32)}
    gradient = without_last(formula) if fixed_small(config) else formula
    found = {"loop_ancestral": ancestral(denoise, *given, cond, gradient=gradient)}
    scored = classifier_guided(denoise, formula)
    found |= {f"loop_ddim_eta{eta}": ddim(scored, *given, cond, eta=eta) for eta in ETAS[:2]}
    return {name: nchw(value.x_t) for name, value in found.items()}


@pytest.fixture(scope="module")
def report():
    errors = []
    yield errors
    golden_cases.print_report(errors)


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    """(ours, golden, tolerance) of the tables, of single steps and, where the case has them, of loops."""
    steps = steps_of(case)
    by_ddim = {name: steps.pop(name) for name in tuple(steps) if name.startswith("ddim_")}
    groups = [
        (tables(case.config["diffusion"]), case.arrays, TABLES),
        (steps, case.arrays, FORMULAS),
        (by_ddim, case.arrays, DDIM_STEPS),
    ]
    if golden_cases.make_case_process(case.config["diffusion"]).num_timesteps <= MAX_LOOP:
        groups.append((loops(case), case.arrays, LOOPS))
    return groups


def test_formulas_equal_the_reference(case, computed, report):
    errors = [error for group in computed for error in compare(case.name, *group)]
    report += errors
    check(errors)


def test_every_array_is_compared(case, computed):
    compared = {name for ours, _, _ in computed for name in ours}
    assert case.arrays.keys() - INPUTS <= compared
    results = {name for ours, _, tolerance in computed if tolerance is not TABLES for name in ours}
    may_be_nan = {name for name in results if name.startswith("ddim_eta1.0")}  # in the reference, and then left out
    assert results - may_be_nan | STORED_TABLES <= case.arrays.keys()


def fails_if_perturbed(name, groups):
    for ours, golden, tolerance in groups:
        for array in ours.keys() & golden.keys():
            errors = compare(name, {array: ours[array]}, perturbed(golden, array, tolerance), tolerance)
            with pytest.raises(AssertionError, match=f"{name}/{array}: "):
                check(errors)


def test_perturbed_arrays_fail(case, computed):
    fails_if_perturbed(case.name, computed)


def network_of(case: Case, name: str, module, arguments):
    """A network of another golden file, with its parameters bound, and its arguments there."""
    (file,) = (each for each in golden_cases.cases_of_kind(KINDS[name]) if each.name == case.config[name])
    network = make_network(module, **arguments(file.config["arguments"]))
    params = from_openai(golden_cases.weights(file, "state"), abstract_params(network))
    return lambda *inputs: network.apply(params, *inputs), file.config["arguments"]


@pytest.fixture(**golden_cases.through(NETWORK_CASES))
def network_case(request):
    return request.param


@pytest.fixture(scope="module")
def network_computed(network_case):
    """Every iteration of a loop with a network and a classifier."""
    case = network_case
    config, arrays = case.config, case.arrays
    network, unet_arguments = network_of(case, "unet", UNet, golden_cases.unet_arguments)
    classify, _ = network_of(case, "classifier", Classifier, golden_cases.classifier_arguments)

    def unet(x_t, t, cond):
        return network(x_t, t, cond if unet_arguments.get("num_classes") else {})

    process = golden_cases.make_case_process(config["diffusion"])
    denoise = golden_cases.make_case_denoiser(config["diffusion"], unet)
    denoise = clipped(denoise) if config["clip_denoised"] else denoise
    gradient = classifier_gradient(
        lambda x_t, level, cond: log_prob(classify(x_t, level.network_time), cond["y"]), config["classifier_scale"]
    )
    cond = {"y": jnp.asarray(arrays["y"], jnp.int32)}
    by_ddim = config["sampler"] == "ddim"

    @jax.jit
    def iteration(x_t, t, noise):
        here = transition_at(process, jnp.full((len(x_t),), t))
        pull = gradient(x_t, here.level, cond)
        guided = classifier_guided(denoise, lambda *_: pull) if by_ddim else denoise
        prediction = guided(x_t, here.level, cond)
        if by_ddim:
            return ddim_step(prediction, x_t, here, noise, eta=config["eta"]), prediction.x_0, pull
        kept = without_last(lambda *_: pull) if fixed_small(config["diffusion"]) else lambda *_: pull
        return ancestral_step(prediction, x_t, here, noise, pull=kept(x_t, here.level, cond)), prediction.x_0, pull

    x_t, found = jnp.asarray(nhwc(arrays["x_T"])), []
    noises = nhwc(arrays["noise"]) if "noise" in arrays else np.zeros((process.num_timesteps, *x_t.shape), np.float32)
    for i, t in enumerate(reversed(range(process.num_timesteps))):
        found.append(iteration(x_t, t, noises[i]))
        x_t = found[-1][0]
    samples, pred_xstart, gradients = (nchw(np.stack(values)) for values in zip(*found, strict=True))
    return [
        ({"timestep_map": np.asarray(process.timesteps)}, arrays, TABLES),
        ({"model_t": np.asarray(process.model_timesteps)[::-1]}, arrays, TIMES),
        ({"sample": samples, "pred_xstart": pred_xstart}, arrays, SAMPLES),
        ({"gradient": gradients}, arrays, GRADIENTS),
    ]


def test_loops_of_networks_equal_the_reference(network_case, network_computed, report):
    errors = [error for group in network_computed for error in compare(network_case.name, *group)]
    report += errors
    check(errors)
    compared = {name for ours, _, _ in network_computed for name in ours}
    assert network_case.arrays.keys() - INPUTS <= compared
    assert compared <= network_case.arrays.keys()


def test_perturbed_loops_fail(network_case, network_computed):
    fails_if_perturbed(network_case.name, network_computed)
