"""OpenAI's checkpoints in and out, as their users call the commands, and training that starts from them."""

import io
import json
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from fooddiff import build, parallel
from fooddiff.commands import sample, train
from fooddiff.commands.convert import main
from fooddiff.commands.flags import load_config
from fooddiff.convert import importing
from fooddiff.files.torch_file import load_state_dict
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.network import abstract_params
from fooddiff.model.openai import to_openai
from fooddiff.runs import workdir
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.fine_tune import starting_weights
from fooddiff.runs.load import load_trained
from tests import tiny
from tests.golden_cases import checkpoint_files, unet_cases, weights
from tests.openai_files import random_params, write_random_pt

ROOT = Path(__file__).resolve().parent.parent
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"
OTHER_CLASSES = tuple("abcde")


def load(run, weights="ema"):
    return load_trained(run, step=None, weights=weights, mesh=parallel.make_mesh())


def assert_equal_params(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name


def fails(capsys, *argv):
    """Calls the command, which must end with status 1, and returns its message."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in argv])
    assert end.value.code == 1
    return capsys.readouterr().err


# The state dict in OpenAI's own format


def owner(path):
    """The golden UNet whose weights a state dict holds."""
    found = load_state_dict(path)
    return next(
        case for case in unet_cases()
        if weights(case).keys() == found.keys()
        and all(np.array_equal(value.astype(np.float16), case.arrays[f"weights/{name}"].astype(np.float16))
                for name, value in found.items())
    )  # fmt: skip


def write_config(path, unet):
    """Writes a config file with the architecture of a golden UNet, as a user would for a model of their own."""
    size, learned = unet["image_size"], unet["out_channels"] == 2 * unet["in_channels"]
    rates = {2**level for level in range(len(unet["channel_mult"]))} & set(unet["attention_resolutions"])
    changes = {
        "data": {"image_size": size},
        "diffusion": {"timesteps": 4, "variance": "learned_range" if learned else "fixed_large"},
        "objective": {"name": "vlb"},
        "model": {
            "model_channels": unet["model_channels"],
            "channel_mult": tuple(unet["channel_mult"]),
            "num_res_blocks": unet["num_res_blocks"],
            "attention_resolutions": tuple(sorted(size // rate for rate in rates)),
            "num_heads": unet["num_heads"],
            "num_classes": unet["num_classes"],
            "scale_shift_norm": unet["use_scale_shift_norm"],
        },
    }
    path.write_text(
        "from configs import digits\n\n\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        f"    config.update({changes!r})\n"
        "    config.sample.steps = None\n    del config.objective.vb_weight\n"
        "    return config\n"
    )
    return f"--config={path}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(path, marks=[pytest.mark.slow] if i else []) for i, path in enumerate(checkpoint_files())],
    ids=lambda path: path.stem,
)
def golden(request, tmp_path_factory):
    """An imported golden state dict: its file, the golden UNet that it is of, its config and the workdir."""
    file, case = request.param, owner(request.param)
    if case.config.get("num_heads_upsample", -1) not in (-1, case.config["num_heads"]):
        pytest.skip("configs have one number of heads")
    folder = tmp_path_factory.mktemp("imported")
    config, arguments = write_config(folder / "config.py", case.config), []
    if classes := case.config["num_classes"]:
        (folder / "names.txt").write_text("".join(f"dish_{y}\n" for y in range(classes)))
        arguments = [f"--class_names={folder / 'names.txt'}"]
    main(["import", str(file), config, f"--workdir={folder / 'run'}", *arguments])
    return file, case, config, folder / "run"


@pytest.mark.parametrize("name", ["raw", "ema"])
def test_an_imported_workdir_gives_the_references_output(golden, name):
    _, case, _, run = golden
    trained = load(run, name)
    assert trained.step == 0
    nhwc = np.moveaxis(case.arrays["x"], 1, -1)
    cond = {"y": case.arrays["y"]} if "y" in case.arrays else {}
    out = jax.jit(trained.model.network.apply)(trained.params, nhwc, case.arrays["t"], cond)
    expected = np.moveaxis(case.arrays["out"], 1, -1)
    np.testing.assert_allclose(out, expected, atol=1e-4 * abs(expected).max(), rtol=0)


@pytest.mark.slow
def test_an_imported_workdir_is_sampled_like_any_other(golden, tmp_path):
    _, case, _, run = golden
    sample.run(
        run, step=None, weights="ema", classes=load(run).class_names[-1:], per_class=2, spec=dict(steps=2),
        seed=0, batch_size=2, single_files=False, out=tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("step_0000000_ema_0.995_*.npz")
    size = case.config["image_size"]
    with np.load(path, allow_pickle=False) as file:
        assert file["arr_0"].shape == (2, size, size, 3)
        assert file["arr_0"].std() > 0


def test_the_files_name_and_hash_are_kept(golden):
    file, _, _, run = golden
    meta = load(run).meta
    assert meta["origin"]["file"] == file.name
    assert len(meta["origin"]["sha256"]) == 64
    assert meta["data_sha256"] is None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_and_import_again_change_no_bit(golden, tmp_path, suffix):
    file, _, config, run = golden
    exported, again = tmp_path / f"model{suffix}", tmp_path / "again"
    main(["export", f"--workdir={run}", f"--out={exported}"])
    arguments = [config] if suffix == ".pt" else []
    main(["import", str(exported), *arguments, f"--workdir={again}"])
    before, after = load(run), load(again)
    assert_equal_params(after.params, before.params)
    assert_equal_params(to_openai(after.params), load_state_dict(file))
    assert workdir.to_json(before.config) == workdir.to_json(after.config)
    if suffix == ".safetensors":
        assert after.class_names == before.class_names
        origin = after.meta["origin"]
        assert [origin[name] for name in ("step", "weights", "images_seen")] == [0, "ema_0.995", 0]
    main(["export", f"--workdir={again}", f"--out={tmp_path / f'twice{suffix}'}"])
    if suffix == ".pt":
        assert exported.read_bytes() == (tmp_path / f"twice{suffix}").read_bytes()


# What is refused


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, capsys, layout):
    flag, evil = tmp_path / "was_run", tmp_path / "evil.pt"
    program = pickle.dumps({"time_embed.0.weight": Evil(f"touch {flag}")}, protocol=2)
    if layout == "zip":
        with zipfile.ZipFile(evil, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    elif layout == "legacy":
        header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        evil.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in header) + program)
    else:
        evil.write_bytes(program)
    message = fails(capsys, "import", evil, DIGITS, "--workdir", tmp_path / "run")
    assert "which was not run" in message
    assert not flag.exists()
    assert not (tmp_path / "run").exists()
    pickle.load(io.BytesIO(program))  # the same bytes are harmful indeed
    assert flag.exists()


def test_another_architecture_names_the_first_tensors_and_leaves_nothing(tmp_path, capsys):
    message = fails(
        capsys, "import", ROOT / "tests" / "golden" / "openai_unet_a.pt", DIGITS, "--workdir", tmp_path / "run"
    )
    assert "another architecture" in message
    assert "label_emb.weight: the model has (10, 128), the file has (5, 128)" in message
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    config = tiny.config(tmp_path)
    params = random_params(config)
    params["time_in.bias"][3] = np.nan
    write_state_dict(tmp_path / "nan.pt", to_openai(params))
    with pytest.raises(ValueError, match=r"nan.pt has numbers that are not finite in 1 tensors, first time_in.bias"):
        importing.import_openai(tmp_path / "nan.pt", tmp_path / "run", config, None)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def names(tmp_path):
    def write(*names):
        (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
        return tmp_path / "names.txt"

    return write


def test_class_names_must_fit_the_model(tmp_path, names):
    config = tiny.config(tmp_path)
    write_random_pt(tmp_path / "a.pt", config)
    for given, message in [
        ([*"abc"], "names 3 classes, but config.model.num_classes is 10"),
        ([*"aacdefghij"], "expected distinct class names, got a twice"),
        ([*"abcdefghi", "../j"], "class name '../j' is not allowed"),
    ]:
        with pytest.raises(ValueError, match=message):
            importing.import_openai(tmp_path / "a.pt", tmp_path / "run", config, names(*given))
    with pytest.raises(ValueError, match=r"config.model.num_classes is None: the model has no classes"):
        importing.import_openai(
            tmp_path / "a.pt", tmp_path / "run", tiny.config(tmp_path, model__num_classes=None), names("a")
        )
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(golden, tmp_path, capsys):
    file, _, config, run = golden
    assert "is not empty" in fails(capsys, "import", file, config, "--workdir", run)
    precious = tmp_path / "model.pt"
    precious.write_text("precious")
    assert "already exists" in fails(capsys, "export", "--workdir", run, "--out", precious)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--workdir=/nowhere", "--out=a.pt"), "no run in /nowhere"),
        (("export", "--workdir=/nowhere", "--out=a.ckpt"), "expected a name that ends in .safetensors or .pt"),
        (("import", "none.pt", DIGITS, "--workdir=/nowhere"), "none.pt"),
        (("import", "none.safetensors", "--workdir=/nowhere"), "none.safetensors"),
        (("import", "none.safetensors", DIGITS, "--workdir=/nowhere"), "leave out --config"),
        (("import", "none.pt", "--workdir=/nowhere"), "--config is missing"),
        (("import", "none.pt", "--config=none.py", "--workdir=/nowhere"), "none.py"),
        (("import", "none.pt", DIGITS, "--config.model.heads=2", "--workdir=/nowhere"), "did you mean model.num_heads"),
        (("import", "none.pt", DIGITS, "--config.seed=x", "--workdir=/nowhere"), "--config.seed=x"),
    ],
)
def test_bad_requests_are_named(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [("import", "a.pt", "--workdir=/nowhere", "--confi=x"), ("export", "--workdir=a", "--out=b.pt", "--config.seed=1")],
)
def test_unknown_flags_are_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert f"no flag {arguments[-1].partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["no metadata", "other tensors", "truncated", "bad names"])
def test_a_foreign_or_damaged_safetensors_file_is_refused(golden, tmp_path, damage):
    _, _, _, run = golden
    file = tmp_path / "model.safetensors"
    main(["export", f"--workdir={run}", f"--out={file}"])
    tensors = safetensors.numpy.load_file(file)
    meta = load(run)
    metadata = {"config": json.dumps(workdir.to_json(meta.config)), "class_names": json.dumps(meta.class_names),
                "step": "0", "weights": "raw"}  # fmt: skip
    if damage == "no metadata":
        safetensors.numpy.save_file(tensors, file)
    elif damage == "other tensors":
        safetensors.numpy.save_file(tensors | {"time_in.bias": np.zeros(3, np.float32)}, file, metadata)
    elif damage == "bad names":
        bad = json.dumps(["../" + name for name in meta.class_names])
        safetensors.numpy.save_file(tensors, file, metadata | {"class_names": bad})
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"was not written by|does not hold the tensors"):
        importing.import_safetensors(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_the_config_of_the_published_model_has_its_tensors():
    model = build.make_diffusion_model(load_config(str(ROOT / "configs" / "openai_imagenet64.py"), []))
    weightless = {name: np.broadcast_to(np.float32(0), leaf.shape)
                  for name, leaf in abstract_params(model.network).items()}  # fmt: skip
    published = json.loads((ROOT / "tests" / "golden" / "openai_imagenet64_shapes.json").read_text())
    assert {name: list(value.shape) for name, value in to_openai(weightless).items()} == published


def test_overrides_reach_the_config():
    config = load_config(
        f"{ROOT / 'configs' / 'openai_imagenet64.py'}:uncond", ["--config.optimizer.lr=1e-5", "--config.seed=3"]
    )
    assert (config.optimizer.lr, config.seed, config.model.num_classes) == (1e-5, 3, None)


# Training that starts from weights


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def imported(workspace):
    """A tiny model of the digits, imported; its classes are numbered, as those of the digits are."""
    config = tiny.config(workspace)
    params = write_random_pt(workspace / "tiny.pt", config)
    importing.import_openai(workspace / "tiny.pt", workspace / "imported", config, None)
    return workspace / "imported", params


@pytest.fixture(scope="module")
def other_classes(workspace):
    """A tiny model of five classes, imported."""
    config = tiny.config(workspace, model__num_classes=5)
    params = write_random_pt(workspace / "five.pt", config)
    (workspace / "five.txt").write_text("\n".join(OTHER_CLASSES))
    importing.import_openai(workspace / "five.pt", workspace / "five", config, workspace / "five.txt")
    return workspace / "five", params


def state_of(run, config, step):
    with Checkpoints(run, read_only=True) as checkpoints:
        return checkpoints.restore(step, build.make_training(config, parallel.make_mesh()).abstract_state)


def test_parameters_and_every_average_are_the_imported_weights(workspace, imported):
    run, params = imported
    state = state_of(run, tiny.config(workspace), 0)
    assert int(state.step) == 0
    for found in (state.params, *state.ema.values()):
        assert_equal_params(found, params)


def test_the_first_state_shares_no_buffer(workspace, imported):
    _, params = imported
    training = build.make_training(tiny.config(workspace), parallel.make_mesh())
    start = jax.device_put(params, training.replicated)
    state = build.first_state(training, jax.random.key(0), start)

    def pointers(*trees):
        return [
            shard.data.unsafe_buffer_pointer()
            for tree in trees for leaf in tree.values() for shard in leaf.addressable_shards
        ]  # fmt: skip

    own = pointers(state.params, *state.ema.values())
    assert len(set(own)) == len(own)
    assert not set(own) & set(pointers(start))


@pytest.mark.slow
def test_training_goes_on_in_an_imported_workdir(workspace, imported, caplog):
    run = shutil.copytree(imported[0], workspace / "continued")
    with caplog.at_level(logging.INFO, "fooddiff"):
        train.run(tiny.config(workspace, optimizer__lr=1e-3, train__steps=1), run)
    assert "resumed at step 0 of 1" in caplog.text
    assert "imported weights, which belong to no data" in caplog.text
    after = load(run)
    assert after.step == 1
    assert after.meta["data_sha256"] is not None
    assert after.meta["origin"]["file"] == "tiny.pt"
    for name, value in load(run, "raw").params.items():
        np.testing.assert_allclose(value, imported[1][name], atol=2e-3)  # one step of Adam from there


def test_an_imported_workdir_accepts_no_other_classes(workspace, imported, names):
    config = tiny.config(workspace)
    run = workspace / "letters"
    importing.import_openai(workspace / "tiny.pt", run, config, names(*"abcdefghij"))
    with pytest.raises(
        ValueError, match=r"know 10 classes \(a, b, c, ...\), the data have 10 classes \(0, 1, 2, ...\)"
    ):
        train.run(config, run)
    assert load(run).step == 0


@pytest.fixture(scope="module")
def unconditional(workspace):
    """A tiny model without classes, imported."""
    config = tiny.config(workspace, model__num_classes=None, train__steps=1)
    params = write_random_pt(workspace / "uncond.pt", config)
    importing.import_openai(workspace / "uncond.pt", workspace / "uncond", config, None)
    return workspace / "uncond", params


def test_a_model_without_classes_is_imported(unconditional):
    run, params = unconditional
    assert load(run).class_names == ("unconditional",)
    assert_equal_params(load(run).params, params)


@pytest.mark.slow
def test_a_model_without_classes_is_trained_on_any_data(workspace, unconditional):
    run = shutil.copytree(unconditional[0], workspace / "uncond_continued")
    train.run(tiny.config(workspace, model__num_classes=None, train__steps=1), run)
    assert load(run).class_names == tuple("0123456789")


def test_a_model_without_classes_can_get_some(workspace, unconditional, imported):
    source, (_, conditional) = load(unconditional[0]), imported
    start, origin = starting_weights(source, tiny.config(workspace), tuple("0123456789"), conditional)
    assert_equal_params(start, unconditional[1])
    assert conditional.keys() - start.keys() == {"label.embedding"}
    assert origin["reinitialised"] == ["label.embedding"]


@pytest.mark.slow
def test_fine_tuning_starts_from_all_weights_of_the_same_classes(workspace, imported):
    config = tiny.config(workspace, train__steps=1, init_from=str(imported[0]))
    run = workspace / "tuned"
    train.run(config, run)
    meta = load(run).meta
    assert meta["origin"]["workdir"] == str(imported[0])
    assert meta["origin"]["reinitialised"] == []
    assert meta["origin"]["origin"]["file"] == "tiny.pt"
    for kind in ("raw", "ema"):
        for name, value in load(run, kind).params.items():
            np.testing.assert_allclose(value, imported[1][name], atol=2e-3)


@pytest.mark.slow
def test_fine_tuning_on_other_classes_renews_only_their_embedding_and_ends_without_the_source(
    workspace, other_classes, caplog
):
    source = shutil.copytree(other_classes[0], workspace / "source")
    run = workspace / "retuned"
    with caplog.at_level(logging.INFO, "fooddiff"):
        train.run(tiny.config(workspace, train__steps=1, init_from=str(source)), run)
    assert "the other model's 5 classes are not these 10: anew begins label.embedding" in caplog.text
    after = load(run, "raw")
    assert after.meta["origin"]["reinitialised"] == ["label.embedding"]
    assert after.params["label.embedding"].shape == (10, 128)
    for name, value in after.params.items():
        if name != "label.embedding":
            np.testing.assert_allclose(value, other_classes[1][name], atol=2e-3)
    shutil.rmtree(source)
    train.run(tiny.config(workspace, train__steps=2, init_from=str(source)), run)
    assert load(run).step == 2
    assert load(run).meta["origin"] == after.meta["origin"]


def test_classes_in_another_order_are_other_classes(workspace, imported):
    source, config = load(imported[0]), tiny.config(workspace)
    same, _ = starting_weights(source, config, source.class_names, source.params)
    assert same.keys() == source.params.keys()
    swapped, _ = starting_weights(source, config, source.class_names[::-1], source.params)
    assert source.params.keys() - swapped.keys() == {"label.embedding"}


def test_differences_that_shapes_do_not_show_are_told(workspace, imported, caplog):
    source = load(imported[0])
    config = tiny.config(workspace, diffusion__schedule="linear", model__num_heads=2, model__dropout=0.1)
    starting_weights(source, config, source.class_names, source.params)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "config.diffusion.schedule is 'linear' here, the weights were trained with 'cosine'",
        "config.model.num_heads is 2 here, the weights were trained with 4",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(init_from="/nowhere"), r"config.init_from is ./nowhere.: expected a run with a checkpoint, or a file"),
        (dict(model__num_res_blocks=2), r"do not fit, first\n  down\.\S+: the model has .*, the other has none"),
        (dict(model__num_classes=None), r"1 tensors do not fit, first\n  label.embedding: the model has none"),
    ],
)
def test_a_start_from_weights_that_do_not_fit_leaves_the_directory_free(workspace, imported, changes, message):
    run = workspace / "misfit"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(tiny.config(workspace, **(dict(init_from=str(imported[0])) | changes)), run)
    assert not run.exists()
