"""RetCLIP at inference: regions retrieve similar regions from the collection (section 2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ovref_inference.collection.class_support import FLOOR
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import Texts
from ovref_inference.encoders.pooling import RegionEncoder
from ovref_inference.images import check_images
from ovref_inference.models import canonical
from ovref_inference.proposers.proposals import Proposals, as_proposals
from ovref_inference.ranges import (
    ADDED_LATER,
    STRICT,
    require_above,
    require_at_least,
    require_one_of,
    require_within,
)
from ovref_inference.segmenters.labels import (
    NamedTexts,
    check_joint_space,
    check_same_encoders,
    match_labels,
    missing_names,
    prepared_once,
    support_by_text,
    trained_scores,
    warn_without,
)
from ovref_inference.segmenters.regions import (
    Panoptic,
    ScoredRegions,
    Segmentation,
    panoptic,
    region_features,
    semantic,
    softmax,
)
from ovref_inference.vectors import prefetch_rows


@dataclass(frozen=True, kw_only=True)
class RetClipConfig:
    """Parameters of RetCLIP's inference; alpha, beta, gamma are the paper's best (table 4)."""

    __pydantic_config__ = STRICT

    alpha: float = 0.4
    """Weight of CLIP and retrieval relative to the proposer's own classes, in [0, 1], for a class
    that it was trained on; unused with a proposer without classes."""
    beta: float = 0.7
    """The same for a class that the proposer was not trained on."""
    gamma: float = 0.3
    """Weight of retrieval relative to CLIP's text classification, in [0, 1]."""
    k: int = 20
    """References retrieved per region, at least 1. The paper gives no number."""
    fusion: Literal["arithmetic", "geometric"] = field(default="arithmetic", metadata=ADDED_LATER)
    """How the in-vocabulary scores join the others: `arithmetic` is RetCLIP's weighted mean;
    `geometric` FC-CLIP's, whose best beta is 0.8, and with gamma 0 its whole method."""
    votes: Literal["best", "share"] = "best"
    """How the references of a class give its retrieval score, which the paper leaves open. `best`:
    the score of its best reference. `share`: the sum over its references as a fraction of the sum
    over all retrieved ones; more robust to wrong nouns and coarse features, but a class needs about
    `k` references."""
    tau: float = 0.01
    """Temperature of the softmax over CLIP's cosines, above 0: CLIP's own, as in FC-CLIP, on which
    RetCLIP is built. Tune it together with gamma: the more peaked the text scores, the less
    influence retrieval has."""
    label_threshold: float = 0.95
    """A noun represents a class if the cosine of their texts is above this."""
    bare_labels: bool = False
    """Whether these texts are the bare names (the paper: "CLIP text embedding of class names") or
    use the collection's templates, whose shared words raise all cosines."""
    prune: bool = False
    """Whether classes that the proposer did not find in an image are excluded for it (section 2.2),
    if the proposer reports what it found; otherwise every region is scored for every class."""
    mask_threshold: float = 0.5
    """A pixel belongs to a region's mask if its probability is above this."""
    min_score: float = 0.0
    """Panoptic: regions whose best score is not above this are dropped."""
    overlap: float = 0.8
    """Panoptic: minimum fraction of its pixels that a region must keep."""

    floor: float | None = FLOOR
    """As `FossilConfig.floor`; null classifies every class without references by text, as RetCLIP
    does."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "min_score", "overlap"):
            require_within(name, getattr(self, name), 0, 1)
        require_at_least("k", self.k, 1)
        require_one_of("fusion", self.fusion, "arithmetic", "geometric")
        require_one_of("votes", self.votes, "best", "share")
        require_above("tau", self.tau, 0)
        require_within("mask_threshold", self.mask_threshold, 0, 1, "[)")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A collection's references in terms of the requested classes. Made by `RetClipSegmenter`."""

    class_of_noun: np.ndarray
    """(nouns,) int64: the class of each noun of the collection, -1 for none."""
    extra_md: np.ndarray
    """(m, d) float32, L2-normalised: references of the fallback for classes missing in the
    collection."""
    extra_classes: np.ndarray
    """(m,) int64: their classes."""
    missing: tuple[str, ...]
    """Classes without support in either collection."""
    by_text: tuple[str, ...] = ()
    """Classes without references that are classified by text alone."""


