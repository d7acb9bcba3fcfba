"""Representative references of a noun, and click points inside their masks."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from ovref_inference.collection.reference_collection import ReferenceCollection


def best_references(
    collection: ReferenceCollection, nouns: Sequence[str], k: int
) -> Iterator[tuple[str, list[int]]]:
    """k representative references of each noun: the nearest of its own references to each of k
    prototypes, without repetition; all references if there are at most k.

    Yields:
        The noun and the ids of its references, those of the largest clusters first.
    """
    place = {noun: row for row, noun in enumerate(collection.nouns)}
    for noun in nouns:
        ids = collection.references_of(noun)
        if len(ids) <= k:
            yield noun, ids.tolist()
            continue
        vectors_nd = np.asarray(collection.visual[ids], dtype=np.float32)
        texts = collection.noun_embeddings[[place[noun]]]
        found = collection.prototypes([noun], k, text_embeddings=texts, floor=None)
        cosines = vectors_nd @ found.vectors_nkd[0, : found.counts[0]].T
        sizes = np.bincount(cosines.argmax(1), minlength=cosines.shape[1])
        chosen: list[int] = []
        for cluster in np.argsort(-sizes, kind="stable"):
            order = np.argsort(-cosines[:, cluster], kind="stable")
            chosen.append(next(int(row) for row in order if int(row) not in chosen))
        rest = [int(row) for row in np.argsort(-cosines.max(1), kind="stable")]
        chosen += [row for row in rest if row not in chosen][: max(0, k - len(chosen))]
        yield noun, ids[chosen[:k]].tolist()


def click_points(mask_hw: np.ndarray, count: int = 3) -> list[tuple[int, int]]:
    """Pixels (x, y) inside a mask, as a person would click: first the one farthest from its edge,
    then repeatedly the one farthest from the edge and the previous points. Fewer if the mask has
    fewer pixels, none if it is empty."""
    padded = np.pad(mask_hw, 1)
    depth_hw = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    points: list[tuple[int, int]] = []
    rows, columns = np.indices(mask_hw.shape)
    while len(points) < count and depth_hw.max(initial=0) > 0:
        y, x = np.unravel_index(int(depth_hw.argmax()), depth_hw.shape)
        points.append((int(x), int(y)))
        away_hw = np.hypot(rows - y, columns - x)
        depth_hw = np.minimum(depth_hw, away_hw)
    return points
