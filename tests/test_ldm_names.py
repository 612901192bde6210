"""Autoencoders in the names of latent-diffusion and of diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from configs import autoencoder
from fooddiff.files.torch_file import load_state_dict
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.autoencoder import Autoencoder
from fooddiff.model.ldm import NAMINGS, from_state_dict, is_of_autoencoder, settings_of, to_state_dict
from fooddiff.model.network import abstract_params, make_network
from tests.golden_cases import same_arrays

SETTINGS = dict(
    image_size=8,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    z_channels=3,
    latent_channels=2,
    num_codes=5,
)
LIKE = abstract_params(make_network(Autoencoder, **SETTINGS))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in LIKE.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_there_and_back_through_files(naming, params, tmp_path):
    state_dict = to_state_dict(params, naming)
    write_state_dict(tmp_path / "file.pt", state_dict)
    contiguous = {name: np.ascontiguousarray(value) for name, value in state_dict.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "file.safetensors")
    for read in (load_state_dict(tmp_path / "file.pt"), safetensors.numpy.load_file(tmp_path / "file.safetensors")):
        assert same_arrays(from_state_dict(read, LIKE), params)


@pytest.mark.parametrize(
    ("ours", "ldm", "diffusers", "diffusers_old"),
    [
        ("to_latent.kernel", "quant_conv.weight", "quant_conv.weight", "quant_conv.weight"),
        ("from_latent.bias", "post_quant_conv.bias", "post_quant_conv.bias", "post_quant_conv.bias"),
        ("codebook", "quantize.embedding.weight", "quantize.embedding.weight", "quantize.embedding.weight"),
        ("decoder.conv_in.kernel", "decoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_in.weight"),
        (
            "encoder.norm_out.scale",
            "encoder.norm_out.weight",
            "encoder.conv_norm_out.weight",
            "encoder.conv_norm_out.weight",
        ),
        (
            "encoder.levels.0.blocks.0.norm_out.scale",
            "encoder.down.0.block.0.norm2.weight",
            "encoder.down_blocks.0.resnets.0.norm2.weight",
            "encoder.down_blocks.0.resnets.0.norm2.weight",
        ),
        (
            "encoder.levels.1.blocks.0.skip.kernel",
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        ),
        (
            "encoder.levels.0.resample.conv.bias",
            "encoder.down.0.downsample.conv.bias",
            "encoder.down_blocks.0.downsamplers.0.conv.bias",
            "encoder.down_blocks.0.downsamplers.0.conv.bias",
        ),
        (
            "decoder.levels.1.resample.conv.bias",
            "decoder.up.1.upsample.conv.bias",
            "decoder.up_blocks.0.upsamplers.0.conv.bias",
            "decoder.up_blocks.0.upsamplers.0.conv.bias",
        ),
        (
            "decoder.levels.1.attentions.1.out.kernel",
            "decoder.up.1.attn.1.proj_out.weight",
            "decoder.up_blocks.0.attentions.1.to_out.0.weight",
            "decoder.up_blocks.0.attentions.1.proj_attn.weight",
        ),
        (
            "decoder.middle.attention.q.kernel",
            "decoder.mid.attn_1.q.weight",
            "decoder.mid_block.attentions.0.to_q.weight",
            "decoder.mid_block.attentions.0.query.weight",
        ),
        (
            "decoder.middle.last.conv_in.bias",
            "decoder.mid.block_2.conv1.bias",
            "decoder.mid_block.resnets.1.conv1.bias",
            "decoder.mid_block.resnets.1.conv1.bias",
        ),
    ],
)
def test_names(ours, ldm, diffusers, diffusers_old, params):
    marked = {name: np.full_like(value, name == ours) for name, value in params.items()}
    for naming, name in zip(NAMINGS, (ldm, diffusers, diffusers_old), strict=True):
        assert [found for found, value in to_state_dict(marked, naming).items() if value.any()] == [name]


def test_layouts(params):
    ours = params["decoder.middle.attention.q.kernel"][0, 0]
    theirs = to_state_dict(params, "ldm")["decoder.mid.attn_1.q.weight"]
    np.testing.assert_array_equal(theirs, ours.T[..., None, None])
    np.testing.assert_array_equal(
        to_state_dict(params, "diffusers")["decoder.mid_block.attentions.0.to_q.weight"], ours.T
    )
    np.testing.assert_array_equal(
        to_state_dict(params, "ldm")["encoder.conv_in.weight"],
        params["encoder.conv_in.kernel"].transpose(3, 2, 0, 1),
    )


def test_the_first_stage_of_a_diffusion_model_in_half_precision(params):
    state_dict = {
        f"first_stage_model.{name}": value.astype(np.float16) for name, value in to_state_dict(params, "ldm").items()
    }
    other = {"model.diffusion_model.out.0.weight": np.ones(3), "decoder.unrelated": np.ones(2)}
    halved = from_state_dict(state_dict | other, LIKE)
    assert all(value.dtype == np.float32 for value in halved.values())
    assert same_arrays(halved, {name: value.astype(np.float16) for name, value in params.items()})


def test_what_training_left_is_ignored_and_what_does_not_fit_refused(params):
    state_dict = to_state_dict(params, "ldm")
    training = {"loss.logvar": np.ones(()), "model_ema.decay": np.ones(()), "colorize": np.ones((3, 4, 1, 1))}
    assert same_arrays(from_state_dict(state_dict | training, LIKE), params)
    with pytest.raises(ValueError, match=r"first\n  decoder.up.7.block.0.conv1.bias: the model has none"):
        from_state_dict(state_dict | {"decoder.up.7.block.0.conv1.bias": np.ones(4, np.float32)}, LIKE)
    missing = {name: value for name, value in state_dict.items() if name != "quant_conv.bias"}
    with pytest.raises(ValueError, match=r"quant_conv.bias: the model has \(2,\), the file has none"):
        from_state_dict(missing, LIKE)
    with pytest.raises(ValueError, match=r"quant_conv.bias: the model has \(2,\), the file has \(3,\)"):
        from_state_dict(state_dict | {"quant_conv.bias": np.ones(3, np.float32)}, LIKE)
    with pytest.raises(ValueError, match="of another architecture"):
        from_state_dict({}, LIKE)


KL = SETTINGS | dict(channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8, 2), num_codes=None)


def weightless(settings):
    """An autoencoder's parameters without memory."""
    like = abstract_params(make_network(Autoencoder, **settings))
    return {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in like.items()}


