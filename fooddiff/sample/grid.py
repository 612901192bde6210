"""Labelled PNG grids: one column per class, names under the columns. Samples come out of a grid as they went in."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor
MAX_COLUMNS = 12
GAP = 4
FONT_SIZE = 10
LINE = 12
KEY = "fooddiff"  # of the PNG text that says what a grid holds


class Grid(NamedTuple):
    """Samples of some classes, uint8[classes, per_class, h, w, 3], and the names of these classes."""

    images: np.ndarray
    class_names: tuple[str, ...]


class _Layout(NamedTuple):
    """Where everything of a grid lies, in pixels."""

    shape: tuple[int, int, int, int]  # classes, per_class, height, width
    caption_lines: int

    @property
    def factor(self) -> int:
        return max(1, -(-MIN_CELL // self.shape[2]))

    @property
    def columns(self) -> int:
        return min(self.shape[0], MAX_COLUMNS)

    @property
    def cell(self) -> tuple[int, int]:
        return self.shape[2] * self.factor, self.shape[3] * self.factor

    @property
    def band_height(self) -> int:
        return self.shape[1] * (self.cell[0] + GAP) + LINE * self.caption_lines + GAP

    @property
    def size(self) -> tuple[int, int]:
        bands = -(-self.shape[0] // self.columns)
        return self.columns * (self.cell[1] + GAP) + GAP, bands * self.band_height + GAP

    def corner(self, column: int, row: int) -> tuple[int, int]:
        """Left and top of a class's sample; row per_class is its caption."""
        left = GAP + (column % self.columns) * (self.cell[1] + GAP)
        return left, GAP + (column // self.columns) * self.band_height + row * (self.cell[0] + GAP)


def class_grid(images: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Lays out samples.

    Args:
        images: uint8[classes, per_class, h, w, 3].
        class_names: a name for every class of `images`.

    Returns:
        An RGB picture; columns that would exceed 12 continue in a further band below.
    """
    captions = [name.replace("_", "\n") for name in class_names]
    layout = _Layout(images.shape[:4], max(caption.count("\n") + 1 for caption in captions))
    picture = Image.new("RGB", layout.size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    height, width = layout.cell
    for i, (column, caption) in enumerate(zip(images, captions, strict=True)):
        for row, pixels in enumerate(column):
            cell = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(cell, layout.corner(i, row))
        left, top = layout.corner(i, len(column))
        draw.multiline_text(
            (left + width // 2, top), caption, fill="black", font=font, anchor="ma", align="center", spacing=1
        )
    picture.info[KEY] = json.dumps({"shape": layout.shape, "class_names": list(class_names)})
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """Encodes a picture as PNG; a grid keeps the description by which `read_grid` reads it."""
    buffer, text = BytesIO(), PngImagePlugin.PngInfo()
    if KEY in picture.info:
        text.add_text(KEY, picture.info[KEY])
    picture.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def is_grid(path: Path) -> bool:
    """Whether a file is there and `read_grid` reads it."""
    try:
        read_grid(path)
    except ValueError:
        return False
    return True


def read_grid(path: Path) -> Grid:
    """Takes the samples out of a grid's PNG file, each pixel as it was.

    Args:
        path: a file that holds the `png_bytes` of a `class_grid`.

    Raises:
        ValueError: the file is not such a grid.
    """
    try:
        with Image.open(path) as picture:
            content = json.loads(picture.info[KEY])
            shape, names = tuple(content["shape"]), tuple(content["class_names"])
            layout = _Layout(shape, max(name.count("_") + 1 for name in names))
            if min(shape) < 1 or len(shape) != 4 or len(names) != shape[0] or layout.size != picture.size:
                raise ValueError("its description does not fit its size")
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a grid that this program wrote: {error}") from error
    images = np.empty((*shape, 3), np.uint8)
    height, width = layout.cell
    for i in range(shape[0]):
        for row in range(shape[1]):
            left, top = layout.corner(i, row)
            images[i, row] = pixels[top : top + height : layout.factor, left : left + width : layout.factor]
    return Grid(images, names)
