"""Tri-state masks (`records.NO`, `UNSURE`, `YES`): area, box, overlap, reasons to reject one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovref.contract import Dropped
from ovref.records import YES, ImageRecord, Prompt, Region
from ovref_inference.images import box_of


def require_areas(min_area: float, max_area: float) -> None:
    """Raises ValueError unless `0 <= min_area < max_area <= 1`, the limits of `reject_reason`."""
    if not 0 <= min_area < max_area <= 1:
        raise ValueError(
            f"min_area and max_area must be ordered in [0, 1], found {min_area} and {max_area}"
        )


def area(mask_hw: np.ndarray) -> float:
    """YES pixels as a fraction of all, in [0, 1]; 0 for a mask without pixels."""
    return float(np.mean(mask_hw == YES)) if mask_hw.size else 0.0


def box_xyxy(mask_hw: np.ndarray) -> tuple[int, int, int, int] | None:
    """The smallest box around the YES pixels, right and bottom exclusive; None without any."""
    box = box_of(mask_hw == YES)
    return box if box[2] else None


def iou(mask_hw: np.ndarray, other_hw: np.ndarray) -> float:
    """Intersection over union of the YES pixels, in [0, 1]; 0 when both have none.

    Raises:
        ValueError: the masks differ in size.
    """
    if mask_hw.shape != other_hw.shape:
        raise ValueError(f"masks of {mask_hw.shape} and {other_hw.shape} cannot be compared")
    a, b = mask_hw == YES, other_hw == YES
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def reject_reason(mask_hw: np.ndarray, min_area: float, max_area: float) -> str | None:
    """Why the mask cannot be a region, as a reason for `Dropped`; None if it can.

    Args:
        mask_hw: tri-state mask.
        min_area: least fraction of YES pixels; a mask without any is rejected even at 0.
        max_area: largest fraction of YES pixels.

    Returns:
        `empty_mask`, `full_mask` or None.
    """
    fraction = area(mask_hw)
    if fraction == 0 or fraction < min_area:
        return "empty_mask"
    if fraction > max_area:
        return "full_mask"
    return None


def image_record(
    prompt: Prompt,
    image: bytes,
    regions: Sequence[Region],
    heatmaps: Sequence[np.ndarray] = (),
    *,
    seed: int | None = None,
    provenance: dict[str, Any] | None = None,
) -> ImageRecord | Dropped:
    """The record of a prompt's image, or the drop `no_regions` where no region is left.

    Args:
        image: the stored file.
        heatmaps: one (h, w) float16 array for each region, or none.
    """
    if not regions:
        return Dropped(prompt.key, "no_regions")
    return ImageRecord(
        key=prompt.key,
        caption=prompt.caption,
        source=prompt.source,
        image=image,
        regions=tuple(regions),
        heatmaps_nhw=np.stack(heatmaps) if heatmaps else None,
        seed=seed,
        provenance=provenance or {},
    )
