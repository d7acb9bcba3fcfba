"""The per-image counts of an evaluation, shard by shard.

A first step holds the image names of a data set, a second step their counts, made by the stage of
`ScoreImages`. So an evaluation is committed, resumed and spread over workers like a build, and its
totals are sums over committed shards, whatever their order.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ovref.check_models import models_of, weights_fingerprint
from ovref.config import dump
from ovref.contract import Stage
from ovref.corpora.corpus_identity import identify_files
from ovref.errors import InputError
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.datasets import true_instances
from ovref.evaluation.knn import KnnMethod, memory_bank_identity
from ovref.evaluation.methods import Methods, rows_of
from ovref.evaluation.metrics_ap import THRESHOLDS, MatchedDetections, match_detections
from ovref.evaluation.metrics_panoptic import PanopticQuality
from ovref.evaluation.metrics_semantic import boundary_pixels, sparse_confusion
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.evaluation.predictions import Prediction
from ovref.evaluation.spec import EvaluateSpec
from ovref.evaluation.trained import TrainedMethod, head_identity
from ovref.identity import fingerprint
from ovref.records import LabelledImage, ScoredImage
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, open_step
from ovref.stored_images import png_of
from ovref_inference.segmenters.instances import Instances

IMAGES, SCORES = "images", "scores"
"""Steps of an evaluation's output."""

TABLES: dict[str, tuple[type, tuple[str, ...]]] = {
    "confusion": (np.int64, ("row", "true class", "predicted class", "pixels")),
    "boundaries": (np.int64, ("row", "class", "pixels of both", "pixels of either")),
    "segments": (np.float64, ("row", "class", "IoU", "matched", "wrong", "missed")),
    "instances": (np.int64, ("row", "class", "true instances")),
    "detections": (np.float64, ("row", "class", "score", "right", "ignored")),
}
"""Columns of `ScoredImage.tables`. For detections, `right` and `ignored` have a bit per threshold
of `metrics_ap.THRESHOLDS`."""

PLACES = {
    "": (
        "output", "collection", "fallback", "root", "names", "features", "pictures", "shard_size",
        "limit",
    ),
    "folder": ("images", "labels", "classes"),
    "clip_rc": ("weights",),
}
"""Fields of `EvaluateSpec` that do not affect the counts of an image, or whose content is
identified by the class list and by the names and sizes of the files."""


@dataclass(frozen=True, kw_only=True)
class ScoreImages:
    """Segments images by the method of every row and counts correct predictions."""

    name: ClassVar[str] = SCORES
    version: ClassVar[int] = 1
    evaluate: EvaluateSpec
    device: str | None = None
    """"cpu", "cuda", ...; None takes a GPU where there is one."""

    def build(self) -> Stage:
        """Opens the data set and the collection; models are loaded with the first image."""
        return ImageScorer(self.evaluate, CachedModels(self.device, self.evaluate.features))


class ImageScorer:
    """The stage of `ScoreImages`."""

    def __init__(self, spec: EvaluateSpec, models: CachedModels) -> None:
        """`models` are loaded when a row first needs them; their caches are cleared after each
        batch."""
        self._spec, self._models = spec, models
        self._data = spec.open_data()
        self._methods = methods_of(spec, self._data, models)
        self._rows = rows_of(spec)

    def __call__(self, records: Iterator[LabelledImage]) -> Iterator[ScoredImage]:
        for batch in _batches(records, self._spec.batch_size):
            examples = [self._data.read(record.name) for record in batch]
            with warnings.catch_warnings():
                # The result has this for every class, and each row would repeat it.
                warnings.filterwarnings("ignore", message=".* has no references for")
                self._methods.encode_batch(examples)
                for record, example in zip(batch, examples, strict=True):
                    yield self._scored(record, example)
            self._models.clear()

    def _scored(self, record: LabelledImage, example: Example) -> ScoredImage:
        tables: dict[str, list[np.ndarray]] = {name: [] for name in TABLES}
        maps = {}
        segments = example.panoptic is not None and self._data.things is not None
        for number, row in enumerate(self._rows):
            found = self._methods.predict(row, example.image_hwc, segments)
            counted = counts_of(example, found, self._data, self._spec.boundaries)
            for name, table_nc in counted.items():
                numbered = np.insert(table_nc, 0, number, axis=1)
                tables[name].append(numbered)
            if not row.changes:
                maps[number] = png_of_labels(found.labels_hw)
        whole = {name: np.concatenate(parts) for name, parts in tables.items() if parts}
        return ScoredImage(key=record.key, name=record.name, tables=whole, maps=maps)


def methods_of(
    spec: EvaluateSpec, data: LabelledSet, models: CachedModels
) -> Methods | KnnMethod | TrainedMethod:
    """The methods that make the rows' predictions. Raises InputError like `Methods` and
    `TrainedMethod`."""
    kinds = {"collection": Methods, "knn": KnnMethod, "clip_rc": TrainedMethod}
    return kinds[spec.method](spec, data, models)


def counts_of(
    example: Example, found: Prediction, data: LabelledSet, boundaries: bool = False
) -> dict[str, np.ndarray]:
    """The tables of one row and image (`TABLES`), without the column of the row."""
    classes = len(data.class_names)
    tables = {"confusion": sparse_confusion(example.label_hw, found.labels_hw, classes)}
    if boundaries:
        tables["boundaries"] = boundary_pixels(example.label_hw, found.labels_hw, classes)
    if example.panoptic is None or data.things is None:
        return tables
    quality = PanopticQuality(data.things)
    quality.add(example.panoptic, found.panoptic)
    present = np.flatnonzero(quality.counts.any(0))
    columns = (present, quality.ious[present], *quality.counts[:, present])
    tables["segments"] = np.stack([np.asarray(one, np.float64) for one in columns], axis=1)
    detections = _detections(found, data.things)
    matched = match_detections(true_instances(example.panoptic, data.things), detections)
    tables["instances"] = np.array(
        [(one.label, one.truths) for one in matched], dtype=np.int64
    ).reshape(-1, 2)
    tables["detections"] = np.concatenate([np.zeros((0, 4)), *(_packed(one) for one in matched)])
    return tables


