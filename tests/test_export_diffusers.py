"""Exports that diffusers loads: names both ways, what is refused, and the same steps in diffusers itself."""

import functools
import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import food101_cheap, hybrid, superres
from fooddiff import build, parallel
from fooddiff.commands.convert import main
from fooddiff.convert import diffusers
from fooddiff.convert.exporting import export
from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.guidance import guided, unconditional
from fooddiff.diffusion.level import for_batch
from fooddiff.diffusion.samplers import ancestral_step
from fooddiff.model.diffusers import HEADS_CLASS, PLAIN_CLASS, from_diffusers, to_diffusers, unet_config
from fooddiff.runs.load import TrainedModel, load_trained
from fooddiff.runs.weights_file import write_weights
from fooddiff.runs.workdir import to_json
from tests.openai_files import random_params

PYTHON = os.environ.get("FOODDIFF_REFERENCE_PYTHON")
PEER = Path(__file__).parent / "peers" / "diffusers_steps.py"


def small(**changes):
    """The report's hybrid model in the small: its heads have other widths on every level."""
    config = hybrid.get_config()
    config.data.image_size = 16
    config.diffusion.timesteps = 40
    config.model.model_channels = 16
    config.model.norm_groups = 8
    config.model.channel_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (16, 8)
    config.model.num_classes = 5
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def get_config():
    """For a command that takes a config file."""
    return small()


def adm():
    config = small(model__null_label=True, model__attention_resolutions=(8,), diffusion__prediction="v")
    config.model.update({"resblock_updown": True, "head_channels": 16, "new_attention_order": True})
    return config


CONFIGS = {
    "heads": small(),
    "plain": small(
        model__num_classes=None, model__scale_shift_norm=False, model__num_res_blocks=2,
        model__attention_resolutions=(), diffusion__variance="fixed_large", diffusion__schedule="linear",
        diffusion__rescale_timesteps=False,
    ),
    "adm": adm(),
}  # fmt: skip


def saved(path, config, seed=0):
    """A file of random weights of a config."""
    names = tuple(f"dish_{y}" for y in range(config.model.num_classes or 1))
    about = {"config": to_json(config), "class_names": names, "step": 7, "weights": "raw", "images_seen": 7}
    params = random_params(config, seed)
    write_weights(path, params, about, half=False)
    return params


