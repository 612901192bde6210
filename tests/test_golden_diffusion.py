"""The diffusion package against the reference's arrays, for every case of a golden directory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.discrete import GaussianDiffusion, level_at, transition_at, transitions
from fooddiff.diffusion.level import Level, add_noise, q_posterior
from fooddiff.diffusion.likelihood import bits_per_dim
from fooddiff.diffusion.losses import bound_term, prior_term
from fooddiff.diffusion.samplers import ancestral, ancestral_step, begin, ddim, ddim_step
from fooddiff.diffusion.timesteps import empty_history, second_moment_probs, update_history
from tests import golden_cases
from tests.golden_cases import Case, Tolerance, check, compare, example_size, nchw, nhwc, perturbed, probe, tables

if not (golden_cases.GOLDEN / "diffusion.json").exists():
    pytest.skip(f"{golden_cases.GOLDEN} holds no diffusion.json", allow_module_level=True)

CASES = golden_cases.diffusion_cases()
SPACINGS = golden_cases.spacing_cases()
INPUTS = {"x0", "eps", "eps2", "t", "loop_x_T", "loop_noise"}

TABLES = Tolerance(1e-12, "of the entry", lambda golden, name: np.abs(golden[name]))
PROBABILITIES = Tolerance(1e-5, "of the entry", lambda golden, name: np.abs(golden[name]))


def maths_tolerance(case: Case) -> Tolerance:
    """1e-5 in the quantity's own unit.

    Two quantities have another unit than 1. The objective with `use_kl` is T times a term in bits/dim. An x_0 that is
    clipped to [-1, 1] keeps the rounding of what it was before, so it may be off by 1e-6 of that.
    """

    def scale(golden, name):
        if name == "train_loss" and case.config.get("use_kl", False):
            num_timesteps = case.config["num_timesteps"]
            return num_timesteps * example_size(golden[name] / num_timesteps)
        if name == "p_pred_xstart_clip1":
            return example_size(0.1 * golden["p_pred_xstart_clip0"])
        return example_size(golden[name])

    return Tolerance(1e-5, "absolute, or of the example's largest entry above 1", scale)


@pytest.fixture(scope="module")
def report():
    errors = []
    yield errors
    golden_cases.print_report(errors)


def golden_tables(case: Case) -> dict[str, np.ndarray]:
    """The stored tables and, by their definitions, those that the files leave out."""
    alpha_bar = case.arrays["alphas_cumprod"]
    derived = dict(
        log_snr=np.log(alpha_bar) - np.log(1 - alpha_bar),
        sqrt_alphas_cumprod=np.sqrt(alpha_bar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alpha_bar),
    )
    return derived | case.arrays


def noisier(process: GaussianDiffusion, t) -> Level:
    """The level of t + 1; beyond the last there is noise alone."""
    last = (t + 1 == process.num_timesteps).astype(jnp.float32)
    level = level_at(process, jnp.minimum(t + 1, process.num_timesteps - 1))
    return level._replace(alpha=(1 - last) * level.alpha, sigma=jnp.where(last, 1.0, level.sigma))


def maths(case: Case, compile: Callable = lambda fun: fun) -> dict[str, np.ndarray]:
    """Everything that is computed for one batch, under the reference's names."""
    config = case.config
    denoise = golden_cases.make_case_denoiser(config, probe(config))

    def everything(process: GaussianDiffusion, x_0, eps, eps2, t):
        here = transition_at(process, t)
        x_t = add_noise(here.level, x_0, eps)
        posterior = q_posterior(here, x_0, x_t)
        loss = golden_cases.make_case_loss(config, process.num_timesteps)(denoise, x_0, here, eps, {})
        unclipped, within = (each(x_t, here.level, {}) for each in (denoise, clipped(denoise)))
        encoding = here._replace(next=noisier(process, t))

        def variance(log_var, zero_at_first):  # there the posterior's variance is 0, and its logarithm t = 1's
            first = (t == 0)[:, None, None, None] & zero_at_first
            return jnp.broadcast_to(jnp.where(first, 0, jnp.exp(log_var)), x_t.shape)

        fixed_small = config.get("sigma_small", False) and not config.get("learn_sigma", False)
        return dict(
            x_t=x_t,
            q_posterior_mean=posterior.mean,
            q_posterior_log_variance=jnp.broadcast_to(posterior.log_var, x_t.shape),
            q_posterior_variance=variance(posterior.log_var, zero_at_first=True),
            model_t=here.level.network_time,
            p_mean_clip0=q_posterior(here, unclipped.x_0, x_t).mean,
            p_variance_clip0=variance(unclipped.log_var, fixed_small),
            p_log_variance_clip0=jnp.broadcast_to(unclipped.log_var, x_t.shape),
            p_pred_xstart_clip0=unclipped.x_0,
            p_mean_clip1=q_posterior(here, within.x_0, x_t).mean,
            p_variance_clip1=variance(within.log_var, fixed_small),
            p_log_variance_clip1=jnp.broadcast_to(within.log_var, x_t.shape),
            p_pred_xstart_clip1=within.x_0,
            train_loss=loss.total,
            train_mse=loss.mse,
            train_vb=golden_cases.vb_weight(config, process.num_timesteps) * loss.vb,
            vb_bpd=bound_term(unclipped, x_0, x_t, here),
            prior_bpd=prior_term(x_0, level_at(process, jnp.full_like(t, process.num_timesteps - 1))),
            p_sample=ancestral_step(within, x_t, here, eps2),
            ddim_reverse=ddim_step(within, x_t, encoding, eps2),
            **{f"ddim_eta{eta}": ddim_step(within, x_t, here, eps2, eta=eta) for eta in (0.0, 0.5, 1.0)},
        )

    images = (nhwc(case.arrays[name]) for name in ("x0", "eps", "eps2"))
    t = jnp.asarray(case.arrays["t"], jnp.int32)
    ours = compile(everything)(golden_cases.make_case_process(config), *images, t)
    return {name: nchw(value) if value.ndim == 4 else np.asarray(value) for name, value in ours.items()}


