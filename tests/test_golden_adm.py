"""The networks of guided-diffusion, and super-resolution of both repositories, for every case of a golden directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.files.torch_file import load_state_dict
from fooddiff.model.classifier import Classifier
from fooddiff.model.network import Network, abstract_params, make_network
from fooddiff.model.openai import from_openai, to_openai
from fooddiff.model.unet import UNet, resize_bilinear
from tests import golden_cases
from tests.golden_cases import GOLDEN, GRADIENTS, Case, Tolerance, largest_entry, nchw, nhwc, same_arrays

report = golden_cases.report
CASES = [case for kind in ("adm_unet", "adm_classifier", "superres") for case in golden_cases.cases_of_kind(kind)]

OUTPUT = Tolerance(2e-5, "of the largest entry", largest_entry)
LOGITS = Tolerance(1e-5, "of the largest entry", largest_entry)
INPUT_GRADIENTS = Tolerance(5e-5, "of the largest entry", largest_entry)
RESIZED = Tolerance(5e-6, "absolute", lambda golden, name: np.ones(()))


def make_case_network(case: Case) -> Network:
    """The network that a case's arguments describe."""
    arguments = case.config["arguments"]
    match case.config["kind"]:
        case "adm_classifier":
            return make_network(Classifier, **golden_cases.classifier_arguments(arguments))
        case "superres":
            sized = arguments | {"image_size": case.config["large_size"]}
            return make_network(UNet, low_res=True, **golden_cases.unet_arguments(sized))
        case "adm_unet":
            return make_network(UNet, **golden_cases.unet_arguments(arguments))


def computed_unet(case: Case, network: Network, params):
    """out, and the gradients of sum(out * R): [(ours, tolerance), ...]."""
    arrays = case.arrays
    inputs = {name: jnp.asarray(nhwc(arrays[name])) for name in ("x", "low_res") if name in arrays}
    labels = {"y": jnp.asarray(arrays["y"], jnp.int32)} if "y" in arrays else {}

    def objective(params, inputs):
        images = dict(inputs)
        out = network.apply(params, images.pop("x"), arrays["t"], labels | images)
        return (out * nhwc(arrays["R"])).sum(), out

    gradients, of_inputs, out = gradients_of(objective, params, inputs)
    resized = {}
    if "low_res" in inputs:
        resized["upsampled"] = nchw(resize_bilinear(inputs["low_res"], *arrays["x"].shape[2:]))
    for name in arrays:
        if name.startswith("resize/") and name.endswith("/in"):
            result = name.removesuffix("in") + "out"
            resized[result] = nchw(resize_bilinear(jnp.asarray(nhwc(arrays[name])), *arrays[result].shape[2:]))
    return [({"out": nchw(out)}, OUTPUT), (resized, RESIZED), (of_inputs, INPUT_GRADIENTS), (gradients, GRADIENTS)]


def computed_classifier(case: Case, network: Network, params):
    """logits, log p(y | x, t) and the gradients of its sum: [(ours, tolerance), ...]."""
    arrays = case.arrays

    def objective(params, inputs):
        logits = network.apply(params, inputs["x"], arrays["t"])
        chosen = jax.nn.log_softmax(logits)[np.arange(len(logits)), arrays["y"]]
        return chosen.sum(), {"logits": logits, "log_prob": chosen}

    gradients, of_inputs, out = gradients_of(objective, params, {"x": jnp.asarray(nhwc(arrays["x"]))})
    return [(out, LOGITS), (of_inputs, INPUT_GRADIENTS), (gradients, GRADIENTS)]


def gradients_of(objective, params, inputs):
    """Gradients by the names of the golden arrays, of parameters and of inputs; and what else the objective gives."""
    (gradients, of_inputs), out = xla.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, inputs)
    gradients = to_openai(gradients)
    norms = {f"grad_norm/{name}": np.linalg.norm(value.astype(np.float64)) for name, value in gradients.items()}
    return (
        norms | {f"grad/{name}": value for name, value in gradients.items()},
        {f"grad_{name}": nchw(value) for name, value in of_inputs.items()},
        out,
    )


@pytest.fixture(**golden_cases.through(CASES, quick=["adm_unet_a", "adm_classifier"]))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    network = make_case_network(case)
    params = from_openai(golden_cases.weights(case, "state"), abstract_params(network))
    compute = computed_classifier if case.config["kind"] == "adm_classifier" else computed_unet
    return compute(case, network, params)


def test_equals_reference(case, computed, report):
    golden_cases.check_equal(case, computed, report)


def test_every_array_is_compared(case, computed):
    compared = {name for ours, _ in computed for name in ours}
    inputs = {"x", "t", "y", "R", "low_res"}
    inputs |= {name for name in case.arrays if name.startswith("state/") or name.endswith("/in")}
    assert case.arrays.keys() - inputs <= compared
    assert {name for name in compared if not name.startswith("grad/")} <= case.arrays.keys()
    assert {f"grad_norm/{name}" for name in golden_cases.weights(case, "state")} <= case.arrays.keys()


def test_perturbed_arrays_fail(case, computed):
    golden_cases.check_perturbed(case, computed)


@pytest.mark.parametrize(**golden_cases.by_name([case for case in CASES if "checkpoint" in case.config]))
def test_checkpoint(case):
    """A file as guided-diffusion saves it holds the golden parameters, and import and export change no bit."""
    state_dict = load_state_dict(GOLDEN / case.config["checkpoint"])
    assert same_arrays(state_dict, golden_cases.weights(case, "state"))
    params = from_openai(state_dict, abstract_params(make_case_network(case)))
    assert same_arrays(to_openai(params), state_dict)


def test_every_kind_is_known():
    kinds = {path.name: manifest["kind"] for path, manifest in golden_cases.manifests().items() if "kind" in manifest}
    assert set(kinds.values()) <= golden_cases.KINDS, kinds


@pytest.mark.parametrize("setting", [{"dims": 3}, {"use_fp16": True}])
def test_settings_without_a_counterpart_are_refused(setting):
    arguments = dict(image_size=8, in_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[])
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .* only .* has a counterpart here"):
        golden_cases.unet_arguments(arguments | dict(out_channels=3) | setting)
