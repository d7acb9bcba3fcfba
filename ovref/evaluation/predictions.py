"""What a segmenter predicts for an image."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ovref.evaluation.metrics_panoptic import PanopticMap
from ovref_inference.segmenters.instances import Instances


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction of a segmenter for one image."""

    labels_hw: np.ndarray
    """(H, W) integers: positions in the class list, or NO_CLASS."""
    panoptic: PanopticMap
    """The same as panoptic segments."""
    scores: Mapping[int, float]
    """Confidence of each segment, comparable across images."""
    instances: Instances | None = None
    """Detections for mask AP, which may overlap; None takes the thing segments."""