class RetClipSegmenter:
    """RetCLIP's inference with frozen CLIP and a collection built from the same CLIP's regions.

        visual = load_region_encoder(collection.visual_config)
        segmenter = RetClipSegmenter(collection, visual, text, proposer)
        labels_hw = segmenter.segment([image_hwc], ["car", "road"])[0].labels_hw
        segments = segmenter.segment_panoptic([image_hwc], ["car", "road"], [True, False])[0]

    Training-free with any proposer of masks: s = gamma s_ret + (1 - gamma) s_clip. With a proposer
    trained on classes (it gives `Proposals` with their probabilities, s_iv), the whole ensemble:
    best with one that was trained on texts (`proposers.fcclip`), whose s_iv is of every class and
    whose probability of void takes its share from the scores of all.

    One default differs from the paper: a class without support in the collection is missing and
    gets no pixel, as with every segmenter here. RetCLIP classifies such classes by text alone,
    which `floor=None` does too.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: RegionEncoder,
        text: Texts,
        proposer: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray | Proposals]],
        config: RetClipConfig = RetClipConfig(),
        *,
        fallback: ReferenceCollection | None = None,
    ) -> None:
        """
        Args:
            collection: queried by region; built with `visual` and `text`.
            proposer: any of `proposers`, or one that gives `Proposals`.
            fallback: supplies references for classes that `collection` lacks; built with the same
                encoders.

        Raises:
            ValueError: the two collections were built with different encoders or templates.
        """
        if fallback is not None:
            check_same_encoders(collection, fallback)
        self.collection = collection
        self.fallback = fallback
        self.visual = visual
        self.texts = NamedTexts(text, collection.manifest.templates)
        self._bare = NamedTexts(text, ("{}",))
        self.proposer = proposer
        self.config = config
        # Features that a proposer brings are comparable where they are pooled from the same maps.
        own = collection.manifest.visual
        dense = own.settings.get("features", "tokens") == "tokens"
        self._own_model = canonical(own.model) if dense else ""

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> Labelled:
        """Matches references to classes; cached for the next call.

        Warns, once per list of classes, about classes without references. They are classified by
        text alone if a noun is near enough (`class_support`), otherwise they are missing.

        Raises:
            ValueError: no class names, an empty one, no support for any of them, or a collection
                whose visual embeddings are not in the space of its texts.
        """
        texts_cd = self.texts(names)
        check_joint_space(self.collection.url, self.collection.manifest.visual.dim, texts_cd)
        own = self._classes_of(self.collection, names, texts_cd)
        missing = np.setdiff1d(np.arange(len(names)), own)
        ids, classes = [own[:0]], [own[:0]]
        if self.fallback is not None and len(missing):
            others = self._classes_of(self.fallback, names, texts_cd)
            for noun, label in zip(self.fallback.nouns, others, strict=True):
                if label in missing:
                    ids.append(self.fallback.references_of(noun))
                    classes.append(np.full(len(ids[-1]), label))
        matrix = (self.collection if self.fallback is None else self.fallback).visual
        rows = np.concatenate(ids)
        prefetch_rows(matrix, rows)
        extra_classes = np.concatenate(classes)
        without = [names[i] for i in np.setdiff1d(missing, extra_classes)]
        lacking = self._unsupported(without)
        if len(lacking) == len(names):
            raise ValueError(f"{self.collection.url} has no references for any of {names}")
        by_text = tuple(name for name in without if name not in lacking)
        warn_without(self.collection.url, lacking, "not be predicted")
        warn_without(self.collection.url, by_text, "be classified by text alone")
        return Labelled(
            class_of_noun=own,
            extra_md=np.asarray(matrix[rows], dtype=np.float32),
            extra_classes=extra_classes,
            missing=lacking,
            by_text=by_text,
        )

    def score(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[ScoredRegions]:
        """The proposals of each image with the ensemble's score of every class.

        Args, errors: as in `segment`.
        """
        check_images(images)
        labelled, texts_cd = self.prepare(class_names), self.texts(class_names)
        config = self.config
        present = np.array([name not in labelled.missing for name in class_names])
        proposals = [as_proposals(found, rest=False) for found in self.proposer(images)]
        scored = []
        for found, features_nd in region_features(
            self.visual, images, proposals, config.mask_threshold, self._own_model
        ):
            open_nc = mixed(
                softmax(np.where(present, features_nd @ texts_cd.T, -np.inf), config.tau),
                self.retrieved(features_nd, labelled, len(class_names)),
                config.gamma,
            )
            scores_nc, void_n = open_nc, None
            if found.knows_classes:
                trained = trained_scores(found, class_names, self.texts, config.label_threshold)
                fuse = ensemble if config.fusion == "arithmetic" else geometric_ensemble
                scores_nc = fuse(
                    open_nc, trained.scores_nc, trained.seen, config.alpha, config.beta
                )
                scores_nc *= 1 - trained.void_n[:, None]
                void_n = trained.void_n if found.open_classes is not None else None
            scores_nc[:, ~present] = 0.0
            if config.prune and found.found_names is not None:
                scores_nc[:, [name not in found.found_names for name in class_names]] = 0.0
            scored.append(ScoredRegions(
                mask_probs_nhw=found.mask_probs_nhw, scores_nc=scores_nc,
                missing=labelled.missing, void_n=void_n,
            ))  # fmt: skip
        return scored

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images, by `regions.semantic`; see `Segmenter.segment`, and `prepare` for
        further errors. Pixels without a proposal have the label NO_CLASS."""
        return [semantic(regions) for regions in self.score(images, class_names)]

    def segment_panoptic(
        self, images: Sequence[np.ndarray], class_names: Sequence[str], things: Sequence[bool]
    ) -> list[Panoptic]:
        """Panoptic maps of images, by `regions.panoptic`.

        Args, errors: as in `segment`; `things` says whether each class is a thing.
        """
        return [
            panoptic(regions, things, min_score=self.config.min_score, overlap=self.config.overlap)
            for regions in self.score(images, class_names)
        ]

    def retrieved(self, features_nd: np.ndarray, labelled: Labelled, classes: int) -> np.ndarray:
        """(n, classes) retrieval scores of regions: `retrieval_scores` of the k nearest references
        of the collection and, for missing classes, of the fallback."""
        if not len(features_nd):
            return np.zeros((0, classes), dtype=np.float32)
        support = self.collection.search_regions(features_nd, self.config.k)
        # Row -1 reads the last noun, which the score of -inf makes irrelevant.
        labels = np.where(support.ids >= 0, labelled.class_of_noun[support.noun_rows], -1)
        extra = np.broadcast_to(labelled.extra_classes, (len(labels), len(labelled.extra_classes)))
        labels = np.concatenate([labels, extra], axis=1)
        cosines = np.concatenate([support.scores, features_nd @ labelled.extra_md.T], axis=1)
        # Stable, so that in a tie the collection's own reference comes first.
        order = np.argsort(-cosines, axis=1, kind="stable")[:, : self.config.k]
        return retrieval_scores(
            1 - np.take_along_axis(cosines, order, 1),
            np.take_along_axis(labels, order, 1),
            classes,
            self.config.votes,
        )

    def _unsupported(self, names: list[str]) -> tuple[str, ...]:
        """The classes without support in either collection."""
        asked = [self.collection] if self.fallback is None else [self.collection, self.fallback]
        for collection in asked:
            if names:
                support = support_by_text(collection, names, self.texts, self.config.floor)
                names = list(missing_names(names, support))
        return tuple(names)

    def _classes_of(
        self, collection: ReferenceCollection, names: tuple[str, ...], texts_cd: np.ndarray
    ) -> np.ndarray:
        nouns_vd = collection.noun_embeddings
        if self.config.bare_labels:
            nouns_vd, texts_cd = self._bare(collection.nouns), self._bare(names)
        found = match_labels(
            collection.nouns, nouns_vd, names, texts_cd, self.config.label_threshold
        )
        # A noun whose references are all deleted represents no class.
        return np.where(collection.noun_counts > 0, found, -1)


