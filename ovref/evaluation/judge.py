"""Predictions against the truth: all metrics at once, and whether a difference is more than chance.

Counts are kept image by image. A metric of the data set is made of their sums, and a confidence
interval of the difference of two segmenters by drawing images anew, the same ones for both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

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
    "seen": "mIoU seen",
    "unseen": "mIoU unseen",
    "hiou": "hIoU",
}
"""Keys of `Judgement.metrics` and how people write them."""

DRAWS = 1000
"""Bootstrap samples of a confidence interval."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a segmenter says about one image."""

    labels_hw: np.ndarray
    """(H, W) integers: positions in the class list, -1 for pixels that no class was given to."""
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
    """(n, classes, classes + 1) int64 pixels; row: true class, column: predicted class, the last
    for none."""
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


def prediction_of_pixels(
    labels_hw: np.ndarray, scores_chw: np.ndarray, things: Sequence[bool] | None
) -> Prediction:
    """The prediction of a segmenter that only classifies pixels.

    Segments are those of `panoptic_of_labels` (without knowing things from stuff, whole classes),
    their confidence is the mean score of their class in them.

    Args:
        labels_hw: (H, W) integers: positions in the class list, or -1.
        scores_chw: (classes, H, W), finite where its class was given.
        things: of each class, whether it is a thing; None where that is not known.
    """
    panoptic = panoptic_of_labels(labels_hw, things or [False] * len(scores_chw), ignore=-1)
    scores = {
        i: float(scores_chw[label][panoptic.ids_hw == i].mean())
        for i, label in panoptic.labels.items()
    }
    return Prediction(labels_hw=labels_hw, panoptic=panoptic, scores=scores)


def judge(data: Dataset, predictions: Sequence[Prediction]) -> Judgement:
    """Judges the predictions of all images of a data set.

    PQ and AP need the panoptic truth of the data set, hIoU its split of classes.

    Raises:
        ValueError: another number of predictions than of images, or what the metrics refuse.
    """
    if len(predictions) != len(data.images):
        raise ValueError(f"{len(predictions)} predictions for {len(data.images)} images")
    confusion = _confusion(data, predictions)
    iou = _iou(confusion.sum(0)[None])[0]
    judged = confusion.sum()
    right = np.trace(confusion.sum(0)[:, :-1])
    metrics = {
        "miou": _mean(iou),
        "pixel_accuracy": float(right / judged) if judged else math.nan,
    }
    ious = segments = None
    if data.panoptic is not None and data.things is not None:
        ious, segments = _segments(data.panoptic, data.things, predictions)
        metrics |= _quality(data.things, ious, segments)
        metrics["ap"] = _ap(data.panoptic, data.things, predictions)
    if data.seen is not None:
        metrics |= asdict(split_scores(iou, data.seen))
    return Judgement(
        metrics=metrics, per_class_iou=iou, confusion=confusion, ious=ious, segments=segments
    )


def metric_of(data: Dataset, predictions: Sequence[Prediction], metric: str) -> float:
    """`judge(...).metrics[metric]` for `miou` or `pq`, without the work for all the others."""
    _check_metric(metric)
    if metric == "miou":
        return _mean(_iou(_confusion(data, predictions).sum(0)[None])[0])
    if data.panoptic is None or data.things is None:
        raise ValueError("PQ needs a data set with panoptic truth")
    counted = _segments(data.panoptic, data.things, predictions)
    return _quality(data.things, *counted)["pq"]


def difference(first: Judgement, second: Judgement, metric: str, seed: int = 0) -> Difference:
    """How much better `first` is than `second`, with a paired bootstrap over the images.

    Args:
        first, second: of the same images in the same order.
        metric: `miou` or `pq`.
        seed: of the drawing.

    Raises:
        ValueError: another metric, or other images.
    """
    _check_metric(metric)
    if len(first.confusion) != len(second.confusion):
        raise ValueError("both judgements must be of the same images")
    images = len(first.confusion)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(np.float64)
    drawn = _resampled(first, metric, times) - _resampled(second, metric, times)
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    value = first.metrics[metric] - second.metrics[metric]
    return Difference(value=float(value), low=float(low), high=float(high))


def _check_metric(metric: str) -> None:
    if metric not in ("miou", "pq"):
        raise ValueError(f"metric must be miou or pq, found {metric!r}")


def _confusion(data: Dataset, predictions: Sequence[Prediction]) -> np.ndarray:
    """(n, classes, classes + 1) as in `Judgement`."""
    classes, counts = len(data.classes), []
    for label_hw, predicted in zip(data.labels, predictions, strict=True):
        matrix = ConfusionMatrix(classes + 1)
        matrix.add(label_hw, np.where(predicted.labels_hw < 0, classes, predicted.labels_hw))
        if matrix.counts[classes].any():  # the class of none, which a prediction alone may have
            raise ValueError(f"truth holds label {classes}, expected 0 to {classes - 1}")
        counts.append(matrix.counts[:classes])
    return np.stack(counts)


def _iou(counts: np.ndarray) -> np.ndarray:
    """(m, classes, classes + 1) pixels -> (m, classes) IoU, NaN for a class in neither map."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    wholes = counts.sum(2) + counts[:, :, :-1].sum(1) - hits
    return np.where(wholes > 0, hits / np.maximum(wholes, 1), math.nan)


def _segments(
    truth: Sequence[PanopticMap], things: Sequence[bool], predictions: Sequence[Prediction]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, classes) sums of matched IoU and (n, 3, classes) segments, as in `Judgement`."""
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
    truth: Sequence[PanopticMap], things: Sequence[bool], predictions: Sequence[Prediction]
) -> float:
    average = AveragePrecision(len(things))
    for true, predicted in zip(truth, predictions, strict=True):
        found = true_instances(predicted.panoptic, things)
        chosen = [i for i, label in predicted.panoptic.labels.items() if things[label]]
        scores = np.array([predicted.scores[i] for i in chosen], dtype=np.float64)
        detections = Detections(masks_nhw=found.masks_nhw, labels=found.labels, scores=scores)
        average.add(true_instances(true, things), detections)
    return average.scores().ap


def _resampled(judged: Judgement, metric: str, times: np.ndarray) -> np.ndarray:
    """(draws,) the metric of data sets that hold image i `times[:, i]` times."""
    draws, images = times.shape
    if metric == "miou":
        counts = times @ judged.confusion.reshape(images, -1)
        shares = _iou(counts.reshape(draws, *judged.confusion.shape[1:]))
    else:
        if judged.ious is None or judged.segments is None:
            raise ValueError("PQ needs a data set with panoptic truth")
        wholes = times @ np.einsum("nkc,k->nc", judged.segments, [1.0, 0.5, 0.5])
        shares = np.where(wholes > 0, times @ judged.ious / np.maximum(wholes, 0.5), math.nan)
    known = ~np.isnan(shares)
    total = np.where(known, shares, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), math.nan)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; NaN if nothing else is there."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
