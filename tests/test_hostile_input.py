"""Files and settings that are wrong, by accident or on purpose: accepted if they make sense, else refused by name."""

import ast
import contextlib
import json
import math
import os
import pickle
import string
import tarfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from rich.console import Console

from fooddiff import build
from fooddiff.commands import train
from fooddiff.commands.workdir import WorkdirError, check
from fooddiff.data import sources
from fooddiff.data.sources.source import checked_name
from fooddiff.eval.images import NpzImages
from fooddiff.eval.stats import Stats, read_stats, write_stats
from fooddiff.train.record import Recorder, read_scalars
from tests import fuzz, tiny
from tests.tiny_food101 import tiny_food101, write_tar

PACKAGE = Path(__file__).resolve().parent.parent / "fooddiff"
SETTINGS = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.mark.parametrize("inputs", [650, pytest.param(13_000, marks=pytest.mark.slow)])
def test_mutated_files_never_crash_a_reader(inputs):
    assert fuzz.run(inputs, seed=inputs, console=Console()) == 0


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (self.flag, "w"))


def test_no_reader_unpickles(tmp_path):
    flag = tmp_path / "executed"
    payload = pickle.dumps({"arr_0": Evil(str(flag))})
    objects = tmp_path / "objects.npz"
    np.savez(objects, arr_0=np.array([Evil(str(flag))], object), mu=np.array([Evil(str(flag))], object))
    for reader in fuzz.readers().values():
        for content in (payload, objects.read_bytes()):
            path = tmp_path / reader.file
            path.write_bytes(content)
            with contextlib.suppress(ValueError, OSError):
                reader.read(path)
            assert not flag.exists()
    pickle.loads(payload)
    assert flag.exists()  # the same bytes are harmful indeed


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_unpickle(path):
    """NumPy refuses pickles unless asked; the one unpickler knows the parts of a state dict and nothing else."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert node.value.value is False
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load")
            assert node.attr != "Unpickler" or path.relative_to(PACKAGE) == Path("model/torch_file.py")


@pytest.mark.parametrize(
    "member",
    ["../outside", "/etc/outside", "food-101/../../outside", "food-101/images/cheesecake/../../../../outside"],
)
def test_members_of_an_archive_that_point_outside_are_not_written_anywhere(tmp_path, member):
    (tmp_path / "inside").mkdir()
    path = write_tar(tmp_path / "inside" / "food.tar.gz", tiny_food101() | {member: b"x"})
    for _, decode in sources.archive(path).split("train").read():
        decode()
    assert [file.name for file in tmp_path.rglob("*")] == ["inside", "food.tar.gz"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_place_of_an_image_are_refused(tmp_path, kind):
    members = tiny_food101()
    name = next(name for name in members if name.endswith(".jpg"))
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "food.tar.gz", members | {name: link})
    with pytest.raises(ValueError, match=r"food\.tar\.gz"):
        list(sources.archive(path).split("train").read())


@SETTINGS
@hypothesis.given(st.text(max_size=300))
def test_a_name_is_printable_and_no_path_or_refused(name):
    try:
        checked_name(name, "name")
    except ValueError as error:
        safe = str(error).isprintable()  # a message may not carry to the terminal what it refuses
    else:
        safe = name.isprintable() and not set(name) & set("/\\\0\x1b") and name not in (".", "..", "")
    assert safe


NUMBERS = st.dictionaries(st.text(string.ascii_lowercase + "/_", min_size=1), st.floats(width=32), max_size=4)


@SETTINGS
@hypothesis.given(st.lists(NUMBERS.filter(lambda numbers: "step" not in numbers), max_size=5))
def test_metrics_are_read_as_they_were_written(tmp_path_factory, records):
    workdir = tmp_path_factory.mktemp("metrics")
    with Recorder(workdir, resume_step=0) as recorder:
        for step, values in enumerate(records, start=1):
            recorder.scalars(step, values)
    expected = [
        {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        for step, values in enumerate(records, start=1)
    ]
    assert read_scalars(workdir) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@SETTINGS
@hypothesis.given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_damaged_config_is_named_and_left_alone(tmp_path_factory, content):
    workdir = tmp_path_factory.mktemp("config")
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged|belongs to a run with another config"):
        check(workdir, tiny.config(workdir))
    assert (workdir / "config.json").read_bytes() == content


@SETTINGS
@hypothesis.given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_statistics_are_read_as_they_were_written(tmp_path_factory, dimension, seed):
    g = np.random.default_rng(seed)
    factor = g.normal(size=(dimension, dimension))
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    stats = Stats(7, g.normal(size=dimension), factor @ factor.T)
    write_stats(path, stats, {"seed": seed})
    again, provenance = read_stats(path)
    np.testing.assert_array_equal(again.mean, stats.mean)
    np.testing.assert_array_equal(again.cov, stats.cov)
    assert (again.n, provenance) == (7, {"seed": seed})


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_pixels_that_change_on_the_disk_are_refused(tmp_path, write):
    path = tmp_path / "images.npz"
    write(path, np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.npz is damaged: arr_0 cannot be read"):
        NpzImages(path)[0:3]


def fields(config, prefix=""):
    """Every dotted name of a config with its value."""
    for name, value in config.items():
        yield from fields(value, f"{prefix}{name}.") if hasattr(value, "items") else [(prefix + name, value)]


def wrong_values(value):
    """Values of the same type as a field's, many of which it cannot have."""
    number = st.integers(-3, 40)
    match value:
        case bool():
            return st.booleans()
        case int():
            return number
        case float():
            return st.floats() | st.sampled_from([0.0, -1.0, 1.0, 1.5])
        case str():
            return st.text(max_size=12) | st.sampled_from(["cosine", "linear", "mse", "x_0", "ddim", "bfloat16"])
        case tuple():
            return st.lists(number if value and isinstance(value[0], int) else st.floats(), max_size=4).map(tuple)
    return st.none() | number


DECIDED_LATER = ("data.", "eval.", "log.wandb", "seed", "init_from", "sample.classes")  # by files, not by a model
FIELDS = [
    (name, value)
    for name, value in fields(tiny.config(Path("unused")))
    if not name.startswith(DECIDED_LATER) or name == "data.image_size"
]


@hypothesis.settings(SETTINGS, max_examples=int(os.environ.get("FOODDIFF_EXAMPLES", 25)))
@hypothesis.given(st.data())
def test_every_override_is_accepted_or_refused_by_name(data):
    name, value = data.draw(st.sampled_from(FIELDS))
    config = tiny.config(Path("unused"))
    override = data.draw(wrong_values(value))
    config.update_from_flattened_dict({name: override})
    mesh = build.make_mesh()
    message = ""
    try:
        training = build.make_training(config, mesh)
        train._grid_generator(config, training.model, mesh)
    except ValueError as error:
        message = str(error)
    assert not message or name.split(".")[-1] in message or "config." in message, f"{name}={override!r}: {message}"