@functools.cache
def made(name):
    """The weights of each config, and a model that has them."""
    config = CONFIGS[name]
    names = tuple(f"dish_{y}" for y in range(config.model.num_classes or 1))
    params = random_params(config)
    return params, TrainedModel(config, build.make_diffusion_model(config), names, params, 7, "raw", {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of each config."""
    root = tmp_path_factory.mktemp("diffusers")
    for name in CONFIGS:
        (root / name).mkdir()
        diffusers.write_folder(root / name, *made(name))
    return {name: root / name for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_go_there_and_back(name):
    params, trained = made(name)
    there = to_diffusers(params, trained.config.model)
    assert sum(value.size for value in there.values()) == sum(value.size for value in params.values())
    back = from_diffusers(there, params, trained.config.model)
    assert all(np.array_equal(back[each], value) for each, value in params.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_are_those_of_diffusers(exported, name):
    """What diffusers 0.42.1 calls them and how they are shaped lies beside this test."""
    known = json.loads((Path(__file__).parent / "peers" / "diffusers_names.json").read_text())[name]
    tensors = safetensors.numpy.load_file(exported[name] / "unet" / diffusers.WEIGHTS)
    assert sorted(f"{key} {value.shape}" for key, value in tensors.items()) == sorted(known)


def test_a_folder_says_how_it_is_loaded(exported):
    index = json.loads((exported["heads"] / "model_index.json").read_text())
    assert index["unet"] == ["unet", HEADS_CLASS]
    assert (exported["heads"] / "unet" / "unet.py").is_file()
    assert index["timestep_scale"] == 25
    assert index["id2label"]["4"] == "dish_4"
    plain = json.loads((exported["plain"] / "model_index.json").read_text())
    assert plain["unet"] == ["diffusers", PLAIN_CLASS]
    assert plain["id2label"] is None
    assert not (exported["plain"] / "unet" / "unet.py").exists()
    assert json.loads((exported["adm"] / "model_index.json").read_text())["null_label"] == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_mult", (2, 2)), ("stem_channels", 32), ("conv_resample", False), ("num_heads_upsample", 2),
        ("low_res", True),
    ],
)  # fmt: skip
def test_a_unet_that_diffusers_lacks_is_refused_by_its_field(field, value):
    with pytest.raises(ValueError, match=rf"config\.model\.{field} is"):
        unet_config(
            small(model__attention_resolutions=()).model.to_dict() | {field: value},
            image_size=16, in_channels=3, out_channels=6,
        )  # fmt: skip


def test_super_resolution_is_refused():
    with pytest.raises(ValueError, match=r"config\.low_res is 'a small image'"):
        diffusers.unet_of(superres.get_config())


def test_other_networks_are_refused_and_leave_nothing(tmp_path):
    config = food101_cheap.get_config()
    config.model.update({"width": 32, "depth": 2, "conv_channels": 32, "embed_dim": 32, "num_classes": 3})
    saved(tmp_path / "uvit.safetensors", config)
    with pytest.raises(ValueError, match=r"config\.model\.network is 'uvit'.*--format=stablehlo"):
        export(tmp_path / "uvit.safetensors", step=None, weights="ema", out=tmp_path / "out", format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["uvit.safetensors"]


@pytest.mark.slow
def test_a_folder_comes_back_to_the_bit(exported, tmp_path):
    config = f"--config={Path(__file__).parent / 'test_export_diffusers.py'}"
    main(["import", str(exported["heads"] / "unet"), config, f"--workdir={tmp_path / 'back'}"])
    trained = load_trained(tmp_path / "back", step=None, weights="raw", mesh=parallel.make_mesh())
    for name, value in made("heads")[0].items():
        assert np.array_equal(trained.params[name], value), name
    assert trained.class_names == ("0", "1", "2", "3", "4")


def test_a_network_that_is_not_the_configs_is_refused_by_its_fields(exported, tmp_path):
    """As DDPM's first models in diffusers, and as a class of networks that is none of ours."""
    folder, config = tmp_path / "unet", CONFIGS["plain"]
    shutil.copytree(exported["plain"] / "unet", folder)
    theirs = json.loads((folder / "config.json").read_text())
    like = made("plain")[0]
    old = {name: value for name, value in theirs.items() if diffusers.ABSENT.get(name, "") != value}
    old["attn_norm_num_groups"] = None
    (folder / "config.json").write_text(json.dumps(old))
    assert diffusers.read_folder(folder, config, like).keys() == like.keys()
    (folder / "config.json").write_text(json.dumps(theirs | {"freq_shift": 1, "norm_eps": 1e-6, "skip": "conv"}))
    with pytest.raises(ValueError, match=r"norm_eps is 1e-06, .*freq_shift is 1, .*skip is 'conv'"):
        diffusers.read_folder(folder, config, like)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        diffusers.read_folder(folder, config, like)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        diffusers.read_folder(folder, config, like)


def our_steps(params, trained, *, steps, guidance, n=3):
    """Ancestral steps along one trajectory: x_t of each step, its noise, and what follows, NCHW."""
    model = trained.model
    denoise = model.denoiser(partial(model.network.apply, params))
    if guidance != 1:
        denoise = guided(denoise, unconditional(denoise, model.null_label), scale=guidance)
    y = np.arange(n, dtype=np.int32) % (model.num_classes or 1)
    cond = {} if model.num_classes is None else {"y": y}

    @jax.jit
    def advance(x_t, here, noise):
        here = for_batch(here, n)
        return ancestral_step(clipped(denoise)(x_t, here.level, cond), x_t, here, noise)

    along = model.steps(build.sampler_spec(trained.config.sample, steps=steps))
    drawn = np.random.default_rng(0).standard_normal((steps + 1, n, *model.codec.shape), np.float32)
    x = [drawn[-1]]
    for i in range(steps):
        x.append(np.asarray(advance(x[-1], jax.tree.map(lambda number, i=i: number[i], along), drawn[i])))
    x = np.moveaxis(np.stack(x), -1, 2)
    given = {"x_t": x[:-1], "noise": np.moveaxis(drawn[:-1], -1, 2), "y": y, "steps": steps, "guidance": guidance}
    return given, x[1:]


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="FOODDIFF_REFERENCE_PYTHON names no Python of an environment with diffusers")
def test_diffusers_takes_the_same_steps(exported, tmp_path):
    cases = {"heads": (40, 1.0), "plain": (12, 1.0), "adm": (15, 2.0)}
    expected, arguments = {}, []
    for name, (steps, guidance) in cases.items():
        given, expected[name] = our_steps(*made(name), steps=steps, guidance=guidance)
        np.savez(tmp_path / f"{name}_in.npz", **given)
        arguments.append(f"{exported[name]}:{tmp_path / name}_in.npz:{tmp_path / name}_out.npz")
    subprocess.run([PYTHON, PEER, *arguments], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name, x_next in expected.items():
        found = np.load(tmp_path / f"{name}_out.npz")
        step, end = np.abs(found["x_next"] - x_next).max(), np.abs(found["end"] - x_next[-1]).max()
        print(f"{name}: {found['network']}, {len(x_next)} steps, they differ by {step:.2g}, after all by {end:.2g}")
        np.testing.assert_allclose(found["x_next"], x_next, atol=1e-4)
        pictures = np.moveaxis(np.clip(found["end"] / 2 + 0.5, 0, 1), 1, -1)
        np.testing.assert_allclose(found["images"], pictures, atol=1e-6)
