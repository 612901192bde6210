import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tensorflow_datasets.core.download.download_manager import DownloadManager

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from fooddiff.data.feed import device_batches
from fooddiff.data.sources import food101_tfds


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_tfds_and_the_archive_give_the_same_cache_bit_for_bit(mini_food101_dir, mini_archive, tmp_path, split):
    tfds, archive = (
        load_dataset(source, split, image_size=64, cache_dir=tmp_path)
        for source in (sources.food101(mini_food101_dir), sources.archive(mini_archive))
    )
    assert len(tfds.images) == {"train": 52, "test": 26}[split]
    assert tfds.class_names == archive.class_names
    np.testing.assert_array_equal(tfds.images, archive.images)
    np.testing.assert_array_equal(tfds.labels, archive.labels)
    assert tfds.manifest["sha256"] == archive.manifest["sha256"]


@pytest.mark.slow
def test_photographs_arrive_on_the_devices(mini_food101_dir, tmp_path):
    dataset = load_dataset(sources.food101(mini_food101_dir), "train", image_size=64, cache_dir=tmp_path)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
    batches = device_batches(dataset, seed=0, batch_size=8, start_step=0, flip=True, sharding=sharding)
    for _ in range(2):
        batch = next(batches)
        assert batch.pixels.shape == (8, 64, 64, 3)
        assert np.asarray(batch.pixels).std() > 20
    batches.close()


@pytest.mark.slow
def test_a_finished_cache_needs_no_prepared_data(mini_food101_dir, tmp_path):
    source = sources.food101(mini_food101_dir)
    load_dataset(source, "test", image_size=64, cache_dir=tmp_path)
    again = sources.food101(mini_food101_dir)
    object.__setattr__(again, "load_split", None)
    assert len(load_dataset(again, "test", image_size=64, cache_dir=tmp_path).images) == 26


@pytest.mark.slow
def test_no_tensorflow_at_run_time(mini_food101_dir, tmp_path):
    code = (
        "import sys; from fooddiff.data import sources; from fooddiff.data.cache import load_dataset\n"
        "load_dataset(sources.food101(sys.argv[1]), 'test', image_size=64, cache_dir=sys.argv[2])\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, mini_food101_dir, tmp_path], cwd=Path(__file__).parents[1], check=True)


def test_the_classes_are_the_data_sets_own_and_known_before_a_download(tmp_path):
    source = sources.food101(tmp_path)
    assert len(source.class_names) == 101
    assert source.class_names[16:18] == ("cheesecake", "cheese_plate")
    assert source.identity["examples"] == {"train": 75_750, "test": 25_250}


def test_a_full_disk_is_found_before_the_download(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**9))
    monkeypatch.setattr(DownloadManager, "_download", lambda *_: pytest.fail("it downloads"))
    with pytest.raises(OSError, match=r"needs 20 GB .* 3.0 GB are free.*config.data.path"):
        sources.food101(tmp_path).split("train")


def test_a_failed_download_was_announced_and_says_what_to_do(tmp_path, monkeypatch, caplog):
    def no_network(*_):
        raise ConnectionError("no network")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30 * 10**9))
    monkeypatch.setattr(DownloadManager, "_download", no_network)
    monkeypatch.setattr(food101_tfds, "_check_reachable", lambda url: None)
    with pytest.raises(RuntimeError, match=r"no network.*config.data.source to 'archive'"):
        sources.food101(tmp_path).split("train")
    assert any("5.0 GB" in line and str(tmp_path) in line for line in caplog.messages)


def test_a_host_that_does_not_answer_is_found_before_minutes_of_retries(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30 * 10**9))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/food-101.tar.gz"
        monkeypatch.setattr(food101_tfds, "_URL", url)
        monkeypatch.setattr(DownloadManager, "_download", lambda *_: pytest.fail("it downloads"))
        with pytest.raises(
            RuntimeError, match=rf"{url} cannot be reached \(.*refused\).*config.data.source to 'archive'"
        ):
            sources.food101(tmp_path).split("train")


def test_what_is_downloaded_needs_no_host(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30 * 10**9))
    monkeypatch.setattr(food101_tfds, "_check_reachable", lambda url: pytest.fail("it asks"))
    monkeypatch.setattr(DownloadManager, "_download", lambda *_: 1 / 0)  # what would look for the file below
    (tmp_path / "downloads" / "food101").mkdir(parents=True)
    (tmp_path / "downloads" / "food101" / "cvl_food-101abc.tar.gz").touch()
    with pytest.raises(RuntimeError, match="division by zero"):
        sources.food101(tmp_path).split("train")