def loops(case: Case) -> dict[str, np.ndarray]:
    """Whole sampling runs and the whole bound, under the reference's names and in its order of timesteps."""
    process = golden_cases.make_case_process(case.config)
    denoise = clipped(golden_cases.make_case_denoiser(case.config, probe(case.config)))
    noises = jnp.asarray(nhwc(case.arrays["loop_noise"])[::-1])  # stored by iteration, T-1 first

    def noise(t):
        return noises[t]

    x_T = jnp.asarray(nhwc(case.arrays["loop_x_T"]))
    steps = transitions(process)
    bound = bits_per_dim(denoise, steps, nhwc(case.arrays["x0"][: len(x_T)]), noise, {})
    return dict(
        loop_ancestral=nchw(ancestral(denoise, steps, begin(x_T), noise, {}).x_t),
        loop_ddim_eta0=nchw(ddim(denoise, steps, begin(x_T), noise, {}).x_t),
        bpd_total_bpd=bound.total,
        bpd_prior_bpd=bound.prior,
        bpd_vb=bound.vb[:, ::-1],
        bpd_xstart_mse=bound.x0_mse[:, ::-1],
        bpd_mse=bound.eps_mse[:, ::-1],
    )


def resampler() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Our probabilities after each round, and the reference's weights normalised to probabilities."""
    arrays = golden_cases.resampler_arrays()
    weights = arrays["weights_after"]
    history, probs, update = empty_history(weights.shape[1], per_term=10), [], jax.jit(update_history)
    for t, loss in zip(arrays["t"].astype(np.int32), arrays["loss"].astype(np.float32), strict=True):
        history = update(history, t, loss)
        probs.append(second_moment_probs(history, uniform_prob=0.001))
    return {"resampler": np.stack(probs)}, {"resampler": weights / weights.sum(axis=1, keepdims=True)}


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    """(ours, golden, tolerance) of the tables, the maths and, where the case has them, the loops."""
    groups = [(tables(case.config), golden_tables(case), TABLES), (maths(case), case.arrays, maths_tolerance(case))]
    if "loop_x_T" in case.arrays:
        groups.append((loops(case), case.arrays, maths_tolerance(case)))
    return groups


def test_equals_reference(case, computed, report):
    """Operation by operation, as the reference computes; only the loops are compiled."""
    errors = [error for group in computed for error in compare(case.name, *group)]
    report += errors
    check(errors)


def test_every_array_is_compared(case, computed):
    assert case.arrays.keys() - INPUTS <= {name for ours, _, _ in computed for name in ours}
    assert golden_cases.make_case_process(case.config).num_timesteps == case.config["num_timesteps"]


def test_perturbed_arrays_fail(case, computed):
    """Ten times the tolerance, in one entry of any array, is noticed."""
    for ours, golden, tolerance in computed:
        for name in ours.keys() & golden.keys():
            errors = compare(case.name, ours, perturbed(golden, name, tolerance), tolerance)
            with pytest.raises(AssertionError, match=f"{case.name}/{name}: "):
                check(errors)


users_jit = functools.partial(
    jax.jit,
    compiler_options=dict(
        xla_backend_optimization_level=3, xla_llvm_disable_expensive_passes=False, xla_cpu_use_fusion_emitters=True
    ),
)


@pytest.mark.slow
def test_compiled_maths(case, computed):
    """jit contracts products and sums, which moves a difference of large numbers by some units of these."""
    _, (eager, _, tolerance), *_ = computed
    largest = example_size(eager["p_pred_xstart_clip0"]).reshape(-1)  # of x_0 before it is clipped

    def size(golden, name):
        array = golden[name]
        return tolerance.scale(golden, name) + largest.reshape(-1, *[1] * (array.ndim - 1))

    check(compare(case.name, maths(case, users_jit), eager, Tolerance(3e-6, "of the numbers involved", size)))


def test_resampler(report):
    ours, golden = resampler()
    errors = compare("resampler", ours, golden, PROBABILITIES)
    report += errors
    check(errors)
    with pytest.raises(AssertionError, match="resampler"):
        check(compare("resampler", ours, perturbed(golden, "resampler", PROBABILITIES), PROBABILITIES))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing(spacing):
    steps, sections = spacing.split("|")
    assert golden_cases.kept_timesteps(int(steps), sections) == SPACINGS[spacing]