def _detections(found: Prediction, things: Sequence[bool]) -> Instances:
    """The detections for average precision: instances, which may overlap, or segments."""
    if found.instances is not None:
        return found.instances
    segments = true_instances(found.panoptic, things)
    chosen = [id_ for id_, label in found.panoptic.labels.items() if things[label]]
    scores = np.array([found.scores[id_] for id_ in chosen], dtype=np.float64)
    return Instances(masks_nhw=segments.masks_nhw, labels=segments.labels, scores=scores)


def matched_of(instances_nc: np.ndarray, detections_nc: np.ndarray) -> list[MatchedDetections]:
    """Unpacks the detections of one row and image from the tables of `counts_of`."""
    found = []
    for _, label, truths in instances_nc.tolist():
        own = detections_nc[detections_nc[:, 1] == label]
        right, ignored = (_bits(own[:, column]) for column in (3, 4))
        found.append(
            MatchedDetections(
                label=label, truths=truths, scores=own[:, 2], right=right, ignored=ignored
            )
        )
    return found


def _packed(matched: MatchedDetections) -> np.ndarray:
    """(d, 4) float64: class, score, and threshold bits of `right` and `ignored`."""
    powers = 2.0 ** np.arange(len(THRESHOLDS))
    columns = (
        np.full(len(matched.scores), matched.label, dtype=np.float64),
        matched.scores,
        powers @ matched.right,
        powers @ matched.ignored,
    )
    return np.stack(columns, axis=1)


def _bits(values_n: np.ndarray) -> np.ndarray:
    """Unpacks bits to (thresholds, n) bool."""
    places = np.arange(len(THRESHOLDS))[:, None]
    return (values_n.astype(np.int64) >> places & 1).astype(bool)


def png_of_labels(labels_hw: np.ndarray) -> bytes:
    """A label map as a 16-bit PNG file: 0 is NO_CLASS, classes follow from 1."""
    return png_of((labels_hw + 1).astype(np.uint16))


def labels_of_png(png: bytes) -> np.ndarray:
    """Decodes a PNG of `png_of_labels` to (H, W) int32."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image).astype(np.int32) - 1


def open_steps(
    spec: EvaluateSpec, data: LabelledSet, models: CachedModels
) -> tuple[StepFolder, StepFolder]:
    """Opens or creates the steps of names and counts.

    Raises:
        MismatchError: the output belongs to another evaluation; the message says what differs.
    """
    output = Store.open(spec.output)
    images = open_step(output, IMAGES, images_identity(spec, data))
    settings = dump(spec)
    for part, names in PLACES.items():
        tree = settings[part] if part else settings
        for name in names if tree is not None else ():
            del tree[name]
    parts: list[Any] = [spec]
    identity: dict[str, Any] = {
        "version": ScoreImages.version,
        "settings": settings,
        "classes": data.class_fingerprint,
    }
    if spec.method == "clip_rc":
        identity["head"] = head_identity(models.head(spec.clip_rc.weights)[0])
    if spec.method == "knn":
        identity["memory"] = memory_bank_identity(spec, spec.open_training(data))
    for name in ("collection", "fallback"):
        if url := getattr(spec, name):
            collection = models.collection(url)
            identity[name] = {
                "fingerprint": collection.manifest.fingerprint,
                "tombstones": collection.deletions,
            }
            parts += [collection.visual_config, collection.text_config]
    identity["models"] = {
        name: weights_fingerprint(name, revision)
        for part in parts
        for _, name, revision in models_of(part)
    }
    return images, open_step(output, SCORES, identity, [images.fingerprint])


def images_identity(spec: EvaluateSpec, data: LabelledSet) -> dict[str, Any]:
    """Identity of the images and labels of an evaluation: names and sizes of files, not their
    location."""
    return {
        "data": data.name,
        "convention": data.convention,
        "class_list": data.class_list.fingerprint,
        "classes": list(data.class_names),
        "images": fingerprint(list(data.ids)),
        "files": identify_files(data.folders),
        "shard_size": spec.shard_size,
    }


def list_images(
    data: LabelledSet, target: StepFolder, shard_size: int, report: Callable[[int], None]
) -> None:
    """Reads every image and label map once, before any model is loaded, and commits their names.

    Raises:
        InputError: an image or label map is missing, unreadable or has unknown values, or no pixel
            of any has a class; nothing is scored in that case.
    """
    if target.complete() is not None:
        return
    done, shards = set(target.committed()), []
    labelled, pending = bool(done), []
    for number, names in enumerate(_batches(data.ids, shard_size)):
        shards.append(f"{number:06d}")
        if shards[-1] in done:
            continue
        for name in names:
            example = data.read(name)
            labelled = labelled or bool((example.label_hw >= 0).any())
        records = [LabelledImage(key=fingerprint(name)[:24], name=name) for name in names]
        pending.append((shards[-1], records))
        if labelled:  # so that what is committed has a labelled pixel
            for shard, known in pending:
                target.commit(shard, known, inputs=len(known))
            pending.clear()
        report(number * shard_size + len(names))
    if not labelled:
        raise InputError(f"no pixel of {data.name} has a class: all are void ({data.convention})")
    target.finish(shards)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
