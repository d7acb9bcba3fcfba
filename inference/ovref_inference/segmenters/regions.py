"""Scored regions to label maps (VOCSeg eq. 5) and panoptic maps.

Segmenters that classify proposals (VOCSeg, RetCLIP, CorrCLIPv2) share these functions, which do not
need torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ovref_inference.encoders.pooling import RegionEncoder
from ovref_inference.images import box_of
from ovref_inference.lazy import missing_package
from ovref_inference.proposers.proposals import Proposals, owned_masks
from ovref_inference.vectors import l2_normalised

NO_CLASS = -1
"""Label of a pixel without a class: background, or not covered by a proposal."""

_VALUES_AT_ONCE = 1 << 22
"""Number of scores computed at once, 16 MB: those of 171 classes at 12 megapixels would be 8 GB."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Segmentation of one image."""

    labels_hw: np.ndarray
    """(H, W) int32: index into the class names, or NO_CLASS."""
    max_score_hw: np.ndarray
    """(H, W) float32: highest score of any class; -inf if no class has support."""
    scores_of: Callable[[slice], np.ndarray] = field(repr=False)
    """Computes the scores of a slice of the classes, as in `scores_chw`."""
    missing: tuple[str, ...] = ()
    """Classes without support in the collection, which get no pixel."""
    tensor_of: Callable[[slice], Any] | None = field(default=None, repr=False)
    """`scores_of` as a tensor on the device that computes the scores; None where numpy does."""

    @property
    def scores_chw(self) -> np.ndarray:
        """(classes, H, W) float32; -inf for a class without support. Computed at each call: 8 GB
        for 171 classes at 12 megapixels."""
        return self.scores_of(slice(None))

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the classes that occur: (n, H, W) bool, and the class of each, (n,) int64."""
        classes = np.unique(self.labels_hw)
        classes = classes[classes >= 0].astype(np.int64)
        return self.labels_hw[None] == classes[:, None, None], classes

    def to_torch(self, device: Any = None) -> dict[str, Any]:
        """Tensors: `labels` (H, W) int64 or NO_CLASS, `scores` (H, W) float32 of the best class,
        `masks` (n, H, W) bool and `classes` (n,) int64 as in `masks`."""
        import torch

        masks_nhw, classes = self.masks()
        return {
            "labels": torch.as_tensor(self.labels_hw, dtype=torch.int64, device=device),
            "scores": torch.as_tensor(self.max_score_hw, device=device),
            "masks": torch.as_tensor(masks_nhw, device=device),
            "classes": torch.as_tensor(classes, device=device),
        }

    def to_supervision(self, class_names: Sequence[str]) -> Any:
        """`supervision.Detections`, one for each class that occurs: box, mask, mean score of its
        pixels as confidence, class id, and `class_name` in its data.

        Args:
            class_names: the requested classes.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise missing_package(error, "Segmentation.to_supervision") from error
        masks_nhw, classes = self.masks()
        if not len(classes):
            return supervision.Detections.empty()
        return supervision.Detections(
            xyxy=np.array([box_of(mask_hw) for mask_hw in masks_nhw], dtype=np.float64),
            mask=masks_nhw,
            confidence=np.array([self.max_score_hw[mask_hw].mean() for mask_hw in masks_nhw]),
            class_id=classes,
            data={"class_name": np.array([class_names[label] for label in classes])},
        )


def best_of_names(scores_nm: np.ndarray, class_of: np.ndarray, classes: int) -> np.ndarray:
    """The highest score over the names of each class.

    Args:
        scores_nm: (n, names).
        class_of: (names,) the class of each name.
        classes: number of classes.

    Returns:
        (n, classes) float32, -inf for a class without a name.
    """
    scores_nc = np.full((len(scores_nm), classes), -np.inf, dtype=np.float32)
    np.maximum.at(scores_nc.T, class_of, scores_nm.T)
    return scores_nc


