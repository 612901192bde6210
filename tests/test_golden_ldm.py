"""The autoencoders of latent-diffusion, and TAESD, against their own code, for every case of a golden directory."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.autoencoder import Autoencoder
from fooddiff.model.bottleneck import draw, kl_divergence, negative_log_density, posterior_of, quantize
from fooddiff.model.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from fooddiff.model.ldm import from_state_dict, to_state_dict
from fooddiff.model.network import Network, abstract_params, make_network
from fooddiff.model.taesd import TAESD, from_taesd, settings_of, to_taesd
from tests import golden_cases
from tests.golden_cases import GRADIENTS, Case, Tolerance, check, compare, largest_entry, nchw, nhwc, perturbed

NETWORKS = ("ldm_autoencoder_kl", "ldm_vq_model")
CASES = [
    case
    for kind in (*NETWORKS, "ldm_autoencoder_vq", "ldm_discriminator", "taesd")
    for case in golden_cases.cases_of_kind(kind)
]

OUTPUT = Tolerance(2e-5, "of the largest entry", largest_entry)
INPUT_GRADIENTS = Tolerance(5e-5, "of the largest entry", largest_entry)
QUANTIZER = Tolerance(1e-6, "of the largest entry", largest_entry)
EXACT = Tolerance(0, "absolute", lambda golden, name: np.ones(()))


def _example_size(golden, name):
    """max(1, the largest entry) of each example."""
    array = np.abs(golden[name])
    return np.maximum(1, array.max(axis=tuple(range(1, array.ndim)), keepdims=True))


GAUSSIAN = Tolerance(1e-5, "of max(1, the example's largest entry)", _example_size)


@pytest.fixture(scope="module")
def report():
    errors = []
    yield errors
    golden_cases.print_report(errors)


def autoencoder_arguments(config) -> dict:
    """The arguments of ours, from those of the reference, where attention at a size that never occurs has no effect."""
    network = config["ddconfig"]
    golden_cases.refuse_others(
        network, resamp_with_conv=True, attn_type="vanilla", use_linear_attn=False, tanh_out=False, give_pre_end=False
    )
    channel_mult = tuple(network.get("ch_mult", (1, 2, 4, 8)))
    sizes = {network["resolution"] >> level for level in range(len(channel_mult))}
    return dict(
        image_size=network["resolution"],
        in_channels=network["in_channels"],
        out_channels=network["out_ch"],
        model_channels=network["ch"],
        channel_mult=channel_mult,
        num_res_blocks=network["num_res_blocks"],
        attention_resolutions=tuple(sizes & set(network["attn_resolutions"])),
        z_channels=network["z_channels"],
        latent_channels=config["embed_dim"],
        num_codes=config.get("n_embed"),
        dropout=network.get("dropout", 0.0),
    )


def load(case: Case) -> tuple[Network, dict]:
    """A case's autoencoder and its parameters."""
    network = make_network(Autoencoder, **autoencoder_arguments(case.config["arguments"]))
    return network, from_state_dict(golden_cases.weights(case, "state"), abstract_params(network))


def images(case: Case, *names: str) -> list[jax.Array]:
    return [jnp.asarray(nhwc(case.arrays[name])) for name in names]


def as_golden(arrays) -> dict[str, np.ndarray]:
    """Feature maps in the layout of the golden arrays."""
    return {name: nchw(value) if np.ndim(value) == 4 else np.asarray(value) for name, value in arrays.items()}


def named_gradients(gradients) -> dict[str, np.ndarray]:
    """Gradients of parameters and their norms, by the names of the golden arrays."""
    return with_norms(to_state_dict(gradients, "ldm"))


def with_norms(gradients) -> dict[str, np.ndarray]:
    norms = {f"grad_norm/{name}": np.linalg.norm(value.astype(np.float64)) for name, value in gradients.items()}
    return norms | {f"grad/{name}": value for name, value in gradients.items()}


def computed_kl(case: Case):
    """Everything between x and the objective, its gradients, and the Gaussian alone: [(ours, tolerance), ...]."""
    network, params = load(case)
    x, noise, z = images(case, "x", "noise", "z")

    def objective(params, x):
        encode, decode = (partial(network.apply, params, method=m) for m in (Autoencoder.encode, Autoencoder.decode))
        moments = encode(x)
        posterior = posterior_of(moments)
        sample = draw(posterior, noise)
        reconstruction = decode(sample)
        kl, mse = kl_divergence(posterior), ((reconstruction - x) ** 2).mean()
        total = mse + case.config["kl_weight"] * kl.mean()
        return total, dict(
            h=network.apply(params, x, method=lambda autoencoder, x, dropout_key: autoencoder.encoder(x)),
            moments=moments, mean=posterior.mean, logvar=posterior.log_var, std=jnp.exp(posterior.log_var / 2), kl=kl,
            sample=sample, reconstruction=reconstruction, reconstruction_of_mode=decode(posterior.mean),
            decoded_z=decode(z), mse=mse, objective=total,
        )  # fmt: skip

    (gradients, of_x), outputs = xla.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
    return [
        (as_golden(outputs), OUTPUT),
        (as_golden({"grad_x": of_x}), INPUT_GRADIENTS),
        (named_gradients(gradients), GRADIENTS),
        (as_golden(computed_gaussian(case)), GAUSSIAN),
    ]


