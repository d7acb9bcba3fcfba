"""What a segmenter predicts for an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ovref.evaluation.metrics_panoptic import panoptic_of_labels
from ovref_inference.segmenters.instances import Instances
from ovref_inference.segmenters.regions import Panoptic


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction of a segmenter for one image."""

    labels_hw: np.ndarray
    """(H, W) integers: positions in the class list, or NO_CLASS."""
    panoptic: Panoptic
    """The same as panoptic segments."""
    scores: Mapping[int, float]
    """Confidence of each segment, comparable across images."""
    instances: Instances | None = None
    """Detections for mask AP, which may overlap; None takes the thing segments."""


def segments_of_labels(
    labels_hw: np.ndarray, max_score_hw: np.ndarray, things: Sequence[bool]
) -> Panoptic:
    """The segments of a label map (`panoptic_of_labels`), each with the mean score of its
    pixels."""
    found = panoptic_of_labels(labels_hw, things)
    ids = list(found.labels)
    means = ndimage.mean(max_score_hw, found.ids_hw, ids) if ids else ()
    scores = {id_: float(mean) for id_, mean in zip(ids, means, strict=True)}
    return Panoptic(ids_hw=found.ids_hw, labels=found.labels, scores=scores)


def prediction_of_segments(
    labels_hw: np.ndarray, segments: Panoptic, instances: Instances | None = None
) -> Prediction:
    """A label map and segments, which may come from elsewhere, as a prediction."""
    return Prediction(
        labels_hw=labels_hw,
        panoptic=segments,
        scores=segments.scores,
        instances=instances,
    )


def prediction_of_labels(
    labels_hw: np.ndarray, max_score_hw: np.ndarray, things: Sequence[bool] | None
) -> Prediction:
    """A label map as a prediction, with `segments_of_labels`; without segments if `things` is
    None."""
    if things is None:
        return prediction_of_segments(labels_hw, Panoptic(ids_hw=np.zeros_like(labels_hw)))
    segments = segments_of_labels(labels_hw, max_score_hw, things)
    return prediction_of_segments(labels_hw, segments)
