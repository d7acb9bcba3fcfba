"""VOCSeg at inference: proposals classified by text and by prototypes (section 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.collection.class_support import FLOOR
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import Texts
from ovref_inference.encoders.pooling import RegionEncoder
from ovref_inference.images import check_images
from ovref_inference.proposers.proposals import Proposals, as_proposals
from ovref_inference.ranges import STRICT, require_above, require_at_least, require_within
from ovref_inference.segmenters.cosines import best_cosines, prototype_cosines
from ovref_inference.segmenters.labels import (
    NamedTexts,
    check_joint_space,
    missing_names,
    prepared_once,
    supported_classes,
    trained_scores,
)
from ovref_inference.segmenters.regions import (
    ScoredRegions,
    Segmentation,
    region_features,
    semantic,
    softmax,
)
from ovref_inference.vectors import l2_normalised


@dataclass(frozen=True, kw_only=True)
class VocSegConfig:
    """Parameters of VOCSeg's inference; the defaults are the paper's for ADE-150 (section 4.4)."""

    __pydantic_config__ = STRICT

    alpha: float = 0.35
    """Weight of the prototypes relative to the class's text, in [0, 1] (eq. 3)."""
    beta: float = 0.7
    """Weight of CLIP relative to the proposer's own classes, in [0, 1] (eq. 4); unused with a
    proposer without classes."""
    tau: float = 0.01
    """Temperature of the softmax over classes, above 0; CLIP's own, because the paper gives
    none."""
    k: int = 10
    """Prototypes per class, at least 1."""
    mask_threshold: float = 0.4
    """A pixel belongs to a region's crop if its probability is above this."""
    label_threshold: float = 0.95
    """A trained class matches a requested one if the cosine of their texts is above this."""
    rest: bool = True
    """Whether the uncovered part is one more region, so that regions cover the image (eq. 1)."""
    rest_of_soft: bool = False
    """The same for a trained proposer's soft masks. A pixel that no mask covers at `mask_threshold`
    is then no longer decided by many small activations (eq. 5)."""

    floor: float | None = FLOOR
    """As `FossilConfig.floor`."""

    def __post_init__(self) -> None:
        require_within("alpha", self.alpha, 0, 1)
        require_within("beta", self.beta, 0, 1)
        require_above("tau", self.tau, 0)
        require_at_least("k", self.k, 1)
        require_within("mask_threshold", self.mask_threshold, 0, 1, "[)")


class VocSegSegmenter:
    """VOCSeg's inference with frozen CLIP and a collection built from the same CLIP's regions.

        visual = load_region_encoder(collection.visual_config)
        segmenter = VocSegSegmenter(collection, visual, text, proposer)
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    Eq. 2 compares a region with a class's prototypes, eq. 3 adds its text, eq. 4 the proposer's own
    classes where it has any, eq. 5 sums over the regions of each pixel. A class that is rare or
    absent in the collection gets the prototypes of its neighbours in text space (section 3.1).
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: RegionEncoder,
        text: Texts,
        proposer: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray | Proposals]],
        config: VocSegConfig = VocSegConfig(),
    ) -> None:
        """`proposer`: any of `proposers`, or one that returns `Proposals` with soft masks and, if
        it was trained on classes, their probabilities."""
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
            ValueError: no class names, an empty one, no support for any of them, or a collection
                whose visual embeddings are not in the space of its texts.
        """
        texts_cd = self.texts(names)
        check_joint_space(self.collection.url, self.collection.manifest.visual.dim, texts_cd)
        support = supported_classes(self.collection, names, self.texts, self.config.floor)
        prototypes = self.collection.prototypes(
            list(names), self.config.k, text_embeddings=texts_cd, floor=None
        )
        return prototypes.supported(support)

    def score(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[ScoredRegions]:
        """The proposals of each image with p_ij of every class (eq. 4).

        Args, errors: as in `segment`.
        """
        check_images(images)
        prototypes, texts_cd = self.prepare(class_names), self.texts(class_names)
        proposals = [as_proposals(found, rest=self.config.rest) for found in self.proposer(images)]
        if self.config.rest_of_soft:
            proposals = [found.with_rest(self.config.mask_threshold) for found in proposals]
        scored = []
        for found, features_nd in region_features(
            self.visual, images, proposals, self.config.mask_threshold
        ):
            similarity = ensemble_similarity(features_nd, prototypes, texts_cd, self.config.alpha)
            scores_nc = softmax(similarity, self.config.tau)
            if found.knows_classes:
                trained = trained_scores(
                    found, class_names, self.texts, self.config.label_threshold
                )
                own_nc = trained.scores_nc * (1 - trained.void_n[:, None])
                scores_nc = geometric_mean(scores_nc, own_nc, self.config.beta)
            scores_nc[:, prototypes.counts == 0] = 0.0
            scored.append(
                ScoredRegions(
                    mask_probs_nhw=found.mask_probs_nhw,
                    scores_nc=scores_nc,
                    missing=missing_names(class_names, prototypes.support),
                )
            )
        return scored

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images (eq. 5); see `Segmenter.segment`, and `prepare` for errors."""
        return [semantic(regions) for regions in self.score(images, class_names)]


def prototype_similarity(features_nd: np.ndarray, prototypes: Prototypes) -> np.ndarray:
    """VOCSeg eq. 2: mean of the best and the average cosine to each class's prototypes.

    Args, errors: as `prototype_cosines`.

    Returns:
        (n, c) float32 in [-1, 1]; -inf for a class without prototypes.
    """
    cosines_nck = prototype_cosines(features_nd, prototypes)
    best = best_cosines(cosines_nck)
    total = np.where(np.isfinite(cosines_nck), cosines_nck, 0).sum(2)
    return (best / 2 + total / np.maximum(prototypes.counts, 1) / 2).astype(np.float32)


def ensemble_similarity(
    features_nd: np.ndarray, prototypes: Prototypes, texts_cd: np.ndarray, alpha: float
) -> np.ndarray:
    """VOCSeg eq. 3: alpha eq. 2 + (1 - alpha) cosine to the class's text; (n, c) float32, -inf for
    a class without prototypes."""
    present = prototypes.counts > 0
    visual_nc = np.where(present, prototype_similarity(features_nd, prototypes), 0.0)
    both_nc = alpha * visual_nc + (1 - alpha) * (l2_normalised(features_nd) @ texts_cd.T)
    return np.where(present, both_nc, -np.inf).astype(np.float32)


def geometric_mean(clip_nc: np.ndarray, trained_scores_nc: np.ndarray, beta: float) -> np.ndarray:
    """VOCSeg eq. 4: clip ** beta * trained ** (1 - beta), of non-negative (n, c) arrays."""
    return (clip_nc**beta * trained_scores_nc ** (1 - beta)).astype(np.float32)
