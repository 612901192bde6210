import functools
import hashlib
import http.server
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fooddiff.eval import weights
from fooddiff.eval.weights import InceptionWeights, load_inception, metric_name
from tests.random_stem import random_stem
from tests.test_files_torch_file import of, zip_bytes

stem = functools.cache(random_stem)


def pth_bytes(arrays):
    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.asarray(7)}
    return zip_bytes({name: of(value, str(i)) for i, (name, value) in enumerate({**arrays, **extra}.items())})


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def assert_is_the_stem(loaded):
    assert set(loaded.params) == {"Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"}
    layer = {name.removeprefix("Conv2d_1a_3x3."): np.float64(value) for name, value in stem().items() if "_1a_" in name}
    scale = layer["bn.weight"] / np.sqrt(layer["bn.running_var"] + 1e-3)
    params = loaded.params["Conv2d_1a_3x3"]
    np.testing.assert_allclose(
        params["kernel"].transpose(3, 2, 0, 1), layer["conv.weight"] * scale[:, None, None, None], rtol=1e-5
    )
    np.testing.assert_allclose(
        params["bias"], layer["bn.bias"] - layer["bn.running_mean"] * scale, rtol=1e-4, atol=1e-6
    )
    assert params["kernel"].dtype == jnp.float32


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        path.write_bytes(pth_bytes(arrays))
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".pt"])
def test_every_format_gives_the_same_parameters(tmp_path, suffix):
    path = write(tmp_path / f"some stem{suffix}", stem())
    loaded = load_inception(path, ("64",), cache_dir=tmp_path / "cache")
    assert_is_the_stem(loaded)
    assert (loaded.name, loaded.genuine) == ("some stem", False)
    assert loaded.sha256 == sha256(path.read_bytes())


def test_a_torch_file_is_converted_once_to_a_small_file(tmp_path, monkeypatch):
    arrays = {**stem(), "Mixed_7c.branch_pool.conv.weight": np.zeros(10**6, np.float32)}
    path = write(tmp_path / "w.pth", arrays)
    load_inception(path, ("64",), cache_dir=tmp_path / "cache")
    (converted,) = (tmp_path / "cache").iterdir()
    assert converted.stat().st_size < 130_000
    monkeypatch.setattr(weights, "load_state_dict", lambda *_, **__: pytest.fail("it was read again"))
    assert_is_the_stem(load_inception(path, ("64",), cache_dir=tmp_path / "cache"))


def test_only_the_right_hash_is_genuine(tmp_path, monkeypatch):
    path = write(tmp_path / "weights-inception-2015-12-05-6726825d.pth", stem())
    loaded = load_inception(path, ("64",), cache_dir=tmp_path)
    assert not loaded.genuine
    monkeypatch.setattr(weights, "GENUINE_SHA256", loaded.sha256)
    assert load_inception(path, ("64",), cache_dir=tmp_path).genuine


