"""Training as in the reference: the train step's losses, Adam and EMA, for every case of a golden directory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fooddiff import codec, xla
from fooddiff.diffusion.losses import LossTerms
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.openai import from_openai
from fooddiff.model.unet import UNet
from fooddiff.train.averages import make_averages
from fooddiff.train.state import init_state
from fooddiff.train.step import make_train_step
from fooddiff.train.tasks.diffusion import Examples, make_diffusion_task
from fooddiff.train.times import uniform_timesteps
from tests import golden_cases
from tests.golden_cases import Case, Tolerance, check, compare, nchw, nhwc, perturbed

CASES = golden_cases.trajectory_cases()
UNETS = {unet.name: unet for unet in golden_cases.unet_cases()}
INPUTS = {"x0", "eps", "t", "y", "probe_x", "probe_t", "probe_y"}


def _loss_size(golden, name):
    """1 before the first update and 1 more for each update.

    Adam's first update is the sign of the gradient times the learning rate. Among some 1e5 weights a few have a
    gradient that is nothing but rounding; its sign, and with it the weight, differs between any two orders of
    summation. The reference run with another number of threads departs from itself as far as this project does.
    """
    steps = len(golden[name])
    return np.abs(golden[name]) * np.arange(1, steps + 1)[:, None]


LOSSES = Tolerance(1e-4, "of the entry, per step so far", _loss_size)
OUTPUTS = Tolerance(1e-3, "of the largest entry", lambda golden, name: np.abs(golden[name]).max())


@pytest.fixture(scope="module")
def report():
    errors = []
    yield errors
    golden_cases.print_report(errors)


def trajectory(case: Case) -> dict[str, np.ndarray]:
    """Trains through the project's own step.

    The step is handed the recorded examples instead of drawing any, and leaves the losses of each example in the
    state that a timestep sampler would keep.
    """
    config, arrays = case.config, case.arrays
    unet = UNETS[config["unet"]]
    network = make_network(UNet, **golden_cases.unet_arguments(unet.config))
    weights = from_openai(golden_cases.weights(unet), abstract_params(network))

    process = golden_cases.make_case_process(config["diffusion"])
    loss_terms = golden_cases.make_case_loss(config["diffusion"], process.num_timesteps)
    task = make_diffusion_task(
        network,
        codec.pixels(unet.config["image_size"]),
        uniform_timesteps(process),
        partial(golden_cases.make_case_denoiser, config["diffusion"]),
        loss_terms,
        terms=("mse", "vb"),
        conditional="y" in arrays,
        dropout=False,
    )
    no_losses = LossTerms(*(jnp.zeros(arrays["t"].shape[1:]) for _ in LossTerms._fields))
    replay = task._replace(
        init=lambda _: weights,
        init_carried=lambda _: no_losses,
        draw=lambda losses, examples, key: examples,
        observe=lambda losses, examples, terms: (terms, task.observe(None, examples, terms)[1]),
    )
    assert config["optimizer"] == "adam"
    b1, b2 = config["betas"]
    optimizer = optax.adam(config["lr"], b1=b1, b2=b2, eps=config["eps"])
    key, rate = jax.random.key(0), config["ema_rate"]
    averages = make_averages([rate], warmup=False, power_lengths=())
    state = init_state(key, replay, optimizer, averages)
    step = xla.jit(make_train_step(replay, optimizer, averages))

    terms = []
    for i in range(config["steps"]):
        t = jnp.asarray(arrays["t"][i], jnp.int32)
        cond = {"y": jnp.asarray(arrays["y"][i], jnp.int32)} if "y" in arrays else {}
        examples = Examples(nhwc(arrays["x0"][i]), t, jnp.ones(t.shape), nhwc(arrays["eps"][i]), cond)
        state = step(state, examples, key)
        terms.append(state.carried)

    cond = {"y": jnp.asarray(arrays["probe_y"], jnp.int32)} if "probe_y" in arrays else {}
    probe = jax.jit(lambda params: network.apply(params, nhwc(arrays["probe_x"]), arrays["probe_t"], cond))
    weight = golden_cases.vb_weight(config["diffusion"], process.num_timesteps)
    return dict(
        loss=np.stack([term.total for term in terms]),
        mse=np.stack([term.mse for term in terms]),
        vb=weight * np.stack([term.vb for term in terms]),
        probe_out=nchw(probe(state.params)),
        probe_out_ema=nchw(probe(state.ema[str(rate)])),
    )


@pytest.fixture(**golden_cases.through(CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    """(ours, tolerance) of the losses and of the networks at the end."""
    ours = trajectory(case)
    losses = {name: ours.pop(name) for name in ("loss", "mse", "vb")}
    return [(losses, LOSSES), (ours, OUTPUTS)]


def test_equals_reference(case, computed, report):
    errors = [error for ours, tolerance in computed for error in compare(case.name, ours, case.arrays, tolerance)]
    report += errors
    check(errors)


def test_every_array_is_compared(case, computed):
    assert case.arrays.keys() - INPUTS <= {name for ours, _ in computed for name in ours}


def test_perturbed_arrays_fail(case, computed):
    """Ten times the tolerance, in one entry of any array, is noticed."""
    for ours, tolerance in computed:
        for name in ours.keys() & case.arrays.keys():
            errors = compare(case.name, ours, perturbed(case.arrays, name, tolerance), tolerance)
            with pytest.raises(AssertionError, match=f"{case.name}/{name}: "):
                check(errors)
