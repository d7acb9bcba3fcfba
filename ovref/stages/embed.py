"""Images with regions to references: a visual and a textual embedding of every region."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from ovref_inference.encoder_config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.pooling import pool_regions
from ovref_inference.retrieve import TEMPLATES, WEIGHTS, class_embeddings, retrieval_embedding
from ovref_inference.vectors import l2_normalised

from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.errors import ModelError
from ovref.ops import masks
from ovref.ops.images import UnusableImageError
from ovref.records import ImageRecord, Reference

logger = logging.getLogger(__name__)

NOUNS_REMEMBERED = 65_536


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Pools dense features over each region and embeds its noun and caption (FOSSIL 3.2).

    The device is not part of it: `build` takes the CUDA device where there is one.
    """

    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 1
    __pydantic_config__ = STRICT

    visual: VisualEncoderConfig
    """The backbone whose dense features are pooled."""
    text: TextEncoderConfig
    """The text encoder of the textual retrieval embeddings."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts that a noun is put into, each with one `{}`; their embeddings are averaged."""
    weights: tuple[float, float] = WEIGHTS
    """Of the noun and of its whole caption in a textual retrieval embedding."""
    min_cells: float = 0.5
    """Smallest region, in cells of the feature grid; the features of a smaller one are mostly of
    what is around it. Dropped as `small_mask`."""
    batch_size: int = 16
    """Images per forward pass. Kernels round differently at another batch size, in the last bits,
    so it belongs to the identity of the bytes."""

    def __post_init__(self) -> None:
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise ValueError(f"templates must have one {{}} each, found {self.templates}")
        if min(self.weights) < 0 or max(self.weights) <= 0:
            raise ValueError(f"weights must be at least 0, not both 0, found {self.weights}")
        if self.min_cells < 0:
            raise ValueError(f"min_cells must be at least 0, found {self.min_cells}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {self.batch_size}")

    def build(self) -> "EmbedStage":
        """Loads both encoders.

        Raises:
            ModelError: one cannot be found, read or used.
        """
        from ovref_inference.encoders import load_text_encoder, load_visual_encoder
        from ovref_inference.errors import ModelLoadError

        try:
            visual = load_visual_encoder(self.visual, batch_size=self.batch_size)
            texts = load_text_encoder(self.text)
        except ModelLoadError as error:
            raise ModelError(str(error)) from error
        logger.info("embedding with %s and %s", self.visual.model, self.text.model)
        return EmbedStage(self, visual, texts)


class EmbedStage:
    """`ImageRecord` in; `Reference`, or `Dropped`, out.

    Dropped records: `no_regions` (it came without any), and `ovref.ops.images.REASONS` for images
    that cannot be decoded. Dropped regions, under the key the reference would have had:
    `empty_mask`, `small_mask`, `wrong_mask_size`, `nonfinite_features` (also features that are all
    zero, which have no direction).
    """

    def __init__(self, spec: Embed, visual: Any, texts: Any) -> None:
        """`visual` and `texts` have `encode` as the encoders of `ovref_inference.encoders`."""
        self._spec, self._visual, self._texts = spec, visual, texts
        # A noun is encoded alone, so that its bits do not depend on the nouns that came before it.
        self._noun_embedding = lru_cache(NOUNS_REMEMBERED)(
            lambda noun: class_embeddings(texts, [noun], spec.templates)[0]
        )

    def __call__(self, records: Iterator[ImageRecord]) -> Iterator[Reference | Dropped]:
        batch: list[tuple[ImageRecord, np.ndarray]] = []
        for record in records:
            if not record.regions:
                yield Dropped(record.key, "no_regions")
                continue
            try:
                image_hwc = record.image_hwc()
            except UnusableImageError as error:
                yield Dropped(record.key, error.reason)
                continue
            batch.append((record, image_hwc))
            if len(batch) == self._spec.batch_size:
                yield from self._embed(batch)
                batch = []
        if batch:
            yield from self._embed(batch)

    def _embed(self, batch: list[tuple[ImageRecord, np.ndarray]]) -> Iterator[Reference | Dropped]:
        features_nhwd = self._visual.encode([image_hwc for _, image_hwc in batch])
        captions_nd = self._texts.encode([record.caption for record, _ in batch])
        for (record, image_hwc), features_hwd, caption_d in zip(
            batch, features_nhwd, captions_nd, strict=True
        ):
            yield from self._references(record, image_hwc.shape[:2], features_hwd, caption_d)

    def _references(
        self,
        record: ImageRecord,
        size_hw: tuple[int, int],
        features_hwd: np.ndarray,
        caption_d: np.ndarray,
    ) -> Iterator[Reference | Dropped]:
        cells = features_hwd.shape[0] * features_hwd.shape[1]
        for number, region in enumerate(record.regions):
            key = f"{record.key}#{number}"
            area = masks.area(region.mask_hw)
            if region.mask_hw.shape != size_hw:
                yield Dropped(key, "wrong_mask_size")
                continue
            if area == 0:
                yield Dropped(key, "empty_mask")
                continue
            if area * cells < self._spec.min_cells:
                yield Dropped(key, "small_mask")
                continue
            pooled_1d, valid = pool_regions(features_hwd, region.mask_hw[None])
            if not valid[0] or not pooled_1d.any():
                yield Dropped(key, "nonfinite_features")
                continue
            textual_d = retrieval_embedding(
                self._noun_embedding(region.noun.text), caption_d, self._spec.weights
            )
            yield Reference(
                key=key,
                noun=region.noun,
                caption=record.caption,
                box_xyxy=masks.box_xyxy(region.mask_hw),
                area=area,
                score=region.score,
                source=region.source,
                seed=record.seed,
                visual=l2_normalised(pooled_1d[0]).astype(np.float16),
                textual=textual_d.astype(np.float16),
            )
