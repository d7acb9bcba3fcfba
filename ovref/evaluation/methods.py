"""The segmenters compared in an evaluation, which share models that encode each image once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from ovref.errors import InputError
from ovref.evaluation.apply_protocol import (
    label_windows,
    proposal_images,
    segment_with_protocol,
    windows_of,
)
from ovref.evaluation.cached import CachedEncoder, CachedModels, RegionProposer
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.evaluation.oracle import label_masks, oracle_proposer
from ovref.evaluation.predictions import (
    Prediction,
    prediction_of_labels,
    prediction_of_segments,
)
from ovref.evaluation.spec import TITLES, EvaluateSpec
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.load import no_proposals
from ovref_inference.segmenters.corrclip import CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaSegmenter
from ovref_inference.segmenters.instances import instances
from ovref_inference.segmenters.labels import check_same_encoders
from ovref_inference.segmenters.regions import (
    NO_CLASS,
    ScoredRegions,
    Segmentation,
    best_of_names,
    panoptic,
    semantic,
)
from ovref_inference.segmenters.retclip import RetClipSegmenter
from ovref_inference.segmenters.rns import RnsSegmenter
from ovref_inference.segmenters.vocseg import VocSegSegmenter

PROPOSALS = {
    "fossil": "opencut",
    "fossil_no_proposals": "none",
    "fossil_oracle": "oracle",
    "text_only": "none",
    "text_only_opencut": "opencut",
    "text_only_oracle": "oracle",
    "retclip_oracle": "oracle",
    "rns_no_proposals": "none",
}
"""Row -> source of its proposals."""

DENSE = ("fossil", "fossil_no_proposals", "fossil_oracle", "freeda", "rns", "rns_no_proposals")
"""Rows that compare dense features with the collection."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, as plain data."""

    name: str
    """One of `spec.TITLES`."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of FOSSIL's configuration that an ablation changes."""

    @property
    def title(self) -> str:
        """Title for people."""
        changed = [f"{n if n == 'gamma' else n.upper()} = {v}" for n, v in self.changes]
        return ", ".join([TITLES[self.name], *changed])


def rows_of(spec: EvaluateSpec) -> tuple[Row, ...]:
    """The requested rows, then those of the ablations, which vary one parameter at a time from the
    best configuration (FOSSIL section 4.3)."""
    if spec.method != "collection":
        return (Row(name=spec.method),)
    grids = {"n": spec.ablate_n, "k": spec.ablate_k, "gamma": spec.ablate_gamma}
    ablations = [
        Row(name="fossil", changes=((name, value),))
        for name, values in grids.items()
        for value in values
        if "fossil" in spec.rows
    ]
    return (*(Row(name=name) for name in spec.rows), *ablations)


