import io

import numpy as np
import pytest
from PIL import Image

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from tests.tiny_food101 import jpeg, write_folder

FILES = {
    "train/cheesecake/b.jpg": jpeg(1, (16, 16)),
    "train/cheesecake/a.jpg": jpeg(2, (16, 16)),
    "train/cheese_plate/a.jpg": jpeg(3, (16, 16)),
    "test/cheesecake/c.jpg": jpeg(4, (16, 16)),
}


def load(root, cache_dir, split="train"):
    return load_dataset(sources.folder(root), split, image_size=16, cache_dir=cache_dir)


def decode(content):
    return np.array(Image.open(io.BytesIO(content)))


def test_images_and_labels(tmp_path):
    dataset = load(write_folder(tmp_path / "data", FILES), tmp_path / "cache")
    assert dataset.class_names == ("cheese_plate", "cheesecake")
    assert dataset.labels.tolist() == [0, 1, 1]
    names = ("cheese_plate/a", "cheesecake/a", "cheesecake/b")
    np.testing.assert_array_equal(dataset.images, [decode(FILES[f"train/{name}.jpg"]) for name in names])


def test_both_splits_share_the_classes_even_where_one_lacks_some(tmp_path):
    root = write_folder(tmp_path / "data", FILES)
    test = load(root, tmp_path / "cache", "test")
    assert test.class_names == load(root, tmp_path / "cache").class_names
    assert test.labels.tolist() == [1]


def test_classes_txt_gives_the_order(tmp_path):
    root = write_folder(tmp_path / "data", FILES | {"classes.txt": b"cheesecake\ncheese_plate\nwaffles\n"})
    dataset = load(root, tmp_path / "cache")
    assert dataset.class_names == ("cheesecake", "cheese_plate", "waffles")
    assert dataset.labels.tolist() == [1, 0, 0]
    assert sources.folder(root).class_names == dataset.class_names


def test_hidden_files_are_ignored(tmp_path):
    hidden = {"train/.DS_Store": b"x", "train/cheesecake/.DS_Store": b"x", "train/.cache/a.jpg": b"x"}
    dataset = load(write_folder(tmp_path / "data", FILES | hidden), tmp_path / "cache")
    assert len(dataset.images) == 3


def test_the_identity_follows_the_files(tmp_path):
    root = write_folder(tmp_path, FILES)
    before = sources.folder(root).identity
    assert sources.folder(root).identity == before
    write_folder(root, {"test/cheesecake/d.jpg": jpeg(5)})
    more = sources.folder(root).identity
    write_folder(root, {"classes.txt": b"cheesecake\ncheese_plate\n"})
    assert len({str(identity) for identity in (before, more, sources.folder(root).identity)}) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train/cheesecake/notes.txt": b"hello"}, "cheesecake/notes.txt: not a JPEG"),
        ({"train/cheesecake/more/a.jpg": b""}, "more is not a file"),
        ({"train/\x1b[2J/a.jpg": b""}, r"'\\x1b\[2J' is not allowed"),
        ({"train/cheesecake/a\nb.jpg": b""}, r"'a\\nb.jpg' is not allowed"),
        ({"classes.txt": b"cheesecake\n"}, "lacks: 'cheese_plate'"),
        ({"classes.txt": b"cheesecake\ncheesecake\ncheese_plate\n"}, "cheesecake twice"),
    ],
)
def test_bad_content_is_named(tmp_path, extra, message):
    root = write_folder(tmp_path / "data", FILES | extra)
    with pytest.raises(ValueError, match=message):
        load(root, tmp_path / "cache")


def test_a_folder_without_splits(tmp_path):
    with pytest.raises(ValueError, match="no folder train or test"):
        sources.folder(tmp_path)


def test_a_missing_split(tmp_path):
    root = write_folder(tmp_path / "data", {"train/a/1.jpg": jpeg(1)})
    with pytest.raises(FileNotFoundError, match="test does not exist"):
        load(root, tmp_path / "cache", "test")


def test_an_empty_split(tmp_path):
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        load(tmp_path / "data", tmp_path / "cache")


def test_no_path_and_no_such_path(tmp_path):
    with pytest.raises(ValueError, match="needs config"):
        sources.folder(None)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        sources.folder(tmp_path / "absent")
