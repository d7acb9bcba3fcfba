"""The segmenters of the papers' tables, made of shared parts: each model is loaded once, when it is
first needed, and answers each question once.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ovref.evaluation.datasets import Dataset
from ovref.evaluation.judge import Prediction, prediction_of_pixels
from ovref.evaluation.metrics_panoptic import PanopticMap
from ovref.evaluation.remember import (
    Proposer,
    RememberingEncoder,
    RememberingTexts,
    remembering_proposer,
)
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import load_region_encoder, load_text_encoder
from ovref_inference.proposers.config import ProposerConfig
from ovref_inference.proposers.grounded_sam import load_grounded_sam
from ovref_inference.proposers.load import (
    grounded_sam_proposer,
    load_proposer,
    no_proposals,
)
from ovref_inference.proposers.mask_former import load_mask_former
from ovref_inference.segmenters.corrclip import CorrClipConfig, CorrClipSegmenter
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter
from ovref_inference.segmenters.freeda import FreedaConfig, FreedaSegmenter
from ovref_inference.segmenters.regions import panoptic, semantic
from ovref_inference.segmenters.retclip import RetClipConfig, RetClipSegmenter
from ovref_inference.segmenters.vocseg import VocSegConfig, VocSegSegmenter
from paper_tables.spec import TablesSpec

PROPOSALS = {
    "none": "without proposals",
    "truth": "true masks",
    "opencut": "OpenCut",
    "trained": "MaskFormer with its classes",
    "sam_grid": "grid of points + SAM",
    "grounded_sam": "GroundingDINO + SAM",
}
"""Names of proposals and how people write them."""


class Parts:
    """Collections, encoders and proposers of a specification; use as a context."""

    def __init__(
        self, spec: TablesSpec, datasets: Sequence[Dataset], device: str | None = None
    ) -> None:
        """
        Args:
            spec: names the parts.
            datasets: whose images may be asked about, of the same classes, with panoptic truth.
            device: "cpu", "cuda", ...; None takes a GPU where there is one.
        """
        self.spec, self._device = spec, device
        self._datasets = datasets
        self._open = ExitStack()
        self._collections: dict[str, ReferenceCollection] = {}
        self._encoders: dict[VisualEncoderConfig, RememberingEncoder] = {}
        self._texts: dict[TextEncoderConfig, RememberingTexts] = {}
        self._proposers: dict[str, Proposer] = {}

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def collection(self, name: str) -> ReferenceCollection:
        """The collection of a field of `Collections`, open."""
        if name not in self._collections:
            url = getattr(self.spec.collections, name)
            self._collections[name] = self._open.enter_context(ReferenceCollection.open(url))
        return self._collections[name]

    def encoder(self, config: VisualEncoderConfig) -> RememberingEncoder:
        """A visual encoder: dense, or of regions."""
        if config not in self._encoders:
            encoder = load_region_encoder(config, device=self._device)
            self._encoders[config] = RememberingEncoder(encoder)
        return self._encoders[config]

    def text(self, config: TextEncoderConfig) -> RememberingTexts:
        """A text encoder."""
        if config not in self._texts:
            self._texts[config] = RememberingTexts(load_text_encoder(config, device=self._device))
        return self._texts[config]

    def proposer(self, name: str) -> Proposer:
        """One of PROPOSALS."""
        if name not in self._proposers:
            self._proposers[name] = remembering_proposer(self._load_proposer(name))
        return self._proposers[name]

    def _load_proposer(self, name: str) -> Proposer:
        config = self.spec.proposers
        if name == "none":
            return no_proposals
        if name == "truth":
            return truth_proposer(self._datasets)
        if name == "trained":
            model = load_mask_former(config.mask_former, device=self._device)
            return lambda images: list(model.propose(images))
        if name == "grounded_sam":
            found = load_grounded_sam(config.detector, config.sam, device=self._device)
            return grounded_sam_proposer(found, self._datasets[0].classes)
        asked = ProposerConfig(**{name: getattr(config, name)})  # opencut, sam_grid
        return load_proposer(asked, device=self._device)

    # Each of these predicts all images of a data set.

    def fossil(self, data: Dataset, config: FossilConfig, proposals: str) -> list[Prediction]:
        """FOSSIL, whose pixels outside of masks take their patch."""
        own = self.collection("fossil")
        segmenter = FossilSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.proposer(proposals),
            config,
        )
        return _of_pixels(segmenter, data)

    def text_only(self, data: Dataset, proposals: str) -> list[Prediction]:
        """Dense CLIP features against the texts of the classes, without a collection."""
        own = self.collection("fossil")
        segmenter = TextOnlySegmenter(
            self.encoder(self.spec.clip),
            self.text(own.text_config),
            self.proposer(proposals),
            templates=own.manifest.templates,
            windows=None,
        )
        return _of_pixels(segmenter, data)

    def freeda(self, data: Dataset, config: FreedaConfig) -> list[Prediction]:
        """FreeDA, whose superpixels need no proposer."""
        own = self.collection("fossil")
        segmenter = FreedaSegmenter(
            own, self.encoder(own.visual_config), self.text(own.text_config), config
        )
        return _of_pixels(segmenter, data)

    def corrclip(self, data: Dataset, config: CorrClipConfig, proposals: str) -> list[Prediction]:
        """CorrCLIPv2's region queries."""
        own = self.collection("fossil")
        segmenter = CorrClipSegmenter(
            own,
            self.encoder(own.visual_config),
            self.encoder(self.spec.clip),
            self.text(own.text_config),
            self.proposer(proposals),
            config,
        )
        return _of_regions(segmenter, data)

    def vocseg(
        self, data: Dataset, config: VocSegConfig, proposals: str, masking: str = "binary"
    ) -> list[Prediction]:
        """VOCSeg with the collection and the crops of a masking strategy."""
        own = self.collection(f"vocseg_{masking}")
        segmenter = VocSegSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.proposer(proposals),
            config,
        )
        return _of_regions(segmenter, data)

    def retclip(self, data: Dataset, config: RetClipConfig, proposals: str) -> list[Prediction]:
        """RetCLIP; training-free unless proposals are `trained`."""
        own = self.collection("retclip")
        segmenter = RetClipSegmenter(
            own,
            self.encoder(own.visual_config),
            self.text(own.text_config),
            self.proposer(proposals),
            config,
        )
        return _of_regions(segmenter, data, config.min_score, config.overlap)


def truth_proposer(datasets: Sequence[Dataset]) -> Proposer:
    """The true segments as proposals, for exactly the images of these data sets."""
    known = {
        (image.shape, image.tobytes()): segments.ids_hw
        == np.array(list(segments.labels))[:, None, None]
        for data in datasets
        for image, segments in zip(data.images, data.panoptic or (), strict=True)
    }
    return lambda images: [known[image.shape, image.tobytes()] for image in images]


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
                panoptic=PanopticMap(ids_hw=segments.ids_hw, labels=segments.labels),
                scores=segments.scores,
            )
        )
    return found
