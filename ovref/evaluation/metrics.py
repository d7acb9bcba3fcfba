"""Semantic segmentation metrics from a confusion matrix that grows image by image.

The definitions are mmsegmentation's, which the TCL protocol and FOSSIL use: counts are summed over
the whole data set first, then intersection over union is taken for each class; pixels labelled
`IGNORE` in the truth count nowhere; a class that occurs neither in the truth nor in a prediction
has no IoU (NaN) and is left out of the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = 255
"""Label of pixels that are not judged."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of a whole data set; fractions in [0, 1], NaN where there is nothing to judge."""

    iou: np.ndarray
    """(classes,) float64 intersection over union; NaN for a class in neither map."""
    accuracy: np.ndarray
    """(classes,) float64 share of a class's pixels that are right; NaN for a class not in truth."""
    miou: float
    """Mean of `iou` over the classes that have one."""
    mean_accuracy: float
    """Mean of `accuracy` over the classes that have one."""
    pixel_accuracy: float
    """Share of all judged pixels that are right."""


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Generalised zero-shot metrics: some classes were seen in training, the others never."""

    seen: float
    """Mean IoU over the seen classes that have one; NaN if none has."""
    unseen: float
    """Mean IoU over the others."""
    hiou: float
    """Harmonic mean of the two; 0 if one of them is 0, NaN if one is NaN."""


class ConfusionMatrix:
    """Counts of (true class, predicted class) over many label maps."""

    def __init__(self, classes: int) -> None:
        """Starts from nothing. `classes` is how many there are, at least 1.

        Raises:
            ValueError: `classes` is below 1.
        """
        if classes < 1:
            raise ValueError(f"classes must be at least 1, found {classes}")
        self.counts = np.zeros((classes, classes), dtype=np.int64)
        """(classes, classes) pixels; row: true class, column: predicted class."""

    def add(self, truth_hw: np.ndarray, predicted_hw: np.ndarray) -> None:
        """Counts one image.

        Args:
            truth_hw: (H, W) integer labels in [0, classes) or IGNORE.
            predicted_hw: (H, W) integer labels in [0, classes); any value where truth is IGNORE.

        Raises:
            ValueError: shapes differ, the type is not an integer, or a label is out of range.
        """
        if truth_hw.shape != predicted_hw.shape:
            raise ValueError(
                f"truth and prediction differ in shape: {truth_hw.shape} and {predicted_hw.shape}"
            )
        classes = len(self.counts)
        judged = np.asarray(truth_hw) != IGNORE
        labels = {}
        for name, map_hw in (("truth", truth_hw), ("prediction", predicted_hw)):
            if not np.issubdtype(map_hw.dtype, np.integer):
                raise ValueError(f"{name} must hold integers, found {map_hw.dtype}")
            labels[name] = map_hw[judged].astype(np.int64)
            wrong = labels[name][(labels[name] < 0) | (labels[name] >= classes)]
            if len(wrong):
                raise ValueError(
                    f"{name} holds label {wrong[0]}, expected 0 to {classes - 1} (or {IGNORE} in "
                    "the truth); check the label convention of the data set"
                )
        pairs = labels["truth"] * classes + labels["prediction"]
        self.counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def scores(self) -> Scores:
        """Metrics of everything added so far."""
        right = np.diag(self.counts).astype(np.float64)
        true, predicted = self.counts.sum(1), self.counts.sum(0)
        # 0 / 0 is the documented NaN of a class that does not occur.
        with np.errstate(invalid="ignore"):
            iou = right / (true + predicted - right)
            accuracy = right / true
            pixel_accuracy = float(right.sum() / np.float64(true.sum()))
        return Scores(
            iou=iou,
            accuracy=accuracy,
            miou=_mean(iou),
            mean_accuracy=_mean(accuracy),
            pixel_accuracy=pixel_accuracy,
        )


def split_scores(iou: np.ndarray, seen: Sequence[bool]) -> SplitScores:
    """Mean IoU of seen and of unseen classes and their harmonic mean (Xian et al., CVPR 2019).

    Args:
        iou: (classes,) of `Scores`, from predictions among all classes, seen and unseen.
        seen: of each class, whether it was seen.

    Raises:
        ValueError: `seen` is of another length.
    """
    if len(seen) != len(iou):
        raise ValueError(f"seen must tell of {len(iou)} classes, found {len(seen)}")
    chosen = np.asarray(seen, dtype=bool)
    first, second = _mean(iou[chosen]), _mean(iou[~chosen])
    harmonic = 2 * first * second / (first + second) if first + second else 0.0
    return SplitScores(seen=first, unseen=second, hiou=harmonic)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; NaN if nothing else is there."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
