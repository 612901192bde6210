"""Files and settings that are wrong, by accident or on purpose: accepted if they make sense, else refused by name."""

import ast
import bz2
import contextlib
import io
import json
import lzma
import math
import os
import pickle
import string
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from rich.console import Console

from fooddiff import build, parallel
from fooddiff.commands import sample, train
from fooddiff.commands.terminal import session
from fooddiff.convert.importing import import_openai
from fooddiff.data import sources
from fooddiff.data.sources.source import checked_class_names, checked_name, read_class_names
from fooddiff.eval.images import FolderImages, NpzImages, open_images
from fooddiff.eval.stats import Stats, read_stats, write_stats
from fooddiff.eval.weights import load_inception
from fooddiff.files.torch_file import load_state_dict
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import described
from fooddiff.runs.record import Recorder, read_scalars
from fooddiff.runs.workdir import WorkdirError, check, to_json
from tests import fuzz, tiny
from tests.openai_files import write_random_pt
from tests.random_stem import random_stem
from tests.tiny_food101 import jpeg, tiny_food101, write_tar

UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "pandas"}
PACKAGE = Path(__file__).resolve().parent.parent / "fooddiff"
SETTINGS = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.mark.parametrize("inputs", [210, pytest.param(4_200, marks=pytest.mark.slow)])
def test_mutated_files_never_crash_a_reader(inputs):
    assert fuzz.run(inputs, seed=inputs, console=Console()) == 0


def test_the_files_that_are_mutated_are_good(tmp_path):
    for number, reader in enumerate(fuzz.readers().values()):
        path = tmp_path / str(number) / reader.file
        path.parent.mkdir()
        path.write_bytes(reader.wrap(reader.good))
        reader.read(path)


def test_the_fuzzer_notices_crashes_and_hangs(monkeypatch, capsys):
    def read(path):
        if number := len(path.read_bytes()) % 4:
            raise (ValueError("nothing"), ValueError(f"\x1b{path.name}"), KeyError(path.name))[number - 1]
        time.sleep(0.01)
        raise fuzz.Hang  # as the alarm would

    monkeypatch.setattr(fuzz, "readers", lambda: {"bad": fuzz.Reader("bad.bin", bytes(50), read)})
    assert fuzz.run(100, seed=0, console=Console(width=200)) == 100
    shown = capsys.readouterr().out
    for kind in ("ValueError that names nothing", "ValueError that is not printable", "KeyError", "bad hung"):
        assert kind in shown


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (self.flag, "w"))


