"""The UNet against the reference's outputs and gradients, for every case of a golden directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.arrays import Cond
from fooddiff.files.torch_file import load_state_dict
from fooddiff.model.network import Network, abstract_params, make_network
from fooddiff.model.openai import from_openai, to_openai
from fooddiff.model.unet import UNet
from tests import golden_cases
from tests.golden_cases import GRADIENTS, Case, Tolerance, check, compare, largest_entry, nchw, nhwc, same_arrays

report = golden_cases.report
CASES = golden_cases.unet_cases()

OUTPUT = Tolerance(1e-4, "of the largest entry", largest_entry)


def load(case: Case) -> tuple[Network, dict]:
    """A case's network and its parameters."""
    network = make_network(UNet, **golden_cases.unet_arguments(case.config))
    return network, from_openai(golden_cases.weights(case), abstract_params(network))


def labels(arrays) -> Cond:
    return {"y": jnp.asarray(arrays["y"], jnp.int32)} if "y" in arrays else {}


def output_and_gradients(case: Case) -> dict[str, np.ndarray]:
    """out, and the gradients of sum(out * R), under the reference's names."""
    network, params = load(case)
    arrays = case.arrays
    x, R, t, cond = nhwc(arrays["x"]), nhwc(arrays["R"]), arrays["t"], labels(arrays)

    def objective(params):
        out = network.apply(params, x, t, cond)
        return (out * R).sum(), out

    gradients, out = xla.jit(jax.grad(objective, has_aux=True))(params)
    gradients = to_openai(gradients)
    return (
        {"out": nchw(out)}
        | {f"grad/{name}": value for name, value in gradients.items()}
        | {f"grad_norm/{name}": np.linalg.norm(value.astype(np.float64)) for name, value in gradients.items()}
    )


@pytest.fixture(**golden_cases.through(CASES, quick=["a"]))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    """(ours, tolerance) of the output and of the gradients."""
    ours = output_and_gradients(case)
    return [({"out": ours.pop("out")}, OUTPUT), (ours, GRADIENTS)]


def test_equals_reference(case, computed, report):
    golden_cases.check_equal(case, computed, report)


def test_every_array_is_compared(case, computed):
    compared = {name for ours, _ in computed for name in ours}
    inputs = {"x", "t", "y", "R"} | {name for name in case.arrays if name.startswith("weights/")}
    assert case.arrays.keys() - inputs <= compared
    assert {f"grad_norm/{name}" for name in golden_cases.weights(case)} <= case.arrays.keys()


def test_perturbed_arrays_fail(case, computed):
    golden_cases.check_perturbed(case, computed)


@pytest.mark.parametrize("path", golden_cases.checkpoint_files(), ids=lambda path: path.name)
def test_openai_checkpoint(path, report):
    """A file in OpenAI's format, read safely, gives the golden output of the UNet that it belongs to."""
    state_dict = load_state_dict(path)
    owners = [case for case in CASES if same_arrays(golden_cases.weights(case), state_dict)]
    assert owners, f"{path.name} holds the weights of none of {[case.name for case in CASES]}"
    for case in owners:
        network = make_network(UNet, **golden_cases.unet_arguments(case.config))
        params = from_openai(state_dict, abstract_params(network))
        out = xla.jit(network.apply)(params, nhwc(case.arrays["x"]), case.arrays["t"], labels(case.arrays))
        golden = {"out of .pt": case.arrays["out"]}
        errors = compare(f"{path.name} as {case.name}", {"out of .pt": nchw(out)}, golden, OUTPUT)
        report += errors
        check(errors)
        assert same_arrays(to_openai(params), state_dict)