def retrieval_scores(
    distances_nk: np.ndarray,
    classes_nk: np.ndarray,
    classes: int,
    votes: Literal["best", "share"] = "best",
) -> np.ndarray:
    """RetCLIP 2.2: one minus the min-max normalised distance, of the references of each class.

    The distances of one region are normalised to [0, 1], so the nearest reference scores 1 and the
    farthest 0. If all are equally far (within 1e-6, below the resolution of float16 embeddings), or
    there is only one, each scores 1.

    Args:
        distances_nk: (n, k) to the retrieved references; inf where fewer were found.
        classes_nk: (n, k) integers; -1 for a reference of none of the classes.
        classes: number of classes.
        votes: as in `RetClipConfig`.

    Returns:
        (n, classes) float32 in [0, 1]; 0 for a class without retrieved references.

    Raises:
        ValueError: a distance is NaN or minus infinity.
    """
    found = np.isfinite(distances_nk)
    if not (found | (distances_nk == np.inf)).all():
        raise ValueError("distances_nk must be finite, or inf for what was not found")
    low = np.where(found, distances_nk, np.inf).min(1, initial=np.inf, keepdims=True)
    high = np.where(found, distances_nk, -np.inf).max(1, initial=-np.inf, keepdims=True)
    wide = np.isfinite(high - low) & (high - low > 1e-6)
    low, spread = np.where(wide, low, 0.0), np.where(wide, high - low, 1.0)
    scores_nk = np.where(wide, 1 - (np.where(found, distances_nk, 0.0) - low) / spread, 1.0)
    scores_nc = np.zeros((len(scores_nk), classes), dtype=np.float32)
    rows, columns = np.nonzero(found & (classes_nk >= 0))
    where, scores = (rows, classes_nk[rows, columns]), scores_nk[rows, columns]
    if votes == "best":
        np.maximum.at(scores_nc, where, scores)
        return scores_nc
    np.add.at(scores_nc, where, scores)
    total = np.where(found, scores_nk, 0.0).sum(1, keepdims=True)
    return (scores_nc / np.where(total > 0, total, 1.0)).astype(np.float32)