class Methods:
    """Segmenters over cached models, for the images of the last `encode_batch`."""

    def __init__(
        self,
        spec: EvaluateSpec,
        data: LabelledSet,
        models: CachedModels,
        collection: ReferenceCollection | None = None,
    ) -> None:
        """
        Args:
            spec: the settings; models are loaded when a row first needs them.
            data: data set with the class names.
            models: the caching models.
            collection: used in place of that of `spec`.

        Raises:
            InputError: the collection is of masked crops, but a row compares dense features; or the
                fallback was built with other encoders.
        """
        self.collection = collection or models.collection(spec.collection)
        self.fallback = models.collection(spec.fallback) if spec.fallback else None
        if self.fallback is not None:
            try:
                check_same_encoders(self.collection, self.fallback)
            except ValueError as error:
                raise InputError(f"fallback: {error}") from error
        masked = self.collection.visual_config.masking
        refused = [TITLES[name] for name in spec.rows if name in DENSE]
        if masked and refused:
            raise InputError(
                f"{spec.collection} was embedded as masked crops "
                f"({self.collection.visual_config.features}), and {', '.join(refused)} compare "
                "dense features with it: give a collection of dense features, or other rows"
            )
        self.spec, self.data, self.protocol = spec, data, spec.chosen_protocol()
        self._models = models
        self._oracle: RegionProposer = oracle_proposer([], [])
        self._segmenters: dict[Row, Any] = {}
        self.names, self._class_of = query_names(data, spec)
        self._seen = seen_of_names(data, self._class_of)

    @property
    def visual(self) -> CachedEncoder:
        """The collection's visual encoder."""
        return self._models.encoder(self.collection.visual_config)

    @property
    def proposers(self) -> dict[str, Callable[[], RegionProposer]]:
        """Loaders of proposers, by the names in PROPOSALS."""
        opencut = ProposerConfig(opencut=self.spec.opencut)
        return {
            "none": lambda: no_proposals,
            "oracle": lambda: lambda images: self._oracle(images),
            "opencut": lambda: self._models.proposer(opencut),
            "own": lambda: self._models.proposals(self.spec.proposer or opencut, self.names),
        }

    def fossil(self, config: FossilConfig, proposals: str = "opencut") -> FossilSegmenter:
        """FOSSIL with these proposals, without windows, which are the protocol's."""
        return FossilSegmenter(
            self.collection,
            self.visual,
            self._models.text(self.collection.text_config),
            self.proposers[proposals](),
            replace(config, windows=None),
        )

    def segmenter(self, row: Row) -> Any:
        """The segmenter of a row. Cached."""
        if row not in self._segmenters:
            self._segmenters[row] = self._make(row)
        return self._segmenters[row]

    def _make(self, row: Row) -> Any:
        if row.name.startswith("fossil"):
            return self.fossil(replace(self.spec.fossil, **dict(row.changes)), PROPOSALS[row.name])
        text = self._models.text(self.collection.text_config)
        if row.name.startswith("text_only"):
            return TextOnlySegmenter(
                self._models.encoder(self.spec.clip),
                text,
                self.proposers[PROPOSALS[row.name]](),
                templates=self.collection.manifest.templates,
                windows=None,
            )
        if row.name == "freeda":
            return FreedaSegmenter(self.collection, self.visual, text, self.spec.freeda)
        proposer = self.proposers[PROPOSALS.get(row.name, "own")]()
        if row.name == "vocseg":
            return VocSegSegmenter(self.collection, self.visual, text, proposer, self.spec.vocseg)
        if row.name.startswith("retclip"):
            return RetClipSegmenter(
                self.collection, self.visual, text, proposer, self.spec.retclip,
                fallback=self.fallback,
            )  # fmt: skip
        if row.name.startswith("rns"):
            return RnsSegmenter(self.collection, self.visual, text, proposer, self.spec.rns)
        clip = self._models.encoder(self.spec.clip)
        return CorrClipSegmenter(
            self.collection, self.visual, clip, text, proposer, self.spec.corrclip
        )

    def support(self) -> dict[str, str]:
        """A description of where FOSSIL takes the references of each class from."""
        support = self.fossil(self.spec.fossil, "none").prepare(self.names).support
        words: dict[str, str] = {}
        for label, one in zip(self._class_of[:-1].tolist(), support, strict=True):
            words.setdefault(self.data.class_names[label], str(one))
        return words

    def encode_batch(self, examples: Sequence[Example]) -> None:
        """Encodes everything that the rows need of these images, all windows together."""
        protocol = self.protocol
        parts = [part for one in examples for part in windows_of(one.image_hwc, protocol)]
        names = set(self.spec.rows)
        if any(name.endswith("oracle") for name in names):
            maps = [part for one in examples for part in label_windows(one.label_hw, protocol)]
            self._oracle = oracle_proposer(parts, list(map(label_masks, maps)))
        if names & set(DENSE):
            self.visual.encode(parts)
        if any(name.startswith("text_only") for name in names) or "corrclip" in names:
            self._models.encoder(self.spec.clip).encode(parts)
        proposed = [part for one in examples for part in proposal_images(one.image_hwc, protocol)]
        if names & {name for name, proposals in PROPOSALS.items() if proposals == "opencut"}:
            self.proposers["opencut"]()(proposed)
        if names & {"vocseg", "retclip", "corrclip", "rns"}:
            self.proposers["own"]()(proposed)

    def predict(self, row: Row, image_hwc: np.ndarray, segments: bool = False) -> Prediction:
        """The prediction of a row for one image.

        Args:
            image_hwc: (H, W, 3) uint8, one of the last `encode_batch`.
            segments: whether to make panoptic segments, too.
        """
        segmenter = self.segmenter(row)
        if segments and self._whole and hasattr(segmenter, "score"):
            return self._of_regions(row, segmenter, image_hwc)
        protocol = self.protocol
        if protocol is not None and PROPOSALS.get(row.name) == "oracle":
            protocol = replace(protocol, proposals="window")  # true masks are made per window
        found = segment_with_protocol(segmenter, image_hwc, self.names, protocol, self._seen)
        return prediction_of(found, self._class_of, self.data, segments)

    @property
    def _whole(self) -> bool:
        """Whether the segmenter gets the whole image, so that its segments are the image's."""
        return self.protocol is None or (
            self.protocol.window is None
            and self.protocol.background is None
            and not self.protocol.seen_penalty
        )

    def _of_regions(self, row: Row, segmenter: Any, image_hwc: np.ndarray) -> Prediction:
        """Segments of scored regions, as in RetCLIP and FC-CLIP, at the size of the image."""
        (window_hwc,) = windows_of(image_hwc, self.protocol)
        regions = _resized(
            segmenter.score([window_hwc], self.names)[0], self._class_of, image_hwc.shape[:2]
        )
        settings = self.spec.retclip
        limits = (
            {"min_score": settings.min_score, "overlap": settings.overlap}
            if row.name.startswith("retclip")
            else {}
        )
        things = self.data.is_thing
        return prediction_of_segments(
            semantic(regions).labels_hw,
            panoptic(regions, things, **limits),
            instances(regions, things),
        )


