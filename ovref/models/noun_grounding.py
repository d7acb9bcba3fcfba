"""Locates the nouns of a caption in its image, by one of two routes.

The *detector* route (RetCLIP section 2.1) finds boxes of the nouns with GroundingDINO and turns
them into masks with SAM. The *proposal* route (VOCSeg section 3.1) takes class-agnostic masks and
gives each noun the mask with the highest CLIP similarity: since the caption names the noun, one of
the masks should show it.

Importing this module loads no torch; loading a route's models does.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovref.config import STRICT
from ovref.models.blank import BLANK_HWC
from ovref.models.noun_embeddings import noun_embedding, require_templates
from ovref_inference.collection.retrieve import TEMPLATES
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.errors import ModelError
from ovref_inference.proposers.config import GroundingDinoConfig, ProposerConfig, SamConfig
from ovref_inference.ranges import require_within
from ovref_inference.vectors import l2_normalised

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DetectorRoute:
    """Boxes from GroundingDINO, masks from SAM."""

    __pydantic_config__ = STRICT

    detector: GroundingDinoConfig
    """Finds boxes of the nouns; a noun may have several."""
    sam: SamConfig
    """Turns boxes into masks."""


@dataclass(frozen=True, kw_only=True)
class ProposalRoute:
    """Class-agnostic masks, matched to the nouns by CLIP."""

    __pydantic_config__ = STRICT

    proposer: ProposerConfig
    """Makes the masks; a noun gets one of them, which may overlap others."""
    visual: VisualEncoderConfig
    """CLIP embeddings of the masks: `crop_binary` in VOCSeg, or dense features to be pooled."""
    text: TextEncoderConfig
    """The same CLIP's text encoder."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompt templates, each with one `{}` for the noun; their embeddings are averaged."""
    min_similarity: float = -1.0
    """Lowest cosine of a noun's text and its mask; -1 gives every noun a mask, as in VOCSeg."""

    def __post_init__(self) -> None:
        require_templates(self.templates)
        require_within("min_similarity", self.min_similarity, -1, 1)
        if self.visual.library != "open_clip" and self.visual.features != "values":
            raise ValueError(
                "visual must be in the space of texts, as masks are compared with them: of library "
                f"open_clip, or features 'values'; found {self.visual.library!r} and "
                f"{self.visual.features!r}"
            )
        if self.proposer.grounded_sam is not None:
            raise ValueError("grounded_sam looks for class names; use ground.detector in a build")
        if self.visual.masking == "heatmap" and self.proposer.mask_former is None:
            raise ValueError("only mask_former has heatmaps; visual.features must not need them")


@dataclass(frozen=True, kw_only=True)
class GroundedNoun:
    """A mask of a noun."""

    noun: int
    """Index of the noun in the query."""
    mask_hw: np.ndarray
    """(H, W) bool at the image's size; may be empty."""
    score: float
    """Confidence of the route."""
    facts: dict[str, Any]
    """Plain JSON values for the record's provenance."""
    heatmap_hw: np.ndarray | None = None
    """(H, W) float32 in [0, 1]: the soft mask before binarisation, if the route has one."""


@dataclass(frozen=True)
class Finder:
    """A route with its models loaded."""

    find: Callable[[Sequence[np.ndarray], Sequence[Sequence[str]]], Iterable[list[GroundedNoun]]]
    """Images, and the distinct nouns of each -> the masks found in each image."""
    source: str
    """Source of its regions: `grounded_sam`, `mask_former_clip`, ..."""
    missing: str
    """Reason for `Dropped` of a noun without a mask."""
    provenance: dict[str, Any]
    """Provenance of its records: models and thresholds."""
    check: Callable[[], Any] = lambda: None
    """Runs each model on blank input, including those that a blank image would not reach."""


def detector_finder(route: DetectorRoute, batch_size: int) -> Finder:
    """Loads the detector and SAM. Raises ModelError."""
    from ovref_inference.proposers.grounded_sam import load_grounded_sam

    models = load_grounded_sam(route.detector, route.sam, batch_size=batch_size)

    def check() -> None:
        # A blank image has no boxes, so SAM would not run.
        box_xyxy = np.array([[8, 8, 40, 40]], np.float32)
        list(models.sam.of_boxes([BLANK_HWC], [box_xyxy], multimask=route.sam.multimask))

    logger.info("grounding with %s and %s", route.detector.model, route.sam.model)
    return Finder(
        lambda images, nouns: map(_boxes_found, models.find(images, nouns)),
        source="grounded_sam",
        missing="no_box",
        provenance={
            "detector": route.detector.model,
            "revision": route.detector.revision,
            "box_threshold": route.detector.box_threshold,
            "text_threshold": route.detector.text_threshold,
            "nms_iou": route.detector.nms_iou,
            "sam": route.sam.model,
            "multimask": route.sam.multimask,
        },
        check=check,
    )


