"""GroundingDINO and SAM together: images and nouns -> masks (RetCLIP, section 2.1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.pixels import device_of
from ovref_inference.proposers.config import GroundingDinoConfig, SamConfig
from ovref_inference.proposers.detectors import Detector, load_detector
from ovref_inference.proposers.grounding import DetectedBoxes
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import load_sam


@dataclass(frozen=True, kw_only=True)
class GroundedMasks:
    """Detections in one image with their masks, by descending detector score."""

    detections: DetectedBoxes
    """Boxes, nouns and scores."""
    masks_nhw: np.ndarray
    """(n, H, W) bool, the mask of each box; masks may overlap or be empty."""
    predicted_iou: np.ndarray
    """(n,) float32: IoU that SAM predicts for its masks, roughly in [0, 1]."""


class GroundedSam:
    """Finds nouns in images as boxes and turns the boxes into masks. Made by
    `load_grounded_sam`."""

    def __init__(self, detector: Detector, sam: SamMasks, *, multimask: bool = False) -> None:
        """`multimask` as of `SamConfig`."""
        self.sam = sam
        self._detector, self._multimask = detector, multimask

    def find(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> Iterator[GroundedMasks]:
        """Masks of the nouns of every image, one image at a time.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.
            nouns: of every image, as in `GroundingDino.detect`.
        """
        found = self._detector.detect(images, nouns)
        boxes = [detections.boxes_xyxy for detections in found]
        masks = self.sam.of_boxes(images, boxes, multimask=self._multimask)
        for detections, (masks_nhw, ious_n) in zip(found, masks, strict=True):
            yield GroundedMasks(detections=detections, masks_nhw=masks_nhw, predicted_iou=ious_n)


def load_grounded_sam(
    detector: GroundingDinoConfig,
    sam: SamConfig,
    *,
    device: str | None = None,
    batch_size: int = 8,
) -> GroundedSam:
    """Loads both models.

    Args:
        device: "cpu", "cuda", ...; None selects a GPU if there is one.
        batch_size: maximum number of images per forward pass.

    Raises:
        ModelError: one of them cannot be found or read.
    """
    return GroundedSam(
        load_detector(detector, device=device, batch_size=batch_size),
        SamMasks(
            load_sam(sam.model, device_of(device), revision=sam.revision), batch_size=batch_size
        ),
        multimask=sam.multimask,
    )
