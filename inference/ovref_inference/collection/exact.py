"""Nearest neighbours by brute force."""

from typing import Any

import numpy as np

from ovref_inference.vectors import Vectors

CHUNK_ROWS = 65_536
"""Rows that are in memory in float32 at a time."""


def faiss_module() -> Any:
    """The module faiss. Raises an ImportError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "a reference collection needs faiss: pip install 'ovref[cpu]', or 'ovref[gpu]' on a "
            "machine with a GPU, never both (they are two builds of one module)"
        ) from error
    return faiss


def exact_search(
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    *,
    excluded: np.ndarray | None = None,
    rows: int = CHUNK_ROWS,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query by brute force, in chunks of rows.

    Args:
        vectors: (n, d).
        queries: (m, d).
        excluded: ids that are never returned.
        rows: of a chunk.

    Returns:
        scores (m, k) float32, highest first, and ids (m, k) int64; -inf and -1 beyond the rows.
    """
    faiss = faiss_module()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(vectors), rows):
        chunk = np.asarray(vectors[start : start + rows], dtype=np.float32)
        numbers = np.arange(start, start + len(chunk))
        if excluded is not None and len(excluded):
            kept = ~np.isin(numbers, excluded)
            numbers, chunk = numbers[kept], chunk[kept]
        if not len(numbers):
            continue
        count = min(k, len(numbers))
        scores, found = faiss.knn(queries, chunk, count, metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best, scores], axis=1)
        every = np.concatenate([ids, numbers[found]], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.take_along_axis(every, order, axis=1)
    return best, ids
