"""Which references stand for a noun: its own, and for a rare noun those of its nearest nouns."""

import numpy as np


def nearest_nouns(textual_vd: np.ndarray, rows_q: np.ndarray, count: int) -> np.ndarray:
    """The `count` nouns nearest to each asked noun by cosine, nearest first, itself left out.

    Args:
        textual_vd: (v, d) float, one unit text embedding per noun of the vocabulary.
        rows_q: (q,) int, the nouns to ask for.
        count: neighbours wanted; fewer come back when the vocabulary is smaller.

    Returns:
        (q, min(count, v - 1)) int. Equal cosines are ordered by row, so the result is the same
        on every run.
    """
    count = min(count, len(textual_vd) - 1)
    found = np.zeros((len(rows_q), count), dtype=np.int64)
    if count == 0:
        return found
    textual_vd = np.ascontiguousarray(textual_vd, dtype=np.float32)
    for start in range(0, len(rows_q), 256):
        rows = rows_q[start : start + 256]
        distances = -(textual_vd[rows] @ textual_vd.T)
        distances[np.arange(len(rows)), rows] = np.inf
        last_wanted = np.partition(distances, count - 1, axis=1)[:, count - 1]
        for row, (distance_v, last) in enumerate(zip(distances, last_wanted, strict=True)):
            near = np.flatnonzero(distance_v <= last)
            in_order = near[np.argsort(distance_v[near], kind="stable")]
            found[start + row] = in_order[:count]
    return found


def support_nouns(
    counts_v: np.ndarray, textual_vd: np.ndarray, min_references: int, max_neighbours: int
) -> list[np.ndarray]:
    """For every noun, the nouns whose references make its prototypes: itself first.

    A noun with `min_references` or more stands alone. A rarer one takes in its nearest nouns in
    text space, one by one, until they have `min_references` together or `max_neighbours` have
    been taken (VOCSeg, section 3.1, "Handling rare nouns"; the paper's N is 10). The noun's own
    few references stay in, because they are what is surely of that noun.

    Args:
        counts_v: (v,) int, references of each noun.
        textual_vd: (v, d) float, unit rows.
        min_references: at least 1.
        max_neighbours: 0 for none.
    """
    supports = [np.array([noun]) for noun in range(len(counts_v))]
    rare = np.flatnonzero(counts_v < min_references)
    if max_neighbours == 0 or len(rare) == 0:
        return supports
    for noun, nearest in zip(rare, nearest_nouns(textual_vd, rare, max_neighbours), strict=True):
        together = counts_v[noun] + np.cumsum(counts_v[nearest])
        needed = int(np.searchsorted(together, min_references)) + 1
        supports[noun] = np.concatenate([[noun], nearest[:needed]])
    return supports
