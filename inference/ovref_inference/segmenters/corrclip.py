"""CorrCLIPv2's region queries: text classification of a region, supported by similar regions.

This is the part of CorrCLIPv2 (zdk258/CorrCLIP) that uses a memory bank. The bank has an embedding
by a vision model for searching and one by CLIP for comparing with texts; a reference collection's
visual embeddings serve as the former, its textual embeddings of noun and caption as the latter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.collection.class_support import FLOOR, ClassSupport
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import Texts
from ovref_inference.collection.support import Support
from ovref_inference.encoders.pooling import RegionEncoder
from ovref_inference.images import check_images
from ovref_inference.proposers.proposals import as_proposals
from ovref_inference.ranges import STRICT, require_above, require_at_least, require_within
from ovref_inference.segmenters.labels import (
    NamedTexts,
    missing_names,
    prepared_once,
    supported_classes,
)
from ovref_inference.segmenters.regions import (
    ScoredRegions,
    Segmentation,
    region_features,
    semantic,
    softmax,
    with_background,
)
from ovref_inference.vectors import check_readable, l2_normalised


@dataclass(frozen=True, kw_only=True)
class CorrClipConfig:
    """Parameters of the region queries; the defaults are CorrCLIPv2's."""

    __pydantic_config__ = STRICT

    k: int = 20
    """References retrieved per region, at least 1."""
    support: float = 0.5
    """Weight of the retrieved references against the region itself, in [0, 1]."""
    tau: float = 0.025
    """Temperature of the softmax over classes, above 0: one over CorrCLIPv2's scale of 40."""
    background: float | None = None
    """Pixels whose best probability is below this get no class (0.2 or 0.15 in CorrCLIPv2); null
    for data without background."""
    rest: bool = True
    """Whether the uncovered part of the image is one more region, as in CorrCLIPv2."""

    floor: float | None = FLOOR
    """As `FossilConfig.floor`; null classifies every class by text, as CorrCLIPv2 does."""

    def __post_init__(self) -> None:
        require_at_least("k", self.k, 1)
        require_within("support", self.support, 0, 1)
        require_above("tau", self.tau, 0)


class CorrClipSegmenter:
    """Regions query the collection; texts are compared with the regions and with the references
    found.

        keys = load_region_encoder(collection.visual_config)
        segmenter = CorrClipSegmenter(collection, keys, clip, text, proposer)

    Score of a class: (1 - support) cos(region's CLIP embedding, text) + support cos(mean of the k
    retrieved textual embeddings, text).

    One default differs from CorrCLIPv2: a class without support in the collection is missing and
    gets no pixel, as with every segmenter here. CorrCLIPv2 still classifies it by its text and the
    retrieved regions, which `floor=None` does too.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        keys: RegionEncoder,
        clip: RegionEncoder,
        text: Texts,
        proposer: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]],
        config: CorrClipConfig = CorrClipConfig(),
    ) -> None:
        """
        Args:
            keys: the encoder that made the collection.
            clip: embeds regions in the space of `text`; the same as `keys` if that is CLIP.

        Raises:
            CollectionError: the textual embeddings cannot be read where the collection is.
        """
        check_readable(collection.textual)
        self.collection = collection
        self.keys = keys
        self.clip = clip
        self.texts = NamedTexts(text, collection.manifest.templates)
        self.proposer = proposer
        self.config = config

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> tuple[ClassSupport, ...]:
        """The support of these classes, cached for the next call.

        Warns, once per list of classes, about classes without support.

        Raises:
            ValueError: no class names, an empty one, or no support for any of them.
        """
        return supported_classes(self.collection, names, self.texts, self.config.floor)

    def score(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[ScoredRegions]:
        """The proposals of each image with the probability of every class.

        Args, errors: as in `segment`.
        """
        check_images(images)
        support = self.prepare(class_names)
        none = np.array([one.source == "none" for one in support])
        texts_cd, config = self.texts(class_names), self.config
        proposals = [as_proposals(found, rest=config.rest) for found in self.proposer(images)]
        keyed = region_features(self.keys, images, proposals, 0.5)
        own = keyed
        if self.clip is not self.keys:
            own = region_features(self.clip, images, proposals, 0.5)
        scored = []
        for (found, keys_nd), (_, own_nd) in zip(keyed, own, strict=True):
            if own_nd.shape[1] != texts_cd.shape[1]:
                raise ValueError(
                    f"regions of width {own_nd.shape[1]} cannot be compared with texts of width "
                    f"{texts_cd.shape[1]}; clip must be the image tower of the text encoder"
                )
            cosines = (1 - config.support) * (own_nd @ texts_cd.T)
            if len(keys_nd):
                retrieved = self.collection.search_regions(keys_nd, config.k)
                cosines += config.support * (support_embeddings(retrieved) @ texts_cd.T)
            cosines[:, none] = -np.inf
            scored.append(
                ScoredRegions(
                    mask_probs_nhw=found.mask_probs_nhw,
                    scores_nc=softmax(cosines, config.tau),
                    missing=missing_names(class_names, support),
                )
            )
        return scored

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; see `Segmenter.segment`, and `prepare` for further errors.

        Background has the label NO_CLASS. Raises ValueError also for encoders whose widths differ
        from the collection's.
        """
        found = [semantic(regions) for regions in self.score(images, class_names)]
        if self.config.background is None:
            return found
        return [with_background(one, self.config.background) for one in found]


def support_embeddings(support: Support) -> np.ndarray:
    """(n, d_textual) float32, L2-normalised: mean textual embedding of the references of each
    region.

    Raises:
        ValueError: nothing was found for a region.
    """
    found = (support.ids >= 0).sum(1)
    if not found.all():
        raise ValueError(f"the search found nothing for {int((found == 0).sum())} regions")
    return l2_normalised(support.textual.sum(1) / found[:, None])
