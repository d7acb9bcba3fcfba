"""Searches given inverted lists, which faiss' Python functions cannot do with parameters."""

from typing import Any

import numpy as np

from ovref_inference.collection.exact import faiss_module


def search_lists(
    index: Any,
    queries: np.ndarray,
    k: int,
    cosines: np.ndarray,
    lists: np.ndarray,
    *,
    params: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """As faiss' `IndexIVF.search`, in these lists of each query.

    Args:
        index: an IndexIVF.
        queries: (m, d) float32.
        cosines, lists: (m, nprobe) cosines of a query to centroids, and their lists; -1 is none.
        params: SearchParametersIVF with this nprobe.

    Returns:
        scores and ids, (m, k); -1 where the lists hold fewer.
    """
    faiss = faiss_module()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    cosines = np.ascontiguousarray(cosines, dtype=np.float32)
    lists = np.ascontiguousarray(lists, dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    ids = np.empty((len(queries), k), dtype=np.int64)
    arrays = (faiss.swig_ptr(array) for array in (lists, cosines, scores, ids))
    index.search_preassigned_c(
        len(queries), faiss.swig_ptr(queries), k, *arrays, False, params
    )  # fmt: skip
    return scores, ids
