"""Mask average precision as defined by COCO (Lin et al., ECCV 2014, and its evaluation code).

Precision is interpolated at 101 recalls for each class and each of ten IoU thresholds, 0.50 to
0.95; AP is the mean over all of them. At most 100 detections per class and image are evaluated. A
detection that is matched to a crowd instance is ignored: it is neither right nor wrong.
"""

import math
from dataclasses import dataclass

import numpy as np

from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.instances import Instances

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds at which a detection is correct."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is sampled."""

MAX_DETECTIONS = 100
"""Maximum number of detections evaluated per class and image, the best first."""


@dataclass(frozen=True, kw_only=True)
class TrueInstances:
    """The true instances of one image, which may overlap."""

    masks_nhw: np.ndarray
    """(n, H, W) bool; n may be 0."""
    labels: np.ndarray
    """(n,) integers: positions in the class list."""
    crowd: np.ndarray
    """(n,) bool: the mask is a crowd of several instances."""


@dataclass(frozen=True, kw_only=True)
class ApScores:
    """Average precision of a whole data set; fractions in [0, 1]."""

    per_class: np.ndarray
    """(classes,) float64, mean over the thresholds; NaN for a class without a true instance."""
    ap: float
    """Mean over all thresholds and classes with instances; NaN if there are none."""
    ap50: float
    """The same at IoU 0.5."""
    ap75: float
    """The same at IoU 0.75."""


@dataclass(frozen=True, kw_only=True)
class MatchedDetections:
    """The detections of one class in one image, best first."""

    label: int
    truths: int
    """Number of true instances that are not crowds."""
    scores: np.ndarray
    """(d,) float."""
    right: np.ndarray
    """(thresholds, d) bool: the detection is correct at the threshold."""
    ignored: np.ndarray
    """(thresholds, d) bool: the detection is matched to a crowd."""


class AveragePrecision:
    """Accumulates matched detections over images."""

    def __init__(self, classes: int) -> None:
        """`classes` is their number. Raises ValueError if it is below 1."""
        require_at_least("classes", classes, 1)
        self.truths = np.zeros(classes, dtype=np.int64)
        """(classes,) number of true instances that are not crowds."""
        self._matched: list[list[MatchedDetections]] = [[] for _ in range(classes)]

    def add_matched(self, matched: MatchedDetections) -> None:
        """Adds one class of one image. Of equal scores, the earlier image comes first."""
        self.truths[matched.label] += matched.truths
        self._matched[matched.label].append(matched)

    def scores(self) -> ApScores:
        """Metrics of everything added so far."""
        table = np.full((len(self.truths), len(THRESHOLDS)), np.nan)
        for label, matched in enumerate(self._matched):
            if not self.truths[label]:
                continue
            scores = np.concatenate([one.scores for one in matched])
            right = np.concatenate([one.right for one in matched], axis=1)
            ignored = np.concatenate([one.ignored for one in matched], axis=1)
            order = np.argsort(-scores, kind="stable")
            for t in range(len(THRESHOLDS)):
                kept = order[~ignored[t, order]]
                table[label, t] = _interpolated(right[t, kept], int(self.truths[label]))
        known = table[self.truths > 0]
        by_threshold = known.mean(0) if len(known) else np.full(len(THRESHOLDS), np.nan)
        return ApScores(
            per_class=table.mean(1),
            ap=float(by_threshold.mean()),
            ap50=float(by_threshold[0]),
            ap75=float(by_threshold[5]),
        )


def match_detections(truth: TrueInstances, found: Instances) -> list[MatchedDetections]:
    """Matches the detections of one image to its true instances, class by class. Scores must be
    comparable across images."""
    matched = []
    for label in np.union1d(truth.labels, found.labels).tolist():
        true, chosen = truth.labels == label, np.flatnonzero(found.labels == label)
        order = np.argsort(-found.scores[chosen], kind="stable")[:MAX_DETECTIONS]
        chosen = chosen[order]
        ious = _ious(found.masks_nhw[chosen], truth.masks_nhw[true], truth.crowd[true])
        right, ignored = _match(ious, truth.crowd[true])
        matched.append(
            MatchedDetections(
                label=int(label),
                truths=int((~truth.crowd[true]).sum()),
                scores=found.scores[chosen],
                right=right,
                ignored=ignored,
            )
        )
    return matched


def _ious(masks_dhw: np.ndarray, true_ghw: np.ndarray, crowd_g: np.ndarray) -> np.ndarray:
    """(d, g) float64 IoU; for a crowd instance, the share of the detection that lies on it."""
    pixels = math.prod(masks_dhw.shape[1:])
    flat_dp = masks_dhw.reshape(len(masks_dhw), pixels).astype(np.float64)
    true_gp = true_ghw.reshape(len(true_ghw), pixels).astype(np.float64)
    common = flat_dp @ true_gp.T
    area_d1 = flat_dp.sum(1)[:, None]
    union = np.where(crowd_g, area_d1, area_d1 + true_gp.sum(1) - common)
    return common / np.maximum(union, 1)


def _match(ious: np.ndarray, crowd_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections, best first, are correct and which are ignored: (thresholds, d) bool each.

    Each is matched to the unmatched true instance with the highest IoU, the last of equals; only if
    none reaches the threshold, to a crowd instance, which can be matched repeatedly.
    """
    order = np.argsort(crowd_g, kind="stable")
    ious, crowd_g = ious[:, order], crowd_g[order]
    shape = (len(THRESHOLDS), len(ious))
    right, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for t, threshold in enumerate(THRESHOLDS):
        free_g = np.ones(len(crowd_g), dtype=bool)
        for d, row in enumerate(ious):
            for kind in (~crowd_g, crowd_g):
                candidates = np.flatnonzero(kind & free_g & (row >= threshold))
                if len(candidates):
                    best = candidates[np.flatnonzero(row[candidates] == row[candidates].max())[-1]]
                    right[t, d], ignored[t, d] = not crowd_g[best], crowd_g[best]
                    free_g[best] = crowd_g[best]
                    break
    return right, ignored


def _interpolated(right: np.ndarray, truths: int) -> float:
    """Mean over RECALLS of the maximum precision at that recall or higher; 0 beyond the last."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / truths, RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(right))].mean())
