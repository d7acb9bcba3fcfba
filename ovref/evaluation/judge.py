"""Predictions against the truth: all metrics at once, and whether a difference is more than chance.

Counts are kept image by image. A metric of the data set is made of their sums, and a confidence
interval of the difference of two segmenters by drawing images anew, the same ones for both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ovref.evaluation.datasets import Dataset, true_instances
from ovref.evaluation.metrics import ConfusionMatrix, split_scores
from ovref.evaluation.metrics_ap import AveragePrecision, Detections
from ovref.evaluation.metrics_panoptic import PanopticMap, PanopticQuality, panoptic_of_labels

METRICS = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "pq_things": "PQ things",
    "pq_stuff": "PQ stuff",
    "ap": "mask AP",
    "hiou": "hIoU",
}
"""Keys of `Judgement.metrics` and how people write them."""

DRAWS = 1000
"""Bootstrap samples of a confidence interval."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a segmenter says about one image."""

    labels_hw: np.ndarray
    """(H, W) integers: positions in the class list."""
    panoptic: PanopticMap
    """The same as segments, with instances of things."""
    scores: Mapping[int, float]
    """Confidence of each segment, comparable over images."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Counts of n judged images, and the metrics of all of them."""

    metrics: dict[str, float]
    """Fractions in [0, 1] by the keys of METRICS; those that do not apply are left out."""
    per_class_iou: np.ndarray
    """(classes,) float64; NaN for a class in neither truth nor prediction."""
    confusion: np.ndarray
    """(n, classes, classes) int64 pixels; row: true class, column: predicted class."""
    ious: np.ndarray | None
    """(n, classes) float64: sum of the IoU of matched segments; None without panoptic truth."""
    segments: np.ndarray | None
    """(n, 3, classes) int64: matched, wrong, missed segments; None without panoptic truth."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better one segmenter is than another, on one metric."""

    value: float
    """Of the whole data set; positive where the first is better."""
    low: float
    high: float
    """Between them lie 95 % of the differences of data sets drawn anew from the same images."""


def prediction_of_scores(scores_chw: np.ndarray, things: Sequence[bool] | None) -> Prediction:
    """The prediction of a segmenter that only scores pixels.

    Each pixel takes its best class; segments are those of `panoptic_of_labels` (without knowing
    things from stuff, whole classes), their confidence is the mean score of their class in them.

    Args:
        scores_chw: (classes, H, W), -inf for a class that cannot be predicted.
        things: of each class, whether it is a thing; None where that is not known.
    """
    labels_hw = scores_chw.argmax(0)
    panoptic = panoptic_of_labels(labels_hw, things or [False] * len(scores_chw), ignore=-1)
    ids = np.array(list(panoptic.labels), dtype=np.int64)
    means = ndimage.mean(scores_chw.max(0), panoptic.ids_hw, ids)
    scores = dict(zip(ids.tolist(), np.asarray(means).tolist(), strict=True))
    return Prediction(labels_hw=labels_hw, panoptic=panoptic, scores=scores)


def judge(data: Dataset, predictions: Sequence[Prediction]) -> Judgement:
    """Judges the predictions of all images of a data set.

    PQ and AP need the panoptic truth of the data set, hIoU its split of classes.

    Raises:
        ValueError: another number of predictions than of images, or what the metrics refuse.
    """
    if len(predictions) != len(data.images):
        raise ValueError(f"{len(predictions)} predictions for {len(data.images)} images")
    total = ConfusionMatrix(len(data.classes))
    confusion = []
    for label_hw, predicted in zip(data.labels, predictions, strict=True):
        matrix = ConfusionMatrix(len(data.classes))
        matrix.add(label_hw, predicted.labels_hw)
        confusion.append(matrix.counts)
        total.counts += matrix.counts
    scores = total.scores()
    metrics = {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
    ious = segments = None
    if data.panoptic is not None and data.things is not None:
        found, ious, segments = _panoptic(data, data.things, predictions)
        metrics |= found
    if data.seen is not None:
        metrics["hiou"] = split_scores(scores.iou, data.seen).hiou
    return Judgement(
        metrics=metrics,
        per_class_iou=scores.iou,
        confusion=np.stack(confusion),
        ious=ious,
        segments=segments,
    )


def difference(first: Judgement, second: Judgement, metric: str, seed: int = 0) -> Difference:
    """How much better `first` is than `second`, with a paired bootstrap over the images.

    Args:
        first, second: of the same images in the same order.
        metric: `miou` or `pq`.
        seed: of the drawing.

    Raises:
        ValueError: another metric, or other images.
    """
    if metric not in ("miou", "pq"):
        raise ValueError(f"metric must be miou or pq, found {metric!r}")
    if len(first.confusion) != len(second.confusion):
        raise ValueError("both judgements must be of the same images")
    images = len(first.confusion)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(np.float64)
    drawn = _resampled(first, metric, times) - _resampled(second, metric, times)
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    value = first.metrics[metric] - second.metrics[metric]
    return Difference(value=float(value), low=float(low), high=float(high))


def _panoptic(
    data: Dataset, things: Sequence[bool], predictions: Sequence[Prediction]
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    total, average = PanopticQuality(things), AveragePrecision(len(data.classes))
    ious, segments = [], []
    for truth, predicted in zip(data.panoptic or (), predictions, strict=True):
        one = PanopticQuality(things)
        one.add(truth, predicted.panoptic)
        ious.append(one.ious)
        segments.append(one.counts)
        total.ious += one.ious
        total.counts += one.counts
        found = true_instances(predicted.panoptic, things)
        chosen = [i for i, label in predicted.panoptic.labels.items() if things[label]]
        scores = np.array([predicted.scores[i] for i in chosen], dtype=np.float64)
        detections = Detections(masks_nhw=found.masks_nhw, labels=found.labels, scores=scores)
        average.add(true_instances(truth, things), detections)
    quality, ap = total.scores(), average.scores()
    metrics = {
        "pq": quality.all.pq,
        "sq": quality.all.sq,
        "rq": quality.all.rq,
        "pq_things": quality.things.pq,
        "pq_stuff": quality.stuff.pq,
        "ap": ap.ap,
    }
    return metrics, np.stack(ious), np.stack(segments)


def _resampled(judged: Judgement, metric: str, times: np.ndarray) -> np.ndarray:
    """(draws,) the metric of data sets that hold image i `times[:, i]` times."""
    draws, images = times.shape
    if metric == "miou":
        size = judged.confusion.shape[1:]
        counts = (times @ judged.confusion.reshape(images, -1)).reshape(draws, *size)
        hits = np.diagonal(counts, axis1=1, axis2=2)
        wholes = counts.sum(1) + counts.sum(2) - hits
    else:
        if judged.ious is None or judged.segments is None:
            raise ValueError("PQ needs a data set with panoptic truth")
        hits = times @ judged.ious
        weights = np.einsum("nkc,k->nc", judged.segments, [1.0, 0.5, 0.5])
        wholes = times @ weights
    known = wholes > 0
    shares = np.where(known, hits / np.where(known, wholes, 1), 0)
    classes = known.sum(1)
    return np.where(classes, shares.sum(1) / np.maximum(classes, 1), math.nan)
