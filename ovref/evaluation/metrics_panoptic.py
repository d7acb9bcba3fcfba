"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4).

The definition is that of COCO's official evaluation, including its special rules: void pixels of
the truth do not count against a prediction, crowd segments are never missed and predictions on them
are ignored, and the counts of a class are summed over all images before anything is divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ovref_inference.segmenters.regions import Panoptic

VOID = 0
"""Segment id of pixels without a segment."""


@dataclass(frozen=True, kw_only=True)
class TruePanoptic(Panoptic):
    """The true segments of one image, which have no scores."""

    crowd: frozenset[int] = frozenset()
    """Ids of segments that are crowds of several instances."""


def crowd_of(panoptic: Panoptic) -> frozenset[int]:
    """Ids of segments that are crowds; predicted segments have none."""
    return panoptic.crowd if isinstance(panoptic, TruePanoptic) else frozenset()


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over the classes that occur; fractions in [0, 1], NaN if no class occurs."""

    pq: float
    """Panoptic quality."""
    sq: float
    """Segmentation quality: mean IoU of matched segments."""
    rq: float
    """Recognition quality: F1 of segments."""
    classes: int
    """Number of classes in the means."""


@dataclass(frozen=True, kw_only=True)
class PanopticScores:
    """Panoptic quality of a whole data set."""

    pq: np.ndarray
    """(classes,) float64; NaN for a class without a matched, missed or wrong segment."""
    sq: np.ndarray
    """(classes,) float64; 0 for a class that was never matched, NaN as in `pq`."""
    rq: np.ndarray
    """(classes,) float64; NaN as in `pq`."""
    all: Quality
    things: Quality
    stuff: Quality


class PanopticQuality:
    """Accumulates counts of matched, missed and wrong segments over images."""

    def __init__(self, things: Sequence[bool]) -> None:
        """`things` says whether each class is a thing (with instances) or stuff. Raises ValueError
        if there are none."""
        if len(things) < 1:
            raise ValueError("things must have at least one class, found none")
        self.things = np.asarray(things, dtype=bool)
        self.ious = np.zeros(len(things))
        """(classes,) float64: sum of the IoU of matched segments."""
        self.counts = np.zeros((3, len(things)), dtype=np.int64)
        """(3, classes): matched, wrong, missed segments."""

    def add(self, truth: TruePanoptic, predicted: Panoptic) -> None:
        """Counts one image.

        A predicted segment matches a true one of its class if their IoU is above 0.5; the union
        excludes predicted pixels that are void in the truth. A predicted segment without a match is
        wrong, unless more than half of it lies on void or on its class's crowd segment (if there
        are several, the last one, as in the official code).

        Raises:
            ValueError: shapes differ, an id has no label, a label is not a class, or a predicted
                segment has no pixels or is a crowd.
        """
        self._check(truth, predicted)
        true_area, area = _areas(truth.ids_hw), _areas(predicted.ids_hw)
        pairs = np.stack([truth.ids_hw.ravel(), predicted.ids_hw.ravel()]).astype(np.int64)
        found, sizes = np.unique(pairs, axis=1, return_counts=True)
        overlap = {(int(t), int(p)): int(n) for (t, p), n in zip(found.T, sizes, strict=True)}
        matched_true, matched = set(), set()
        for (true_id, id_), common in overlap.items():
            if VOID in (true_id, id_) or true_id in truth.crowd:
                continue
            label = truth.labels[true_id]
            if label != predicted.labels[id_]:
                continue
            union = true_area[true_id] + area[id_] - common - overlap.get((VOID, id_), 0)
            if common / union > 0.5:
                self.ious[label] += common / union
                self.counts[0, label] += 1
                matched_true.add(true_id)
                matched.add(id_)
        crowd_of = {label: id_ for id_, label in truth.labels.items() if id_ in truth.crowd}
        for id_, label in predicted.labels.items():
            crowd = crowd_of.get(label, VOID)
            excused = overlap.get((VOID, id_), 0)
            if crowd != VOID:
                excused += overlap.get((crowd, id_), 0)
            if id_ not in matched and excused / area[id_] <= 0.5:
                self.counts[1, label] += 1
        for id_, label in truth.labels.items():
            if id_ not in matched_true and id_ not in truth.crowd:
                self.counts[2, label] += 1

    def scores(self) -> PanopticScores:
        """Metrics of everything added so far."""
        hits, wrong, missed = self.counts.astype(np.float64)
        occurs = np.asarray(self.counts.any(0))
        total = np.where(occurs, hits + 0.5 * wrong + 0.5 * missed, np.nan)
        pq, rq = self.ious / total, hits / total
        sq = np.where(occurs, self.ious / np.maximum(hits, 1), np.nan)

        def mean(chosen: np.ndarray) -> Quality:
            classes = int(chosen.sum())
            means = [float(v[chosen].mean()) if classes else float("nan") for v in (pq, sq, rq)]
            return Quality(pq=means[0], sq=means[1], rq=means[2], classes=classes)

        return PanopticScores(
            pq=pq, sq=sq, rq=rq,
            all=mean(occurs), things=mean(occurs & self.things), stuff=mean(occurs & ~self.things),
        )  # fmt: skip

    def _check(self, truth: TruePanoptic, predicted: Panoptic) -> None:
        if truth.ids_hw.shape != predicted.ids_hw.shape:
            raise ValueError(
                f"truth and prediction differ in shape: {truth.ids_hw.shape} and "
                f"{predicted.ids_hw.shape}"
            )
        for name, panoptic in (("truth", truth), ("prediction", predicted)):
            if not np.issubdtype(panoptic.ids_hw.dtype, np.integer):
                raise ValueError(f"{name} must hold integer ids, found {panoptic.ids_hw.dtype}")
            ids = set(np.unique(panoptic.ids_hw).tolist()) - {VOID}
            if ids - set(panoptic.labels):
                raise ValueError(f"{name} has no label for {sorted(ids - set(panoptic.labels))}")
            wrong = [v for v in panoptic.labels.values() if not 0 <= v < len(self.things)]
            if wrong or VOID in panoptic.labels:
                raise ValueError(
                    f"{name}: segment ids start at 1 and labels lie in 0 to "
                    f"{len(self.things) - 1}, found {dict(panoptic.labels)}"
                )
            crowd = crowd_of(panoptic)
            if name == "prediction" and (set(panoptic.labels) - ids or crowd):
                raise ValueError(
                    "predicted segments must have pixels and not be crowds, found segments "
                    f"{sorted(set(panoptic.labels) - ids)} without, crowd {set(crowd)}"
                )


def panoptic_of_labels(label_hw: np.ndarray, things: Sequence[bool]) -> Panoptic:
    """The panoptic map derived from a label map.

    All pixels of a stuff class are one segment; each connected component of a thing class is one,
    so that touching things count as one, and a thing cut in two as two.

    Args:
        label_hw: (H, W) integer classes; below 0 without a segment.
        things: whether each class is a thing.

    Returns:
        Segments in the order of classes, components (4-connected) from top to bottom.
    """
    ids_hw = np.zeros(label_hw.shape, dtype=np.int32)
    labels: dict[int, int] = {}
    for label in np.unique(label_hw[label_hw >= 0]).tolist():
        where_hw = label_hw == label
        parts_hw, count = ndimage.label(where_hw) if things[label] else (where_hw, 1)
        before = len(labels)
        ids_hw[where_hw] = parts_hw[where_hw] + before
        labels |= {before + part: label for part in range(1, count + 1)}
    return Panoptic(ids_hw=ids_hw, labels=labels)


def _areas(ids_hw: np.ndarray) -> dict[int, int]:
    """Number of pixels of each id that occurs."""
    found, counts = np.unique(ids_hw, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