@pytest.mark.parametrize(
    ("metric", "feature", "genuine", "other"),
    [
        ("FD", "64", "FID-64", "FD-64[my stem 0123abcd]"),
        ("KD", "2048", "KID-2048", "KD-2048[my stem 0123abcd]"),
        ("Precision", "2048", "Precision-2048", "Precision-2048[my stem 0123abcd]"),
    ],
)
def test_a_number_says_which_weights_it_was_made_with(metric, feature, genuine, other):
    of_kind = functools.partial(InceptionWeights, {}, "my stem", "0123abcd" + "0" * 56)
    assert metric_name(metric, feature, of_kind(True)) == genuine
    assert metric_name(metric, feature, of_kind(False)) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Conv2d_2b_3x3.bn.bias": None}, r"lacks 1 of the 15 parameters.*Conv2d_2b_3x3\.bn\.bias"),
        ({"Conv2d_1a_3x3.conv.weight": np.zeros((3, 3, 3, 32), np.float32)}, r"expected floats \[32, 3, 3, 3\]"),
        ({"Conv2d_1a_3x3.bn.bias": np.zeros(32, int)}, "int64"),
        ({"Conv2d_1a_3x3.bn.bias": np.full(32, np.nan, np.float32)}, "NaN"),
        ({"Conv2d_1a_3x3.bn.running_var": np.full(32, -1, np.float32)}, "negative"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_weights_that_cannot_be_right_are_refused(tmp_path, change, message, suffix):
    arrays = {name: value for name, value in {**stem(), **change}.items() if value is not None}
    path = write(tmp_path / f"w{suffix}", arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_inception(path, ("64",), cache_dir=tmp_path / "cache")
    assert str(path) in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_slice_serves_only_the_features_that_it_covers(tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*Conv2d_3b_1x1\.conv\.weight.*shallower"):
        load_inception(write(tmp_path / "w.npz", stem()), ("64", "192"), cache_dir=tmp_path)


def test_files_that_are_not_there_or_not_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{weights.GENUINE_SHA256}.*--inception PATH"):
        load_inception(tmp_path / "none.pth", ("64",), cache_dir=tmp_path)
    for name, content in (("a.npz", b"junk"), ("a.safetensors", b"junk"), ("a.pth", b"junk"), ("a.bin", b"junk")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_inception(tmp_path / name, ("64",), cache_dir=tmp_path)


def test_the_hash_is_checked_where_it_is_given(tmp_path):
    path = write(tmp_path / "w.npz", stem())
    right = sha256(path.read_bytes())
    load_inception(path, ("64",), cache_dir=tmp_path, sha256=right)
    with pytest.raises(ValueError, match=f"{right}, expected 00"):
        load_inception(path, ("64",), cache_dir=tmp_path, sha256="00")


class Server:
    """Serves one file; notes the ranges asked for; can break off, or ignore ranges."""

    def __init__(self, content):
        self.content, self.break_after, self.ranges, self.honour_ranges = content, None, [], True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers["Range"]
                outer.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and outer.honour_ranges else 0
                if start >= len(outer.content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start : outer.break_after])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/files/inception.pth?raw=1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server(pth_bytes(stem()))
    yield server
    server.server.shutdown()
    server.server.server_close()


def fetch(server, tmp_path, digest=None):
    return load_inception(server.url, ("64",), cache_dir=tmp_path, sha256=digest or sha256(server.content))


def test_a_download_happens_once(server, tmp_path):
    assert_is_the_stem(fetch(server, tmp_path))
    assert sha256((tmp_path / "inception.pth").read_bytes()) == sha256(server.content)
    (tmp_path / "inception.pth").unlink()  # the converted slice is enough
    assert_is_the_stem(fetch(server, tmp_path))
    assert server.ranges == [None]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("honour_ranges", [True, False])
def test_an_interrupted_download_goes_on(server, tmp_path, honour_ranges):
    server.honour_ranges = honour_ranges
    server.break_after = 5000
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*By hand"):
        fetch(server, tmp_path)
    assert (tmp_path / "inception.pth.part").stat().st_size == 5000
    assert not (tmp_path / "inception.pth").exists()
    server.break_after = None
    assert_is_the_stem(fetch(server, tmp_path))
    assert server.ranges == [None, "bytes=5000-"]


def test_a_download_that_was_complete_is_not_fetched_again(server, tmp_path):
    (tmp_path / "inception.pth.part").write_bytes(server.content)
    assert_is_the_stem(fetch(server, tmp_path))


def test_a_download_with_another_hash_is_removed(server, tmp_path):
    with pytest.raises(ValueError, match=f"{sha256(server.content)}, expected 12"):
        fetch(server, tmp_path, "12")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_network_the_message_tells_the_manual_way(tmp_path):
    url = "http://127.0.0.1:9/inception.pth"
    with pytest.raises(ConnectionError, match=f"{weights.GENUINE_SHA256}.*--inception PATH"):
        load_inception(url, ("64",), cache_dir=tmp_path, sha256="00")


def test_a_url_without_a_known_hash_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--inception_sha256"):
        load_inception("https://example.org/inception.pth", ("64",), cache_dir=tmp_path)
    assert Path(weights.GENUINE_URLS[0]).name.endswith(f"{weights.GENUINE_SHA256[:8]}.pth")
