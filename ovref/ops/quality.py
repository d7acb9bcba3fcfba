"""Measures of the reliability of references, on plain arrays.

A collection of generated or automatically labelled references contains masks that miss their noun.
Two measures find most of them without annotations: whether a reference's visual neighbours on
*other* images have the same noun, and whether a reference nearly duplicates another.
"""

import numpy as np

_ROUNDING = 1e-6
"""Rounding error of a cosine in float32."""
ODD = 3.0
"""A reference is suspicious if its agreement is this many median deviations below the median."""


def usable_rows(vectors_nd: np.ndarray, tolerance: float = 0.01) -> np.ndarray:
    """(n,) bool: whether each row is finite and of unit length, within `tolerance` for float16."""
    vectors_nd = vectors_nd.astype(np.float32)
    finite = np.isfinite(vectors_nd).all(axis=1)
    lengths = np.linalg.norm(np.where(finite[:, None], vectors_nd, 0), axis=1)
    return finite & (np.abs(lengths - 1) <= tolerance)


def noun_agreement(
    neighbours_qm: np.ndarray,
    query_rows_q: np.ndarray,
    nouns_n: np.ndarray,
    images_n: np.ndarray,
    elsewhere_n: np.ndarray,
    k: int,
) -> np.ndarray:
    """How well a reference's visual neighbours on other images share its noun, in [0, 1].

    For each query, the first k of its m candidates that lie on another image count, so a reference
    never supports itself, and regions of one image never support each other. The number with the
    query's noun is divided by its maximum, the smaller of k and the number of references with this
    noun on other images, so that rare nouns are not penalised. The idea is that of SegRAG's
    intra-class consistency check, which keeps a support feature if it retrieves its own class in
    other supports.

    Args:
        neighbours_qm: (q, m) int rows, nearest first, -1 where the search found fewer. For k to be
            reached, m must exceed k by the maximum number of references on one image.
        query_rows_q: (q,) int, the query rows.
        nouns_n, images_n: (n,) int codes of every row's noun and image.
        elsewhere_n: (n,) int, `count_on_other_images(nouns_n, images_n)`.
        k: neighbours to consider, at least 1.

    Returns:
        (q,) float64; NaN where no other image shows the noun.
    """
    other_image = images_n[neighbours_qm] != images_n[query_rows_q][:, None]
    considered = other_image & (neighbours_qm >= 0)
    considered &= np.cumsum(considered, axis=1) <= k
    same_noun = nouns_n[neighbours_qm] == nouns_n[query_rows_q][:, None]
    agreeing = (considered & same_noun).sum(axis=1)

    available = elsewhere_n[query_rows_q]
    with np.errstate(invalid="ignore"):
        return np.where(available > 0, agreeing / np.minimum(available, k), np.nan)


def agreement_with_others(
    vectors_nd: np.ndarray, deviations: float = ODD
) -> tuple[np.ndarray, np.ndarray]:
    """How well each of a noun's references agrees with the others.

    Args:
        vectors_nd: (n, d) float32 visual embeddings.
        deviations: how many median deviations below the median one is suspicious.

    Returns:
        (n,) cosines to the mean of the others, 1 for a single one; and (n,) bool, which are
        suspicious; of 4 or fewer none is.
    """
    count = len(vectors_nd)
    if count < 2:
        return np.ones(count), np.zeros(count, bool)
    others_nd = vectors_nd.sum(0) - vectors_nd
    norms = np.linalg.norm(others_nd, axis=1) * np.linalg.norm(vectors_nd, axis=1)
    agreement = (others_nd * vectors_nd).sum(1) / np.maximum(norms, 1e-12)
    middle = np.median(agreement)
    # 1.4826 makes the median deviation of a normal distribution its standard deviation.
    limit = middle - deviations * 1.4826 * np.median(np.abs(agreement - middle))
    return agreement, (agreement < limit) & (count > 4)


def count_on_other_images(nouns_n: np.ndarray, images_n: np.ndarray) -> np.ndarray:
    """(n,) int: number of references of the same noun on other images."""
    _, noun_codes, noun_counts = np.unique(nouns_n, return_inverse=True, return_counts=True)
    pairs = np.stack([nouns_n, images_n], axis=1)
    _, pair_codes, pair_counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    return noun_counts[noun_codes] - pair_counts[pair_codes.reshape(-1)]


def first_of_near_duplicates(
    vectors_nd: np.ndarray, min_cosine: float, existing: int = 0, block: int = 1024
) -> np.ndarray:
    """(n,) bool: the rows to keep so that no two kept rows have a cosine of `min_cosine` or more.

    Greedy, in order: a row is kept unless it is that near to a row kept before. Time is O(n kept),
    memory O(block kept).

    Args:
        vectors_nd: (n, d) float, no zero rows.
        min_cosine: in (-1, 1]; 1 for rows that are equal up to rounding.
        existing: number of leading rows that are always kept, duplicates or not.
        block: rows compared at a time; does not change the result.
    """
    # Float16 rows have unit length only within 1e-3, but cosines near 1 matter here.
    vectors_nd = vectors_nd.astype(np.float32)
    vectors_nd /= np.linalg.norm(vectors_nd, axis=1, keepdims=True)
    min_cosine -= _ROUNDING
    keep = np.zeros(len(vectors_nd), dtype=bool)
    for start in range(0, len(vectors_nd), block):
        rows = vectors_nd[start : start + block]
        kept_before = vectors_nd[:start][keep[:start]]
        alive = np.ones(len(rows), dtype=bool)
        if len(kept_before):
            alive = (rows @ kept_before.T).max(axis=1) < min_cosine
        near = rows @ rows.T >= min_cosine
        existing_here = max(existing - start, 0)
        alive[:existing_here] = True
        near[:, :existing_here] = False
        for row in range(len(rows)):
            if alive[row]:
                alive[row + 1 :] &= ~near[row, row + 1 :]
        keep[start : start + block] = alive
    return keep
