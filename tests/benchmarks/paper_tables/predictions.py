"""Evaluates predictions: all metrics at once, and whether a difference is significant.

Counts are kept per image. Metrics of a data set are computed from their sums, and a confidence
interval for the difference of two segmenters from a paired bootstrap over images.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ovref.evaluation.datasets import true_instances
from ovref.evaluation.metrics_ap import AveragePrecision, match_detections
from ovref.evaluation.metrics_panoptic import PanopticQuality, TruePanoptic, panoptic_of_labels
from ovref.evaluation.metrics_semantic import (
    confusion,
    iou_of_counts,
    scores_of_counts,
    split_scores,
)
from ovref.evaluation.predictions import Prediction
from ovref_inference.segmenters.instances import Instances
from paper_tables.datasets import Dataset

METRICS = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "pq_things": "PQ things",
    "pq_stuff": "PQ stuff",
    "ap": "mask AP",
    "seen": "mIoU seen",
    "unseen": "mIoU unseen",
    "hiou": "hIoU",
}
"""Keys of `Evaluation.metrics` -> names in tables."""

BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Counts of n images, and their metrics."""

    metrics: dict[str, float]
    """Fractions in [0, 1] by key of METRICS, without those that do not apply."""
    per_class_iou: np.ndarray
    """(classes,) float64; NaN for a class in neither truth nor prediction."""
    confusion: np.ndarray
    """(n, classes, classes + 1) int64 pixels, as in `metrics_semantic.confusion`."""
    ious: np.ndarray | None
    """(n, classes) float64: sum of the IoU of matched segments; None without panoptic truth."""
    segments: np.ndarray | None
    """(n, 3, classes) int64: matched, wrong, missed segments; None without panoptic truth."""
    seen: tuple[bool, ...] | None = None
    """Whether each class was seen in training; None without a split."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two segmenters in one metric."""

    value: float
    """Difference on the whole data set; positive if the first is better."""
    low: float
    high: float
    """Ends of the 95 % bootstrap interval."""


def prediction_of_pixels(
    labels_hw: np.ndarray, scores_chw: np.ndarray, things: Sequence[bool] | None
) -> Prediction:
    """The prediction of a segmenter that only classifies pixels.

    Segments are those of `panoptic_of_labels` (whole classes if things are unknown); their
    confidence is the mean score of their class over their pixels.

    Args:
        labels_hw: (H, W) integers: positions in the class list, or NO_CLASS.
        scores_chw: (classes, H, W), finite for the class of each pixel.
        things: whether each class is a thing; None if unknown.
    """
    panoptic = panoptic_of_labels(labels_hw, things or [False] * len(scores_chw))
    scores = {
        i: float(scores_chw[label][panoptic.ids_hw == i].mean())
        for i, label in panoptic.labels.items()
    }
    return Prediction(labels_hw=labels_hw, panoptic=panoptic, scores=scores)


