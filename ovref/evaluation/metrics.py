"""Semantic segmentation metrics from confusion matrices.

The definitions are mmsegmentation's, which the TCL protocol and FOSSIL use: counts are summed over
the whole data set first, then intersection over union is taken for each class; pixels labelled
`IGNORE` in the truth count nowhere; a class that occurs neither in the truth nor in a prediction
has no IoU (NaN) and is left out of the mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.regions import NO_CLASS

IGNORE = 255
"""True label of pixels that are not evaluated."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of a whole data set; fractions in [0, 1], NaN where nothing could be evaluated."""

    iou: np.ndarray
    """(classes,) float64 intersection over union; NaN for a class in neither map."""
    accuracy: np.ndarray
    """(classes,) float64 share of a class's pixels that are right; NaN for a class not in truth."""
    miou: float
    """Mean of `iou` over the classes that have one."""
    mean_accuracy: float
    """Mean of `accuracy` over the classes that have one."""
    pixel_accuracy: float
    """Share of all evaluated pixels that are right."""


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Generalised zero-shot metrics: some classes were seen in training, the others never."""

    seen: float
    """Mean IoU over the seen classes that have one; NaN if none has."""
    unseen: float
    """Mean IoU over the others."""
    hiou: float
    """Harmonic mean of the two; 0 if one of them is 0, NaN if one is NaN."""


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
    pairs = labels["truth"] * (classes + 1) + predicted
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def iou_of_counts(counts: np.ndarray) -> np.ndarray:
    """(..., classes, classes + 1) pixels as in `confusion` -> (..., classes) float64 IoU."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(-1) + counts[..., :-1].sum(-2) - right
    return np.where(union > 0, right / np.maximum(union, 1), math.nan)


def scores_of_counts(counts: np.ndarray) -> Scores:
    """Metrics of (classes, classes + 1) pixels: the sum of `confusion` over the images."""
    right, true = np.diagonal(counts), counts.sum(1)
    iou = iou_of_counts(counts)
    accuracy = np.where(true > 0, right / np.maximum(true, 1), math.nan)
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
        iou: (classes,) of `Scores`, from predictions among all classes, seen and unseen.
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


def mean_of_known(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
