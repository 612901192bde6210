"""Labelled PNG grids: one column per class, class names under the columns."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor
MAX_COLUMNS = 12
GAP = 4
FONT_SIZE = 10
LINE = 12


def class_grid(images: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Lays out samples.

    Args:
        images: uint8[classes, per_class, h, w, 3].
        class_names: a name for every class of `images`.

    Returns:
        An RGB picture; columns that would exceed 12 continue in a further band below.
    """
    classes, per_class, height, width, _ = images.shape
    factor = max(1, -(-MIN_CELL // height))
    cell_h, cell_w = height * factor + GAP, width * factor + GAP
    columns = min(classes, MAX_COLUMNS)
    captions = [name.replace("_", "\n") for name in class_names]
    caption_h = LINE * max(caption.count("\n") + 1 for caption in captions) + GAP
    band_h = per_class * cell_h + caption_h
    bands = -(-classes // columns)
    picture = Image.new("RGB", (columns * cell_w + GAP, bands * band_h + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for i, (column, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + (i % columns) * cell_w, GAP + (i // columns) * band_h
        for row, pixels in enumerate(column):
            cell = Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            picture.paste(cell, (left, top + row * cell_h))
        centre = left + (cell_w - GAP) // 2
        draw.multiline_text(
            (centre, top + per_class * cell_h), caption, fill="black", font=font, anchor="ma", align="center", spacing=1
        )
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """Encodes a picture as PNG."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
