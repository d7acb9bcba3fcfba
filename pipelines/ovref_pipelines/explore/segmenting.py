"""A photograph segmented by several methods, and the references that decided each region."""

import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import panoptic_of_labels
from ovref.exchange.class_lists import Classes
from ovref.ops.palette import class_palette
from ovref.stored_images import reduced
from ovref_inference import ReferenceCollection
from ovref_inference.encoders.load import load_region_encoder
from ovref_inference.images import box_of
from ovref_inference.segmenters.load import METHODS, load_segmenter
from ovref_inference.vectors import l2_normalised
from ovref_pipelines.explore.library import compared, read_visual
from ovref_pipelines.explore.pictures import labelled, webp

SIDE = 1024
"""Maximum length of the longer side in pixels; larger photographs are reduced to it."""
MOST_CLASSES = 100
SMALLEST = 0.004
"""Minimum area of an explained region, as a fraction of the image."""
MOST_REGIONS = 40
DECIDING = 6
"""References shown per region."""


class Photographs:
    """Segments photographs with one collection, one at a time. Models are loaded once."""

    def __init__(self, collection: ReferenceCollection) -> None:
        self._collection = collection
        self._segmenters: dict[str, Any] = {}
        self._visual: Any = None
        self._lock = threading.Lock()

    def segment(
        self, image_hwc: np.ndarray, classes: Classes, methods: list[str]
    ) -> dict[str, Any]:
        """Segments a photograph by each method.

        Returns:
            `size_hw`; `colours` of the classes; `results`, for each method its `picture` (WebP
            bytes) and its `regions` (see `_explained`), or an `error` that says why the method does
            not suit this collection.

        Raises:
            InputError: unknown method, no classes or too many.
        """
        names = len(classes.query_names)
        if not 1 <= names <= MOST_CLASSES:
            raise InputError(
                f"give 1 to {MOST_CLASSES} classes with their synonyms, found {names}"
            )
        if unknown := sorted(set(methods) - METHODS.keys()):
            raise InputError(f"methods are {', '.join(METHODS)}, found {', '.join(unknown)}")
        image_hwc = np.asarray(reduced(Image.fromarray(image_hwc), SIDE))
        colours = class_palette(len(classes.names))[:-1]
        with self._lock:
            results = {method: self._by(method, image_hwc, classes, colours) for method in methods}
        return {
            "size_hw": list(image_hwc.shape[:2]),
            "colours": dict(zip(classes.names, map(_css, colours), strict=True)),
            "results": results,
        }

    def _by(
        self, method: str, image_hwc: np.ndarray, classes: Classes, colours: np.ndarray
    ) -> dict[str, Any]:
        try:
            if method not in self._segmenters:
                self._segmenters[method] = load_segmenter(self._collection, method)  # type: ignore[arg-type]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about missing classes, which are listed below
                (found,) = self._segmenters[method].segment([image_hwc], classes.query_names)
        except ValueError as error:
            return {"error": str(error).replace(self._collection.url, "this collection")}
        labels_hw = classes.labels(found.labels_hw)
        return {
            "picture": webp(labelled(image_hwc, labels_hw, colours)),
            "missing": list(classes.missing(found.missing)),
            "regions": self._explained(image_hwc, labels_hw, classes),
        }

    def _explained(
        self, image_hwc: np.ndarray, labels_hw: np.ndarray, classes: Classes
    ) -> list[dict[str, Any]]:
        """Connected regions of one class, the largest first, each with the ids and cosines of its
        references.

        `references` are the class's references most similar to the region, `others` the most
        similar of any noun: if those are of another noun, the region is contested.
        """
        regions = _regions(labels_hw)
        if not regions:
            return []
        if self._visual is None:
            self._visual = load_region_encoder(self._collection.visual_config)
        masks_nhw = np.stack([mask_hw for _, mask_hw in regions])
        features_nd, kept = self._visual.encode_regions([image_hwc], [masks_nhw])[0]
        regions = [region for region, keep in zip(regions, kept, strict=True) if keep]
        features_nd = features_nd[kept]
        if not regions:
            return []
        found = []
        any_noun = self._collection.search_regions(features_nd, k=DECIDING)
        for number, (label, mask_hw) in enumerate(regions):
            names = [classes.query_names[i] for i in np.flatnonzero(classes.class_of == label)]
            found.append({
                "name": classes.names[label],
                "area": float(mask_hw.mean()),
                "box": list(box_of(mask_hw)),
                "references": self._nearest(features_nd[number], names),
                "others": (any_noun.ids[number].tolist(), any_noun.scores[number].tolist()),
            })  # fmt: skip
        return found

    def _nearest(self, feature_d: np.ndarray, names: list[str]) -> tuple[list[int], list[float]]:
        """The references that stand for a class of these names and look most like a region, of an
        even sample if there are many (`library.compared`)."""
        ids = np.concatenate([self._collection.references_of(name) for name in names])
        if not len(ids):
            texts = self._collection.embed_text(names[:1])
            ids = self._collection.search_text(texts, k=100).ids[0]
            ids = ids[ids >= 0]
        ids = compared(ids)
        cosines = read_visual(self._collection, ids) @ l2_normalised(feature_d[None])[0]
        best = np.argsort(-cosines)[:DECIDING]
        return ids[best].tolist(), cosines[best].tolist()


def _regions(labels_hw: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Connected regions of one class that are large enough to explain, the largest first."""
    parts = panoptic_of_labels(labels_hw, [True] * (int(labels_hw.max()) + 1))
    sizes = np.bincount(parts.ids_hw.ravel())
    large = [part for part in parts.labels if sizes[part] >= SMALLEST * labels_hw.size]
    large.sort(key=lambda part: -sizes[part])
    return [(parts.labels[part], parts.ids_hw == part) for part in large[:MOST_REGIONS]]


def _css(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)
