"""Segmenters: images + class names + a collection -> label maps.

`FossilSegmenter` is FOSSIL's inference (sections 3.3 and 3.5): retrieve references by text, cluster
them into prototypes, pool dense features over proposed regions, compare. `TextOnlySegmenter` is
what FOSSIL is measured against: dense CLIP features compared with the text embeddings of the
classes. Both are compositions of the plain functions in this module. Other methods have modules of
their own: `vocseg`, `retclip`, `corrclip`, `freeda`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import TEMPLATES, Texts, checked_names, class_embeddings
from ovref_inference.encoders.pooling import pool_regions
from ovref_inference.images import check_images
from ovref_inference.proposers.load import Encoder, Proposer
from ovref_inference.segmenters.labels import NamedTexts, Recent
from ovref_inference.segmenters.regions import Segmentation, labelled
from ovref_inference.segmenters.windows import WindowConfig, resize_scores, sliding_scores
from ovref_inference.vectors import l2_normalised


@dataclass(frozen=True, kw_only=True)
class FossilConfig:
    """Parameters of FOSSIL's inference; the defaults are the paper's best on ADE (section 4.3)."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    n: int = 150
    """References retrieved for each class, at least 1."""
    k: int = 10
    """Prototypes they are clustered into, at least 1."""
    gamma: float = 0.5
    """Weight of the best prototype against the mean of all, in [0, 1] (eq. 5)."""
    seed: int = 0
    """Of k-means."""
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    """Sliding window; null scores each image as a whole, for images of the encoder's size."""

    def __post_init__(self) -> None:
        for name in ("n", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], found {self.gamma}")


class FossilSegmenter:
    """FOSSIL's inference with a frozen visual encoder and a reference collection.

        segmenter = FossilSegmenter(collection, visual, text, opencut_proposer(dino))
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    The encoders must be the ones the collection was built with.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: Encoder,
        text: Texts,
        proposer: Proposer,
        config: FossilConfig = FossilConfig(),
    ) -> None:
        self.collection = collection
        self.visual = visual
        self.text = text
        self.proposer = proposer
        self.config = config
        self._prepared: dict[tuple[str, ...], Prototypes] = Recent()

    def prepare(self, class_names: Sequence[str]) -> Prototypes:
        """Prototypes of these classes; made at the first call, remembered for the next.

        Warns, once for each list of classes, about classes that the collection has nothing for.

        Raises:
            ValueError: no class names, an empty one, or no support for any of them.
        """
        names = checked_names(class_names)
        if names not in self._prepared:
            embeddings = class_embeddings(
                self.text, list(names), self.collection.manifest.templates
            )
            prototypes = self.collection.fossil_prototypes(
                embeddings, n=self.config.n, k=self.config.k, seed=self.config.seed
            )
            missing = missing_names(names, prototypes)
            if len(missing) == len(names):
                raise ValueError(f"{self.collection.url} has no references for any of {names}")
            if missing:
                warnings.warn(
                    f"{self.collection.url} has no references for {', '.join(missing)}: "
                    "these classes will not be predicted",
                    stacklevel=2,
                )
            self._prepared[names] = prototypes
        return self._prepared[names]

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
            class_names: what to look for, as text; at least one.

        Returns:
            One Segmentation an image, at the image's size.

        Raises:
            ValueError: like `prepare`; images of another kind; or features of an image are zero or
                not finite.
        """
        check_images(images)
        prototypes = self.prepare(class_names)
        present = prototypes.counts > 0
        # Only classes with support take part, so that no infinite score is ever interpolated.
        supported = Prototypes(
            vectors_nkd=prototypes.vectors_nkd[present],
            counts=prototypes.counts[present],
            nouns=tuple(n for n, p in zip(prototypes.nouns, present, strict=True) if p),
        )
        maps = score_images(
            images,
            self.visual,
            self.proposer,
            lambda features_nd: prototype_scores(features_nd, supported, self.config.gamma),
            self.config.windows,
        )
        missing = missing_names(class_names, prototypes)
        return _segmentations(maps, images, present, missing)


