"""Image files to what segmenters take. Pillow is imported when the first is read."""

from pathlib import Path

import numpy as np


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB pixels of an image file, upright whatever its EXIF orientation.

    Raises:
        FileNotFoundError: it is not there.
        PIL.UnidentifiedImageError: it is no image.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
