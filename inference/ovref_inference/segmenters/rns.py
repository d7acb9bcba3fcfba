"""Retrieve and Segment (RNS; Aravanis et al., CVPR 2026): a linear head fitted to each image.

The head learns from references that the image's regions retrieve, from mixtures of each class's
mean reference with its text, and, for classes without references, from what text alone finds in the
image. The settings are those of the released code (TilemahosAravanis/Retrieve-and-Segment). There
the references come from labelled images of the target data set; here a collection has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from ovref_inference.collection.class_support import FLOOR, ClassSupport
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import ImageTexts
from ovref_inference.encoders.pooling import DenseEncoder, pool_regions
from ovref_inference.images import check_images
from ovref_inference.proposers.load import Proposer
from ovref_inference.proposers.proposals import Proposals, as_proposals
from ovref_inference.ranges import STRICT, require_at_least, require_one_of
from ovref_inference.segmenters.labels import (
    NamedTexts,
    missing_names,
    prepared_once,
    supported_classes,
)
from ovref_inference.segmenters.regions import Segmentation
from ovref_inference.segmenters.rns_head import References, RnsHeadConfig, head_scores
from ovref_inference.segmenters.windows import CropScores, WindowConfig, segment_images
from ovref_inference.vectors import check_readable, l2_normalised, prefetch_rows


@dataclass(frozen=True, kw_only=True)
class RnsConfig:
    """Parameters of RNS; the defaults are those of its released code."""

    __pydantic_config__ = STRICT

    max_references: int = 150
    """References of a class that may be retrieved, those nearest to its text, at least 1. The
    released code has those of one labelled image of a class and of what else is in it."""
    class_scale: float = 10.0
    """Rows count by a softmax over classes of this times the cosine of the image to the text."""
    head: RnsHeadConfig = field(default_factory=RnsHeadConfig)
    """What the head of an image learns from, and how."""
    unsupported: Literal["missing", "text"] = "missing"
    """Classes without support in the collection: `missing` gives them no pixel, as every segmenter
    here does; `text` learns them from the regions that are nearest to their texts, as RNS does,
    which needs a collection of the text encoder's own image tower."""
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    """Sliding window, one head for all windows of an image; null takes each image as a whole."""
    floor: float | None = FLOOR
    """As `FossilConfig.floor`."""

    def __post_init__(self) -> None:
        require_at_least("max_references", self.max_references, 1)
        require_at_least("class_scale", self.class_scale, 0)
        require_one_of("unsupported", self.unsupported, "missing", "text")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """References and support of a list of classes. Made by `RnsSegmenter.prepare`."""

    references: References
    """References of the classes that are answered."""
    texts_cd: np.ndarray
    """(answered, d_textual) float32, L2-normalised."""
    answered: np.ndarray
    """(classes,) bool: which of the classes may be predicted."""
    support: tuple[ClassSupport, ...]
    """One for every class."""