def test_no_reader_unpickles(tmp_path):
    flag = tmp_path / "executed"
    evil = Evil(str(flag))
    payload = pickle.dumps({"arr_0": evil})
    objects, state_dict, array = tmp_path / "objects.npz", tmp_path / "model.pt", tmp_path / "array.npy"
    np.savez(objects, **{name: np.array([evil], object) for name in ("arr_0", "arr_1", "mu", "sigma", "provenance")})
    np.save(array, np.array([evil], object))
    with zipfile.ZipFile(state_dict, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    for reader in fuzz.readers().values():
        for content in (payload, objects.read_bytes(), array.read_bytes(), state_dict.read_bytes()):
            path = tmp_path / reader.file
            path.write_bytes(content)
            with contextlib.suppress(ValueError, OSError):
                reader.read(path)
            assert not flag.exists()
    pickle.loads(payload)
    assert flag.exists()  # the same bytes are harmful indeed


def test_no_module_can_unpickle():
    """NumPy refuses pickles unless asked. No module has an unpickler; one writes pickles, by hand."""
    for path in PACKAGE.rglob("*.py"):
        allowed = {"pickle"} if path == PACKAGE / "files" / "torch_zip.py" else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.keyword(arg="allow_pickle"):
                    assert node.value.value is False, path
                case ast.ImportFrom():
                    assert node.module not in UNPICKLERS, path
                case ast.Import():
                    assert not {alias.name for alias in node.names} & (UNPICKLERS - allowed), path
                case ast.Attribute():
                    assert ast.unparse(node) not in ("pickle.load", "pickle.loads", "torch.load"), path
                    assert "Unpickler" not in node.attr, path
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in ("eval", "exec"), path


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../evil"], "class name '../evil' is not allowed"),
        (["/etc/evil"], "class name '/etc/evil' is not allowed"),
        (["a\0b"], r"class name 'a\\x00b' is not allowed"),
        (["\x1b]0;owned\x07"], r"'\\x1b\]0;owned\\x07' is not allowed"),
        (["\u202egnp.exe"], "u202egnp.exe' is not allowed"),
        (["a\u200bb"], "u200bb' is not allowed"),
        ([" a"], "no space at the ends"),
        (["x" * 201], "it has 201 bytes, expected at most 200"),
        (["é" * 101], "it has 202 bytes, expected at most 200"),
        (["x" * 10**7], "it has 10,000,000 bytes"),
        (["é", "e\u0301"], "é twice"),
        (["a", "b", "a"], "a twice"),
        ([], "got none"),
    ],
)
def test_class_names_that_no_list_may_have(tmp_path, names, message):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(names), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_class_names(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_list_of_class_names_is_text(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("crème".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt: the list of class names is not text in UTF-8"):
        read_class_names(path)


VISIBLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/\\.")
NAMES = st.lists(st.text(VISIBLE, min_size=1, max_size=20), min_size=1, max_size=5, unique=True)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(NAMES)
def test_class_names_are_read_as_they_were_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "classes.txt"
    try:
        expected = checked_class_names(names, path)
    except ValueError:
        hypothesis.reject()
    path.write_text("".join(name + "\n" for name in expected), encoding="utf-8")
    assert read_class_names(path) == expected


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, zlib.compress])
def test_an_archive_in_another_compression_is_refused(tmp_path, pack):
    whole = write_tar(tmp_path / "food.tar", tiny_food101(), "w").read_bytes()
    path = tmp_path / "food.tar.gz"
    path.write_bytes(pack(whole))
    with pytest.raises(ValueError, match=r"food\.tar\.gz is not a whole tar or tar\.gz archive"):
        _ = sources.archive(path).class_names


def png(width, height, *, depth=8, colour=2, rows=b""):
    """A PNG file with any header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_jpeg():
    content = bytearray(jpeg(0))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(2**31 - 1, 2**31 - 1), "image"),  # Pillow itself may refuse these two, in its own words
        (huge_jpeg(), "image"),
        (png(8000, 8000), "8000 x 8000 is more than 50,000,000 pixels"),
        (png(0, 8), "image"),
        (b"GIF89a" + bytes(100), "not a JPEG, PNG, WEBP image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG, WEBP image"),
        (jpeg(0)[:-200], "not a whole JPEG"),
        (png(2, 2, depth=16, colour=0, rows=bytes(10)), "more than 8 bits per channel"),
    ],
)
def test_pictures_that_are_refused(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png is unreadable: .*{message}"):
        FolderImages([tmp_path / "a.png"])


def test_the_high_byte_of_a_16_bit_colour_is_its_8_bit_value(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 1, depth=16, rows=bytes([0, 200, 99, 100, 99, 50, 99])))
    np.testing.assert_array_equal(FolderImages([tmp_path / "a.png"])[0:1], [[[[200, 100, 50]]]])


def npz(path, arrays, write=np.savez):
    write(path, **arrays)
    return path


GOOD_STATS = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "d >= 1"),
        ({"sigma": -np.eye(2)}, "negative variances"),
        ({"n": np.zeros(3, int)}, "n is not a number of images"),
        ({"n": np.float64("nan")}, "n is not a number of images"),
        ({"n": np.int64(-5)}, "n is not a number of images"),
        ({"provenance": np.array("{")}, "provenance is not JSON"),
        ({"provenance": np.array("[" * 100_000)}, "provenance is not JSON"),
        ({"provenance": np.array("[1]")}, "provenance is not a JSON object"),
        ({"provenance": np.zeros(3)}, "provenance is not JSON"),
    ],
)
def test_statistics_that_lie_are_refused(tmp_path, changes, message):
    path = npz(tmp_path / "stats.npz", GOOD_STATS | changes)
    with pytest.raises(ValueError, match=rf"stats\.npz.*{message}"):
        read_stats(path)


ARRAYS = hypothesis.extra.numpy.arrays(
    st.sampled_from(["<f8", "<f4", "<i8", "u1", "?", "<c16", "U3"]),
    hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(st.fixed_dictionaries({"mu": ARRAYS, "sigma": ARRAYS}, optional={"n": ARRAYS, "provenance": ARRAYS}))
def test_any_arrays_are_statistics_or_refused_by_name(tmp_path_factory, arrays):
    path = npz(tmp_path_factory.mktemp("stats") / "stats.npz", arrays)
    try:
        (n, mean, cov), provenance = read_stats(path)
    except ValueError as error:
        right = str(path) in str(error)
    else:
        right = mean.shape == cov.shape[:1] == cov.shape[1:] != (0,) and np.isfinite(mean).all()
        right &= np.isfinite(cov).all() and (n is None or n >= 2)
        right &= provenance is None or isinstance(provenance, dict)
    assert right


@pytest.mark.parametrize("read", [read_stats, lambda path: open_npz(path), lambda path: inception(path)])
def test_an_array_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch, read):
    monkeypatch.setattr("fooddiff.files.npz.MAX_ARRAY_BYTES", 10**6)
    bomb = np.zeros(10**6)
    names = ("mu", "sigma", "arr_1", *random_stem())
    arrays = {"arr_0": np.zeros((1, 8, 8, 3), np.uint8)} | dict.fromkeys(names, bomb)
    path = npz(tmp_path / "bomb.npz", arrays, np.savez_compressed)
    with pytest.raises(ValueError, match=r"bomb\.npz .*unpacks to 8,000,128 bytes, expected at most 1,000,000"):
        read(path)


def open_npz(path):
    return open_images(str(path), sources={}, image_size=8, cache_dir=path.parent)


def inception(path):
    return load_inception(path, ("64",), cache_dir=path.parent)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**40, 8, 8, 3), "arr_0 claims 1,099,511,627,776 images"),
        ((1, 2**20, 2**20, 3), "more than 50,000,000 pixels"),
        ((2**62, 2**62, 2**62, 3), "more than 50,000,000 pixels"),
        ((-1, 8, 8, 3), "images are uint8"),
    ],
)
def test_images_that_are_not_there_are_not_believed(tmp_path, shape, message):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue() + bytes(192))
    with pytest.raises(ValueError, match=rf"images\.npz: .*{message}"):
        open_npz(tmp_path / "images.npz")


def test_names_in_a_file_do_not_reach_the_terminal_raw(tmp_path):
    path = npz(tmp_path / "a.npz", {"\x1b[2J": np.zeros(1)})
    with pytest.raises(ValueError, match=r"holds '\\x1b\[2J'"):
        open_npz(path)


def test_messages_do_not_control_the_terminal(capsys):
    with pytest.raises(SystemExit), session(distributed=False):
        raise ValueError("first \x1b[2J\u202e line\nsecond line")
    assert capsys.readouterr().err.endswith("error: first \\x1b[2J\\u202e line\nsecond line\n")


@pytest.mark.slow
@SETTINGS
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3, st.just(3))), st.booleans(), st.data()
)
def test_images_are_read_as_they_were_written(tmp_path_factory, pixels, packed, data):
    labels = np.arange(len(pixels))
    path = tmp_path_factory.mktemp("images") / "images.npz"
    (np.savez_compressed if packed else np.savez)(path, pixels, labels)
    found = open_npz(path)
    start = data.draw(st.integers(0, len(pixels) - 1))
    np.testing.assert_array_equal(found.pixels[start : len(pixels)], pixels[start:])
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=9),
        hypothesis.extra.numpy.arrays(np.float32, hypothesis.extra.numpy.array_shapes(min_dims=0, min_side=0)),
        max_size=3,
    )
)
def test_state_dicts_are_read_as_they_were_written(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("tensors") / "model.pt"
    write_state_dict(path, tensors)
    found = load_state_dict(path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)


NUMBERS = st.dictionaries(st.text(string.ascii_lowercase + "/_", min_size=1), st.floats(width=32), max_size=4)


@pytest.mark.slow
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


@pytest.mark.slow
@SETTINGS
@hypothesis.given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_damaged_config_is_named_and_left_alone(tmp_path_factory, content):
    workdir = tmp_path_factory.mktemp("config")
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged|belongs to a run with another config"):
        check(workdir, tiny.config(workdir))
    assert (workdir / "config.json").read_bytes() == content


@pytest.mark.slow
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


def meta(tmp_path, **changes):
    """What a checkpoint says about itself, as JSON brings it back."""
    about = {"config": to_json(tiny.config(tmp_path)), "class_names": [str(y) for y in range(10)]}
    return json.loads(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "does not describe a model"),
        ({"config": [1]}, "does not describe a model"),
        ({"config": {"model": 3}}, "does not describe a model"),
        ({"class_names": None}, "does not describe a model"),
        ({"class_names": 7}, "does not describe a model"),
        ({"class_names": list(range(10))}, "does not describe a model"),
        ({"class_names": ["a", "b"]}, "names 2 classes, but its model has 10"),
        ({"class_names": ["../" + str(y) for y in range(10)]}, "class name '../0' is not allowed"),
    ],
)
def test_a_checkpoint_that_lies_about_its_model_is_refused(tmp_path, changes, message):
    described(meta(tmp_path), tmp_path / "100")
    with pytest.raises(WorkdirError, match=rf"100 .*{message}"):
        described(meta(tmp_path, **changes), tmp_path / "100")


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=30)
@hypothesis.given(JSON, st.sampled_from(["config", "model", "diffusion", "data", "ema", "class_names"]))
def test_any_json_in_place_of_a_part_is_a_model_or_refused(tmp_path_factory, value, part):
    about = meta(tmp_path_factory.mktemp("meta"))
    (about if part in about else about["config"])[part] = value
    with contextlib.suppress(WorkdirError):
        described(about, Path("100"))


def test_nobodys_checkpoint_makes_sampling_write_outside(tmp_path, monkeypatch):
    config = tiny.config(tmp_path)
    write_random_pt(tmp_path / "a.pt", config)
    import_openai(tmp_path / "a.pt", tmp_path / "run", config, None)
    true_meta = Checkpoints.meta
    names = ["../../../outside", *"123456789"]
    monkeypatch.setattr(Checkpoints, "meta", lambda self, step: true_meta(self, step) | {"class_names": names})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(WorkdirError, match=r"'\.\./\.\./\.\./outside' is not allowed"):
        sample.run(
            tmp_path / "run", step=None, weights="raw", classes=(), per_class=1, spec=dict(steps=2),
            seed=0, batch_size=10, single_files=True, out=None,
        )  # fmt: skip
    assert set(tmp_path.rglob("*")) == before


def fields(config, prefix=""):
    """Every dotted name of a config with its value."""
    for name, value in config.items():
        yield from fields(value, f"{prefix}{name}.") if hasattr(value, "items") else [(prefix + name, value)]


WRONG_TYPES = st.sampled_from([None, True, 1.5, math.nan, math.inf, 10**400, "8", b"8", (), ("a",), (None,), [[1]], {}])


def wrong_values(value):
    """Values of the same type as a field's, many of which it cannot have."""
    number = st.integers(-3, 12)  # more blocks take minutes to trace
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


DECIDED_LATER = ("data.", "eval.", "log.wandb", "init_from", "sample.classes")  # by files, not by a model
FIELDS = [
    (name, value)
    for name, value in fields(tiny.config(Path("unused")))
    if not name.startswith(DECIDED_LATER) or name == "data.image_size"
]


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=int(os.environ.get("FOODDIFF_EXAMPLES", 15)))
@hypothesis.given(st.data())
def test_every_override_is_accepted_or_refused_by_name(data):
    name, value = data.draw(st.sampled_from(FIELDS))
    config = tiny.config(Path("unused"))
    override = data.draw(wrong_values(value) | WRONG_TYPES)
    with config.ignore_type():
        config.update_from_flattened_dict({name: override})
    mesh = parallel.make_mesh()
    message = ""
    try:
        training = build.make_training(config, mesh)
        train.ACTIONS["diffusion"](config, training.model, mesh)
        jax.eval_shape(training.step, *build.abstract_step_arguments(config, training))
    except ValueError as error:
        message = str(error)
    assert not message or name.split(".")[-1] in message or "config." in message, f"{name}={override!r}: {message}"