def computed_gaussian(case: Case):
    moments, others, noise = images(case, "gaussian/moments", "gaussian/other_moments", "gaussian/noise")
    posterior, other = posterior_of(moments), posterior_of(others)
    sample = draw(posterior, noise)
    ours = dict(
        mean=posterior.mean, mode=posterior.mean, logvar=posterior.log_var, std=jnp.exp(posterior.log_var / 2),
        var=jnp.exp(posterior.log_var), sample=sample, kl=kl_divergence(posterior),
        kl_to_other=kl_divergence(posterior, other), nll_under_other=negative_log_density(other, sample),
    )  # fmt: skip
    return {f"gaussian/{name}": value for name, value in ours.items()}


def computed_vq_model(case: Case):
    """Everything between x and the objective, and its gradients: [(ours, tolerance), ...]."""
    network, params = load(case)
    x, z = images(case, "x", "z")

    def objective(params, x):
        decode = partial(network.apply, params, method=Autoencoder.decode)
        prequant = network.apply(params, x, method=Autoencoder.encode)
        quantized = quantize(prequant, params["codebook"])
        reconstruction = decode(quantized.z)
        mse = ((reconstruction - x) ** 2).mean()
        total = mse + quantized.loss
        indices = quantized.indices.reshape(-1)
        return total, (indices, dict(
            prequant=prequant, quantized=quantized.z, codebook_loss=quantized.loss, reconstruction=reconstruction,
            decoded_z=decode(quantize(z, params["codebook"]).z), decoded_z_not_quantized=decode(z),
            mse=mse, objective=total,
        ))  # fmt: skip

    (gradients, of_x), (indices, outputs) = xla.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
    return [
        ({"indices": np.asarray(indices)}, EXACT),
        (as_golden(outputs), OUTPUT),
        (as_golden({"grad_x": of_x}), INPUT_GRADIENTS),
        (named_gradients(gradients), GRADIENTS),
    ]


def computed_quantizer(case: Case):
    """The quantiser alone: [(ours, tolerance), ...]."""
    codebook = jnp.asarray(case.arrays["state/embedding.weight"])
    z, R = images(case, "z", "R")
    beta = case.config["arguments"]["beta"]
    quantized = quantize(z, codebook, beta=beta)
    entry = codebook[quantized.indices]
    straight = jax.grad(lambda z: (quantize(z, codebook, beta=beta).z * R).sum())(z)
    ours = {"quantized": quantized.z, "entry": entry, "straight_through_grad_z": straight}
    for name, legacy in (("legacy", True), ("not_legacy", False)):

        def loss(z, codebook, *, through, legacy=legacy):
            quantized = quantize(z, codebook, beta=beta, legacy=legacy)
            return quantized.loss + (quantized.z * R).sum() * through

        ours[f"{name}/loss"] = loss(z, codebook, through=0)
        for prefix, through in (("loss_grad", 0), ("grad", 1)):
            of_z, of_codebook = jax.grad(partial(loss, through=through), argnums=(0, 1))(z, codebook)
            ours |= {f"{name}/{prefix}_z": of_z, f"{name}/{prefix}_codebook": of_codebook}
    indices = np.asarray(quantized.indices)
    return [({"indices": indices.reshape(-1), "indices_bhw": indices}, EXACT), (as_golden(ours), QUANTIZER)]


def discriminator_name(name: str, num_layers: int) -> str:
    """The reference's name for a parameter of the discriminator: a place among convolutions, norms and ReLUs."""
    kind, index, leaf = name.split(".")
    index = int(index) + (kind == "norms")
    place = {0: 0, num_layers + 1: 3 * num_layers + 2}.get(index, 3 * index - 1) + (kind == "norms")
    return f"main.{place}.{'bias' if leaf == 'bias' else 'weight'}"


