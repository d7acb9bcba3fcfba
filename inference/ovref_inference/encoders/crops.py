"""Masked crops: a region cut out of its image for an encoder of whole images (VOCSeg 3.2 and 4.3).

The builder and the segmenters both crop regions here, so references and queries have the same
domain shift.
"""

from typing import Literal

import numpy as np

from ovref_inference.images import box_of

Masking = Literal["binary", "heatmap", "none"]
"""Treatment of the background of a region: erased, attenuated by the heatmap, or kept."""

CLIP_MEAN_RGB = (122.77, 116.75, 104.09)
"""Mean colour of CLIP's training images, in [0, 255]: zero after CLIP's normalisation."""


def masked_crop(
    image_hwc: np.ndarray,
    mask_hw: np.ndarray,
    masking: Masking = "binary",
    *,
    heatmap_hw: np.ndarray | None = None,
    fill_rgb: tuple[float, float, float] = CLIP_MEAN_RGB,
) -> np.ndarray:
    """The crop of a region: the bounding box of its mask, with the background treated.

    `binary` erases every pixel outside of the mask, `none` keeps the box as it is, `heatmap`
    attenuates each pixel by 1 - its heatmap, after min-max normalisation over the whole image
    (VOCSeg 4.3). Erased pixels become `fill_rgb`; with black, attenuation is the paper's product of
    pixels and heatmap.

    Args:
        image_hwc: (H, W, 3) uint8 RGB.
        mask_hw: (H, W) bool, at least one pixel.
        masking: the strategy.
        heatmap_hw: (H, W) real and finite, any range; only used by `heatmap`, which requires it. A
            constant heatmap attenuates nothing.
        fill_rgb: colour in [0, 255]; best the encoder's mean, which is zero after normalisation.

    Returns:
        (h, w, 3) uint8, h and w those of the mask's bounding box.

    Raises:
        ValueError: an empty mask, shapes or types not as above, a heatmap missing or not finite,
            an unknown strategy.
    """
    if image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.dtype != np.uint8:
        raise ValueError(
            f"image_hwc must be (H, W, 3) uint8, found {image_hwc.shape} {image_hwc.dtype}"
        )
    if mask_hw.shape != image_hwc.shape[:2] or mask_hw.dtype != bool:
        raise ValueError(
            f"mask_hw must be {image_hwc.shape[:2]} bool like the image, found {mask_hw.shape} "
            f"{mask_hw.dtype}"
        )
    x0, y0, x1, y1 = box_of(mask_hw)
    if not x1:
        raise ValueError("mask_hw is empty: there is nothing to crop")
    box = slice(y0, y1), slice(x0, x1)
    crop = image_hwc[box]
    if masking == "none":
        return crop.copy()
    if masking == "binary":
        kept_hw = mask_hw[box].astype(np.float32)
    elif masking == "heatmap":
        kept_hw = _unit_range(heatmap_hw, mask_hw.shape)[box]
    else:
        raise ValueError(f"masking must be binary, heatmap or none, found {masking!r}")
    fill = np.asarray(fill_rgb, dtype=np.float32)
    mixed = fill + kept_hw[..., None] * (crop.astype(np.float32) - fill)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def _unit_range(heatmap_hw: np.ndarray | None, size_hw: tuple[int, ...]) -> np.ndarray:
    """(H, W) float32 in [0, 1]; ones where the heatmap is constant."""
    if heatmap_hw is None:
        raise ValueError("masking 'heatmap' needs the region's heatmap_hw, found None")
    if heatmap_hw.shape != size_hw:
        raise ValueError(f"heatmap_hw must be {size_hw} like the image, found {heatmap_hw.shape}")
    heatmap = heatmap_hw.astype(np.float32)
    low, high = heatmap.min(), heatmap.max()
    if not np.isfinite(high - low):
        raise ValueError("heatmap_hw holds values that are not finite")
    # Resizing a constant leaves rounding errors, which must not be stretched to [0, 1].
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.ones_like(heatmap)
    return (heatmap - low) / (high - low)
