"""`ovref search`: finds references by noun, free text, image or region of an image.

A noun of the vocabulary needs no model, for its embedding is in the collection; other words are
embedded without torch where the text encoder allows it, because importing torch takes longer than
all the rest.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import InputError
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings
from ovref_pipelines.console import drawn


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query: words, or an image with a region; not both."""

    text: str = ""
    image: str | None = None
    box_xyxy: tuple[int, int, int, int] | None = None
    mask: str | None = None
    """An image file; pixels brighter than half of its maximum are the region."""

    def __post_init__(self) -> None:
        words = bool(self.text.strip())
        if words and self.image is not None:
            raise ValueError("give words to search for, or --image, not both")
        if not words and self.image is None:
            raise ValueError("there is nothing to search for: give words, or --image")
        if self.image is None and (self.box_xyxy or self.mask):
            raise ValueError("--box and --mask say where in an image: give --image too")
        if self.box_xyxy and self.mask:
            raise ValueError("give --box or --mask, not both")


@dataclass(frozen=True, kw_only=True)
class Found:
    """References, nearest first."""

    query: str
    """In words."""
    rows: list[dict[str, Any]]
    """Rows of the collection's table."""
    scores: list[float]
    """Cosine similarities."""


def search(collection: ReferenceCollection, query: Query, k: int) -> Found:
    """The k nearest references.

    Raises:
        InputError: the image or mask cannot be read, or the region is empty or outside the image.
        ModelError: an encoder cannot be loaded.
    """
    if query.text.strip():
        support = collection.search_text(_text_embedding(collection, query.text), k)
        words = query.text
    else:
        support = collection.search_regions(_region_embedding(collection, query), k)
        words = f"{query.image}{' (region)' if query.box_xyxy or query.mask else ''}"
    kept = support.ids[0] >= 0
    return Found(
        query=words,
        rows=collection.rows(support.ids[0][kept]),
        scores=[round(float(score), 4) for score in support.scores[0][kept]],
    )


def text(found: Found) -> str:
    """A table, for people."""
    from rich.table import Table

    table = Table(title=f"references nearest to {found.query}", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("noun", style="bold")
    table.add_column("caption", ratio=1)
    table.add_column("score", justify="right")
    table.add_column("key", no_wrap=True)
    for row, score in zip(found.rows, found.scores, strict=True):
        table.add_row(str(row["id"]), row["noun"], row["caption"], f"{score:.3f}", row["key"])
    # Brackets and colons in captions are not rich markup or emoji.
    return drawn(table, markup=False, emoji=False)


def as_json(found: Found) -> str:
    """The rows with their scores, for programs."""
    rows = [
        {**row, "similarity": score} for row, score in zip(found.rows, found.scores, strict=True)
    ]
    return json.dumps({"query": found.query, "references": rows}, indent=1, ensure_ascii=False)


def write_sheet(collection: ReferenceCollection, found: Found, path: str, build: str | None) -> int:
    """Writes a contact sheet of the references; returns how many of them have an image.

    Raises:
        InputError: there are no images of the collection, or the file cannot be written.
    """
    from ovref_pipelines.verbs.reference_images import reference_sheet

    titles = [
        (f"{row['noun']}  {score:.3f}", row["caption"])
        for row, score in zip(found.rows, found.scores, strict=True)
    ]
    png, there = reference_sheet(collection.url, found.rows, titles, build)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png)
    except OSError as error:
        raise InputError(f"cannot write the sheet {path}: {error}") from error
    return there


def _text_embedding(collection: ReferenceCollection, words: str) -> np.ndarray:
    noun = " ".join(words.lower().split())
    if noun in collection.nouns:
        return collection.noun_embeddings[[collection.nouns.index(noun)]]
    from ovref_inference.encoders.text_without_torch import load_without_torch

    quick = load_without_torch(collection.text_config)
    if quick is None:
        return collection.embed_text([words])
    return class_embeddings(quick, [words], collection.manifest.templates)


def _region_embedding(collection: ReferenceCollection, query: Query) -> np.ndarray:
    from ovref_inference.encoders import load_region_encoder

    image_hwc = _read(query.image or "")
    mask_hw = _region(query, image_hwc.shape[:2])
    encoder = load_region_encoder(collection.visual_config)
    ((features_nd, valid),) = encoder.encode_regions(
        [image_hwc], [mask_hw[None]], [mask_hw[None].astype(np.float32)]
    )
    if not valid.all():
        raise InputError(f"the features of {query.image} are not finite in this region")
    return features_nd


def _region(query: Query, size_hw: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool at the image's size. Raises InputError if it is empty."""
    mask_hw = np.zeros(size_hw, dtype=bool)
    if query.mask is not None:
        brightness_hw = _read(query.mask).max(2)
        if brightness_hw.shape != tuple(size_hw):
            raise InputError(
                f"the mask {query.mask} must have the size of its image, {size_hw[0]} x "
                f"{size_hw[1]}, found {brightness_hw.shape[0]} x {brightness_hw.shape[1]}"
            )
        mask_hw = brightness_hw > brightness_hw.max() / 2
    elif query.box_xyxy is not None:
        x0, y0, x1, y1 = query.box_xyxy
        if not (0 <= x0 < x1 <= size_hw[1] and 0 <= y0 < y1 <= size_hw[0]):
            raise InputError(
                f"the box x0,y0,x1,y1 must lie in the image of {size_hw[1]} x {size_hw[0]} pixels "
                f"(width x height), found {','.join(map(str, query.box_xyxy))}"
            )
        mask_hw[y0:y1, x0:x1] = True
    else:
        mask_hw[:] = True
    if not mask_hw.any():
        raise InputError(f"the region in {query.image} has no pixel")
    return mask_hw


def _read(place: str) -> np.ndarray:
    from ovref.exchange.photographs import Photograph
    from ovref.stored_images import UnusableImageError

    try:
        return Photograph(place=place, file_name=place).image_hwc()
    except UnusableImageError as error:
        raise InputError(f"{place} is not an image: {error}") from error