def evaluate_predictions(data: Dataset, predictions: Sequence[Prediction]) -> Evaluation:
    """Computes the metrics of predictions for all images of a data set.

    PQ and AP need panoptic truth, hIoU a split of classes.

    Raises:
        ValueError: the numbers of predictions and images differ, or see the metrics.
    """
    if len(predictions) != len(data.images):
        raise ValueError(f"{len(predictions)} predictions for {len(data.images)} images")
    counts = _confusion(data, predictions)
    found = scores_of_counts(counts.sum(0))
    metrics = {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
    ious = segments = None
    if data.panoptic is not None and data.things is not None:
        ious, segments = _segments(data.panoptic, data.things, predictions)
        metrics |= _quality(data.things, ious, segments)
        metrics["ap"] = _ap(data.panoptic, data.things, predictions)
    if data.seen is not None:
        metrics |= asdict(split_scores(found.iou, data.seen))
    return Evaluation(
        metrics=metrics, per_class_iou=found.iou, confusion=counts, ious=ious, segments=segments,
        seen=data.seen,
    )  # fmt: skip


def single_metric(data: Dataset, predictions: Sequence[Prediction], metric: str) -> float:
    """One metric of `evaluate_predictions`, `miou` or `pq`, without computing the others."""
    if metric not in ("miou", "pq"):
        raise ValueError(f"metric must be miou or pq, found {metric!r}")
    if metric == "miou":
        return scores_of_counts(_confusion(data, predictions).sum(0)).miou
    if data.panoptic is None or data.things is None:
        raise ValueError("PQ needs a data set with panoptic truth")
    return _quality(data.things, *_segments(data.panoptic, data.things, predictions))["pq"]


def difference(first: Evaluation, second: Evaluation, metric: str, seed: int = 0) -> Difference:
    """The difference of `first` and `second`, with a paired bootstrap over images.

    Args:
        first, second: evaluations of the same images in the same order.
        metric: `miou`, `pq`, or the mIoU of `seen` or `unseen` classes.
        seed: seed of the resampling.

    Raises:
        ValueError: the metric is another one, or the images differ.
    """
    if metric not in ("miou", "pq", "seen", "unseen"):
        raise ValueError(f"metric must be miou, pq, seen or unseen, found {metric!r}")
    if len(first.confusion) != len(second.confusion):
        raise ValueError("both evaluations must be of the same images")
    images = len(first.confusion)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(images, np.full(images, 1 / images), size=BOOTSTRAP_SAMPLES)
    times = times.astype(np.float64)
    sampled = _resampled(first, metric, times) - _resampled(second, metric, times)
    low, high = np.quantile(sampled[np.isfinite(sampled)], (0.025, 0.975))
    value = first.metrics[metric] - second.metrics[metric]
    return Difference(value=float(value), low=float(low), high=float(high))


def _confusion(data: Dataset, predictions: Sequence[Prediction]) -> np.ndarray:
    """(n, classes, classes + 1) counts as in `Evaluation`."""
    return np.stack(
        [
            confusion(label_hw, predicted.labels_hw, len(data.classes))
            for label_hw, predicted in zip(data.labels, predictions, strict=True)
        ]
    )


def _segments(
    truth: Sequence[TruePanoptic], things: Sequence[bool], predictions: Sequence[Prediction]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, classes) sums of matched IoU and (n, 3, classes) segment counts, as in `Evaluation`."""
    ious, segments = [], []
    for true, predicted in zip(truth, predictions, strict=True):
        one = PanopticQuality(things)
        one.add(true, predicted.panoptic)
        ious.append(one.ious)
        segments.append(one.counts)
    return np.stack(ious), np.stack(segments)


def _quality(things: Sequence[bool], ious: np.ndarray, segments: np.ndarray) -> dict[str, float]:
    total = PanopticQuality(things)
    total.ious, total.counts = ious.sum(0), segments.sum(0)
    found = total.scores()
    return {
        "pq": found.all.pq,
        "sq": found.all.sq,
        "rq": found.all.rq,
        "pq_things": found.things.pq,
        "pq_stuff": found.stuff.pq,
    }


def _ap(
    truth: Sequence[TruePanoptic], things: Sequence[bool], predictions: Sequence[Prediction]
) -> float:
    average = AveragePrecision(len(things))
    for true, predicted in zip(truth, predictions, strict=True):
        found = true_instances(predicted.panoptic, things)
        chosen = [i for i, label in predicted.panoptic.labels.items() if things[label]]
        scores = np.array([predicted.scores[i] for i in chosen], dtype=np.float64)
        detections = Instances(masks_nhw=found.masks_nhw, labels=found.labels, scores=scores)
        for matched in match_detections(true_instances(true, things), detections):
            average.add_matched(matched)
    return average.scores().ap


def _resampled(evaluation: Evaluation, metric: str, times: np.ndarray) -> np.ndarray:
    """(samples,) the metric of data sets that contain image i `times[:, i]` times."""
    samples, images = times.shape
    if metric != "pq":
        counts = times @ evaluation.confusion.reshape(images, -1)
        shares = iou_of_counts(counts.reshape(samples, *evaluation.confusion.shape[1:]))
    else:
        if evaluation.ious is None or evaluation.segments is None:
            raise ValueError("PQ needs a data set with panoptic truth")
        wholes = times @ np.einsum("nkc,k->nc", evaluation.segments, [1.0, 0.5, 0.5])
        shares = np.where(wholes > 0, times @ evaluation.ious / np.maximum(wholes, 0.5), math.nan)
    if metric in ("seen", "unseen"):
        if evaluation.seen is None:
            raise ValueError(f"{metric} needs a data set with a split of classes")
        shares = shares[:, np.array(evaluation.seen) == (metric == "seen")]
    known = ~np.isnan(shares)
    total = np.where(known, shares, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), math.nan)