def prediction_of(
    found: Segmentation, class_of: np.ndarray, data: LabelledSet, segments: bool
) -> Prediction:
    """What was found of the names of `query_names`, as a prediction of the classes of `data`; with
    segments if asked for (`prediction_of_labels`)."""
    labels_hw = class_of[found.labels_hw].astype(np.int32)
    things = data.is_thing if segments else None
    return prediction_of_labels(labels_hw, found.max_score_hw, things)


def query_names(data: LabelledSet, spec: EvaluateSpec) -> tuple[tuple[str, ...], np.ndarray]:
    """The names given to a segmenter, and (names + 1,) int64, the class of each, the last NO_CLASS.

    A class has all of its synonyms and takes the best score; a background that is not queried has
    one name.
    """
    classes, protocol = data.class_list, spec.chosen_protocol()
    if protocol is not None and protocol.background is not None and not protocol.ask_background:
        first, *others = classes.classes
        classes = replace(classes, classes=(first[:1], *others))
    names, owners = classes.query_names()
    return names, np.array([*owners, NO_CLASS], dtype=np.int64)


def seen_of_names(data: LabelledSet, class_of: np.ndarray) -> list[bool] | None:
    """Whether the class of each name of `query_names` is a seen one; None without a split."""
    return None if data.seen is None else [data.seen[label] for label in class_of[:-1]]


def _resized(
    regions: ScoredRegions, class_of: np.ndarray, size_hw: tuple[int, int]
) -> ScoredRegions:
    """The scores of classes, each the maximum over its names, and mask probabilities, resized."""
    labels = class_of[:-1]
    scores_nc = best_of_names(regions.scores_nc, labels, labels.max() + 1)
    mask_probs_nhw = regions.mask_probs_nhw
    if mask_probs_nhw.shape[1:] != size_hw and len(mask_probs_nhw):
        activations = torch.from_numpy(np.ascontiguousarray(mask_probs_nhw))
        resized = interpolate(activations[None].float(), size=size_hw, mode="bilinear")
        mask_probs_nhw = resized[0].numpy()
    elif not len(mask_probs_nhw):
        mask_probs_nhw = np.zeros((0, *size_hw), dtype=np.float32)
    return replace(regions, mask_probs_nhw=mask_probs_nhw, scores_nc=scores_nc)
