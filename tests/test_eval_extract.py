import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from fooddiff.eval import extract as extract_module
from fooddiff.eval import inception, resize
from fooddiff.eval.distances import frechet_distance
from fooddiff.eval.extract import feature_chunks, make_extract
from fooddiff.eval.stats import finish, sums_of
from tests.random_stem import random_stem


@functools.cache
def stem():
    return inception.fold(random_stem(), ("64",))


def make(batch_size, devices=None):
    return make_extract(stem(), ("64",), resize=resize.tf1, batch_size=batch_size, devices=devices)


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def run(extract, x):
    return np.concatenate([batch["64"] for batch in extract([x])])


def never(_):
    pytest.fail("the network ran")


SILENT = {"progress": lambda _: None, "after_chunk": lambda: None}


@pytest.fixture(scope="module")
def extract():
    return make(4)


def fake(pixels):
    """Features that are cheap and tell images apart."""
    for batch in pixels:
        yield {"64": batch.reshape(len(batch), -1)[:, :64].astype(np.float32)}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(extract_module, "CHUNK", 4)


@pytest.mark.slow
def test_batch_size_and_devices_change_nothing_but_rounding(extract):
    x, y = images(11), images(11, seed=1)

    def distance(extract):
        a, b = (finish(sums_of(run(extract, z))) for z in (x, y))
        return frechet_distance(a, b)

    expected = distance(extract)
    for other in (make(6), make(3, jax.devices()[:1])):
        assert run(other, x).shape == (11, 64)
        assert distance(other) == pytest.approx(expected, rel=1e-6)


def test_an_image_has_the_same_features_in_any_company(extract):
    x = images(5)
    together = run(extract, x)
    for i in range(5):
        np.testing.assert_array_equal(run(extract, x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("batch_size", [0, 3, -2])
def test_devices_must_divide_the_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch size {batch_size} .* 2 devices"):
        make(batch_size)


def test_images_must_be_uint8_rgb(extract):
    with pytest.raises(ValueError, match=r"float32 \[2, 8, 8, 3\]"):
        list(extract([np.zeros((2, 8, 8, 3), np.float32)]))
    with pytest.raises(ValueError, match=r"\[2, 8, 8, 1\]"):
        list(extract([np.zeros((2, 8, 8, 1), np.uint8)]))


@pytest.mark.usefixtures("small_chunks")
def test_finished_chunks_are_read_and_not_computed_again(tmp_path):
    x = images(10)
    first = list(feature_chunks(x, fake, identity={"a": 1}, folder=tmp_path, **SILENT))
    assert [len(chunk["64"]) for chunk in first] == [4, 4, 2]
    again = list(feature_chunks(x, never, identity={"a": 1}, folder=tmp_path, **SILENT))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["64"], other["64"])


@pytest.mark.usefixtures("small_chunks")
def test_a_folder_serves_one_identity(tmp_path):
    list(feature_chunks(images(5), fake, identity={"resize": "tf1"}, folder=tmp_path, **SILENT))
    for identity, n in (({"resize": "half_pixel"}, 5), ({"resize": "tf1"}, 6)):
        with pytest.raises(ValueError, match="something else"):
            list(feature_chunks(images(n), never, identity=identity, folder=tmp_path, **SILENT))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("content", [b"", b"not an npz", None])
def test_a_damaged_chunk_is_named_and_not_believed(tmp_path, content):
    list(feature_chunks(images(8), fake, identity={}, folder=tmp_path, **SILENT))
    victim = tmp_path / "000000004.npz"
    victim.write_bytes(victim.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match=r"000000004\.npz is damaged.*delete it"):
        list(feature_chunks(images(8), never, identity={}, folder=tmp_path, **SILENT))


@pytest.mark.usefixtures("small_chunks")
def test_progress_is_told_to_the_end(tmp_path):
    for extract in (fake, never):
        done = []
        list(feature_chunks(images(10), extract, identity={}, folder=tmp_path, **(SILENT | {"progress": done.append})))
        assert done == sorted(done)
        assert done[-1] == 10


RUN = """
    import sys
    from pathlib import Path
    import numpy as np
    from tests.random_stem import random_stem
    from fooddiff.eval import extract, inception, resize
    extract.CHUNK = 8
    params = inception.fold(random_stem(), ("64",))
    run = extract.make_extract(params, ("64",), resize=resize.tf1, batch_size=4)
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for chunk in extract.feature_chunks(x, run, identity={}, folder=Path(sys.argv[1]), progress=int, after_chunk=int):
        print("chunk", chunk["64"].sum(dtype="f8").hex(), flush=True)
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bits(tmp_path):
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tests.parent)}

    def start(folder):
        command = [sys.executable, "-c", textwrap.dedent(RUN), tmp_path / folder]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole = start("whole").communicate()[0]
    killed = start("killed")
    killed.stdout.readline()
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 2 <= len(list((tmp_path / "killed").glob("0*.npz"))) < 5
    assert start("killed").communicate()[0] == whole
    assert whole.count("chunk") == 5