class TextOnlySegmenter:
    """The baseline without a collection: dense CLIP features against the classes' text embeddings.

    With `no_proposals` each patch is classified alone; with a proposer, each region.
    """

    def __init__(
        self,
        visual: Encoder,
        text: Texts,
        proposer: Proposer,
        *,
        templates: tuple[str, ...] = TEMPLATES,
        windows: WindowConfig | None = WindowConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.visual = visual
        self.texts = NamedTexts(text, templates)
        self.proposer = proposer
        self.windows = windows

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; arguments, result and errors as of `FossilSegmenter.segment`."""
        check_images(images)
        texts_cd = self.texts(class_names)
        maps = score_images(
            images,
            self.visual,
            self.proposer,
            lambda features_nd: l2_normalised(features_nd) @ texts_cd.T,
            self.windows,
        )
        present = np.ones(len(texts_cd), dtype=bool)
        return _segmentations(maps, images, present, ())


def prototype_scores(features_nd: np.ndarray, prototypes: Prototypes, gamma: float) -> np.ndarray:
    """FOSSIL eq. 5: (1 - gamma) mean + gamma max of the sigmoid of cosines to a class's prototypes.

    Args:
        features_nd: (n, d) region embeddings or patch features, of any length but zero.
        prototypes: of c classes; a class may have fewer than the others, or none.
        gamma: weight of the maximum, in [0, 1].

    Returns:
        (n, c) float32 in (0, 1); -inf for a class without prototypes.

    Raises:
        ValueError: a feature vector is zero or not finite, or of another width.
    """
    classes, most, dim = prototypes.vectors_nkd.shape
    if features_nd.shape[1:] != (dim,):
        raise ValueError(
            f"expected features (n, {dim}) like the prototypes, found {features_nd.shape}; use the "
            "visual encoder that made the collection"
        )
    counts = prototypes.counts
    if most == 0:
        return np.full((len(features_nd), classes), -np.inf, dtype=np.float32)
    cosines = l2_normalised(features_nd) @ prototypes.vectors_nkd.reshape(-1, dim).T
    similarity = (1 / (1 + np.exp(-cosines))).reshape(-1, classes, most)
    similarity *= np.arange(most) < counts[:, None]
    scores = (1 - gamma) * similarity.sum(2) / np.maximum(counts, 1) + gamma * similarity.max(2)
    scores[:, counts == 0] = -np.inf
    return scores.astype(np.float32)


def pixel_scores(
    features_hwd: np.ndarray,
    masks_nhw: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    size_hw: tuple[int, int],
) -> np.ndarray:
    """Scores of every pixel: its region's where a mask covers it, else its patch's (FOSSIL 3.5).

    Patch scores are interpolated bilinearly to the image, the scores of a region are those of the
    mean of the features under it (eq. 4).

    Args:
        features_hwd: (h, w, d) dense features of the whole image.
        masks_nhw: (n, H, W) bool at the image's size, not overlapping; n may be 0.
        score: maps (m, d) features to (m, classes) finite scores.
        size_hw: (H, W).

    Returns:
        (classes, H, W) float32.

    Raises:
        ValueError: masks of another size; features that are zero or not finite.
    """
    h, w, d = features_hwd.shape
    if masks_nhw.shape[1:] != tuple(size_hw):
        raise ValueError(f"masks must have the image's size {size_hw}, found {masks_nhw.shape}")
    patches_hwc = score(features_hwd.reshape(h * w, d)).reshape(h, w, -1)
    scores_chw = resize_scores(patches_hwc.transpose(2, 0, 1), size_hw).copy()
    filled_nhw = masks_nhw[masks_nhw.any((1, 2))]
    if len(filled_nhw):
        regions_nd, _ = pool_regions(features_hwd, filled_nhw)
        for mask_hw, region_c in zip(filled_nhw, score(regions_nd), strict=True):
            scores_chw[:, mask_hw] = region_c[:, None]
    return scores_chw


def score_images(
    images: Sequence[np.ndarray],
    visual: Encoder,
    proposer: Proposer,
    score: Callable[[np.ndarray], np.ndarray],
    windows: WindowConfig | None,
) -> list[np.ndarray]:
    """`pixel_scores` of images, as wholes, or over sliding windows (`windows.sliding_scores`).

    Returns:
        (classes, h, w) float32 each: at the size of the image, or of the resized image.
    """

    def score_whole(crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            pixel_scores(features_hwd, masks_nhw, score, crop.shape[:2])
            for features_hwd, masks_nhw, crop in zip(
                visual.encode(crops), proposer(crops), crops, strict=True
            )
        ]

    if windows is None:
        return score_whole(images)
    return [sliding_scores(image_hwc, score_whole, windows) for image_hwc in images]


def missing_names(class_names: Sequence[str], prototypes: Prototypes) -> tuple[str, ...]:
    """The classes without a prototype."""
    return tuple(
        name for name, count in zip(class_names, prototypes.counts, strict=True) if count == 0
    )


def _segmentations(
    maps: Sequence[np.ndarray],
    images: Sequence[np.ndarray],
    present: np.ndarray,
    missing: tuple[str, ...],
) -> list[Segmentation]:
    """Of each image's map of those classes that are present, at any size."""
    found = []
    for map_chw, image_hwc in zip(maps, images, strict=True):
        size_hw = image_hwc.shape[:2]
        scores_of = partial(_at_size, map_chw, size_hw, present)
        found.append(labelled(scores_of, len(present), size_hw, missing))
    return found


def _at_size(
    map_chw: np.ndarray, size_hw: tuple[int, int], present: np.ndarray, classes: slice
) -> np.ndarray:
    asked = present[classes]
    rows = np.cumsum(present)[classes][asked] - 1
    if asked.all():
        return resize_scores(map_chw[rows], size_hw)
    scores_chw = np.full((len(asked), *size_hw), -np.inf, dtype=np.float32)
    if len(rows):
        scores_chw[asked] = resize_scores(map_chw[rows], size_hw)
    return scores_chw
