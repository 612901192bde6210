import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from fooddiff.data.sources import Source, Split
from tests.tiny_food101 import tiny_food101, write_folder

ROOT = Path(__file__).parents[1]


def fail(reason):
    raise ValueError(reason)


def made_up(count=12, broken=(), name="made_up", before_each=lambda row: None, order=None):
    """A source of random 8x8 pictures; image i has the label i % 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)

    def decode(row):
        before_each(row)
        return fail("it is broken") if row in broken else Image.fromarray(pixels[row])

    def split(_):
        rows = range(count) if order is None else order
        return Split(
            ids=[f"class/{row:03d}" for row in range(count)],
            labels=[row % 3 for row in range(count)],
            read=lambda: ((row, partial(decode, row)) for row in rows),
        )

    return Source(name, {"count": count, "broken": list(broken)}, lambda: ("a", "b", "c"), split), pixels


def load(source, cache_dir, **options):
    return load_dataset(source, "train", **{"image_size": 8, "cache_dir": cache_dir} | options)


def entries(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir() if path.name != ".lock")


def test_images_labels_and_manifest(tmp_path):
    source, pixels = made_up()
    dataset = load(source, tmp_path)
    np.testing.assert_array_equal(dataset.images, pixels)
    assert isinstance(dataset.images, np.memmap)
    assert not dataset.images.flags.writeable
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.tolist() == [row % 3 for row in range(12)]
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.manifest["source"] == {"name": "made_up", "count": 12, "broken": []}
    assert dataset.manifest["split"] == "train"
    assert dataset.manifest["preprocessing"]["image_size"] == 8
    assert dataset.manifest["images"] == 12
    assert dataset.manifest["images_per_class"] == [4, 4, 4]
    assert dataset.manifest["unreadable"] == {}


def test_the_files_are_plain_arrays(tmp_path):
    dataset = load(made_up()[0], tmp_path)
    (folder,) = entries(tmp_path)
    assert folder.startswith("made_up-train-8px-")
    assert entries(tmp_path / folder) == ["images.npy", "labels.npy", "manifest.json"]
    np.testing.assert_array_equal(np.load(tmp_path / folder / "images.npy"), dataset.images)
    np.testing.assert_array_equal(np.load(tmp_path / folder / "labels.npy"), dataset.labels)


def test_a_cache_is_decoded_once(tmp_path):
    decoded = []
    source, _ = made_up(before_each=decoded.append)
    first = load(source, tmp_path)
    second = load(source, tmp_path)
    assert sorted(decoded) == list(range(12))
    assert first.manifest == second.manifest


def test_the_order_in_which_a_source_reads_changes_nothing(tmp_path):
    forward = load(made_up()[0], tmp_path / "forward")
    shuffled = load(made_up(order=np.random.default_rng(1).permutation(12).tolist())[0], tmp_path / "shuffled")
    np.testing.assert_array_equal(forward.images, shuffled.images)
    assert forward.manifest["sha256"] == shuffled.manifest["sha256"]


def test_the_sha256_tells_pixels_and_labels_apart(tmp_path):
    source, _ = made_up()
    relabelled = Source("other", {}, source.load_class_names, lambda name: source.split(name)._replace(labels=[0] * 12))
    hashes = {
        load(source, tmp_path).manifest["sha256"],
        load(source, tmp_path, image_size=4).manifest["sha256"],
        load(relabelled, tmp_path).manifest["sha256"],
    }
    assert len(hashes) == 3


def test_other_data_size_or_split_have_another_folder(tmp_path):
    load(made_up()[0], tmp_path)
    load(made_up(13)[0], tmp_path)
    load(made_up()[0], tmp_path, image_size=4)
    load_dataset(made_up()[0], "test", image_size=8, cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 4


@pytest.mark.parametrize(
    ("options", "message"), [({"image_size": 0}, "image_size"), ({"max_unreadable": -1}, "max_unreadable")]
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(made_up()[0], tmp_path, **options)


def test_an_unknown_split_is_named_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"'validation'.*train, test"):
        load_dataset(made_up()[0], "validation", image_size=8, cache_dir=tmp_path)


# Unreadable images


def test_unreadable_images_are_counted_and_named_and_stop_the_build(tmp_path):
    source, _ = made_up(broken=(2, 5))
    with pytest.raises(ValueError, match=r"2 of 12 .*allows 1") as error:
        load(source, tmp_path, max_unreadable=1)
    assert "class/002: it is broken" in str(error.value)
    assert "class/005: it is broken" in str(error.value)
    assert entries(tmp_path) == []


def test_many_unreadable_images_do_not_flood_the_terminal(tmp_path):
    source, _ = made_up(100, broken=range(60))
    with pytest.raises(ValueError, match="and 50 more"):
        load(source, tmp_path)


def test_allowed_unreadable_images_are_left_out_and_listed(tmp_path):
    source, pixels = made_up(broken=(2, 5))
    dataset = load(source, tmp_path, max_unreadable=2)
    kept = [row for row in range(12) if row not in (2, 5)]
    np.testing.assert_array_equal(dataset.images, pixels[kept])
    assert dataset.labels.tolist() == [row % 3 for row in kept]
    assert dataset.manifest["images"] == 10
    assert dataset.manifest["images_per_class"] == [4, 4, 2]
    assert dataset.manifest["unreadable"] == {"class/002": "it is broken", "class/005": "it is broken"}
    assert entries(tmp_path / entries(tmp_path)[0]) == ["images.npy", "labels.npy", "manifest.json"]


def test_a_cache_without_images_is_never_made(tmp_path):
    with pytest.raises(ValueError, match="none of the 3 images"):
        load(made_up(3, broken=(0, 1, 2))[0], tmp_path, max_unreadable=3)
    assert entries(tmp_path) == []


def test_a_cache_with_gaps_is_refused_where_none_are_allowed(tmp_path):
    source, _ = made_up(broken=(2,))
    load(source, tmp_path, max_unreadable=1)
    with pytest.raises(ValueError, match=r"class/002"):
        load(source, tmp_path, max_unreadable=0)


# Builds that fail, are killed, or run at once


def test_a_failing_source_leaves_nothing(tmp_path):
    def explode(row):
        if row == 7:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        load(made_up(before_each=explode)[0], tmp_path)
    assert entries(tmp_path) == []
    assert len(load(made_up()[0], tmp_path).images) == 12


def test_too_little_room_is_found_before_writing(tmp_path, monkeypatch):
    other = load(made_up(name="other")[0], tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0.00 GB.*cache_dir") as error:
        load(made_up()[0], tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert len(entries(tmp_path)) == 1
    assert len(other.images) == 12


def test_a_disk_that_fills_up_while_the_cache_is_flushed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="became full"):
            load(made_up()[0], tmp_path)
    assert entries(tmp_path) == []
    assert len(load(made_up()[0], tmp_path).images) == 12


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        (tmp_path / "mine").write_bytes(b"precious")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        with pytest.raises(OSError, match="became full"):
            load(made_up(20)[0], tmp_path, image_size=256)
        assert entries(tmp_path) == ["mine"]
        assert len(load(made_up()[0], tmp_path).images) == 12
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def in_process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    killed = in_process(
        "import os, signal, sys, pathlib, tests.test_data_cache as t\n"
        "die = lambda row: row == 9 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.load(t.made_up(before_each=die)[0], pathlib.Path(sys.argv[1]))",
        tmp_path,
    )
    killed.communicate()
    assert killed.returncode == -9
    assert [name.split("-")[0] for name in entries(tmp_path)] == ["partial"]
    assert len(load(made_up()[0], tmp_path).images) == 12
    assert [name.split("-")[0] for name in entries(tmp_path)] == ["made_up"]


@pytest.mark.slow
def test_processes_that_start_together_share_one_whole_cache(tmp_path):
    write_folder(tmp_path / "data", tiny_food101())
    code = (
        "import sys; from fooddiff.data import sources; from fooddiff.data.cache import load_dataset\n"
        "source = sources.archive(sys.argv[1])\n"
        "print(load_dataset(source, 'train', image_size=64, cache_dir=sys.argv[2]).manifest['sha256'])"
    )
    processes = [in_process(code, tmp_path / "data", tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone = load_dataset(sources.archive(tmp_path / "data"), "train", image_size=64, cache_dir=tmp_path / "alone")
    assert [out.strip() for out, _ in outputs] == [alone.manifest["sha256"]] * 2
    assert len(entries(tmp_path / "cache")) == 1


def test_of_builders_that_run_at_once_one_builds(tmp_path):
    decoded = []
    source, pixels = made_up(before_each=decoded.append)
    together = threading.Barrier(4)
    datasets = []

    def build():
        together.wait()
        datasets.append(load(source, tmp_path))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decoded) == list(range(12))
    for dataset in datasets:
        np.testing.assert_array_equal(dataset.images, pixels)
    assert len(datasets) == 4


def test_a_cache_that_appears_during_the_build_is_kept(tmp_path):
    # Another machine on a shared disk, whose lock is not seen here.
    source, _ = made_up()
    elsewhere = tmp_path / "elsewhere"
    load(source, elsewhere)
    (name,) = entries(elsewhere)

    def appear(row):
        if row == 5:
            shutil.copytree(elsewhere / name, tmp_path / "here" / name)

    dataset = load(made_up(before_each=appear)[0], tmp_path / "here")
    assert entries(tmp_path / "here") == [name]
    assert len(dataset.images) == 12


# Caches that were changed


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit(folder, images=11),
        lambda folder: edit(folder, images_per_class=[5, 4, 3]),
        lambda folder: edit(folder, class_names=["a", "b"]),
        lambda folder: edit(folder, split="test"),
        lambda folder: edit(folder, source={"name": "food101"}),
        lambda folder: edit(folder, sha256=None),
        lambda folder: edit(folder, unreadable=None),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "labels.npy").unlink(),
        lambda folder: os.truncate(folder / "images.npy", 1000),
        lambda folder: os.truncate(folder / "images.npy", 0),
        lambda folder: np.save(folder / "images.npy", np.zeros((12, 8, 8, 3), np.float32)),
        lambda folder: np.save(folder / "labels.npy", np.full(12, 3, np.int32)),
        lambda folder: np.save(folder / "labels.npy", np.zeros(12, object), allow_pickle=True),
    ],
)
def test_a_cache_that_is_not_what_its_manifest_says_is_refused_and_kept(tmp_path, damage):
    source, _ = made_up()
    load(source, tmp_path)
    (name,) = entries(tmp_path)
    damage(tmp_path / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    with pytest.raises(ValueError, match=f"{name} is not what its manifest says.*Delete that folder"):
        load(source, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
