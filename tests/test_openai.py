import jax
import numpy as np
import pytest

from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.openai import check_is_openais, from_openai, openai_name, to_openai
from fooddiff.model.unet import UNet

TINY = dict(
    image_size=8,
    out_channels=6,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    num_classes=3,
)


@pytest.fixture(scope="module")
def shapes():
    return abstract_params(make_network(UNet, **TINY))


@pytest.fixture(scope="module")
def params(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_export_and_import_are_bitwise_inverses(params, shapes):
    again = from_openai(to_openai(params), shapes)
    assert again.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_import_takes_lower_precision_and_gives_float32(params, shapes):
    half = {name: value.astype(np.float16) for name, value in to_openai(params).items()}
    imported = from_openai(half, shapes)
    assert {value.dtype for value in imported.values()} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16)), imported, params)


def test_layouts_are_torchs(params):
    exported = to_openai(params)
    kernel = params["down.1.layers.0.conv_in.kernel"]
    assert kernel.shape == (3, 3, 32, 32)
    np.testing.assert_array_equal(exported["input_blocks.1.0.in_layers.2.weight"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(exported["time_embed.0.weight"], params["time_in.kernel"].T)
    np.testing.assert_array_equal(exported["label_emb.weight"], params["label.embedding"])
    assert exported["middle_block.1.qkv.weight"].shape == (192, 64, 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("time_out.bias", "time_embed.2.bias"),
        ("down.0.layers.0.kernel", "input_blocks.0.0.weight"),
        ("down.2.layers.0.conv.kernel", "input_blocks.2.0.op.weight"),
        ("up.1.layers.2.conv.bias", "output_blocks.1.2.conv.bias"),
        ("up.0.layers.0.skip.kernel", "output_blocks.0.0.skip_connection.weight"),
        ("middle.layers.1.out.kernel", "middle_block.1.proj_out.weight"),
        ("norm_out.scale", "out.0.weight"),
        ("conv_out.bias", "out.2.bias"),
    ],
)
def test_names(ours, theirs):
    assert openai_name(ours) == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_classes=None), r"label_emb.weight: the model has none, the file has \(3, 128\)"),
        (dict(num_classes=4), r"label_emb.weight: the model has \(4, 128\), the file has \(3, 128\)"),
        (dict(out_channels=3), r"2 tensors do not fit.*\n  out.2.bias: the model has \(3,\)"),
        (dict(num_res_blocks=2), r"input_blocks.\S+: the model has .*, the file has none"),
        (dict(scale_shift_norm=False), r"emb_layers.1.weight: the model has \(32, 128\), the file has \(64, 128\)"),
    ],
)
def test_another_architecture_names_the_first_tensors(params, change, message):
    other = abstract_params(make_network(UNet, **(TINY | change)))
    with pytest.raises(ValueError, match=message) as error:
        from_openai(to_openai(params), other)
    assert len(str(error.value).splitlines()) <= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_groups=8), "norm_groups is 8, but OpenAI's UNet always normalises in 32 groups"),
        (dict(network="uvit"), "config.model.network is 'uvit', but OpenAI's code has 'unet' and 'adm_encoder' alone"),
        (dict(network="adm_encoder", patch_size=4), "config.model.patch_size is 4"),
    ],
)
def test_what_openais_code_does_not_have_is_refused(change, message):
    check_is_openais(dict(norm_groups=32))
    with pytest.raises(ValueError, match=message):
        check_is_openais(dict(norm_groups=32) | change)
