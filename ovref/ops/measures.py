"""What can be measured of a region alone, as plain data and plain numbers, for filters."""

from dataclasses import dataclass

import numpy as np

from ovref.config import STRICT
from ovref.records import YES
from ovref_inference.ranges import require_model

SMALL_PART = 0.02
"""Connected parts of less than this share of a mask are specks, and not counted."""
UNSAFE = ("nsfw", "porn", "hentai", "sexy", "unsafe", "explicit")
"""Labels by which image safety classifiers call what is not safe."""


@dataclass(frozen=True, kw_only=True)
class SafetySpec:
    """A classifier of images that says whether one is safe to show."""

    __pydantic_config__ = STRICT

    model: str
    """Folder or hub id of a model for image classification by transformers, such as
    `Falconsai/nsfw_image_detection`."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    unsafe: tuple[str, ...] = UNSAFE
    """Labels of the model, letter case aside, whose probabilities are added up. Those it does not
    have are passed over; it must have one."""

    def __post_init__(self) -> None:
        require_model(self.model)


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """What is measured of each region besides its area and score, for filters of the reduction.

    Always: `components` (`components`) and, where there is a heatmap, `entropy` (`heat_entropy`).
    """

    __pydantic_config__ = STRICT

    clip: bool = True
    """Measure `clip`: the cosine of the box around the region to the region's noun, by both towers
    of the CLIP model in `embed.text`."""
    safety: SafetySpec | None = None
    """Measure `unsafe`: how sure this classifier is that the image is not safe, in [0, 1]."""


def components(mask_hw: np.ndarray) -> int:
    """Connected parts of the YES pixels, diagonal neighbours included, without specks.

    Args:
        mask_hw: (H, W) tri-state; parts of less than SMALL_PART of its YES pixels do not count.
    """
    from scipy import ndimage

    yes_hw = mask_hw == YES
    labels_hw, _ = ndimage.label(yes_hw, np.ones((3, 3)))
    sizes = np.bincount(labels_hw.ravel())[1:]
    return int((sizes >= SMALL_PART * yes_hw.sum()).sum()) if len(sizes) else 0


def heat_entropy(heatmap_hw: np.ndarray) -> float:
    """Entropy of a heatmap as a distribution over its cells: 1 if all are alike, 0 if one has all.

    Args:
        heatmap_hw: (h, w) finite floats, at least 0. NaN is returned where nothing is above 0.
    """
    heat = heatmap_hw.astype(np.float64).ravel()
    total = heat.sum()
    if total <= 0 or heat.size < 2:
        return float("nan")
    share = heat[heat > 0] / total
    return float(-(share * np.log(share)).sum() / np.log(heat.size))
