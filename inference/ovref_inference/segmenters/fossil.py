"""Segmenters: images + class names + a collection -> label maps.

`FossilSegmenter` is FOSSIL's inference (sections 3.3 and 3.5): retrieve references by text, cluster
them into prototypes, pool dense features over proposed regions, compare. `TextOnlySegmenter` is
FOSSIL's baseline: dense CLIP features compared with the text embeddings of the classes. Both are
composed of the functions in this module. The other methods have their own modules: `vocseg`,
`retclip`, `corrclip`, `freeda`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch

from ovref_inference.collection.class_support import FLOOR
from ovref_inference.collection.clustering import MAX_SEED
from ovref_inference.collection.euclidean import euclidean_prototypes
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import TEMPLATES, Texts
from ovref_inference.encoders.pooling import mask_weights, pool_regions
from ovref_inference.images import check_images
from ovref_inference.proposers.load import Encoder, Proposer
from ovref_inference.ranges import ADDED_LATER, STRICT, require_at_least, require_within
from ovref_inference.segmenters.cosines import unit_features
from ovref_inference.segmenters.labels import (
    NamedTexts,
    missing_names,
    prepared_once,
    supported_classes,
)
from ovref_inference.segmenters.regions import Segmentation
from ovref_inference.segmenters.windows import CropScores, WindowConfig, labelled, segment_images
from ovref_inference.vectors import l2_normalised


@dataclass(frozen=True, kw_only=True)
class FossilConfig:
    """Parameters of FOSSIL's inference; the defaults are the paper's best on ADE (section 4.3)."""

    __pydantic_config__ = STRICT

    n: int = 150
    """References retrieved per class, at least 1."""
    k: int = 10
    """Prototypes they are clustered into, at least 1."""
    gamma: float = 0.5
    """Weight of the best prototype relative to the mean of all, in [0, 1] (eq. 5)."""
    seed: int = 0
    """Seed of k-means."""
    clustering: Literal["spherical", "euclidean"] = "spherical"
    """`spherical`: by cosines, with k-means++ initialisation. `euclidean`: faiss' default k-means
    from a random start, as in the paper, of vectors that are L2-normalised (`norms`)."""
    norms: bool = field(default=False, metadata=ADDED_LATER)
    """Whether Euclidean k-means sees the embeddings with the norms that they had, as in the paper;
    the collection must have them (`embed.norms`)."""
    uncovered: Literal["interpolated", "nearest"] = "interpolated"
    """Scores of uncovered pixels: interpolated between patches, or those of the nearest patch (the
    paper, section 3.5)."""
    mask_grid: Literal["area", "bilinear"] = "area"
    """How a mask is resized to the patch grid: by the share of each patch that it covers, or by
    bilinear interpolation (the paper, eq. 4), which may lose small masks, whose pixels are then
    uncovered."""
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    """Sliding window; null scores each image as a whole, which suits images of the encoder's
    size."""
    floor: float | None = FLOOR
    """Relative cosine to a noun of the collection below which a class is missing, see
    `collection.class_support`; null accepts whatever is retrieved for every class."""

    def __post_init__(self) -> None:
        require_at_least("n", self.n, 1)
        require_at_least("k", self.k, 1)
        require_within("gamma", self.gamma, 0, 1)
        require_within("seed", self.seed, 0, MAX_SEED)
        if self.norms and self.clustering != "euclidean":
            raise ValueError("norms are for clustering euclidean; the spherical one has none")


class FossilSegmenter:
    """FOSSIL's inference with a frozen visual encoder and a reference collection.

        segmenter = FossilSegmenter(collection, visual, text, opencut_proposer(dino))
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    The encoders must be those that the collection was built with.
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
        self.texts = NamedTexts(text, collection.manifest.templates)
        self.proposer = proposer
        self.config = config

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> Prototypes:
        """Prototypes and support of these classes, cached for the next call.

        Warns, once per list of classes, about classes without support.

        Raises:
            ValueError: no class names, an empty one, or no support for any of them.
        """
        support = supported_classes(self.collection, names, self.texts, self.config.floor)
        texts_cd, config = self.texts(names), self.config
        if config.clustering == "euclidean":
            prototypes = euclidean_prototypes(
                self.collection, texts_cd, n=config.n, k=config.k, seed=config.seed,
                norms=config.norms,
            )  # fmt: skip
        else:
            prototypes = self.collection.fossil_prototypes(
                texts_cd, n=config.n, k=config.k, seed=config.seed
            )
        return prototypes.supported(support)

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; see `Segmenter.segment`, and `prepare` for further errors."""
        check_images(images)
        prototypes = self.prepare(class_names)
        device = getattr(self.visual, "device", None)
        score_crops = partial(
            crop_scores,
            visual=self.visual,
            proposer=self.proposer,
            score=partial(self._score, prototypes=prototypes, device=device),
            mask_grid=self.config.mask_grid,
            nearest=self.config.uncovered == "nearest",
        )
        missing = missing_names(class_names, prototypes.support)
        return segment_images(
            images, score_crops, self.config.windows, prototypes.counts > 0, missing
        )

    def segment_features(
        self, features_hwd: np.ndarray, masks_nhw: np.ndarray, class_names: Sequence[str]
    ) -> Segmentation:
        """The label map of one image from your own features and masks; no encoder is used.

        Args:
            features_hwd: (h, w, d) dense features of the backbone that made the collection, of any
                real dtype; their grid covers the whole image.
            masks_nhw: (n, H, W) bool at the image's size, without overlap; if n is 0 every pixel is
                classified by its patch.
            class_names: as in `segment`.

        Raises:
            ValueError: like `segment`; features of another width; or masks that are not bool.
        """
        if features_hwd.ndim != 3 or masks_nhw.ndim != 3 or masks_nhw.dtype != bool:
            raise ValueError(
                "expected features (h, w, d) and bool masks (n, H, W), found "
                f"{features_hwd.shape} and {masks_nhw.shape} {masks_nhw.dtype}"
            )
        prototypes = self.prepare(class_names)
        score = partial(self._score, prototypes=prototypes)
        features_hwd = np.asarray(features_hwd, dtype=np.float32)
        nearest = self.config.uncovered == "nearest"
        scores = scored_regions(
            features_hwd, masks_nhw, score, None, self.config.mask_grid, nearest
        )
        missing = missing_names(class_names, prototypes.support)
        return labelled(scores.pixels, prototypes.counts > 0, masks_nhw.shape[1:], missing)

    def _score(
        self, features_nd: np.ndarray, prototypes: Prototypes, device: torch.device | None = None
    ) -> np.ndarray:
        """Only classes with support are scored, so that no infinite score is interpolated."""
        scores_nc = prototype_scores(features_nd, prototypes, self.config.gamma, device)
        return scores_nc[:, prototypes.counts > 0]


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
        """Label maps of images; arguments, result and errors as in `FossilSegmenter.segment`."""
        check_images(images)
        texts_cd = self.texts(class_names)

        def score(features_nd: np.ndarray) -> np.ndarray:
            return l2_normalised(features_nd) @ texts_cd.T

        score_crops = partial(crop_scores, visual=self.visual, proposer=self.proposer, score=score)
        return segment_images(images, score_crops, self.windows, np.ones(len(texts_cd), bool))


def prototype_scores(
    features_nd: np.ndarray,
    prototypes: Prototypes,
    gamma: float,
    device: torch.device | None = None,
) -> np.ndarray:
    """FOSSIL eq. 5: (1 - gamma) mean + gamma max of the sigmoid of cosines to a class's prototypes.

    Args:
        features_nd: (n, d) region embeddings or patch features, of any length but zero.
        prototypes: of c classes; a class may have fewer than the others, or none.
        gamma: weight of the maximum, in [0, 1].
        device: where it is computed; None for the CPU.

    Returns:
        (n, c) float32 in (0, 1); -inf for a class without prototypes.

    Raises:
        ValueError: a feature vector is zero or not finite, or of another width.
    """
    counts, (classes, most, dim) = prototypes.counts, prototypes.vectors_nkd.shape
    if not most:
        return np.full((len(features_nd), classes), -np.inf, dtype=np.float32)
    # As `cosines.prototype_cosines`, whose callers may have no torch.
    unit_nd = torch.as_tensor(unit_features(features_nd, dim), device=device)
    vectors_xd = torch.as_tensor(prototypes.vectors_nkd.reshape(-1, dim), device=device)
    cosines_nck = (unit_nd @ vectors_xd.T).unflatten(1, (classes, most))
    absent_ck = torch.as_tensor(np.arange(most) >= counts[:, None], device=device)
    similarity_nck = cosines_nck.masked_fill_(absent_ck, -torch.inf).sigmoid_()
    means_nc = similarity_nck.sum(2) / torch.as_tensor(counts, device=device).clamp(min=1)
    scores_nc = torch.lerp(means_nc, similarity_nck.amax(2), gamma).cpu().numpy()
    scores_nc[:, counts == 0] = -np.inf
    return scores_nc


def crop_scores(
    crops: Sequence[np.ndarray],
    *,
    visual: Encoder,
    proposer: Proposer,
    score: Callable[[np.ndarray], np.ndarray],
    mask_grid: Literal["area", "bilinear"] = "area",
    nearest: bool = False,
) -> list[CropScores]:
    """Scores of images or crops: a pixel gets the score of its region if a mask covers it,
    otherwise of its patch (FOSSIL 3.5). A region is scored by the mean of the features under it
    (eq. 4).

    Args:
        crops: (H, W, 3) uint8 RGB each.
        visual: dense features; scores are upsampled on its `device`, if it has one.
        proposer: masks at the size of each crop that do not overlap.
        score: maps (m, d) features to (m, classes) finite scores.
        mask_grid: as in `FossilConfig`.
        nearest: as in `CropScores`.

    Raises:
        ValueError: masks of another size; features that are zero or not finite.
    """
    device = getattr(visual, "device", None)
    found = []
    for features_hwd, masks_nhw, crop in zip(
        visual.encode(crops), proposer(crops), crops, strict=True
    ):
        if masks_nhw.shape[1:] != crop.shape[:2]:
            raise ValueError(
                f"masks must have the image's size {crop.shape[:2]}, found {masks_nhw.shape}"
            )
        found.append(scored_regions(features_hwd, masks_nhw, score, device, mask_grid, nearest))
    return found


def scored_regions(
    features_hwd: np.ndarray,
    masks_nhw: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    device: torch.device | None,
    mask_grid: Literal["area", "bilinear"] = "area",
    nearest: bool = False,
) -> CropScores:
    """`crop_scores` for one image with given features (h, w, d) and masks (n, H, W)."""
    h, w, d = features_hwd.shape
    patches_pc = score(features_hwd.reshape(h * w, d))
    filled_nhw = masks_nhw[masks_nhw.any((1, 2))]
    if mask_grid == "bilinear":
        filled_nhw = filled_nhw[mask_weights(filled_nhw, (h, w), mask_grid).any((1, 2))]
    region_hw = np.full(masks_nhw.shape[1:], -1, dtype=np.int64)
    for number, mask_hw in enumerate(filled_nhw):
        region_hw[mask_hw] = number
    regions_nc = patches_pc[:0]
    if len(filled_nhw):
        regions_nc = score(pool_regions(features_hwd, filled_nhw, mask_grid)[0])
    patches_chw = patches_pc.T.reshape(-1, h, w)
    return CropScores(
        region_hw=torch.as_tensor(region_hw, device=device),
        regions_cn=torch.as_tensor(regions_nc.T, dtype=torch.float32, device=device),
        patches_chw=torch.as_tensor(patches_chw, dtype=torch.float32, device=device),
        nearest=nearest,
    )
