"""Masks and heatmaps drawn over their images."""

import numpy as np
from PIL import Image

DIM = 0.28
"""Factor for the brightness outside a mask."""
EDGE_RGB = np.array([255, 214, 64], np.uint8)
HEAT_RGB = np.array([[20, 24, 82], [132, 32, 107], [229, 92, 48], [252, 232, 120]], np.float32)
"""Colours of a heatmap from its lowest to its highest value."""


def masked(image_hwc: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """The (H, W, 3) uint8 image dimmed outside an (H, W) bool mask, with the mask's outline."""
    out = (image_hwc * DIM).astype(np.uint8)
    out[mask_hw] = image_hwc[mask_hw]
    padded = np.pad(mask_hw, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out[mask_hw & ~inside] = EDGE_RGB
    return out


def heated(image_hwc: np.ndarray, heatmap_hw: np.ndarray) -> np.ndarray:
    """The (H, W, 3) uint8 image under a heatmap of values in [0, 1] and any size."""
    height, width = image_hwc.shape[:2]
    levels = Image.fromarray(heatmap_hw.astype(np.float32)).resize((width, height))
    place = np.clip(np.asarray(levels), 0, 1) * (len(HEAT_RGB) - 1)
    low = np.minimum(place.astype(int), len(HEAT_RGB) - 2)
    share = (place - low)[..., None]
    colours = HEAT_RGB[low] * (1 - share) + HEAT_RGB[low + 1] * share
    return (0.35 * image_hwc + 0.65 * colours).astype(np.uint8)