@pytest.fixture(scope="module", params=[SETTINGS, KL], ids=["vq", "kl"])
def sized(request):
    return request.param, weightless(request.param)


@pytest.mark.parametrize("naming", NAMINGS)
def test_settings_are_seen_from_names_and_shapes(naming, sized):
    settings, params = sized
    state_dict = to_state_dict(params, naming)
    found = settings_of(state_dict, image_size=settings["image_size"])
    assert found | {"image_size": 8} == {"num_codes": None, "norm_groups": 32} | settings
    within = {f"first_stage_model.{name}": value for name, value in state_dict.items()}
    assert settings_of(within | {"model.conv_in.weight": np.ones(3)}, image_size=8) == found
    for name in ("encoder.conv_in.weight", "post_quant_conv.weight"):
        with pytest.raises(ValueError, match=f"it has no {name} of 4 axes"):
            settings_of({other: value for other, value in state_dict.items() if other != name}, image_size=8)


SD = json.loads((Path(__file__).parent / "golden" / "sd_autoencoder_shapes.json").read_text())


@pytest.fixture(scope="module")
def stable_diffusion():
    model = autoencoder.get_config("sd").model.to_dict()
    settings = {name: value for name, value in model.items() if name not in ("network", "dtype")}
    return settings, weightless(settings | dict(image_size=64))


@pytest.mark.parametrize("naming", SD)
def test_stable_diffusions_file_fits_its_config(naming, stable_diffusion):
    settings, ours = stable_diffusion
    shapes = {name: tuple(shape) for name, shape in SD[naming]["shapes"].items()}
    file = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert all(map(is_of_autoencoder, file))
    assert settings_of(file, image_size=64) | {"dropout": 0.0} == settings
    assert sum(value.size for value in ours.values()) == 83_653_863
    assert {name: value.shape for name, value in to_state_dict(ours, naming).items()} == shapes
