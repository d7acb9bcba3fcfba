"""Sliding windows: scores of large images from overlapping crops (TCL's protocol), pixel by pixel.

An image is resized to a short side and cut into square crops at a stride; crops are scored
separately, scores are averaged where crops overlap and resized to the image. Scores are stored per
patch and per region; pixels are computed for a few classes at a time on the encoder's device, so
that the scores of all classes of a large image are never in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ovref_inference.ranges import STRICT, require_within
from ovref_inference.segmenters.regions import Segmentation

_VALUES_AT_ONCE = 1 << 25
"""Number of pixel scores computed at once, 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Sizes of the sliding window, in pixels. The defaults are TCL's, which FOSSIL uses."""

    __pydantic_config__ = STRICT

    short_side: int = 448
    """Images are resized to this short side, up or down."""
    long_side: int = 2048
    """Images whose long side would exceed this are resized to this long side instead."""
    crop: int = 448
    """Side of a square crop; smaller images give smaller crops."""
    stride: int = 224
    """Step from crop to crop, at most `crop`."""

    def __post_init__(self) -> None:
        require_within("stride", self.stride, 1, self.crop)
        require_within("short_side", self.short_side, 1, self.long_side)


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
    """Height and width at the configured short side, keeping the aspect ratio up to rounding."""
    scale = min(config.short_side / min(size_hw), config.long_side / max(size_hw))
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


class PixelScores(Protocol):
    """Scores of one crop of H x W pixels."""

    def pixels(self, classes: slice) -> torch.Tensor:
        """(classes in the slice, H, W) float32, finite."""
        ...


@dataclass(frozen=True, kw_only=True)
class CropScores:
    """Scores of one crop of H x W pixels: of its regions, and of its patches outside regions."""

    region_hw: torch.Tensor
    """(H, W) int64: the region of each pixel, -1 for none."""
    regions_cn: torch.Tensor
    """(classes, n) float32, finite."""
    patches_chw: torch.Tensor | None = None
    """(classes, h, w) float32, finite; None where regions cover every pixel."""
    nearest: bool = False
    """Whether a pixel gets the score of the patch that covers it instead of interpolating."""

    def pixels(self, classes: slice) -> torch.Tensor:
        """(classes in the slice, H, W) float32; patches are interpolated bilinearly, unless
        `nearest`."""
        regions_cn = self.regions_cn[classes]
        if self.patches_chw is None:
            return regions_cn[:, self.region_hw]
        patches_chw, size_hw = self.patches_chw[classes], tuple(self.region_hw.shape)
        if self.nearest:
            scores_chw = interpolate(patches_chw[None], size=size_hw, mode="nearest-exact")[0]
        else:
            scores_chw = resize_scores(patches_chw, size_hw)
        if not regions_cn.shape[1]:
            return scores_chw
        regions_chw = regions_cn[:, self.region_hw.clamp(min=0)]
        return torch.where(self.region_hw >= 0, regions_chw, scores_chw)


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """Scores of one image from crops that cover it."""

    size_hw: tuple[int, int]
    """Height and width of the image that was cut into crops."""
    boxes: Sequence[tuple[int, ...]]
    """(top, left, bottom, right) of each crop."""
    crops: Sequence[PixelScores]

    def pixels(self, size_hw: tuple[int, int], classes: slice) -> torch.Tensor:
        """(classes in the slice, *size_hw) float32: averaged over the crops, then resized."""
        parts = [crop.pixels(classes) for crop in self.crops]
        if len(parts) == 1:
            return resize_scores(parts[0], size_hw)
        total_chw = parts[0].new_zeros((len(parts[0]), *self.size_hw))
        crops_hw = parts[0].new_zeros(self.size_hw)
        for (top, left, bottom, right), part_chw in zip(self.boxes, parts, strict=True):
            total_chw[:, top:bottom, left:right] += part_chw
            crops_hw[top:bottom, left:right] += 1
        return resize_scores(total_chw.div_(crops_hw), size_hw)


