"""From attribution heatmaps to tri-state masks.

FOSSIL (section 3.2) passes a heatmap through a sigmoid, to flatten its peaks, and thresholds the
result at 0.45. A heatmap is never negative and the sigmoid of a non-negative number is never under
0.5, so taken literally, the mask would always be the whole image. A sigmoid preserves the order of
values, so the question is only which values are compared with 0.45. There are three readings:

- `minmax`, the default: the heatmap stretched to [0, 1], as DAAM does before its own 0.4;
- `sigmoid_minmax`: the sigmoid of DAAM's own values, stretched to [0, 1]. For values below 1 the
  sigmoid is nearly a straight line. It depends on the heatmap's scale, so it is applied before
  heatmaps are stretched to be stored (`with_sigmoid`);
- `standardised_sigmoid`: sigmoid of (heatmap - mean) / standard deviation. The mask of a
  small thing on an even background then includes the background, whose value is about
  -sqrt(a / (1 - a)) for a thing of area a, with a sigmoid above 0.45 for a below 4 percent.

Measured against the true masks of synthetic scenes (`tests/benchmarks/binarisation.py`), `minmax`
gives the better masks, at 0.45 and at the best threshold of each. The default leaves a band around
0.45 UNSURE: only YES is pooled, so its purity matters.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ovref.config import STRICT
from ovref.records import NO, UNSURE, YES
from ovref_inference.ranges import require_within


@dataclass(frozen=True, kw_only=True)
class BinariseRule:
    """How a heatmap becomes a mask."""

    __pydantic_config__ = STRICT

    method: Literal["minmax", "standardised_sigmoid", "sigmoid_minmax"] = "minmax"
    """`minmax`: the heatmap stretched to [0, 1]. `standardised_sigmoid`: sigmoid of the heatmap in
    standard deviations from its mean. `sigmoid_minmax`: sigmoid of DAAM's own values, stretched."""
    threshold: float = 0.45
    """Threshold in (0, 1) for the values of `method`: YES above, NO below."""
    band: float = 0.05
    """Within this distance of the threshold a pixel is UNSURE; 0 for two-state masks."""

    def __post_init__(self):
        require_within("threshold", self.threshold, 0, 1, "()")
        if not 0 <= self.band < min(self.threshold, 1 - self.threshold):
            raise ValueError(
                f"band must be at least 0 and keep threshold +- band in (0, 1), found {self.band} "
                f"around {self.threshold}"
            )


def min_max_scaled(heatmaps_nhw: np.ndarray) -> np.ndarray:
    """Each heatmap rescaled to [0, 1] by its own range: the form in which heatmaps are stored.

    Args:
        heatmaps_nhw: (n, h, w) floats. A map with non-finite values becomes all NaN, a constant map
            all 0.

    Returns:
        (n, h, w) float16.
    """
    maps = np.asarray(heatmaps_nhw, dtype=np.float64)
    finite = np.isfinite(maps).all(axis=(1, 2), keepdims=True)
    maps = np.where(finite, maps, np.nan)
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    span = np.where(high > low, high - low, 1)
    return ((maps - low) / span).astype(np.float16)


def with_sigmoid(heatmaps_nhw: np.ndarray, rule: BinariseRule) -> np.ndarray:
    """Prepares DAAM's own values for the rule, before they are stretched: (n, h, w) floats."""
    if rule.method != "sigmoid_minmax":
        return heatmaps_nhw
    return 1 / (1 + np.exp(-np.asarray(heatmaps_nhw, dtype=np.float64)))


def binarise(heatmaps_nhw: np.ndarray, size_hw: tuple[int, int], rule: BinariseRule) -> np.ndarray:
    """Tri-state masks at the size of the image.

    The heatmap's scale and offset are ignored, so masks can be recomputed from the stored heatmaps
    with another rule; except with `sigmoid_minmax`, whose stored heatmaps are `with_sigmoid`.

    Args:
        heatmaps_nhw: (n, h, w) finite floats.
        size_hw: height and width of the masks.
        rule: method, threshold and band.

    Returns:
        (n, H, W) uint8 of NO, UNSURE, YES. A constant heatmap gives all NO.
    """
    masks_nhw = np.full((len(heatmaps_nhw), *size_hw), NO, dtype=np.uint8)
    for heatmap_hw, mask_hw in zip(heatmaps_nhw, masks_nhw, strict=True):
        values_hw = _values(resized(heatmap_hw, size_hw), rule.method)
        mask_hw[values_hw > rule.threshold - rule.band] = UNSURE
        mask_hw[values_hw > rule.threshold + rule.band] = YES
    return masks_nhw


def contrast(heatmap_hw: np.ndarray, mask_hw: np.ndarray) -> float:
    """The score of a region: how far its heat stands out from the rest of the image.

    Mean heat on YES pixels minus mean heat on NO pixels, in standard deviations of the heatmap: 2
    for a clean plateau on half of the image, near 0 for noise, 0 where a side is missing.

    Args:
        heatmap_hw: (h, w) finite floats, resized to the mask's size.
        mask_hw: (H, W) tri-state.
    """
    heat_hw = resized(heatmap_hw, mask_hw.shape)
    spread = float(heat_hw.std())
    yes, no = heat_hw[mask_hw == YES], heat_hw[mask_hw == NO]
    if spread == 0 or not yes.size or not no.size:
        return 0.0
    return float(yes.mean() - no.mean()) / spread


def resized(heatmap_hw: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(h, w) floats to (H, W) float32, bicubic."""
    image = Image.fromarray(np.ascontiguousarray(heatmap_hw, dtype=np.float32))
    height, width = size_hw
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _values(heat_hw: np.ndarray, method: str) -> np.ndarray:
    """The values to compare with the threshold, in [0, 1]; 0 for a constant heatmap."""
    low, high = float(heat_hw.min()), float(heat_hw.max())
    # Resizing a constant leaves rounding errors, which must not be stretched into a shape.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros_like(heat_hw)
    if method in ("minmax", "sigmoid_minmax"):
        return (heat_hw - low) / (high - low)
    z_hw = (heat_hw - heat_hw.mean()) / heat_hw.std()
    return 1 / (1 + np.exp(-z_hw))
