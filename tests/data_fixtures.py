"""Real photographs, where they are at hand."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def mini_archive():
    """Real photographs in Food-101's own layout: 13 classes, 4 train and 2 test images each."""
    path = SHARED_DATA / "food-101-original-mini.tar.gz"
    if not path.is_file():
        pytest.skip(f"needs the real photographs of {path}")
    return path


@pytest.fixture(scope="session")
def mini_food101_dir(mini_archive, tmp_path_factory):
    """A TFDS data_dir with the mini archive, prepared by the real builder; only its download is replaced."""
    from etils import epath
    from promise import Promise
    from tensorflow_datasets.core.download.download_manager import DownloadManager

    from fooddiff.data import sources

    data_dir = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DownloadManager, "_download", lambda *_: Promise.resolve(epath.Path(mini_archive)))
        patch.setattr("fooddiff.data.sources.food101_tfds._PREPARE_BYTES", 10**8)
        patch.setattr("fooddiff.data.sources.food101_tfds._check_reachable", lambda url: None)
        sources.food101(data_dir).split("train")
    return data_dir
