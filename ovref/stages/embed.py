"""Images with regions to references: a visual and a textual embedding of every region."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ovref.ahead import map_ahead
from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.identity import ADDED_LATER
from ovref.models.blank import BLANK_HWC, blank_image, blank_prompt
from ovref.models.noun_embeddings import noun_embedding, require_templates
from ovref.ops import masks
from ovref.ops.binarisation import resized
from ovref.ops.measures import MeasureSpec, components, heat_entropy
from ovref.records import NO, YES, ImageRecord, Reference, Region
from ovref.stored_images import UnusableImageError
from ovref_inference.collection.retrieve import (
    TEMPLATES,
    WEIGHTS,
    retrieval_embedding,
)
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.crops import masked_crop
from ovref_inference.ranges import require_at_least
from ovref_inference.vectors import l2_normalised

logger = logging.getLogger(__name__)

DECODERS = min(4, os.cpu_count() or 1)
"""Threads that decode images, and images decoded ahead."""

_Decoded = tuple[ImageRecord, np.ndarray]
"""A record with its decoded image, (H, W, 3) uint8."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embeds each region, its noun and caption.

    `visual.features` selects how regions are embedded: by pooling dense features over them
    (FOSSIL 3.2, RetCLIP 2.1), or as masked crops (VOCSeg 3.1).

    The device is not a setting: `build` uses CUDA if available.
    """

    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 1
    __pydantic_config__ = STRICT

    visual: VisualEncoderConfig
    """The backbone, and how regions become features. With `crop_heatmap`, regions without a heatmap
    are dropped as `no_heatmap`."""
    text: TextEncoderConfig
    """The text encoder of the textual retrieval embeddings."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompt templates for nouns, each with one `{}`; their embeddings are averaged."""
    weights: tuple[float, float] = WEIGHTS
    """Weights of the noun and of its caption in a textual retrieval embedding."""
    min_cells: float = 0.5
    """Minimum area of a region, in cells of the encoder's feature grid; features of a smaller one
    show mostly its background. Dropped as `small_mask`."""
    part: Literal["region", "background"] = field(default="region", metadata=ADDED_LATER)
    """`background` embeds, instead of each region, the part of its image that shows the noun
    nowhere. Such a collection, beside the one of regions, gives each class its background
    prototypes (`ovref_inference.segmenters.freeda`). Dropped as `no_background` where nothing is
    left."""
    measures: MeasureSpec | None = field(default=None, metadata=ADDED_LATER)
    """What else is measured of each region, for filters of the reduction that need it. `{}` takes
    the defaults; None measures nothing."""
    norms: bool = field(default=False, metadata=ADDED_LATER)
    """Whether the collection keeps the norms of the visual embeddings, which it holds as
    directions (`FossilConfig.norms`)."""
    batch_size: int = 16
    """Images, or crops, per forward pass. Part of the identity: at another batch size, kernels
    round the last bits differently."""

    def __post_init__(self) -> None:
        require_templates(self.templates)
        if min(self.weights) < 0 or max(self.weights) <= 0:
            raise ValueError(f"weights must be at least 0, not both 0, found {self.weights}")
        require_at_least("min_cells", self.min_cells, 0)
        if self.part == "background" and self.visual.masking == "heatmap":
            raise ValueError("the background has no heatmap: visual.features must not need one")
        require_at_least("batch_size", self.batch_size, 1)

    def build(self) -> "EmbedStage":
        """Loads both encoders.

        Raises:
            ModelError: one cannot be found, read or used.
        """
        from ovref_inference.encoders import load_region_encoder, load_text_encoder

        visual = load_region_encoder(self.visual, batch_size=self.batch_size)
        texts = load_text_encoder(self.text)
        safety = None
        if self.measures is not None and self.measures.safety is not None:
            from ovref.models.safety import load_safety

            safety = load_safety(self.measures.safety)
        logger.info("embedding with %s and %s", self.visual.model, self.text.model)
        return EmbedStage(self, visual, texts, safety)

    def check(self) -> list["Reference | Dropped"]:
        """Embeds one region of a grey image; see `ovref.check_models`."""
        prompt = blank_prompt()
        mask_hw = np.full(BLANK_HWC.shape[:2], YES, np.uint8)
        mask_hw[:, 32:] = NO  # something for the background, too
        region = Region(noun=prompt.nouns[0], mask_hw=mask_hw, score=1.0, source="blank")
        record = ImageRecord(
            key=prompt.key,
            caption=prompt.caption,
            source=prompt.source,
            image=blank_image(),
            regions=(region,),
            heatmaps_nhw=np.ones((1, 8, 8), np.float16),
        )
        return list(replace(self, min_cells=0.0).build()(iter([record])))


