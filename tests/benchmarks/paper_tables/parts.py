"""The segmenters of the papers' tables over cached models (`ovref.evaluation.cached`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovref.evaluation.cached import CachedModels, CachedProposer, RegionProposer
from ovref.evaluation.oracle import oracle_proposer
from ovref.evaluation.predictions import Prediction
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.grounded_sam import load_grounded_sam
from ovref_inference.proposers.load import (
    grounded_sam_proposer,
    load_proposals,
    load_proposer,
    no_proposals,
)
from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.regions import panoptic, semantic
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
from paper_tables.datasets import Dataset
from paper_tables.predictions import prediction_of_pixels
from paper_tables.spec import TablesSpec

PROPOSALS = {
    "none": "without proposals",
    "truth": "true masks",
    "opencut": "OpenCut",
    "trained": "MaskFormer with its classes",
    "sam_grid": "grid of points + SAM",
    "grounded_sam": "GroundingDINO + SAM",
    "fcclip": "FC-CLIP",
    "open_mask_former": "MaskFormer with open classes",
}
"""Names of proposals and how people write them."""


class Parts(CachedModels):
    """Collections, encoders and proposers of a specification. Use as a context manager."""

    def __init__(
        self, spec: TablesSpec, datasets: Sequence[Dataset], device: str | None = None
    ) -> None:
        """
        Args:
            spec: names the parts.
            datasets: whose images may be segmented, of the same classes, with panoptic truth.
            device: "cpu", "cuda", ...; None takes a GPU where there is one.
        """
        super().__init__(device)
        self.spec = spec
        self._datasets = datasets
        self._named: dict[str, RegionProposer] = {}

    def named(self, name: str) -> ReferenceCollection:
        """The open collection of a field of `Collections`."""
        return self.collection(getattr(self.spec.collections, name))

    def named_proposals(self, name: str) -> RegionProposer:
        """One of PROPOSALS."""
        if name not in self._named:
            self._named[name] = CachedProposer(self._load_proposer(name))
        return self._named[name]

    def _load_proposer(self, name: str) -> RegionProposer:
        config = self.spec.proposers
        if name == "none":
            return no_proposals
        if name == "truth":
            return truth_proposer(self._datasets)
        if name == "fcclip":
            return load_proposals(ProposerConfig(fcclip=config.fcclip), (), device=self.device)
        if name in ("trained", "open_mask_former"):
            chosen = config.mask_former if name == "trained" else config.open_mask_former
            return load_proposals(ProposerConfig(mask_former=chosen), (), device=self.device)
        if name == "grounded_sam":
            found = load_grounded_sam(config.detector, config.sam, device=self.device)
            return grounded_sam_proposer(found, self._datasets[0].classes)
        asked = ProposerConfig(**{name: getattr(config, name)})  # opencut, sam_grid
        return load_proposer(asked, device=self.device)

    # Each of these predicts all images of a data set.

    def fossil(self, data: Dataset, config: FossilConfig, proposals: str) -> list[Prediction]:
        """FOSSIL, whose pixels outside of masks take their patch."""
        own = self.named("fossil")
        segmenter = FossilSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.named_proposals(proposals),
            config,
        )
        return _of_pixels(segmenter, data)

    def text_only(self, data: Dataset, proposals: str) -> list[Prediction]:
        """Dense CLIP features against the texts of the classes, without a collection."""
        own = self.named("fossil")
        segmenter = TextOnlySegmenter(
            self.encoder(self.spec.clip),
            self.text(own.text_config),
            self.named_proposals(proposals),
            templates=own.manifest.templates,
            windows=None,
        )
        return _of_pixels(segmenter, data)

    def freeda(self, data: Dataset, config: FreedaConfig) -> list[Prediction]:
        """FreeDA, whose superpixels need no proposer."""
        own = self.named("fossil")
        segmenter = FreedaSegmenter(
            own, self.encoder(own.visual_config), self.text(own.text_config), config
        )
        return _of_pixels(segmenter, data)

    def corrclip(self, data: Dataset, config: CorrClipConfig, proposals: str) -> list[Prediction]:
        """CorrCLIPv2's region queries."""
        own = self.named("fossil")
        segmenter = CorrClipSegmenter(
            own,
            self.encoder(own.visual_config),
            self.encoder(self.spec.clip),
            self.text(own.text_config),
            self.named_proposals(proposals),
            config,
        )
        return _of_regions(segmenter, data)

    def vocseg(
        self, data: Dataset, config: VocSegConfig, proposals: str, masking: str = "binary"
    ) -> list[Prediction]:
        """VOCSeg with the collection and the crops of a masking strategy."""
        own = self.named(f"vocseg_{masking}")
        segmenter = VocSegSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.named_proposals(proposals),
            config,
        )
        return _of_regions(segmenter, data)

    def retclip(self, data: Dataset, config: RetClipConfig, proposals: str) -> list[Prediction]:
        """RetCLIP; training-free unless proposals are `trained`."""
        own = self.named("retclip")
        segmenter = RetClipSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.named_proposals(proposals),
            config,
        )
        return _of_regions(segmenter, data, config.min_score, config.overlap)


def truth_proposer(datasets: Sequence[Dataset]) -> RegionProposer:
    """The true segments as proposals, for exactly the images of these data sets."""
    images = [image for data in datasets for image in data.images]
    masks = [
        segments.ids_hw == np.array(list(segments.labels))[:, None, None]
        for data in datasets
        for segments in data.panoptic or ()
    ]
    return oracle_proposer(images, masks)


def _of_pixels(segmenter: Any, data: Dataset) -> list[Prediction]:
    return [
        prediction_of_pixels(found.labels_hw, found.scores_chw, data.things)
        for found in segmenter.segment(data.images, data.classes)
    ]


def _of_regions(
    segmenter: Any, data: Dataset, min_score: float = 0.0, overlap: float = 0.8
) -> list[Prediction]:
    found = []
    for regions in segmenter.score(data.images, data.classes):
        segments = panoptic(regions, data.things, min_score=min_score, overlap=overlap)
        found.append(
            Prediction(
                labels_hw=semantic(regions).labels_hw,
                panoptic=segments,
                scores=segments.scores,
            )
        )
    return found
