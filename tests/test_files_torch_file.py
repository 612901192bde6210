"""Files are written here as torch writes them, byte by byte: torch itself is not needed."""

import builtins
import contextlib
import io
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fooddiff.files.torch_file import load_state_dict
from tests.golden_cases import GOLDEN

STORAGES = {"<f8": "Double", "<f4": "Float", "<f2": "Half", "<i8": "Long", "<i4": "Int", "u1": "Byte", "?": "Bool"}


class Global:
    """Pickles as the name `module.name`, whether or not there is such a thing."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Storage:
    def __init__(self, key, kind, numel, content):
        self.key, self.kind, self.numel, self.content = key, kind, numel, content


class Pickler(pickle._Pickler):
    """Protocol 2, as torch uses it."""

    def __init__(self, file, legacy):
        super().__init__(file, protocol=2)
        self.storages = {}
        self.legacy = legacy

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj
        kind = Global("torch", f"{obj.kind}Storage")
        return ("storage", kind, obj.key, "cpu", obj.numel, *([None] if self.legacy else []))

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            return
        super().save(obj, save_persistent_id)

    def save_reduce(self, func, args, *rest, obj=None, **kwargs):
        if isinstance(func, Global):
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
            return
        super().save_reduce(func, args, *rest, obj=obj, **kwargs)


def tensor(storage, offset, size, stride):
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, OrderedDict())


def of(array, key="0"):
    """A contiguous tensor."""
    array = np.asarray(array)
    storage = Storage(key, STORAGES[array.dtype.str.replace("|b1", "?").replace("|", "")], array.size, array.tobytes())
    return tensor(storage, 0, array.shape, tuple(s // array.itemsize for s in array.strides))


def dump(obj, legacy):
    file = io.BytesIO()
    pickler = Pickler(file, legacy)
    pickler.dump(obj)
    return file.getvalue(), pickler.storages


def zip_bytes(obj, compression=zipfile.ZIP_STORED):
    content, storages = dump(obj, legacy=False)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage.content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def legacy_bytes(obj):
    content, storages = dump(obj, legacy=True)
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}})]
    raw = [struct.pack("<q", storage.numel) + storage.content for storage in storages.values()]
    return b"".join([*head, content, pickle.dumps(list(storages), 2), *raw])


FORMATS = {"zip": zip_bytes, "legacy": legacy_bytes}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def load(request, tmp_path):
    def load(obj):
        path = tmp_path / "weights.pt"
        path.write_bytes(request.param(obj))
        return load_state_dict(path)

    return load


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_dtype_and_shape(load, dtype):
    state = {
        name: np.arange(np.prod(shape), dtype=np.int64).reshape(shape).astype(dtype)
        for name, shape in {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2)}.items()
    }
    found = load(OrderedDict((name, of(value, name)) for name, value in state.items()))
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_bfloat16(load):
    value = np.array([1.5, -2.0], jnp.bfloat16)
    found = load({"w": tensor(Storage("0", "BFloat16", 2, value.tobytes()), 0, (2,), (1,))})["w"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, value)


def test_views_share_a_storage_and_parameters_are_tensors(load):
    base = np.arange(12, dtype=np.float32)
    storage = Storage("0", "Float", 12, base.tobytes())
    found = load(
        {
            "transposed": tensor(storage, 0, (4, 3), (1, 4)),
            "sliced": tensor(storage, 3, (4,), (2,)),
            "parameter": Call(
                Global("torch._utils", "_rebuild_parameter"), tensor(storage, 0, (12,), (1,)), True, OrderedDict()
            ),
        }
    )
    np.testing.assert_array_equal(found["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(found["sliced"], base[3:11:2])
    np.testing.assert_array_equal(found["parameter"], base)


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("os", "system"), ("posix", "system"), ("torch", "load"), ("torch._utils", "os.system")],
)
def test_a_file_that_would_run_code_is_refused_by_name(load, module, name, monkeypatch):
    ran = []
    monkeypatch.setattr(builtins, "eval", ran.append)
    monkeypatch.setattr("os.system", ran.append)
    with pytest.raises(ValueError, match=f"{module}'.'{name}'.*not run"):
        load({"w": of(np.zeros(2)), "payload": Call(Global(module, name), "1 + 1")})
    assert not ran


def test_a_pickle_cannot_alter_the_stand_ins(load, tmp_path):
    """BUILD sets attributes of whatever lies on the stack: here, of each global that is allowed."""
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("collections", "OrderedDict"),
    ):
        for state in (b"}X\x04\x00\x00\x00callNs", b"N}X\x04\x00\x00\x00callNs\x86"):
            content = b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."
            path = tmp_path / "build.pt"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", content)
            with pytest.raises(ValueError, match="not a state dict"):
                load_state_dict(path)
    np.testing.assert_array_equal(load({"w": of(np.ones(2, np.float32))})["w"], 1)


def shared_halves(depth):
    """A pickle of nested tuples of which each holds the one before twice: small, and 2 ** depth when unfolded."""
    pairs = (bytes([*b"q", i, *b"h", i]) + pickle.TUPLE2 for i in range(depth))
    return b"\x80\x02" + pickle.EMPTY_TUPLE + b"".join(pairs)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02}" + shared_halves(60)[2:] + b"K\x01s.", "whose name is a tuple"),
        (b"\x80\x02}X\x01\x00\x00\x00w" + shared_halves(60)[2:] + b"s.", "'w' is a tuple, expected a tensor"),
        (b"\x80\x02c" + b"os\nsystem\n" + shared_halves(60)[2:] + b"R.", "which was not run"),
        (b"\x80\x04" + shared_halves(60)[2:] * 2 + b"\x93.", "otherwise than by strings"),
        (b"\x80\x02I1\n.", "instruction INT"),
        (b"\x80\x02}", "is not whole"),
        (b"\x80\x02r\xff\xff\xff\xff.", "is not whole"),
    ],
)
def test_a_pickle_costs_no_more_than_its_length(tmp_path, program, message):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match=message) as refusal:
        load_state_dict(path)
    assert len(str(refusal.value)) < 500


def test_a_pickle_cannot_make_the_memo_fill_the_memory(tmp_path):
    path = tmp_path / "memo.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, limits[1]))  # Python's own unpickler would want 2 ** 35 bytes
    try:
        assert load_state_dict(path) == {}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(protocol, tmp_path):
    content = pickle.dumps(OrderedDict(), protocol)
    path = tmp_path / "empty.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    assert load_state_dict(path) == {}


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (1000,), (0,)),
        (0, (2.0,), (1,)),
        (0, (2**2000,) * 65, (1,) * 65),
        (0, (((),),), (1,)),
    ],
)
def test_tensors_stay_inside_their_storage(load, offset, size, stride):
    with pytest.raises(ValueError, match="'w'"):
        load({"w": tensor(Storage("0", "Float", 4, bytes(16)), offset, size, stride)})


def test_a_storage_must_have_the_size_that_it_claims(load):
    with pytest.raises(ValueError, match=r"not a state dict of torch\.save, or is not whole"):
        load({"w": tensor(Storage("0", "Float", 2**40, bytes(16)), 0, (4,), (1,))})


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1, 2], "holds a list, expected a dict"),
        ({"step": 3}, "'step' is a int, expected a tensor"),
        ({"model": {"w": 1}}, "'model' is a dict"),
        ({1: 2}, "expected a tensor with a name"),
    ],
)
def test_only_tensors_by_name_are_a_state_dict(load, obj, message):
    with pytest.raises(ValueError, match=message):
        load(obj)


def whole_training(payload="best"):
    """What Lightning saves: besides the state dict, names and numbers of its own."""
    w, moment = np.arange(4, dtype=np.float32), np.ones(3)
    return {
        "epoch": 3,
        "callbacks": {Global("pytorch_lightning.callbacks", "ModelCheckpoint"): {payload: of(moment, "moment")}},
        "hyper_parameters": Call(Global("omegaconf", "DictConfig"), [1, Call(Global("os", "system"), "true")]),
        "state_dict": OrderedDict(w=of(w, "w"), other=of(2 * w, "other")),
        "optimizer_states": [{"state": {0: {"exp_avg": of(moment, "moment")}}}],
    }


def test_of_a_whole_trainings_checkpoint_the_state_dict_is_read(load, monkeypatch):
    ran = []
    monkeypatch.setattr("os.system", ran.append)
    found = load(whole_training())
    assert not ran
    assert list(found) == ["w", "other"]
    np.testing.assert_array_equal(found["other"], 2 * np.arange(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"names 'pytorch_lightning\.callbacks'\.'ModelCheckpoint'.*not run"):
        load({name: value for name, value in whole_training().items() if name != "state_dict"})
    with pytest.raises(ValueError, match="'w' is a Foreign, expected a tensor"):
        load({"state_dict": {"w": Call(Global("os", "system"), "true")}})
    assert not ran


def test_objects_of_foreign_classes_are_nothing(tmp_path):
    """NEWOBJ and BUILD: an object with attributes, and with items, of a class that is not there."""
    thing = b"capp.models\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sbX\x01\x00\x00\x00kK\x01s"
    content = b"\x80\x02}(X\x05\x00\x00\x00thing" + thing + b"X\x0a\x00\x00\x00state_dict}u."
    path = tmp_path / "training.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    assert load_state_dict(path) == {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctorch\nFloatStorage\n)\x81.")
    with pytest.raises(ValueError, match="makes an object of a Float32DType"):
        load_state_dict(path)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_unwanted_numbers_are_not_read(write, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(write({name: of(np.full(3, i), name) for i, name in enumerate("abc")}))
    assert list(load_state_dict(path, wanted="b".__eq__)) == ["b"]
    np.testing.assert_array_equal(load_state_dict(path, wanted="c".__eq__)["c"], [2, 2, 2])


def test_compressed_archives_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(zip_bytes({"w": of(np.zeros(10**6, np.float32))}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="compressed"):
        load_state_dict(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_state_dict(tmp_path / "none.pt")


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_never_anything_else(write, data, tmp_path_factory):
    whole = write({"a": of(np.ones((2, 3), np.float32), "a"), "b": of(np.zeros(4), "b")})
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "weights.pt"
    path.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        assert all(isinstance(value, np.ndarray) for value in load_state_dict(path).values())


def test_openais_format_as_torch_itself_wrote_it():
    path = GOLDEN / "openai_unet_a.pt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = load_state_dict(path)
    with np.load(GOLDEN / "unet_a.npz") as file:
        expected = {name.removeprefix("weights/"): file[name] for name in file if name.startswith("weights/")}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].astype(np.float16), value)
