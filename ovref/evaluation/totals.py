"""Sums the committed counts of an evaluation: metrics of rows, classes and images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ovref.evaluation.counting import matched_of
from ovref.evaluation.metrics_ap import AveragePrecision
from ovref.evaluation.metrics_panoptic import PanopticQuality
from ovref.evaluation.metrics_semantic import (
    mean_of_known,
    scores_of_counts,
    shares,
    split_scores,
)
from ovref.records import ScoredImage
from ovref.storage.steps import StepFolder


@dataclass(kw_only=True)
class Overlaps:
    """The contribution of each image to the IoU of each class in one row, for a bootstrap."""

    right: np.ndarray
    """(images, classes) int64: pixels of the class in truth and prediction."""
    either: np.ndarray
    """(images, classes) int64: pixels of the class in truth or prediction."""
    true: np.ndarray
    """(images, classes) int64: pixels of the class in truth."""

    def iou_of_images(self) -> np.ndarray:
        """(images,) float64: mean IoU over the classes that occur in an image; NaN without any."""
        return np.array([mean_of_known(row) for row in shares(self.right, self.either)])

    def accuracy_of_images(self) -> np.ndarray:
        """(images,) float64: share of evaluated pixels that are correct; NaN without any."""
        return shares(self.right.sum(1), self.true.sum(1))


@dataclass(kw_only=True)
class Totals:
    """Counts of all images by row."""

    confusion: np.ndarray
    """(rows, classes, classes + 1) int64, as in `metrics_semantic.confusion`."""
    boundaries: np.ndarray | None
    """(rows, classes, 2) int64: pixels in both boundaries, in either; None if not measured."""
    quality: list[PanopticQuality] | None
    """One per row; None without panoptic truth."""
    average: list[AveragePrecision] | None
    """One per row; None without panoptic truth."""
    names: list[str] = field(default_factory=list)
    """Image names, in the order of the data set."""

    def metrics(self, row: int, seen: Sequence[bool] | None) -> dict[str, float]:
        """Metrics of a row in [0, 1], NaN if not defined, without those that do not apply."""
        scores = scores_of_counts(self.confusion[row])
        found = {
            "miou": scores.miou,
            "mean_accuracy": scores.mean_accuracy,
            "pixel_accuracy": scores.pixel_accuracy,
        }
        if seen is not None:
            found |= asdict(split_scores(scores.iou, seen))
        if self.boundaries is not None:
            found["boundary_iou"] = mean_of_known(self.boundary_iou(row))
        if self.quality is not None and self.average is not None:
            quality, average = self.quality[row].scores(), self.average[row].scores()
            found |= {"pq": quality.all.pq, "sq": quality.all.sq, "rq": quality.all.rq}
            found |= {"pq_things": quality.things.pq, "pq_stuff": quality.stuff.pq}
            found |= {"ap": average.ap, "ap50": average.ap50}
        return found

    def boundary_iou(self, row: int) -> np.ndarray:
        """(classes,) float64; NaN for a class that does not occur."""
        if self.boundaries is None:
            raise ValueError("boundaries were not measured")
        return shares(*self.boundaries[row].T)


def scored_images(scores: StepFolder) -> Iterator[ScoredImage]:
    """All images of a finished step, in the order of the data set."""
    for shard in scores.committed():
        for record in scores.read(shard):
            if isinstance(record, ScoredImage):
                yield record


def sum_counts(images: Iterable[ScoredImage], rows: int, classes: int, things: Any) -> Totals:
    """Sums the counts of images.

    Args:
        images: in the order of the data set, which matters only for detections of equal scores.
        rows: number of rows.
        classes: number of classes.
        things: whether each class is a thing, or None.
    """
    confusion = np.zeros((rows, classes, classes + 1), dtype=np.int64)
    boundaries = np.zeros((rows, classes, 2), dtype=np.int64)
    quality = [PanopticQuality(things or [False] * classes) for _ in range(rows)]
    average = [AveragePrecision(classes) for _ in range(rows)]
    names, seen = [], set()
    for image in images:
        names.append(image.name)
        seen |= set(image.tables)
        row, truth, predicted, pixels = image.tables["confusion"].T
        np.add.at(confusion, (row, truth, predicted), pixels)
        if "boundaries" in image.tables:
            row, label, *both_either = image.tables["boundaries"].T
            np.add.at(boundaries, (row, label), np.stack(both_either, axis=1))
        if "segments" in image.tables:
            _add_segments(image, quality, average)
    panoptic = "segments" in seen
    return Totals(
        confusion=confusion,
        boundaries=boundaries if "boundaries" in seen else None,
        quality=quality if panoptic else None,
        average=average if panoptic else None,
        names=names,
    )


def _add_segments(
    image: ScoredImage, quality: list[PanopticQuality], average: list[AveragePrecision]
) -> None:
    for row, label, iou, *counts in image.tables["segments"].tolist():
        quality[int(row)].ious[int(label)] += iou
        quality[int(row)].counts[:, int(label)] += np.array(counts, dtype=np.int64)
    instances, detections = image.tables["instances"], image.tables["detections"]
    for row in range(len(average)):
        own = instances[instances[:, 0] == row]
        for matched in matched_of(own, detections[detections[:, 0] == row]):
            average[row].add_matched(matched)


def overlaps_of(images: Iterable[ScoredImage], rows: Sequence[int], classes: int) -> list[Overlaps]:
    """The overlaps of some rows, with images in the order given."""
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    for image in images:
        table_nc = image.tables["confusion"]
        for place, number in enumerate(rows):
            _, truth, predicted, pixels = table_nc[table_nc[:, 0] == number].T
            same = truth == predicted
            right = np.bincount(truth[same], pixels[same], classes)
            true = np.bincount(truth, pixels, classes)
            said = np.bincount(predicted, pixels, classes + 1)[:-1]
            parts[place].append(np.stack([right, true + said - right, true]).astype(np.int64))
    found = [np.stack(each, axis=1) for each in parts]
    return [Overlaps(right=one[0], either=one[1], true=one[2]) for one in found]
