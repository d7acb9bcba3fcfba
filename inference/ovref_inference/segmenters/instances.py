"""Scored regions -> instances that may overlap: what mask AP is measured on (FC-CLIP, RetCLIP).

A panoptic map has one class a region and no overlaps; average precision is higher where every pair
of a region and a class is a detection with a score of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.regions import ScoredRegions


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Detections of one image, by falling score of their class."""

    masks_nhw: np.ndarray
    """(n, H, W) bool; they may overlap, and one mask may be there for several classes."""
    labels: np.ndarray
    """(n,) int64: positions in the class names; things alone."""
    scores: np.ndarray
    """(n,) float32: the class's score times how sure the mask's pixels are to belong to it."""


def instances(regions: ScoredRegions, things: Sequence[bool], *, most: int = 100) -> Instances:
    """The best pairs of a region and a class, as Mask2Former's and FC-CLIP's instance inference.

    Of all pairs, with stuff too, the `most` of the highest score of their class are taken; those of
    stuff are then left out. A mask is every pixel of an activation above 0.5. A pair's final score
    is that of the class times the mean activation in the mask.

    Args:
        regions: of one image.
        things: of each class, whether it is a thing.
        most: pairs taken, at least 1.

    Raises:
        ValueError: `things` does not have one entry a class, or `most` is below 1.
    """
    count, classes = regions.scores_nc.shape
    if len(things) != classes:
        raise ValueError(f"things must have one entry for each of {classes} classes: {things!r}")
    require_at_least("most", most, 1)
    flat = regions.scores_nc.ravel()
    best = np.argsort(-flat, kind="stable")[:most]
    rows, labels = best // classes, best % classes
    thing = np.asarray(things, dtype=bool)[labels]
    rows, labels, scores = rows[thing], labels[thing], flat[best][thing]
    masks_nhw = np.zeros((len(rows), *regions.mask_probs_nhw.shape[1:]), dtype=bool)
    sure = np.zeros(count, dtype=np.float32)
    for row in np.unique(rows):
        whole_hw = regions.mask_probs_nhw[row] > 0.5
        masks_nhw[rows == row] = whole_hw
        if whole_hw.any():
            sure[row] = regions.mask_probs_nhw[row][whole_hw].mean()
    return Instances(
        masks_nhw=masks_nhw,
        labels=labels.astype(np.int64),
        scores=(scores * sure[rows]).astype(np.float32),
    )
