import io

import numpy as np
from PIL import Image

from fooddiff.sample.grid import FONT_SIZE, GAP, MAX_COLUMNS, MIN_CELL, class_grid, png_bytes


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
