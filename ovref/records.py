"""The records that flow through the builder. Frozen; arrays are checked on construction.

A record's `key` identifies its caption and draw (`identity.record_key`) and stays the same from
caption to image; a reference's key is `<image key>#<region number>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovref.stored_images import decode_image
from ovref_inference.encoders.pooling import NO as NO
from ovref_inference.encoders.pooling import UNSURE as UNSURE
from ovref_inference.encoders.pooling import YES as YES


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A singular, lower-case concept, and its span in the caption."""

    text: str
    start: int
    end: int
    """Characters [start, end) of the caption."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The true masks of a labelled image: each pixel belongs to one segment or to none."""

    nouns: tuple[tuple[int, ...], ...]
    """Indices of the labels that name each segment, in the record's order."""
    map_png: bytes
    """16-bit PNG file at the size of the upright image or smaller: 0 for no segment, then from 1 in
    the order of `nouns`."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption of a corpus, and its image if it has one."""

    key: str
    text: str
    source: str
    """Position in the corpus, for messages: `captions_val2017.json:12`, an image id, ..."""
    draw: int = 0
    image: bytes | None = None
    """The encoded image file, as stored in the corpus."""
    labels: tuple[Noun, ...] = ()
    """The labels of an image in a labelled set, each with its span in `text`."""
    segments: Segments | None = None
    """The masks of the labels, if the set has them."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption with its nouns, ready for generation or grounding."""

    key: str
    caption: str
    nouns: tuple[Noun, ...]
    source: str
    draw: int = 0
    image: bytes | None = None
    segments: Segments | None = None
    """The true masks of the nouns, if a labelled set has them."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A mask on an image, with its noun, score and source."""

    noun: Noun
    mask_hw: np.ndarray
    """(H, W) uint8 of NO, UNSURE, YES, at the image's size."""
    score: float
    """Confidence of the source; the scale depends on the source."""
    source: str
    """`daam`, `grounded_sam`, ..."""

    def __post_init__(self) -> None:
        if self.mask_hw.ndim != 2 or self.mask_hw.dtype != np.uint8:
            raise ValueError(
                f"mask_hw must be (H, W) uint8, found {self.mask_hw.shape} {self.mask_hw.dtype}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """An image with its caption and the regions that show its nouns."""

    key: str
    caption: str
    source: str
    image: bytes
    """The encoded image (JPEG if generated); the same file is embedded and stored."""
    regions: tuple[Region, ...]
    heatmaps_nhw: np.ndarray | None = None
    """(regions, h, w) float16 attribution heatmaps before binarisation, each rescaled to [0, 1];
    None if the source makes none."""
    seed: int | None = None
    """Seed of the generator that made the image; None for a real image."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values: model id and revision, scheduler, steps, guidance, ..."""

    def image_hwc(self) -> np.ndarray:
        """The decoded image, (H, W, 3) uint8 RGB.

        Raises:
            UnusableImageError: see `ovref.stored_images.decode_image`.
        """
        return decode_image(self.image)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The embeddings of a region, with provenance."""

    key: str
    noun: Noun
    caption: str
    box_xyxy: tuple[int, int, int, int]
    """Bounding box of the mask's YES pixels; right and bottom exclusive."""
    area: float
    """YES pixels as a fraction of the image, in (0, 1]."""
    score: float
    source: str
    seed: int | None
    visual: np.ndarray
    """(d_visual,) float16, L2-normalised."""
    textual: np.ndarray
    """(d_textual,) float16, L2-normalised."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """What else was measured of the region, by name, for filters; NaN where it could not be."""

    def __post_init__(self) -> None:
        for name in ("visual", "textual"):
            vector = getattr(self, name)
            if vector.ndim != 1 or vector.dtype != np.float16:
                raise ValueError(
                    f"{name} must be (d,) float16, found {vector.shape} {vector.dtype}"
                )


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image of a labelled data set that exists and is valid, by its name in the set."""

    key: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """The counts of an evaluation for one image."""

    key: str
    name: str
    """Name in the data set."""
    tables: Mapping[str, np.ndarray]
    """Name -> (n, columns) int64 or float64; names have only lower-case letters and `_`."""
    maps: Mapping[int, bytes] = field(default_factory=dict)
    """Predicted label maps as PNG files, by number of the predicting row."""
