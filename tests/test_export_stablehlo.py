"""Compiled exports: the code on the model card runs them where this program is not, and draws what we draw."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import classifier, digits, food101_cheap, superres
from fooddiff import build
from fooddiff.codec import to_uint8
from fooddiff.convert import stablehlo
from fooddiff.convert.exporting import export
from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.samplers import begin, ddim
from fooddiff.low_res import LowRes
from tests.test_export_diffusers import saved

ALONE = """\
import sys
class Nothing:
    def find_spec(self, name, *_):
        assert not name.startswith(("fooddiff", "flax")), name
sys.meta_path.insert(0, Nothing())
"""


def uvit():
    config = food101_cheap.get_config()
    config.data.image_size = 16
    config.model.update({"width": 32, "depth": 2, "num_heads": 2, "conv_channels": 16, "embed_dim": 32})
    config.model.num_classes = 4
    config.model.num_res_blocks = 1
    config.sample.update({"steps": 4, "guidance": 1.0, "interval": None})
    return config


def unet():
    config = digits.get_config()
    config.diffusion.timesteps = 20
    config.model.update({"channel_mult": (1,), "attention_resolutions": (), "num_classes": 4})
    config.sample.steps = 5
    return config


@pytest.mark.slow
@pytest.mark.parametrize("make", [uvit, unet])
def test_the_cards_code_draws_our_images_without_this_program(tmp_path, make):
    config = make()
    params = saved(tmp_path / "model.safetensors", config)
    export(tmp_path / "model.safetensors", step=None, weights="ema", out=tmp_path / "out", format="stablehlo")
    _, _, code = (tmp_path / "out" / "README.md").read_text().partition("```python\n")
    code = code.partition("```")[0] + "np.save('images', images)\n"
    subprocess.run([sys.executable, "-c", ALONE + code], check=True, cwd=tmp_path, timeout=120)

    model = build.make_diffusion_model(config)
    noise = np.random.default_rng(0).standard_normal((4, *model.codec.shape), np.float32)
    denoise = clipped(model.denoiser(partial(model.network.apply, params)))
    steps = model.steps(build.sampler_spec(config.sample))
    ours = jax.jit(partial(ddim, denoise, noise=lambda _: 0.0, cond={"y": np.arange(4)}))(steps, begin(noise)).x_t
    drawn, expected = np.load(tmp_path / "images.npy"), np.asarray(to_uint8(ours))
    assert drawn.std() > 10
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["weights"] == "raw"


def test_other_tasks_are_refused(tmp_path):
    trained = SimpleNamespace(config=classifier.get_config(), model=None)
    with pytest.raises(ValueError, match=r"config\.task is 'classifier'"):
        stablehlo.write_folder(tmp_path, {}, trained)
    enlarging = SimpleNamespace(low_res=LowRes(16, 0.2, 0.05))
    with pytest.raises(ValueError, match=r"config\.low_res is set"):
        stablehlo.write_folder(tmp_path, {}, SimpleNamespace(config=superres.get_config(), model=enlarging))