def mixed(clip_nc: np.ndarray, retrieved_nc: np.ndarray, gamma: float) -> np.ndarray:
    """RetCLIP's out-of-vocabulary score: gamma s_ret + (1 - gamma) s_clip, (n, c) float32."""
    return (gamma * retrieved_nc + (1 - gamma) * clip_nc).astype(np.float32)


def ensemble(
    open_nc: np.ndarray, trained_scores_nc: np.ndarray, seen: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
    """RetCLIP's last equations: w s_oov + (1 - w) s_iv, w = alpha for seen classes, else beta.

    The scores are of `mixed` and of the in-vocabulary classifier, `seen` (c,) bool says which
    classes it was trained on; (n, c) float32.
    """
    weight = np.where(seen, alpha, beta)
    return (weight * open_nc + (1 - weight) * trained_scores_nc).astype(np.float32)


def geometric_ensemble(
    open_nc: np.ndarray, trained_scores_nc: np.ndarray, seen: np.ndarray, alpha: float, beta: float
) -> np.ndarray:
    """FC-CLIP's fusion, otherwise as `ensemble`: s_oov ** w * s_iv ** (1 - w), brought to a sum of
    1 over the classes; a row whose products are all zero stays zero."""
    weight = np.where(seen, alpha, beta)
    products_nc = open_nc.astype(np.float64) ** weight
    products_nc *= trained_scores_nc.astype(np.float64) ** (1 - weight)
    totals_n1 = products_nc.sum(1, keepdims=True)
    return (products_nc / np.where(totals_n1 > 0, totals_n1, 1.0)).astype(np.float32)
