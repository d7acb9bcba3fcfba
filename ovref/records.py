"""The records that flow through the builder. Frozen; arrays are checked once, when they are made.

A record's `key` identifies the caption and draw it comes from (`identity.record_key`) and stays the
same from caption to image; a reference's key is `<image key>#<region number>`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovref.images import decode_image
from ovref_inference.encoders.pooling import NO as NO
from ovref_inference.encoders.pooling import UNSURE as UNSURE
from ovref_inference.encoders.pooling import YES as YES


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A singular, lower-case concept and where the caption names it."""

    text: str
    start: int
    end: int
    """Characters [start, end) of the caption."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The true masks of a labelled image: each pixel belongs to one segment or to none."""

    nouns: tuple[tuple[int, ...], ...]
    """Numbers of the labels that name each segment, as they stand in the record; from 0."""
    map_png: bytes
    """PNG file of 16 bits, of the upright image or smaller: 0 is no segment, others follow from 1
    in the order of `nouns`."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption of a corpus, and its image where the corpus has one."""

    key: str
    text: str
    source: str
    """Where it stands in the corpus, for people: `captions_val2017.json:12`, an image id, ..."""
    draw: int = 0
    image: bytes | None = None
    """The encoded image file, as the corpus holds it."""
    labels: tuple[Noun, ...] = ()
    """What a labelled set says is in the image, each where `text` names it."""
    segments: Segments | None = None
    """The masks of the labels, where the set has them."""


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
    """The true masks of the nouns, where a labelled set has them."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A mask on an image, with its noun, score and source."""

    noun: Noun
    mask_hw: np.ndarray
    """(H, W) uint8 of NO, UNSURE, YES, at the image's size."""
    score: float
    """How sure the source is, higher is surer; its meaning is the source's."""
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
    """The encoded image (JPEG when generated). What is embedded is what is kept."""
    regions: tuple[Region, ...]
    heatmaps_nhw: np.ndarray | None = None
    """(regions, h, w) float16 attribution heatmaps, before binarisation, each in [0, 1] of its own
    range; None where the source makes none."""
    seed: int | None = None
    """Seed of the generator that made the image; None for a real image."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values: model id and revision, scheduler, steps, guidance, ..."""

    def image_hwc(self) -> np.ndarray:
        """The decoded image, (H, W, 3) uint8 RGB.

        Raises:
            UnusableImageError: see `ovref.images.decode_image`.
        """
        return decode_image(self.image)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One region's embeddings and where they come from."""

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
    """One image of a labelled data set that is there and whole, by its name in the set."""

    key: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """What an evaluation counted in one image."""

    key: str
    name: str
    """Its name in the data set."""
    tables: Mapping[str, np.ndarray]
    """By name, (n, columns) int64 or float64; the names have lower-case letters and `_` only."""
    maps: Mapping[int, bytes] = field(default_factory=dict)
    """Predicted label maps, by the number of the row that predicted them, as PNG files."""
