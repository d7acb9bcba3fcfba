"""Downscales images and label maps in the common way for the full ADE20K set."""

import numpy as np
from PIL import Image


def within_short_side(
    image_hwc: np.ndarray, label_hw: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """An (H, W, 3) uint8 image and its (H, W) label map with the short side reduced to `side`
    pixels; unchanged if it is not longer.

    Images are interpolated bilinearly without smoothing, like OpenCV's INTER_LINEAR. Labels are
    taken at floor(position * scale), like its INTER_NEAREST.
    """
    height, width = label_hw.shape
    short = min(height, width)
    if short <= side:
        return image_hwc, label_hw
    new_height, new_width = (
        (side, round(width / height * side)) if height == short else
        (round(height / width * side), side)
    )  # fmt: skip
    smaller = Image.fromarray(image_hwc).transform(
        (new_width, new_height),
        Image.Transform.AFFINE,
        (width / new_width, 0, 0, 0, height / new_height, 0),
        Image.Resampling.BILINEAR,
    )
    rows = np.arange(new_height) * height // new_height
    columns = np.arange(new_width) * width // new_width
    return np.array(smaller), label_hw[rows[:, None], columns]
