import numpy as np
import pytest
from PIL import Image

from fooddiff.data import sources
from fooddiff.eval.images import open_images

SOURCES = {"digits": sources.digits, "folder": sources.folder}


def pixels(n=3, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def opened(spec, tmp_path):
    return open_images(str(spec), sources=SOURCES, image_size=8, cache_dir=tmp_path / "cache")


def save(folder, images, names):
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def test_a_folder_is_read_in_depth_and_in_order(tmp_path):
    x = pixels(3)
    folder = save(tmp_path / "samples", x, ["b/2.png", "b/10.png", "a.png"])
    (folder / "notes.txt").write_text("not an image")
    found = opened(folder, tmp_path)
    assert (found.name, len(found.pixels), found.class_counts()) == ("samples", 3, None)
    np.testing.assert_array_equal(found.pixels[0:3], x[[2, 1, 0]])
    np.testing.assert_array_equal(found.pixels[1:2], x[[1]])


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    folder = tmp_path / "modes"
    save(folder, [grey], ["grey.png"])
    Image.fromarray(np.dstack([grey] * 3 + [grey])).save(folder / "rgba.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.png")
    found = opened(folder, tmp_path)
    np.testing.assert_array_equal(found.pixels[0:3], np.broadcast_to(grey[None, :, :, None], (3, 8, 8, 3)))


def test_identity_follows_content_and_not_place(tmp_path):
    one = opened(save(tmp_path / "one", pixels(), ["0.png", "1.png", "2.png"]), tmp_path)
    copy = opened(save(tmp_path / "copy", pixels(), ["0.png", "1.png", "2.png"]), tmp_path)
    other = opened(save(tmp_path / "other", pixels(seed=1), ["0.png", "1.png", "2.png"]), tmp_path)
    assert one.identity["sha256"] == copy.identity["sha256"] != other.identity["sha256"]


def test_an_npz_is_read_in_slices_with_its_labels(tmp_path):
    x, path = pixels(5), tmp_path / "samples.npz"
    for write in (np.savez, np.savez_compressed):
        write(path, x, np.array([1, 1, 0, 3, 3]))
        found = opened(path, tmp_path)
        np.testing.assert_array_equal(found.pixels[0:5], x)
        np.testing.assert_array_equal(found.pixels[2:4], x[2:4])
        assert found.class_counts() == {"0": 1, "1": 2, "3": 2}


def test_an_npz_without_labels_has_no_class_counts(tmp_path):
    np.savez(tmp_path / "samples.npz", pixels())
    assert opened(tmp_path / "samples.npz", tmp_path).class_counts() is None


def test_a_data_source_brings_labels_and_names(tmp_path):
    found = opened("digits::test", tmp_path)
    assert found.name == "digits test"
    assert found.pixels[0:2].shape == (2, 8, 8, 3)
    assert sum(found.class_counts().values()) == len(found.pixels)
    assert set(found.class_counts()) == set("0123456789")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.zeros((2, 8, 8, 3), np.float32),), "float32"),
        ((np.zeros((2, 8, 8, 1), np.uint8),), r"\[2, 8, 8, 1\]"),
        ((np.zeros((0, 8, 8, 3), np.uint8),), r"\[0, 8, 8, 3\]"),
        ((np.asfortranarray(pixels(2)),), "C order"),
        ((np.array([{}], object),), "object"),
        ((pixels(2), np.zeros(3, int)), r"arr_1 is int64 \[3\]"),
        ((pixels(2), np.zeros(2)), "arr_1 is float64"),
        ((), "holds nothing"),
    ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, *arrays)
    with pytest.raises(ValueError, match=message) as error:
        opened(path, tmp_path)
    assert str(path) in str(error.value)


def test_a_truncated_npz_is_refused(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, pixels(50))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read"):
        opened(path, tmp_path)


def test_images_of_a_folder_must_be_whole_and_of_one_size(tmp_path):
    folder = save(tmp_path / "mixed", [pixels(1)[0], pixels(1, 9)[0]], ["0.png", "1.png"])
    with pytest.raises(ValueError, match=r"1\.png is 9x9 but .*0\.png is 8x8"):
        opened(folder, tmp_path).pixels[0:2]
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1\.png is unreadable"):
        opened(folder, tmp_path).pixels[0:2]
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "1.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        opened(folder, tmp_path).pixels[0:2]


@pytest.mark.parametrize("spec", ["nowhere", "cifar10::test"])
def test_what_is_not_there_is_answered_with_what_can_be(tmp_path, spec):
    with pytest.raises(FileNotFoundError, match="digits, folder"):
        opened(tmp_path / spec, tmp_path)


def test_other_inputs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        opened(tmp_path / "empty", tmp_path)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a folder nor"):
        opened(tmp_path / "a.zip", tmp_path)
    for spec in ("digits::validation", "digits:test"):
        with pytest.raises(ValueError, match="train or test"):
            opened(spec, tmp_path)
