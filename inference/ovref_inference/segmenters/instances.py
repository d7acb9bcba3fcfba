"""Scored regions to instances that may overlap, for measuring mask AP (FC-CLIP, RetCLIP).

A panoptic map has one class per region and no overlaps; average precision is higher if every pair
of a region and a class is a detection with its own score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.regions import ScoredRegions


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Detections in one image."""

    masks_nhw: np.ndarray
    """(n, H, W) bool; they may overlap, and a mask may occur with several classes."""
    labels: np.ndarray
    """(n,) int64: positions in the class names; things only."""
    scores: np.ndarray
    """(n,) float: confidence."""


def instances(regions: ScoredRegions, things: Sequence[bool], *, most: int = 100) -> Instances:
    """The best pairs of a region and a class, as in the instance inference of Mask2Former and
    FC-CLIP.

    The `most` pairs with the highest class scores are taken, stuff included; those of stuff are
    then dropped. A mask holds every pixel with a probability above 0.5. A pair's final score is the
    class score times the mean probability in the mask. They are ordered by class score.

    Args:
        regions: of one image.
        things: whether each class is a thing.
        most: maximum number of pairs, at least 1.

    Raises:
        ValueError: `things` does not have one entry per class, or `most` is below 1.
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
