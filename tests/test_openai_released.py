"""The files that OpenAI released, by the names and shapes of their tensors: no file is at hand."""

import functools
import inspect
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from configs import adm
from fooddiff.arrays import Params
from fooddiff.files.torch_file import load_state_dict
from fooddiff.model.classifier import Classifier
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.openai import from_openai, to_openai
from fooddiff.model.unet import UNet
from tests.golden_cases import classifier_arguments, same_arrays, unet_arguments
from tests.test_files_torch_file import Storage, tensor, zip_bytes

RELEASED = json.loads((Path(__file__).parent / "golden" / "openai_released_shapes.json").read_text())
PUBLISHED_MILLIONS = {
    "64x64_diffusion.pt": 296,
    "128x128_diffusion.pt": 422,
    "256x256_diffusion.pt": 554,
    "512x512_diffusion.pt": 559,
    "64_256_upsampler.pt": 312,
    "128_512_upsampler.pt": 309,
    "upsample_cond_500K.pt": 280,
}  # in the papers and the READMEs

OF_EACH_KIND = ("64x64_diffusion.pt", "64x64_classifier.pt", "64_256_upsampler.pt")
QUICK = "64x64_classifier.pt"  # the others take up to 5 seconds each

each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in RELEASED]
)


@functools.cache
def shapes_of(name: str) -> Params:
    """The parameters of our network for a released file, without memory."""
    released = RELEASED[name]
    arguments = {"image_size": released.get("large_size")} | released["arguments"]
    if released["code"].endswith("EncoderUNetModel"):
        network = make_network(Classifier, **classifier_arguments(arguments))
    else:
        low_res = released["code"].endswith("SuperResModel")
        network = make_network(UNet, low_res=low_res, **unet_arguments(arguments))
    return abstract_params(network)


@each
def test_names_shapes_and_count_of_parameters(name):
    shapes = shapes_of(name)
    assert sum(leaf.size for leaf in shapes.values()) == RELEASED[name]["parameters"]
    if name in PUBLISHED_MILLIONS:
        assert round(RELEASED[name]["parameters"] / 1e6) == PUBLISHED_MILLIONS[name]
    weightless = {ours: np.broadcast_to(np.float32(0), leaf.shape) for ours, leaf in shapes.items()}
    assert {theirs: list(value.shape) for theirs, value in to_openai(weightless).items()} == RELEASED[name]["shapes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_file_of_this_layout_is_imported(name, tmp_path):
    """All tensors are views at different offsets into one storage of random numbers, so that the file stays small."""
    layout = RELEASED[name]["shapes"]
    numel = max(map(math.prod, layout.values())) + len(layout)
    numbers = np.random.default_rng(0).standard_normal(numel, np.float32)
    storage = Storage("0", "Float", numel, numbers.tobytes())
    state = OrderedDict(
        (theirs, tensor(storage, offset, tuple(shape), strides(shape)))
        for offset, (theirs, shape) in enumerate(layout.items())
    )
    (tmp_path / name).write_bytes(zip_bytes(state))
    found = load_state_dict(tmp_path / name)
    for offset, (theirs, shape) in enumerate(layout.items()):
        np.testing.assert_array_equal(found[theirs].ravel(), numbers[offset : offset + math.prod(shape)])
    params = from_openai(found, shapes_of(name))
    assert {ours: value.shape for ours, value in params.items()} == {
        ours: leaf.shape for ours, leaf in shapes_of(name).items()
    }
    assert same_arrays(to_openai(params), found)


@pytest.mark.parametrize("name", [*RELEASED, *RELEASED["256x256_diffusion_uncond.pt"]["also"]])
def test_its_config_has_the_settings_of_the_file(name):
    """Those of the network's shapes and those that no shape shows; what both leave out is the same by default."""
    like = RELEASED["256x256_diffusion_uncond.pt"] if name.startswith("lsun") else RELEASED[name]
    arguments = {"image_size": like.get("large_size")} | like["arguments"]
    if name in ("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt"):
        arguments["dropout"] = 0.1
    config = adm.get_config(name.removesuffix(".pt"))
    if like["code"].endswith("EncoderUNetModel"):
        module, expected = Classifier, classifier_arguments(arguments)
    else:
        module, expected = UNet, unet_arguments(arguments)
        assert expected.pop("out_channels") == 6
        assert config.diffusion.variance == "learned_range"
    assert config.data.image_size == expected.pop("image_size")
    assert expected.pop("in_channels") == 3
    assert ("low_res" in config) == like["code"].endswith("SuperResModel")
    assert config.model.norm_groups == 32
    defaults = {p.name: p.default for p in inspect.signature(module.__init__).parameters.values()}
    ours = {setting: config.model.get(setting, defaults[setting]) for setting in expected}
    for settings in (ours, expected):
        settings["attention_resolutions"] = set(settings["attention_resolutions"])
        if settings["head_channels"] is not None:
            settings.pop("num_heads")
    if "stem_channels" in ours:
        ours["stem_channels"] = ours["stem_channels"] or config.model.model_channels
    assert ours == expected


@pytest.mark.parametrize("other", ["64x64_diffusion.pt", "128x128_classifier.pt", "64_256_upsampler.pt"])
def test_a_file_of_another_network_is_refused(other):
    layout = RELEASED[other]["shapes"]
    state_dict = {theirs: np.broadcast_to(np.float32(0), shape) for theirs, shape in layout.items()}
    with pytest.raises(ValueError, match=r"the checkpoint is of another architecture: \d+ tensors do not fit"):
        from_openai(state_dict, shapes_of(QUICK))


def strides(shape: list[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