def computed_discriminator(case: Case):
    """Logits, losses, and gradients of the discriminator and of the layer before it: [(ours, tolerance), ...]."""
    arguments, arrays = case.config["arguments"], case.arrays
    network = make_network(
        PatchDiscriminator,
        in_channels=arguments["input_nc"],
        channels=arguments["ndf"],
        num_layers=arguments["n_layers"],
    )
    names = {name: discriminator_name(name, arguments["n_layers"]) for name in abstract_params(network)}
    weights = golden_cases.weights(case, "state")
    assert sorted(names.values()) == sorted(weights)
    params = {
        name: jnp.asarray(weights[theirs].transpose(2, 3, 1, 0) if weights[theirs].ndim == 4 else weights[theirs])
        for name, theirs in names.items()
    }
    x, reconstructed, features = images(case, "x", "reconstructed", "features")
    last = jnp.asarray(arrays["last_layer"].transpose(2, 3, 1, 0))

    def decode(last):
        return jax.lax.conv_general_dilated(features, last, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(params):
        logits = network.apply(params, x), network.apply(params, reconstructed)
        return hinge_loss(*logits), logits

    @xla.jit
    def run(params, last):
        (total, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        adversary, by_adversary = jax.value_and_grad(lambda last: generator_loss(network.apply(params, decode(last))))(
            last
        )
        by_pixels = jax.grad(lambda last: jnp.abs(x - decode(last)).sum() / len(x))(last)
        return gradients, dict(
            logits=logits[0], logits_reconstructed=logits[1], hinge_loss=total, generator_loss=adversary,
            adaptive_weight=adaptive_weight(by_pixels, by_adversary),
        ), by_adversary  # fmt: skip

    gradients, outputs, by_adversary = run(params, last)
    gradients = {names[name]: np.asarray(value) for name, value in gradients.items()}
    gradients = {name: g.transpose(3, 2, 0, 1) if g.ndim == 4 else g for name, g in gradients.items()}
    return [
        (as_golden(outputs), OUTPUT),
        ({"grad_last_layer": np.asarray(by_adversary).transpose(3, 2, 0, 1)}, INPUT_GRADIENTS),
        (with_norms(gradients), GRADIENTS),
    ]


def taesd_weights(case: Case) -> list[dict[str, np.ndarray]]:
    """The state dicts of encoder and decoder that the manifest's recipe gives."""

    def drawn(name, shape):
        g = np.random.default_rng([case.config["seed"], zlib.crc32(name.encode())])
        if len(shape) == 4:
            value = g.normal(size=shape) * np.sqrt(1 / np.prod(shape[1:]))
        else:
            value = g.uniform(0.5, 1.5, size=shape) if name.endswith("weight") else g.normal(size=shape) * 0.1
        return value.astype(np.float32)

    return [
        {name: drawn(f"{half}.{name}", shape) for name, shape in case.config["shapes"][half].items()}
        for half in ("encoder", "decoder")
    ]


def computed_taesd(case: Case):
    """Both halves: [(ours, tolerance), ...]. Images are in [0, 1] there."""
    weights = taesd_weights(case)
    network = make_network(TAESD, **settings_of(weights[1]))
    params = from_taesd(*weights, abstract_params(network))
    assert all(golden_cases.same_arrays(*pair) for pair in zip(to_taesd(params), weights, strict=True))
    x, z = images(case, "x", "z")
    latents = xla.jit(partial(network.apply, method=TAESD.encode))(params, 2 * x - 1)
    decoded = xla.jit(partial(network.apply, method=TAESD.decode))(params, z)
    return [(as_golden({"latents": latents, "decoded": (decoded + 1) / 2}), OUTPUT)]


COMPUTED = {
    "ldm_autoencoder_kl": computed_kl,
    "ldm_vq_model": computed_vq_model,
    "ldm_autoencoder_vq": computed_quantizer,
    "ldm_discriminator": computed_discriminator,
    "taesd": computed_taesd,
}


@pytest.fixture(**golden_cases.through(CASES, quick=["ldm_autoencoder_vq", "taesd_a", "ldm_discriminator"]))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    return COMPUTED[case.config["kind"]](case)


def test_equals_reference(case, computed, report):
    errors = [error for ours, tolerance in computed for error in compare(case.name, ours, case.arrays, tolerance)]
    report += errors
    check(errors)


def test_every_array_is_compared(case, computed):
    compared = {name for ours, _ in computed for name in ours}
    inputs = {
        "x",
        "z",
        "R",
        "noise",
        "reconstructed",
        "features",
        "last_layer",
        "gaussian/moments",
        "gaussian/other_moments",
        "gaussian/noise",
    }
    inputs |= {name for name in case.arrays if name.startswith("state/")}
    assert case.arrays.keys() - inputs <= compared
    assert {name for name in compared if not name.startswith("grad/")} <= case.arrays.keys()
    if case.config["kind"] in NETWORKS:
        assert {f"grad_norm/{name}" for name in golden_cases.weights(case, "state")} <= case.arrays.keys()


def test_perturbed_arrays_fail(case, computed):
    """Ten times the tolerance (of indices: one), in one entry of any array, is noticed."""
    for ours, tolerance in computed:
        moved = tolerance._replace(value=tolerance.value or 0.1)
        for name in ours.keys() & case.arrays.keys():
            golden = {**case.arrays, name: perturbed(case.arrays, name, moved)[name]}
            errors = compare(case.name, {name: ours[name]}, golden, tolerance)
            with pytest.raises(AssertionError, match=f"{case.name}/{name}: "):
                check(errors)


@pytest.mark.parametrize(**golden_cases.by_name([case for case in CASES if case.config["kind"] in NETWORKS]))
def test_names_of_the_reference(case):
    """Import and export change no bit."""
    state_dict = golden_cases.weights(case, "state")
    assert golden_cases.same_arrays(to_state_dict(load(case)[1], "ldm"), state_dict)
