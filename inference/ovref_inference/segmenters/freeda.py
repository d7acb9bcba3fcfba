"""FreeDA at inference (CVPR 2024): superpixels against the mean of the references of each class.

The settings are those of its released code (aimagelab/freeda).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ovref_inference.collection.class_support import FLOOR
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import ImageTexts
from ovref_inference.encoders.pooling import DenseEncoder
from ovref_inference.images import check_images
from ovref_inference.ranges import STRICT, require_at_least, require_within
from ovref_inference.segmenters.cosines import best_cosines, prototype_cosines, sigmoid
from ovref_inference.segmenters.labels import (
    NamedTexts,
    check_same_encoders,
    missing_names,
    prepared_once,
    supported_classes,
)
from ovref_inference.segmenters.regions import Segmentation, with_background
from ovref_inference.segmenters.superpixels import SuperpixelConfig, pool_labels, superpixels
from ovref_inference.segmenters.windows import (
    CropScores,
    ImageScores,
    WindowConfig,
    labelled,
    score_images,
)

BACKGROUND_PARTS = ("background", "surroundings")
"""`Embed.part` in the manifest of a background collection: the value now and its former name."""


@dataclass(frozen=True, kw_only=True)
class FreedaConfig:
    """Parameters of FreeDA's inference; the defaults are its own for ADE."""

    __pydantic_config__ = STRICT

    n: int = 350
    """References retrieved per class, at least 1; their mean is its prototype."""
    local: float = 0.8
    """Weight of the superpixel relative to the CLIP embedding of the whole window, in [0, 1]."""
    superpixels: SuperpixelConfig = field(default_factory=SuperpixelConfig)
    """How windows are cut into superpixels."""
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    """Sliding window; null takes each image as a whole, which suits images of the encoder's
    size."""
    background_prototypes: int = 10
    """Background prototypes of a class, at least 1: clusters of the backgrounds of its n
    references. Used only with a background collection."""
    background: float | None = None
    """Pixels whose best score is below this get no class (0.4 in FreeDA); null for data without
    background."""
    floor: float | None = FLOOR
    """As `FossilConfig.floor`."""

    def __post_init__(self) -> None:
        require_at_least("n", self.n, 1)
        require_at_least("background_prototypes", self.background_prototypes, 1)
        require_within("local", self.local, 0, 1)


class FreedaSegmenter:
    """FreeDA's inference with a frozen backbone, CLIP and a reference collection.

        segmenter = FreedaSegmenter(collection, visual, text)
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    Score of a class at a superpixel: local sigmoid(cos(mean feature, prototype)) + (1 - local)
    cos(CLIP embedding of the window, text).

    With a background collection, built from the background of every region (`Embed.part`), a class
    is possible at a superpixel only if its prototype is at least as near as its background
    prototypes. A pixel without a possible class gets none. OVDiff (Karazija et al., ECCV 2024) has
    background prototypes too, but those of all classes compete with every class, so the grass
    around cows suppresses the class grass.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: DenseEncoder,
        text: ImageTexts,
        config: FreedaConfig = FreedaConfig(),
        *,
        background_collection: ReferenceCollection | None = None,
    ) -> None:
        """The encoders must be those that both collections were built with.

        Raises:
            ValueError: `background_collection` was built with other encoders, or holds regions
                instead of backgrounds.
        """
        if background_collection is not None:
            check_same_encoders(collection, background_collection)
            embed = background_collection.manifest.build.get("embed")
            if embed is not None and embed["fields"].get("part") not in BACKGROUND_PARTS:
                raise ValueError(
                    f"{background_collection.url} holds regions, not their backgrounds; build it "
                    "with embed.part=background"
                )
        self.collection = collection
        self.background_collection = background_collection
        self.visual = visual
        self.text = text
        self.texts = NamedTexts(text, collection.manifest.templates)
        self.config = config

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> tuple[Prototypes, Prototypes | None]:
        """One prototype for each class, and its background prototypes, cached for the next call.

        Warns, once per list of classes, about classes without support.

        Raises:
            ValueError: no class names, an empty one, or no support for any of them.
        """
        support = supported_classes(self.collection, names, self.texts, self.config.floor)
        texts_cd, n = self.texts(names), self.config.n
        background = None
        if self.background_collection is not None:
            background = self.background_collection.fossil_prototypes(
                texts_cd, n=n, k=self.config.background_prototypes
            )
            if not background.counts.all():
                raise ValueError(f"{self.background_collection.url} has no references")
        # The centroid of one cluster is the mean.
        means = self.collection.fossil_prototypes(texts_cd, n=n, k=1)
        return means.supported(support), background

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; see `Segmenter.segment`, and `prepare` for further errors.

        Background has the label NO_CLASS; scores are -inf where a class is not possible.
        """
        check_images(images)
        prototypes, background = self.prepare(class_names)
        present = prototypes.counts > 0
        score = partial(
            self._score,
            prototypes=prototypes,
            background=background,
            texts_cd=self.texts(class_names),
            present=present,
        )
        found = score_images(images, score, self.config.windows)
        missing = missing_names(class_names, prototypes.support)
        threshold = -np.inf if self.config.background is None else self.config.background
        segmentations = []
        for one, image_hwc in zip(found, images, strict=True):
            size_hw = image_hwc.shape[:2]
            pixels = partial(_pixels, one, size_hw, int(present.sum()), background is not None)
            labels = labelled(pixels, present, size_hw, missing)
            segmentations.append(with_background(labels, threshold))
        return segmentations

    def _score(
        self,
        crops: Sequence[np.ndarray],
        *,
        prototypes: Prototypes,
        background: Prototypes | None,
        texts_cd: np.ndarray,
        present: np.ndarray,
    ) -> list[CropScores]:
        """Scores of the present classes; with background prototypes, followed by as many
        margins."""
        device = getattr(self.visual, "device", None)
        whole_nc = self.text.encode_images(crops) @ texts_cd[present].T
        found = []
        for crop, features_hwd, whole_c in zip(
            crops, self.visual.encode(crops), whole_nc, strict=True
        ):
            labels_hw = superpixels(crop, self.config.superpixels)
            pooled = pool_labels(features_hwd, labels_hw)
            near = sigmoid(best_cosines(prototype_cosines(pooled, prototypes)))[:, present]
            planes = [self.config.local * near + (1 - self.config.local) * whole_c]
            if background is not None:
                far = sigmoid(best_cosines(prototype_cosines(pooled, background)))[:, present]
                planes.append(near - far)
            scores_cn = np.concatenate(planes, axis=1).T
            found.append(
                CropScores(
                    region_hw=torch.as_tensor(labels_hw, device=device),
                    regions_cn=torch.as_tensor(scores_cn, dtype=torch.float32, device=device),
                )
            )
        return found


def _pixels(
    scores: ImageScores, size_hw: tuple[int, int], count: int, margins: bool, classes: slice
) -> torch.Tensor:
    """Scores at pixels of some of the `count` classes; -inf where the margin (stored after the
    scores of all classes) is negative."""
    start, stop, _ = classes.indices(count)
    scores_chw = scores.pixels(size_hw, slice(start, stop))
    if not margins:
        return scores_chw
    margins_chw = scores.pixels(size_hw, slice(count + start, count + stop))
    return torch.where(margins_chw >= 0, scores_chw, -torch.inf)