class EmbedStage:
    """`ImageRecord` in; `Reference`, or `Dropped`, out.

    Dropped records: `no_regions` (the record has none), and `stored_images.REASONS` for images that
    cannot be decoded. Dropped regions, under the key the reference would have had:
    `empty_mask`, `small_mask`, `wrong_mask_size`, `no_background`, `no_heatmap`,
    `nonfinite_features` (also features that are all zero, which have no direction).
    """

    def __init__(self, spec: Embed, visual: Any, texts: Any, safety: Any = None) -> None:
        """`visual` has `grid_hw` and `encode_regions`, `texts` has `encode` and, to measure,
        `encode_images`, as the encoders of `ovref_inference.encoders.load`; `safety` is that of
        `models.safety`."""
        self._spec, self._visual, self._texts = spec, visual, texts
        self._noun_embedding = noun_embedding(texts, spec.templates)
        self._safety = safety

    def __call__(self, records: Iterator[ImageRecord]) -> Iterator[Reference | Dropped]:
        # A thread embeds one batch while the caller writes the previous and reads the next one.
        for answers in map_ahead(self._embed_all, self._batches(records), threads=1):
            yield from answers

    def _batches(self, records: Iterator[ImageRecord]) -> Iterator[list[_Decoded | Dropped]]:
        """Batches of decoded images, with drops; threads decode ahead, and drops do not count."""
        batch: list[_Decoded | Dropped] = []
        usable = 0
        for item in map_ahead(_decoded, records, DECODERS):
            batch.append(item)
            usable += not isinstance(item, Dropped)
            if usable == self._spec.batch_size:
                yield batch
                batch, usable = [], 0
        if batch:
            yield batch

    def _embed_all(self, batch: list[_Decoded | Dropped]) -> list[Reference | Dropped]:
        drops = [item for item in batch if isinstance(item, Dropped)]
        images = [item for item in batch if not isinstance(item, Dropped)]
        return [*drops, *self._embed(images)] if images else list(drops)

    def _embed(self, batch: list[_Decoded]) -> Iterator[Reference | Dropped]:
        masks_of_images = [self._masks(record, image_hwc.shape[:2]) for record, image_hwc in batch]
        found = self._visual.encode_regions(
            [image_hwc for _, image_hwc in batch],
            [
                _stacked([mask_hw for mask_hw in some if not isinstance(mask_hw, str)], image_hwc)
                for some, (_, image_hwc) in zip(masks_of_images, batch, strict=True)
            ],
            self._heatmaps(batch, masks_of_images),
        )
        captions_nd = self._texts.encode([record.caption for record, _ in batch])
        measured = self._measured(batch, masks_of_images)
        for (record, _), masks_or_reasons, (features, valid), caption_d, measures in zip(
            batch, masks_of_images, found, captions_nd, measured, strict=True
        ):
            yield from self._references(
                record, masks_or_reasons, features, valid, caption_d, measures
            )

    def _measured(
        self, batch: list[_Decoded], masks_of_images: list[list[np.ndarray | str]]
    ) -> list[list[dict[str, float]]]:
        """What is measured of each image's embedded regions, in their order."""
        spec = self._spec.measures
        found: list[list[dict[str, float]]] = [
            [{} for mask_hw in some if not isinstance(mask_hw, str)] for some in masks_of_images
        ]
        if spec is None:
            return found
        crops, texts, flat = [], [], []
        unsafe_n = self._safety([image_hwc for _, image_hwc in batch]) if self._safety else None
        for at, (some, (record, image_hwc)) in enumerate(zip(masks_of_images, batch, strict=True)):
            here = iter(found[at])
            for number, mask_hw in enumerate(some):
                if isinstance(mask_hw, str):
                    continue
                measures = next(here)
                measures["components"] = float(components(mask_hw))
                heat = None if record.heatmaps_nhw is None else record.heatmaps_nhw[number]
                measures["entropy"] = float("nan") if heat is None else heat_entropy(heat)
                if unsafe_n is not None:
                    measures["unsafe"] = float(unsafe_n[at])
                if spec.clip:
                    crops.append(masked_crop(image_hwc, mask_hw == YES, "none"))
                    texts.append(self._noun_embedding(record.regions[number].noun.text))
                    flat.append(measures)
        if crops:
            images_nd = self._texts.encode_images(crops)
            for measures, image_d, text_d in zip(flat, images_nd, texts, strict=True):
                measures["clip"] = float(image_d @ text_d)
        return found

    def _masks(self, record: ImageRecord, size_hw: tuple[int, int]) -> list[np.ndarray | str]:
        """The mask to embed of each region, (H, W) uint8 tri-state, or the reason to drop it."""
        kept = self._spec.visual.aspect == "kept"
        grid_hw = self._visual.grid_of(size_hw) if kept else self._visual.grid_hw
        least_area = 0.0 if grid_hw is None else self._spec.min_cells / (grid_hw[0] * grid_hw[1])
        found: list[np.ndarray | str] = []
        for region in record.regions:
            if region.mask_hw.shape != size_hw:
                found.append("wrong_mask_size")
                continue
            mask_hw, empty = region.mask_hw, "empty_mask"
            if self._spec.part == "background" and mask_hw.any():
                mask_hw, empty = _background(record, region.noun.text, size_hw), "no_background"
            area = masks.area(mask_hw)
            if area == 0:
                found.append(empty)
            elif area < least_area:
                found.append("small_mask")
            elif self._spec.visual.masking == "heatmap" and record.heatmaps_nhw is None:
                found.append("no_heatmap")
            else:
                found.append(mask_hw)
        return found

    def _heatmaps(
        self, batch: list[_Decoded], masks_of_images: list[list[np.ndarray | str]]
    ) -> list[np.ndarray] | None:
        """(n, H, W) float32 of each image's embedded regions, where the strategy needs them."""
        if self._spec.visual.masking != "heatmap":
            return None
        return [
            _stacked(
                [
                    resized(record.heatmaps_nhw[number], image_hwc.shape[:2])
                    for number, mask_hw in enumerate(some)
                    # `_masks` has dropped the regions of records without heatmaps.
                    if not isinstance(mask_hw, str) and record.heatmaps_nhw is not None
                ],
                image_hwc,
            )
            for (record, image_hwc), some in zip(batch, masks_of_images, strict=True)
        ]

    def _references(
        self,
        record: ImageRecord,
        masks_or_reasons: list[np.ndarray | str],
        features: np.ndarray,
        valid: np.ndarray,
        caption_d: np.ndarray,
        measures: list[dict[str, float]],
    ) -> Iterator[Reference | Dropped]:
        row = 0
        for number, (region, mask_hw) in enumerate(
            zip(record.regions, masks_or_reasons, strict=True)
        ):
            key = f"{record.key}#{number}"
            if isinstance(mask_hw, str):
                yield Dropped(key, mask_hw)
                continue
            region_d, sound, measured = features[row], valid[row], measures[row]
            row += 1
            box_xyxy = masks.box_xyxy(mask_hw)
            if box_xyxy is None or not sound or not region_d.any():
                yield Dropped(key, "nonfinite_features")
                continue
            if self._spec.norms:
                measured = measured | {"norm": float(np.linalg.norm(region_d))}
            textual_d = retrieval_embedding(
                self._noun_embedding(region.noun.text), caption_d, self._spec.weights
            )
            yield Reference(
                key=key,
                noun=region.noun,
                caption=record.caption,
                box_xyxy=box_xyxy,
                area=masks.area(mask_hw),
                score=region.score,
                source=region.source,
                seed=record.seed,
                visual=l2_normalised(region_d).astype(np.float16),
                textual=textual_d.astype(np.float16),
                measures=measured,
            )


def _decoded(record: ImageRecord) -> _Decoded | Dropped:
    if not record.regions:
        return Dropped(record.key, "no_regions")
    try:
        return record, record.image_hwc()
    except UnusableImageError as error:
        return Dropped(record.key, error.reason)


def _background(record: ImageRecord, noun: str, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8, YES where every region of the noun is NO."""
    mask_hw = np.full(size_hw, YES, np.uint8)
    for region in record.regions:
        if region.noun.text == noun and region.mask_hw.shape == size_hw:
            mask_hw[region.mask_hw != NO] = NO
    return mask_hw


def _stacked(maps: list[np.ndarray], image_hwc: np.ndarray) -> np.ndarray:
    """(n, H, W) of maps of the image's size; n may be 0."""
    return np.stack(maps) if maps else np.zeros((0, *image_hwc.shape[:2]), np.uint8)
