"""Making images and label maps smaller as ADE20K's full set is prepared everywhere."""

import numpy as np
from PIL import Image


def within_short_side(
    image_hwc: np.ndarray, label_hw: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both with their short side brought down to `side`; unchanged where it is no longer.

    Image: bilinear between pixel centres, without smoothing, as OpenCV's INTER_LINEAR. Labels: the
    pixel at floor(position * scale), as its INTER_NEAREST.

    Args:
        image_hwc: (H, W, 3) uint8.
        label_hw: (H, W) integers.
        side: pixels.
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
