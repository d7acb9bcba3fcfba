"""A contact sheet of crops with their masks, drawn with Pillow alone for speed."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovref.exchange.picture_files import Picture
from ovref.ops.overlays import masked
from ovref.stored_images import png_of

CELL, TEXT, GAP, COLUMNS = 168, 30, 8, 6
MARGIN = 0.25
"""Margin around a box, as a fraction of its side."""


def contact_sheet(
    pictures: Sequence[Picture | None],
    boxes: Sequence[tuple[int, int, int, int]],
    titles: Sequence[tuple[str, str]],
) -> bytes:
    """A PNG of crops, each dimmed outside its mask, with two lines of text below.

    Args:
        pictures: None leaves an empty cell.
        boxes: x0, y0, x1, y1 in pixels, right and bottom exclusive.
        titles: two lines per crop.
    """
    columns = min(COLUMNS, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    size = (columns * (CELL + GAP) + GAP, rows * (CELL + TEXT + GAP) + GAP)
    sheet, font = Image.new("RGB", size, (250, 250, 250)), ImageFont.load_default()
    pen = ImageDraw.Draw(sheet)
    for number, (picture, box, lines) in enumerate(zip(pictures, boxes, titles, strict=True)):
        left = GAP + number % columns * (CELL + GAP)
        top = GAP + number // columns * (CELL + TEXT + GAP)
        if picture is None:
            pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=(190, 190, 190))
        else:
            crop = Image.fromarray(_crop(picture, box))
            crop.thumbnail((CELL, CELL))
            if max(crop.size) < CELL:
                scale = CELL / max(crop.size)
                crop = crop.resize([max(1, round(side * scale)) for side in crop.size])
            sheet.paste(crop, (left + (CELL - crop.width) // 2, top + (CELL - crop.height) // 2))
        for line, text in enumerate(lines):
            colour = (28, 28, 28) if line == 0 else (107, 107, 107)
            pen.text((left, top + CELL + 1 + 13 * line), _fitted(text, font), colour, font=font)
    return png_of(sheet)


def _crop(picture: Picture, box: tuple[int, int, int, int]) -> np.ndarray:
    height, width = picture.image_hwc.shape[:2]
    x0, y0, x1, y1 = box
    around_x, around_y = round((x1 - x0) * MARGIN) + 1, round((y1 - y0) * MARGIN) + 1
    rows = slice(max(0, y0 - around_y), min(height, y1 + around_y))
    columns = slice(max(0, x0 - around_x), min(width, x1 + around_x))
    shown = picture.image_hwc[rows, columns]
    return shown if picture.mask_hw is None else masked(shown, picture.mask_hw[rows, columns])


def _fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Truncates the text to the width of a cell."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and font.getlength(text) > CELL:
        text = text[:-1]
    return text
