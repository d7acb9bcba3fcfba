"""What an image must be, checked before models see it. No torch is needed here."""

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
    """`check_image` of each; one image alone is a sequence too, of its rows, and refused."""
    shape = getattr(images, "shape", ())
    if len(shape) == 3:
        raise ValueError(
            f"images must be a list of images, found one array {tuple(shape)}; give [image]"
        )
    for image_hwc in images:
        check_image(image_hwc)
