import io

import numpy as np
import pytest
from PIL import Image

from fooddiff.sample.grid import FONT_SIZE, GAP, KEY, MAX_COLUMNS, MIN_CELL, class_grid, png_bytes, read_grid


def test_every_pixel_of_every_sample_is_in_its_place():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(class_grid(images, ["a", "b_c", "d"]))
    factor = MIN_CELL // 8
    for column in range(3):
        for row in range(2):
            top, left = GAP + row * (MIN_CELL + GAP), GAP + column * (MIN_CELL + GAP)
            cell = grid[top : top + MIN_CELL, left : left + MIN_CELL]
            np.testing.assert_array_equal(cell[::factor, ::factor], images[column, row])


def test_names_are_drawn_under_the_columns():
    images = np.zeros((2, 1, 64, 64, 3), np.uint8)
    plain, named = (np.asarray(class_grid(images, names)) for names in (["", ""], ["", "pizza"]))
    changed = np.argwhere((plain != named).any(axis=-1))
    assert changed[:, 0].min() >= GAP + 64  # below the images
    assert changed[:, 1].min() >= GAP + 64  # in the second column
    assert len(changed) > FONT_SIZE


def test_many_classes_continue_in_another_band():
    images = np.zeros((MAX_COLUMNS + 1, 1, 64, 64, 3), np.uint8)
    width, height = class_grid(images, ["x"] * (MAX_COLUMNS + 1)).size
    assert width == MAX_COLUMNS * (64 + GAP) + GAP
    assert height > 2 * 64


def test_png_keeps_every_pixel():
    grid = class_grid(np.random.default_rng(0).integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8), ["x"])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(grid)))), np.asarray(grid))


@pytest.mark.parametrize(("classes", "size"), [(1, 64), (3, 8), (MAX_COLUMNS + 2, 80)])
def test_samples_come_out_of_a_grid_as_they_went_in(tmp_path, classes, size):
    images = np.random.default_rng(0).integers(0, 256, (classes, 2, size, size, 3), dtype=np.uint8)
    names = tuple(f"class_{i}" for i in range(classes))
    path = tmp_path / "grid.png"
    path.write_bytes(png_bytes(class_grid(images, names)))
    grid = read_grid(path)
    np.testing.assert_array_equal(grid.images, images)
    assert grid.class_names == names


@pytest.mark.parametrize(
    "description",
    [None, "", "[]", '{"shape": [1, 1, 64, 64]}', '{"shape": [1, 1, 64, 640], "class_names": ["x"]}',
     '{"shape": [1, 1, "a", 64], "class_names": ["x"]}', '{"shape": [0, 1, 64, 64], "class_names": ["x"]}',
     '{"shape": [1, 1, 64, 64], "class_names": [1]}', '{"shape": [1, 1, 64, 64], "class_names": ["x", "y"]}'],
)  # fmt: skip
def test_other_pictures_are_refused_by_name(tmp_path, description):
    picture = class_grid(np.zeros((1, 1, 64, 64, 3), np.uint8), ["x"])
    picture.info = {} if description is None else {KEY: description}
    path = tmp_path / "grid.png"
    path.write_bytes(png_bytes(picture))
    with pytest.raises(ValueError, match=r"grid\.png is not a grid"):
        read_grid(path)


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "grid.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"grid\.png is not a grid"):
        read_grid(tmp_path / "grid.png")
