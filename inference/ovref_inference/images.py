"""Checks of images before models see them. No torch is needed here."""

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