def score_images(
    images: Sequence[np.ndarray],
    score_crops: Callable[[Sequence[np.ndarray]], Sequence[PixelScores]],
    windows: WindowConfig | None,
) -> list[ImageScores]:
    """Scores of images, as a whole or in sliding windows.

    Args:
        images: (H, W, 3) uint8 RGB each.
        score_crops: scores images of one size or, without windows, of any sizes.
        windows: sizes; None scores each image as a whole.
    """
    if windows is None:
        sizes = [image_hwc.shape[:2] for image_hwc in images]
        return [
            ImageScores(size_hw=size_hw, boxes=[(0, 0, *size_hw)], crops=[crop])
            for size_hw, crop in zip(sizes, score_crops(images), strict=True)
        ]
    found = []
    for image_hwc in images:
        size_hw = resized_size(image_hwc.shape[:2], windows)
        resized = Image.fromarray(image_hwc).resize(size_hw[::-1], Image.Resampling.BILINEAR)
        resized_hwc = np.asarray(resized)
        boxes = window_boxes(size_hw, windows.crop, windows.stride)
        crops = score_crops([resized_hwc[t:b, left:r] for t, left, b, r in boxes])
        found.append(ImageScores(size_hw=size_hw, boxes=boxes, crops=crops))
    return found


def segment_images(
    images: Sequence[np.ndarray],
    score_crops: Callable[[Sequence[np.ndarray]], Sequence[PixelScores]],
    windows: WindowConfig | None,
    present: np.ndarray,
    missing: tuple[str, ...] = (),
) -> list[Segmentation]:
    """One label map per image: `labelled` applied to its scores by `score_images`, which say what
    the arguments are."""
    return [
        labelled(partial(one.pixels, image.shape[:2]), present, image.shape[:2], missing)
        for one, image in zip(score_images(images, score_crops, windows), images, strict=True)
    ]


def resize_scores(scores_chw: torch.Tensor, size_hw: Sequence[int]) -> torch.Tensor:
    """(classes, h, w) finite scores -> (classes, *size_hw), bilinear between cell centres."""
    if scores_chw.shape[1:] == tuple(size_hw):
        return scores_chw
    return interpolate(scores_chw[None], size=tuple(size_hw), mode="bilinear")[0]


def labelled(
    pixels: Callable[[slice], torch.Tensor],
    present: np.ndarray,
    size_hw: tuple[int, int],
    missing: tuple[str, ...] = (),
) -> Segmentation:
    """Each pixel gets its best class; ties go to the first.

    Args:
        pixels: slice of the classes that are present -> (classes in it, H, W) float32, no NaN.
            Called for a few classes at a time, so memory does not grow with their number.
        present: (classes,) bool: which classes may be predicted, at least one.
        size_hw: (H, W).
        missing: passed on.
    """
    numbers = np.flatnonzero(present)
    at_once = max(1, _VALUES_AT_ONCE // (size_hw[0] * size_hw[1]))
    max_score_hw, row_hw = pixels(slice(0, at_once)).max(0)
    for start in range(at_once, len(numbers), at_once):
        found_hw, number_hw = pixels(slice(start, start + at_once)).max(0)
        row_hw = torch.where(found_hw > max_score_hw, number_hw + start, row_hw)
        max_score_hw = torch.maximum(max_score_hw, found_hw)
    tensor_of = partial(_tensor_of, pixels, present, size_hw)
    return Segmentation(
        labels_hw=numbers[row_hw.cpu().numpy()].astype(np.int32),
        max_score_hw=max_score_hw.cpu().numpy(),
        scores_of=partial(_scores_of, tensor_of),
        missing=missing,
        tensor_of=tensor_of,
    )


def _scores_of(tensor_of: Callable[[slice], torch.Tensor], classes: slice) -> np.ndarray:
    return tensor_of(classes).cpu().numpy()


def _tensor_of(
    pixels: Callable[[slice], torch.Tensor],
    present: np.ndarray,
    size_hw: tuple[int, int],
    classes: slice,
) -> torch.Tensor:
    """Scores of a slice of all classes, -inf for those that are not present."""
    asked = present[classes]
    rows = np.cumsum(present)[classes][asked] - 1
    if not len(rows):
        return torch.full((len(asked), *size_hw), -torch.inf)
    found_chw = pixels(slice(rows[0], rows[-1] + 1))
    if asked.all():
        return found_chw
    scores_chw = found_chw.new_full((len(asked), *size_hw), -torch.inf)
    places = torch.from_numpy(np.flatnonzero(asked)).to(found_chw.device)
    return scores_chw.index_copy_(0, places, found_chw)
