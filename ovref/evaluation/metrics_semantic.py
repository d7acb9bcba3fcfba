"""Semantic segmentation metrics from confusion matrices.

The definitions are those of mmsegmentation, also used by the TCL protocol and FOSSIL: counts are
summed over the whole data set before intersection over union is computed for each class; pixels
labelled `IGNORE` in the truth do not count; a class that occurs neither in the truth nor in a
prediction has no IoU (NaN) and is left out of the mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.regions import NO_CLASS

IGNORE = -1
"""True label of pixels that are not evaluated. Unlike 255 and 65535, it is never a class."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of a whole data set; fractions in [0, 1], NaN if nothing could be evaluated."""

    iou: np.ndarray
    """(classes,) float64 intersection over union; NaN for a class in neither map."""
    accuracy: np.ndarray
    """(classes,) float64 share of a class's true pixels that are correct; NaN without any."""
    miou: float
    """Mean of `iou` over the classes that have one."""
    mean_accuracy: float
    """Mean of `accuracy` over the classes that have one."""
    pixel_accuracy: float
    """Share of all evaluated pixels that are correct."""


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Generalised zero-shot metrics, for classes seen and unseen in training."""

    seen: float
    """Mean IoU over the seen classes that have one; NaN without any."""
    unseen: float
    """Mean IoU over the unseen classes."""
    hiou: float
    """Harmonic mean of both; 0 if either is 0, NaN if either is NaN."""


def confusion(truth_hw: np.ndarray, predicted_hw: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of one image by true and by predicted class.

    Args:
        truth_hw: (H, W) integer labels in [0, classes) or IGNORE.
        predicted_hw: (H, W) integer labels in [0, classes) or NO_CLASS; any value where the truth
            is IGNORE.
        classes: number of classes, at least 1.

    Returns:
        (classes, classes + 1) int64; row: true class, column: predicted class, the last NO_CLASS.

    Raises:
        ValueError: shapes differ, the type is not an integer, or a label is out of range.
    """
    counts = np.zeros((classes, classes + 1), dtype=np.int64)
    truth, predicted, pixels = sparse_confusion(truth_hw, predicted_hw, classes).T
    counts[truth, predicted] = pixels
    return counts


def sparse_confusion(truth_hw: np.ndarray, predicted_hw: np.ndarray, classes: int) -> np.ndarray:
    """The non-zero entries of `confusion`, since an image has few of hundreds of classes.

    Args, Raises: see `confusion`.

    Returns:
        (n, 3) int64: true class, predicted class (`classes` for NO_CLASS), pixels; sorted.
    """
    require_at_least("classes", classes, 1)
    if truth_hw.shape != predicted_hw.shape:
        raise ValueError(
            f"truth and prediction differ in shape: {truth_hw.shape} and {predicted_hw.shape}"
        )
    evaluated_hw = np.asarray(truth_hw) != IGNORE
    labels = {}
    for name, map_hw, lowest in (("truth", truth_hw, 0), ("prediction", predicted_hw, NO_CLASS)):
        if not np.issubdtype(map_hw.dtype, np.integer):
            raise ValueError(f"{name} must hold integers, found {map_hw.dtype}")
        found = labels[name] = map_hw[evaluated_hw].astype(np.int64)
        wrong = found[(found < lowest) | (found >= classes)]
        if len(wrong):
            raise ValueError(
                f"{name} holds label {wrong[0]}, expected {lowest} to {classes - 1} (or {IGNORE} "
                "in the truth); check the label convention of the data set"
            )
    predicted = np.where(labels["prediction"] == NO_CLASS, classes, labels["prediction"])
    counts = np.bincount(labels["truth"] * (classes + 1) + predicted)
    pairs = np.flatnonzero(counts)
    return np.stack([pairs // (classes + 1), pairs % (classes + 1), counts[pairs]], axis=1)


def boundary_hw(mask_hw: np.ndarray, ratio: float = 0.02) -> np.ndarray:
    """The pixels of a mask near its edge (Cheng et al., "Boundary IoU", CVPR 2021).

    As in bowenc0221/boundary-iou-api, these are the pixels whose Chebyshev distance to a pixel
    outside of the mask is at most `ratio` times the image diagonal, rounded and at least one.
    Pixels outside of the image are outside of the mask.

    Args:
        mask_hw: (H, W) bool.
        ratio: distance as a fraction of the diagonal.

    Returns:
        (H, W) bool.
    """
    height, width = mask_hw.shape
    reach = max(1, round(ratio * math.sqrt(height**2 + width**2)))
    inner_hw = mask_hw
    for axis in (0, 1):
        inner_hw = ndimage.minimum_filter1d(
            inner_hw.astype(np.uint8), 2 * reach + 1, axis, mode="constant", cval=0
        )
    return mask_hw & (inner_hw == 0)


def boundary_pixels(truth_hw: np.ndarray, predicted_hw: np.ndarray, classes: int) -> np.ndarray:
    """Pixels near the edges of each class, for the boundary IoU of a data set.

    Pixels that are not evaluated have no class in the prediction, either. The boundary IoU of a
    class is the ratio of the sums over images, and the mean is taken as for IoU.

    Args:
        truth_hw, predicted_hw, classes: see `confusion`.

    Returns:
        (n, 3) int64 for the classes that occur: class, pixels in both boundaries, pixels in either.
    """
    evaluated_hw = np.where(truth_hw == IGNORE, NO_CLASS, predicted_hw)
    found = np.union1d(truth_hw, evaluated_hw)
    rows = []
    for label in found[(found >= 0) & (found < classes)].tolist():
        true_hw, own_hw = (boundary_hw(map_hw == label) for map_hw in (truth_hw, evaluated_hw))
        rows.append((label, int((true_hw & own_hw).sum()), int((true_hw | own_hw).sum())))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def iou_of_counts(counts: np.ndarray) -> np.ndarray:
    """(..., classes) float64 IoU from (..., classes, classes + 1) counts as in `confusion`."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    return shares(right, counts.sum(-1) + counts[..., :-1].sum(-2) - right)


def scores_of_counts(counts: np.ndarray) -> Scores:
    """Metrics from (classes, classes + 1) counts: the sum of `confusion` over images."""
    right, true = np.diagonal(counts), counts.sum(1)
    iou = iou_of_counts(counts)
    accuracy = shares(right, true)
    return Scores(
        iou=iou,
        accuracy=accuracy,
        miou=mean_of_known(iou),
        mean_accuracy=mean_of_known(accuracy),
        pixel_accuracy=float(right.sum() / true.sum()) if true.any() else math.nan,
    )


def split_scores(iou: np.ndarray, seen: Sequence[bool]) -> SplitScores:
    """Mean IoU of seen and of unseen classes and their harmonic mean (Xian et al., CVPR 2019).

    Args:
        iou: (classes,) `Scores.iou` of predictions among all classes, seen and unseen.
        seen: whether each class was seen.

    Raises:
        ValueError: `seen` has another length.
    """
    if len(seen) != len(iou):
        raise ValueError(f"seen must have one value for each of {len(iou)} classes, found {seen}")
    chosen = np.asarray(seen, dtype=bool)
    first, second = mean_of_known(iou[chosen]), mean_of_known(iou[~chosen])
    harmonic = 2 * first * second / (first + second) if first + second else 0.0
    return SplitScores(seen=first, unseen=second, hiou=harmonic)


def shares(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Quotients of counts of pixels, float64; NaN where the whole has none."""
    return np.where(wholes > 0, parts / np.maximum(wholes, 1), math.nan)


def mean_of_known(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