class Segmenter(Protocol):
    """Images and class names -> label maps. All segmenters of this package implement this
    protocol."""

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
            class_names: what to look for, as text; at least one.

        Returns:
            One Segmentation per image, at the image's size. Classes without support in the
            collection are listed in `missing` and get no pixel.

        Raises:
            ValueError: no class names or an empty one, no support for any of them, images of
                another type or shape, or features that are zero or not finite.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ScoredRegions:
    """Proposals of one image with a score for each class. They may overlap."""

    mask_probs_nhw: np.ndarray
    """(n, H, W) float32 in [0, 1]: probability that a pixel belongs to the region."""
    scores_nc: np.ndarray
    """(n, classes) float32 in [0, 1]."""
    missing: tuple[str, ...] = ()
    """Classes for which the collection has no references."""
    void_n: np.ndarray | None = None
    """(n,) float32: probability that the region shows no class; None where nothing says so."""


@dataclass(frozen=True, kw_only=True)
class Panoptic:
    """Segments of one image, no two overlapping."""

    ids_hw: np.ndarray
    """(H, W) int32: segment ids from 1, 0 where there is none."""
    labels: Mapping[int, int] = field(default_factory=dict)
    """Segment id -> index into the class names."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """Segment id -> score of its class, for merged stuff the highest; of a label map, the mean over
    its pixels."""


def region_features(
    visual: RegionEncoder,
    images: Sequence[np.ndarray],
    proposals: Sequence[Proposals],
    threshold: float,
    own_model: str = "",
) -> list[tuple[Proposals, np.ndarray]]:
    """Embeddings of the proposals of each image.

    Args:
        visual: embeds regions.
        images: (H, W, 3) uint8 RGB each.
        proposals: of each image. Features that they bring are taken as they are where they are of
            `own_model`, and then nothing is encoded.
        threshold: a pixel is in a region's mask if its probability is above this.
        own_model: the model that `visual` is; empty takes no features of proposals.

    Returns:
        For each image the non-empty proposals and their features (n, d) float32, L2-normalised.

    Raises:
        ValueError: features of a region are zero or not finite.
    """
    kept = [found.chosen(np.asarray(found.masks(threshold).any((1, 2)))) for found in proposals]
    if own_model and all(found.features_of == own_model for found in kept):
        return [(found, l2_normalised(found.features_nd)) for found in kept]
    encoded = visual.encode_regions(
        images,
        [found.masks(threshold) for found in kept],
        [found.mask_probs_nhw for found in kept],
    )
    features = []
    for number, (_, valid) in enumerate(encoded):
        if not valid.all():
            raise ValueError(
                f"image {number}: features of {int((~valid).sum())} of {len(valid)} regions are "
                "not finite"
            )
    for found, (features_nd, _) in zip(kept, encoded, strict=True):
        features.append((found, l2_normalised(features_nd)))
    return features


def softmax(scores_nc: np.ndarray, temperature: float) -> np.ndarray:
    """(n, classes) float32, rows summing to 1, of scores divided by a temperature above 0."""
    scaled = np.asarray(scores_nc, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True, initial=-np.inf))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def semantic(regions: ScoredRegions) -> Segmentation:
    """VOCSeg eq. 5: z_j(q) = sum over regions i of M_i(q) p_ij; each pixel takes its best class.

    A pixel for which every sum is zero gets NO_CLASS, since no region covers it.
    """
    height, width = regions.mask_probs_nhw.shape[1:]
    labels_hw = np.zeros((height, width), dtype=np.int32)
    max_score_hw = np.full((height, width), -np.inf, dtype=np.float32)
    at_once = max(1, _VALUES_AT_ONCE // (width * max(1, regions.scores_nc.shape[1])))
    for top in range(0, height, at_once):
        rows = slice(top, top + at_once)
        # Much faster than argmax over the first axis.
        for label, sums_hw in enumerate(_sums(regions.scores_nc, regions.mask_probs_nhw[:, rows])):
            np.copyto(labels_hw[rows], label, where=sums_hw > max_score_hw[rows])
            np.maximum(max_score_hw[rows], sums_hw, out=max_score_hw[rows])
    found = Segmentation(
        labels_hw=labels_hw,
        max_score_hw=max_score_hw,
        scores_of=partial(_scores_of, regions),
        missing=regions.missing,
    )
    return _where(found, max_score_hw > 0)


def _scores_of(regions: ScoredRegions, classes: slice) -> np.ndarray:
    return _sums(regions.scores_nc[:, classes], regions.mask_probs_nhw)


def _sums(scores_nc: np.ndarray, mask_probs_nhw: np.ndarray) -> np.ndarray:
    n, height, width = mask_probs_nhw.shape
    sums = scores_nc.T @ mask_probs_nhw.reshape(n, height * width)
    return sums.reshape(-1, height, width).astype(np.float32, copy=False)


def with_background(found: Segmentation, threshold: float) -> Segmentation:
    """A copy with NO_CLASS where no score is finite and reaches the threshold."""
    return _where(found, (found.max_score_hw >= threshold) & (found.max_score_hw > -np.inf))


def _where(found: Segmentation, given_hw: np.ndarray) -> Segmentation:
    """A copy with NO_CLASS elsewhere."""
    labels_hw = np.where(given_hw, found.labels_hw, np.int32(NO_CLASS))
    return replace(found, labels_hw=labels_hw)


def panoptic(
    regions: ScoredRegions,
    things: Sequence[bool],
    *,
    min_score: float = 0.0,
    overlap: float = 0.8,
) -> Panoptic:
    """Converts regions to disjoint segments, as MaskFormer does (its section 3.4).

    Each region gets its best class. Its pixels are those of `owned_masks`, weighted by its best
    score, with a threshold of 0.5. A region that loses too much of its area to others is dropped,
    and its pixels get no segment. Stuff of one class is one segment; every thing is a separate
    segment.

    Args:
        regions: of one image; those that show no class more probably than their best are dropped.
        things: whether each class is a thing.
        min_score: regions whose best score is not above this are dropped first.
        overlap: a region is dropped if it keeps less than this fraction of its pixels (probability
            at least 0.5). Only pixels inside its own mask count as kept, as in MaskFormer's paper;
            FC-CLIP's code counts all pixels that it owns, which keeps more regions (PQ 0.203
            instead of 0.206 on the same inputs).

    Raises:
        ValueError: `things` does not have one entry per class.
    """
    height, width = regions.mask_probs_nhw.shape[1:]
    classes = regions.scores_nc.shape[1]
    if len(things) != classes:
        raise ValueError(f"things must have one entry for each of {classes} classes: {things!r}")
    ids_hw = np.zeros((height, width), dtype=np.int32)
    best = regions.scores_nc.max(1, initial=-np.inf)
    # Dropped regions get weight 0, which avoids copying the probabilities of the others.
    weights_n = np.where(best > max(min_score, 0.0), best, np.float32(0))
    if regions.void_n is not None:
        weights_n[best < regions.void_n] = 0.0
    masks_nhw, areas_n = owned_masks(regions.mask_probs_nhw, weights_n, 0.5)
    labels: dict[int, int] = {}
    scores: dict[int, float] = {}
    stuff: dict[int, int] = {}
    for index, (own_hw, area) in enumerate(zip(masks_nhw, areas_n, strict=True)):
        if not own_hw.any() or own_hw.sum() < overlap * area:
            continue
        label, score = int(regions.scores_nc[index].argmax()), float(best[index])
        segment = len(labels) + 1 if things[label] else stuff.setdefault(label, len(labels) + 1)
        ids_hw[own_hw] = segment
        labels[segment] = label
        scores[segment] = max(score, scores.get(segment, 0.0))
    return Panoptic(ids_hw=ids_hw, labels=labels, scores=scores)
