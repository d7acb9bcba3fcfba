"""Sliding windows: score maps of large images from overlapping crops (TCL's protocol).

An image is resized to a short side, cut into square crops at a stride, each crop is scored alone,
scores are averaged where crops overlap, and can be brought back to the size of the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Sizes of the sliding window, in pixels. The defaults are TCL's, which FOSSIL uses."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    short_side: int = 448
    """Images are resized to this short side, whether they are larger or smaller."""
    long_side: int = 2048
    """Images whose long side would be above this are resized to this long side instead."""
    crop: int = 448
    """Side of a square crop; an image shorter than that gives shorter crops."""
    stride: int = 224
    """Step from crop to crop, at most `crop`."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.crop:
            raise ValueError(f"stride must lie in [1, crop = {self.crop}], found {self.stride}")
        if not 1 <= self.short_side <= self.long_side:
            raise ValueError(
                f"short_side must lie in [1, long_side = {self.long_side}], found {self.short_side}"
            )


def window_boxes(size_hw: tuple[int, int], crop: int, stride: int) -> list[tuple[int, ...]]:
    """Crops that cover an image: (top, left, bottom, right) in pixels, row by row.

    The last crop of a row or column is moved back inside the image, so all have the same size.
    """
    spans = []
    for length in size_hw:
        count = max(length - crop + stride - 1, 0) // stride + 1
        stops = [min(index * stride + crop, length) for index in range(count)]
        spans.append([(max(stop - crop, 0), stop) for stop in stops])
    return [(top, left, bottom, right) for top, bottom in spans[0] for left, right in spans[1]]


def resized_size(size_hw: tuple[int, int], config: WindowConfig) -> tuple[int, int]:
    """Height and width at the configured short side, aspect ratio kept as far as pixels allow."""
    scale = min(config.short_side / min(size_hw), config.long_side / max(size_hw))
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def sliding_scores(
    image_hwc: np.ndarray,
    score_crops: Callable[[list[np.ndarray]], list[np.ndarray]],
    config: WindowConfig,
) -> np.ndarray:
    """Scores of every pixel of a resized image, averaged over sliding windows.

    Args:
        image_hwc: (H, W, 3) uint8 RGB.
        score_crops: maps crops (h, w, 3) of one size to scores (classes, h, w) float32, all finite.
        config: sizes.

    Returns:
        (classes, *`resized_size`) float32. `resize_scores` brings them to the size of the image;
        for many classes of a large one that is gigabytes.
    """
    size_hw = resized_size(image_hwc.shape[:2], config)
    resized = Image.fromarray(image_hwc).resize(size_hw[::-1], Image.Resampling.BILINEAR)
    resized_hwc = np.asarray(resized)
    boxes = window_boxes(size_hw, config.crop, config.stride)
    scores = score_crops([resized_hwc[t:b, left:r] for t, left, b, r in boxes])
    total_chw = np.zeros((scores[0].shape[0], *size_hw), dtype=np.float32)
    crops_hw = np.zeros(size_hw, dtype=np.float32)
    for (top, left, bottom, right), scores_chw in zip(boxes, scores, strict=True):
        total_chw[:, top:bottom, left:right] += scores_chw
        crops_hw[top:bottom, left:right] += 1
    total_chw /= crops_hw
    return total_chw


def resize_scores(scores_chw: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(classes, h, w) finite scores -> (classes, *size_hw) float32, bilinear over cell centres."""
    if scores_chw.shape[1:] == tuple(size_hw):
        return np.asarray(scores_chw, dtype=np.float32)
    scores = torch.from_numpy(np.ascontiguousarray(scores_chw, dtype=np.float32))[None]
    resized = torch.nn.functional.interpolate(
        scores, size=tuple(size_hw), mode="bilinear", align_corners=False
    )
    return resized[0].numpy()
