"""Checks of images before models see them, and boxes of masks. No torch is needed here."""

from collections.abc import Sequence

import numpy as np


def check_image(image_hwc: np.ndarray) -> None:
    """Raises ValueError for anything but (H, W, 3) uint8 with at least one pixel."""
    wanted = "an image must be a numpy array (H, W, 3) uint8"
    if not isinstance(image_hwc, np.ndarray):
        raise ValueError(f"{wanted}, found {type(image_hwc).__name__}")
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.dtype != np.uint8:
        raise ValueError(f"{wanted}, found {image_hwc.shape} {image_hwc.dtype}")
    if image_hwc.size == 0:
        raise ValueError(f"an image must have a pixel, found {image_hwc.shape}")


def check_images(images: Sequence[np.ndarray]) -> None:
    """Runs `check_image` on each. A single image, which is a sequence of rows, is refused."""
    shape = getattr(images, "shape", ())
    if len(shape) == 3:
        raise ValueError(
            f"images must be a list of images, found one array {tuple(shape)}; give [image]"
        )
    for image_hwc in images:
        check_image(image_hwc)


def box_of(mask_hw: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask's pixels, right and bottom exclusive; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask_hw.any(1)), np.flatnonzero(mask_hw.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