def _boxes_found(grounded: Any) -> list[GroundedNoun]:
    """The nouns of a `GroundedMasks`."""
    detections = grounded.detections
    return [
        GroundedNoun(
            noun=int(noun),
            mask_hw=mask_hw,
            score=float(score),
            facts={
                "box_xyxy": [round(float(side), 2) for side in box],
                "predicted_iou": round(float(iou), 4),
            },
        )
        for noun, mask_hw, score, box, iou in zip(
            detections.nouns,
            grounded.masks_nhw,
            detections.scores,
            detections.boxes_xyxy,
            grounded.predicted_iou,
            strict=True,
        )
    ]


def proposal_finder(route: ProposalRoute, batch_size: int) -> Finder:
    """Loads a proposer and CLIP. Raises ModelError, also if the text and visual encoder differ."""
    from ovref_inference.encoders import load_region_encoder, load_text_encoder

    propose = _proposals(route.proposer, batch_size)
    visual = load_region_encoder(route.visual, batch_size=batch_size)
    texts = load_text_encoder(route.text)
    if visual.dim != texts.dim:
        raise ModelError(
            f"{route.visual.model} and {route.text.model} belong to different CLIP models: their "
            f"embeddings have {visual.dim} and {texts.dim} dimensions"
        )

    def check() -> None:
        # A blank image may have no proposals, so CLIP would not run.
        whole_nhw = np.ones((1, *BLANK_HWC.shape[:2]), bool)
        heatmaps_nhw = np.ones(whole_nhw.shape, np.float32)
        visual.encode_regions([BLANK_HWC], [whole_nhw], [heatmaps_nhw])
        texts.encode(["a thing"])

    logger.info("grounding with %s and %s", route.proposer.name, route.visual.model)
    return Finder(
        Matcher(propose, visual, texts, route),
        source=f"{route.proposer.name}_clip",
        missing="no_match",
        provenance={
            "proposer": route.proposer.name,
            "clip": route.visual.model,
            "revision": route.visual.revision,
            "features": route.visual.features,
            "min_similarity": route.min_similarity,
        },
        check=check,
    )


def _proposals(
    config: ProposerConfig, batch_size: int
) -> Callable[[Sequence[np.ndarray]], Iterable[tuple[np.ndarray, np.ndarray | None]]]:
    """A function from images to (n, H, W) bool masks of each and, if available, their heatmaps."""
    settings = config.mask_former
    if settings is None:
        from ovref_inference.proposers import load_proposer

        propose = load_proposer(config, batch_size=batch_size)
        return lambda images: ((masks_nhw, None) for masks_nhw in propose(images))
    from ovref_inference.proposers.mask_former import check_choice, load_mask_former, masks_of

    model = load_mask_former(settings, batch_size=batch_size)
    check_choice(model, settings)

    def propose_soft(images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for proposals in model.propose(images):
            masks_nhw, rows = masks_of(proposals, settings)
            yield masks_nhw, proposals.mask_probs_nhw[rows]

    return propose_soft


class Matcher:
    """Gives each noun the proposal with the highest CLIP similarity (VOCSeg section 3.1).

    Several nouns may share a proposal, since their masks need not differ ("a man in a suit").
    """

    def __init__(self, propose: Any, visual: Any, texts: Any, route: ProposalRoute) -> None:
        """`propose` gives masks and heatmaps of images; `visual` has `encode_regions` and `texts`
        `encode`, as the encoders of `ovref_inference.encoders.load`."""
        self._propose, self._visual, self._min = propose, visual, route.min_similarity
        self._noun_embedding = noun_embedding(texts, route.templates)

    def __call__(
        self, images: Sequence[np.ndarray], nouns: Sequence[Sequence[str]]
    ) -> Iterator[list[GroundedNoun]]:
        masks, heatmaps = zip(*self._propose(images), strict=True)
        soft = None if heatmaps[0] is None else heatmaps
        encoded = self._visual.encode_regions(images, masks, soft)
        for number, (features_nd, valid_n) in enumerate(encoded):
            usable = valid_n & features_nd.any(1)
            yield self._matched(
                masks[number][usable],
                None if soft is None else soft[number][usable],
                features_nd[usable],
                nouns[number],
            )

    def _matched(
        self,
        masks_nhw: np.ndarray,
        heatmaps_nhw: np.ndarray | None,
        features_nd: np.ndarray,
        texts: Sequence[str],
    ) -> list[GroundedNoun]:
        if not len(masks_nhw):
            return []
        texts_cd = np.stack([self._noun_embedding(text) for text in texts])
        similarity_cn = texts_cd @ l2_normalised(features_nd).T
        best = similarity_cn.argmax(1)
        scores = similarity_cn[np.arange(len(best)), best]
        return [
            GroundedNoun(
                noun=noun,
                mask_hw=masks_nhw[chosen],
                score=float(score),
                facts={},
                heatmap_hw=None if heatmaps_nhw is None else heatmaps_nhw[chosen],
            )
            for noun, (chosen, score) in enumerate(zip(best, scores, strict=True))
            if score >= self._min
        ]