class RnsSegmenter:
    """Retrieve and Segment with a frozen backbone and a reference collection.

        segmenter = RnsSegmenter(collection, visual, text, opencut_proposer(visual))
        labels_hw = segmenter.segment([image_hwc], ["red panda", "grass"])[0].labels_hw

    RNS is made for a backbone whose features are compared with texts: a collection built with the
    image tower of its own text encoder. In a collection of another backbone (DINO) no reference can
    be mixed with a text. There the mean reference stands for the text in all mixtures, and the
    text counts in the weights of the classes alone, by the image's CLIP embedding.
    """

    def __init__(
        self,
        collection: ReferenceCollection,
        visual: DenseEncoder,
        text: ImageTexts,
        proposer: Proposer,
        config: RnsConfig = RnsConfig(),
    ) -> None:
        """The encoders must be the ones the collection was built with; `no_proposals` classifies
        patches, any other proposer regions.

        Raises:
            ValueError: `visual` has no dense features; or `unsupported` is `text` and the
                collection is not in the space of its texts.
            CollectionError: the textual embeddings cannot be read where the collection is.
        """
        check_readable(collection.textual)
        if not hasattr(visual, "encode"):
            raise ValueError(
                f"RNS needs dense features, and {collection.url} is of masked crops; give a "
                "collection of dense features"
            )
        one, other = collection.manifest.visual, collection.manifest.textual
        self.joint = (one.model, one.revision, one.dim) == (other.model, other.revision, other.dim)
        """Whether references can be compared with texts."""
        if config.unsupported == "text" and not self.joint:
            raise ValueError(
                f"{collection.url} has references of {one.model} and texts of {other.model}, which "
                "cannot be compared; unsupported=text needs a collection of CLIP's image tower"
            )
        self.collection = collection
        self.visual = visual
        self.text = text
        self.texts = NamedTexts(text, collection.manifest.templates)
        self.proposer = proposer
        self.config = config

    @prepared_once
    def prepare(self, names: tuple[str, ...]) -> Prepared:
        """The references of these classes, cached for the next call.

        A class has the references of its noun, or borrows those of the nearest (`class_support`).
        Warns, once for each list of classes, about classes that the collection has nothing for.

        Raises:
            ValueError: no class names, an empty one, or no support for any of them.
        """
        texts_cd, by_text = self.texts(names), self.config.unsupported == "text"
        support = supported_classes(
            self.collection, names, self.texts, self.config.floor,
            "be learnt from what their texts find" if by_text else "not be predicted",
        )  # fmt: skip
        answered = np.array([one.source != "none" or by_text for one in support])
        ids = [
            self._references(one, text_d)
            for one, text_d, some in zip(support, texts_cd, answered, strict=True)
            if some
        ]
        prefetch_rows(self.collection.visual, np.concatenate(ids))
        sets = [l2_normalised(self.collection.visual[one]) for one in ids]
        means_cd = np.zeros((len(sets), self.collection.manifest.visual.dim), np.float32)
        for mean_d, vectors in zip(means_cd, sets, strict=True):
            if len(vectors):
                mean_d[:] = l2_normalised(vectors.mean(0))
        return Prepared(
            references=References(
                vectors_md=np.concatenate(sets),
                labels_m=np.repeat(np.arange(len(sets)), [len(one) for one in sets]),
                means_cd=means_cd,
            ),
            texts_cd=texts_cd[answered],
            answered=answered,
            support=support,
        )

    def segment(
        self, images: Sequence[np.ndarray], class_names: Sequence[str]
    ) -> list[Segmentation]:
        """Label maps of images; arguments, result and errors as in `Segmenter.segment`. A pixel's
        scores are the probabilities of its region or patch."""
        check_images(images)
        prepared = self.prepare(class_names)
        score = partial(self._score, prepared=prepared)
        missing: tuple[str, ...] = ()
        if self.config.unsupported == "missing":
            missing = missing_names(class_names, prepared.support)
        return segment_images(images, score, self.config.windows, prepared.answered, missing)

    def _score(self, crops: Sequence[np.ndarray], *, prepared: Prepared) -> list[CropScores]:
        """Scores of the windows of one image by one head, or of whole images by a head for each."""
        device = getattr(self.visual, "device", None)
        items = [
            _items(features_hwd, _covering(masks), crop.shape[:2])
            for features_hwd, masks, crop in zip(
                self.visual.encode(crops), self.proposer(crops), crops, strict=True
            )
        ]
        groups = [range(len(crops))]
        if self.config.windows is None:
            groups = [range(number, number + 1) for number in range(len(crops))]
        found: list[CropScores] = []
        for group in groups:
            items_nd = np.concatenate([items[number][0] for number in group])
            weights_c = self._class_weights([crops[number] for number in group], items_nd, prepared)
            scores_nc = head_scores(
                items_nd,
                prepared.references,
                weights_c,
                self.config.head,
                texts_cd=prepared.texts_cd if self.joint else None,
                device=device,
            )
            stops = np.cumsum([len(items[number][0]) for number in group])[:-1]
            for number, part_nc in zip(group, np.split(scores_nc, stops), strict=True):
                found.append(_crop_scores(part_nc, items[number][1], items[number][2], device))
        return found

    def _class_weights(
        self, crops: Sequence[np.ndarray], items_nd: np.ndarray, prepared: Prepared
    ) -> np.ndarray:
        """(classes,) how much the rows of each class count in this image, summing to 1."""
        image_d = items_nd.mean(0) if self.joint else self.text.encode_images(crops).mean(0)
        cosines = prepared.texts_cd @ l2_normalised(image_d)
        powers = np.exp(self.config.class_scale * (cosines - cosines.max()))
        return (powers / powers.sum()).astype(np.float32)

    def _references(self, support: ClassSupport, text_d: np.ndarray) -> np.ndarray:
        """Ids of the references of a class, those nearest to its text; none without support."""
        if support.source == "none":
            return np.zeros(0, dtype=np.int64)
        ids = self.collection.references_of(support.nouns[0])
        most = self.config.max_references
        if len(ids) > most:
            prefetch_rows(self.collection.textual, ids)
            cosines = np.asarray(self.collection.textual[ids], dtype=np.float32) @ text_d
            ids = np.sort(ids[np.argsort(-cosines, kind="stable")[:most]])
        return ids


def _covering(masks: np.ndarray | Proposals) -> np.ndarray:
    """(n, H, W) bool masks of proposals, the last of all pixels that are in no other."""
    masks_nhw = as_proposals(masks, rest=False).masks(0.5)
    return as_proposals(masks_nhw, rest=True).masks(0.5)


def _items(
    features_hwd: np.ndarray, masks_nhw: np.ndarray, size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """What is classified of one window: its regions, or its patches where nothing is proposed.

    Args:
        masks_nhw: (n, H, W) bool that cover the window; what covers it whole, alone, is no
            proposal.

    Returns:
        (items, d) float32, L2-normalised; (H, W) int64 region of each pixel, -1 of patches; and the
        grid of the patches, None where there are regions.
    """
    filled_nhw = masks_nhw[masks_nhw.any((1, 2))]
    region_hw = np.full(size_hw, -1, dtype=np.int64)
    if len(filled_nhw) < 2:
        h, w, d = features_hwd.shape
        return l2_normalised(features_hwd.reshape(h * w, d)), region_hw, (h, w)
    for number, mask_hw in enumerate(filled_nhw):
        region_hw[mask_hw] = number
    return l2_normalised(pool_regions(features_hwd, filled_nhw)[0]), region_hw, None


def _crop_scores(
    scores_nc: np.ndarray, region_hw: np.ndarray, grid_hw: tuple[int, int] | None, device: Any
) -> CropScores:
    scores_cn = torch.as_tensor(np.ascontiguousarray(scores_nc.T), device=device)
    regions = torch.as_tensor(region_hw, device=device)
    if grid_hw is None:
        return CropScores(region_hw=regions, regions_cn=scores_cn)
    return CropScores(
        region_hw=regions,
        regions_cn=scores_cn[:, :0],
        patches_chw=scores_cn.reshape(-1, *grid_hw),
    )
