"""Whether CLIP sees in the images of references what their nouns say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovref.exchange.class_lists import Classes
from ovref.exchange.picture_files import Picture
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.crops import masked_crop
from ovref_inference.segmenters.regions import best_of_names

SAMPLE = 24
"""Maximum number of references per class compared by CLIP."""
_BATCH = 64


Pictures = Callable[[list[dict[str, Any]]], Iterable[tuple[dict[str, Any], Picture]]]
"""Gives the pictures of rows of a collection, each with its row, in any order; those it has."""


@dataclass(frozen=True, kw_only=True)
class ClipAgreement:
    """CLIP's agreement with a sample of a class's references."""

    references: int
    """References of the sample whose image is there."""
    cosine: float
    """Mean cosine of the box around each region to the class's text, of several names the
    nearest."""
    first: float
    """Share of them that are nearer to this class than to any other of the list."""


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the values, evenly spaced."""
    return values[:: max(1, -(-len(values) // most))]


def clip_agreement(
    collection: ReferenceCollection,
    classes: Classes,
    ids: Sequence[np.ndarray],
    pictures: Pictures,
) -> list[ClipAgreement | None]:
    """CLIP's agreement for each class; None if no image of its references is available.

    The CLIP is the collection's own, whose text tower made its textual embeddings.

    Args:
        collection: the collection.
        classes: the classes and their synonyms.
        ids: of each class, its references.
        pictures: gives the pictures of rows, each with its row; those that are there.

    Raises:
        ModelError: CLIP cannot be loaded.
    """
    owners: dict[int, list[int]] = {}  # a reference may stand for two classes
    for at, of_class in enumerate(ids):
        for number in thinned(of_class, SAMPLE).tolist():
            owners.setdefault(number, []).append(at)
    texts_nd = collection.embed_text(classes.query_names)
    cosines: list[list[float]] = [[] for _ in ids]
    first: list[int] = [0] * len(ids)

    def compare(batch: list[tuple[int, np.ndarray]]) -> None:
        images_bd = collection.embed_images([crop_hwc for _, crop_hwc in batch])
        texts_nb = texts_nd @ images_bd.T
        scores_bc = best_of_names(texts_nb.T, classes.class_of, len(classes.names))
        for (number, _), scores_c in zip(batch, scores_bc, strict=True):
            for at in owners[number]:
                cosines[at].append(float(scores_c[at]))
                first[at] += bool(scores_c[at] >= scores_c.max())

    batch: list[tuple[int, np.ndarray]] = []
    for row, picture in pictures(collection.rows(sorted(owners))):
        if picture.mask_hw is None or not picture.mask_hw.any():
            continue
        batch.append((row["id"], masked_crop(picture.image_hwc, picture.mask_hw, "none")))
        if len(batch) == _BATCH:
            compare(batch)
            batch = []
    if batch:
        compare(batch)
    return [
        ClipAgreement(
            references=len(found), cosine=float(np.mean(found)), first=first[at] / len(found)
        )
        if found
        else None
        for at, found in enumerate(cosines)
    ]
