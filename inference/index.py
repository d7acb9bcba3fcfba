"""Nearest neighbours by cosine: which faiss index, built how, and how good it measured."""

from pathlib import Path
from typing import Any

import numpy as np
from ovref_inference.errors import CollectionError

EXACT_BELOW = 20_000
TRAIN_PER_LIST = 100
TARGET_RECALL = 0.95
_CHUNK_ROWS = 65_536
_TIE = 1e-3
"""Float16 embeddings of one caption often tie; scores this close count as the same neighbour."""


def faiss_module() -> Any:
    """faiss, or an ImportError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "a reference collection needs faiss: pip install 'ovref[cpu]', or 'ovref[gpu]' on a "
            "machine with a GPU, never both (they are two builds of one module)"
        ) from error
    return faiss


def choose_index(n: int, dim: int) -> str:
    """The faiss factory string for n vectors of width dim.

        n < 20k       Flat                       exact; a search is a few milliseconds
        n < 1M        IVF<c>,SQfp16              c = the power of two nearest 4 sqrt(n)
        n < 10M       IVF16384,SQfp16
        n < 300M      IVF65536_HNSW32,SQfp16
        above         IVF262144_HNSW32,SQfp16

    The numbers of lists are those of faiss' guidelines and of autofaiss. Codes are always float16:
    embeddings are stored in float16, so nothing is lost to them and only probing can miss a
    neighbour, whereas product quantisation loses a third or more. IVF also serves from disk.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"an index needs n >= 1 vectors of dim >= 1, found n={n}, dim={dim}")
    if n < EXACT_BELOW:
        return "Flat"
    if n < 1_000_000:
        return f"IVF{2 ** round(np.log2(4 * np.sqrt(n)))},SQfp16"
    if n < 10_000_000:
        return "IVF16384,SQfp16"
    if n < 300_000_000:
        return "IVF65536_HNSW32,SQfp16"
    return "IVF262144_HNSW32,SQfp16"


def build_index(
    vectors: np.ndarray, factory: str | None = None, *, seed: int = 0, threads: int = 1
) -> Any:
    """A trained and filled faiss index by inner product; row i gets id i.

    Args:
        vectors: (n, d) L2-normalised, float16 or float32, possibly memory-mapped; read in chunks.
        factory: faiss factory string; None takes `choose_index`.
        seed: of the training sample.
        threads: for faiss while building; with 1 equal input gives an equal index.
    """
    faiss = faiss_module()
    n, dim = vectors.shape
    factory = factory or choose_index(n, dim)
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        if not index.is_trained:
            index.train(_sample(vectors, getattr(index, "nlist", 1) * TRAIN_PER_LIST, seed))
        for start in range(0, n, _CHUNK_ROWS):
            index.add(np.asarray(vectors[start : start + _CHUNK_ROWS], dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return index


def search(
    index: Any,
    queries: np.ndarray,
    k: int,
    *,
    parameters: dict[str, int] | None = None,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query.

    Args:
        queries: (m, d) L2-normalised.
        k: >= 1.
        parameters: `{"nprobe": ...}` or `{"efSearch": ...}`, as kept in the manifest.
        excluded: sorted ids never to be returned.

    Returns:
        scores (m, k) float32, highest first, and ids (m, k) int64; where there are fewer than k
        rows the rest is -inf and -1.
    """
    faiss = faiss_module()
    settings: dict[str, Any] = dict(parameters or {})
    if excluded is not None and len(excluded):
        settings["sel"] = faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))
    if "nprobe" in settings:
        options = faiss.SearchParametersIVF(**settings)
    elif "efSearch" in settings:
        options = faiss.SearchParametersHNSW(**settings)
    else:
        options = faiss.SearchParameters(**settings)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    scores, ids = index.search(queries, k, params=options)
    scores[ids < 0] = -np.inf
    return scores, ids


def exact_search(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `search`, by comparing with every row, in chunks."""
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(vectors), _CHUNK_ROWS):
        chunk = np.asarray(vectors[start : start + _CHUNK_ROWS], dtype=np.float32)
        scores = np.concatenate([best, queries @ chunk.T], axis=1)
        new = np.broadcast_to(np.arange(start, start + len(chunk)), (len(queries), len(chunk)))
        every = np.concatenate([ids, new], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.take_along_axis(every, order, axis=1)
    return best, ids


def measure_recall(
    index: Any,
    vectors: np.ndarray,
    *,
    k: int = 10,
    queries: int = 256,
    seed: int = 0,
    parameters: dict[str, int] | None = None,
) -> float:
    """Recall@k against exact search, in [0, 1], over some of the vectors themselves as queries.

    A returned row counts when it scores no worse than the k-th exact neighbour (within 1e-3):
    references of one noun tie often, and any of the tied is as right as another.
    """
    sample = _sample(vectors, queries, seed)
    k = min(k, len(vectors))
    exact, _ = exact_search(vectors, sample, k)
    return _recall(index, vectors, sample, exact[:, -1], k, parameters)


def tune(
    index: Any,
    vectors: np.ndarray,
    *,
    k: int = 10,
    queries: int = 256,
    seed: int = 0,
    target: float = TARGET_RECALL,
) -> tuple[dict[str, int], float]:
    """The smallest power-of-two `nprobe` (IVF) or `efSearch` (HNSW) that reaches `target` recall@k.

    Returns:
        The search parameters, `{}` for an exact index, and the recall measured with them. The
        recall is below the target only when no setting reaches it.
    """
    if hasattr(index, "nlist"):
        name, largest = "nprobe", index.nlist
    elif hasattr(index, "hnsw"):
        name, largest = "efSearch", len(vectors)
    else:
        return {}, 1.0
    sample = _sample(vectors, queries, seed)
    k = min(k, len(vectors))
    exact, _ = exact_search(vectors, sample, k)
    value = 1 if name == "nprobe" else k
    while True:
        value = min(value, largest)
        recall = _recall(index, vectors, sample, exact[:, -1], k, {name: value})
        if recall >= target or value == largest:
            return {name: value}, recall
        value *= 2


def write_index(index: Any, path: str | Path) -> None:
    """Writes the index to a local file."""
    faiss_module().write_index(index, str(path))


def read_index(path: str | Path, *, rows: int, dim: int) -> Any:
    """The index, served from disk through a memory map.

    Raises:
        CollectionError: missing, cut off, or over other rows or another width than the collection.
    """
    faiss = faiss_module()
    try:
        # IVF lists map with one flag, flat and graph codes with the other.
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise CollectionError(f"cannot read the index {path}: {error}") from error
    if (index.ntotal, index.d) != (rows, dim):
        raise CollectionError(
            f"the index {path} holds {index.ntotal} vectors of width {index.d}, "
            f"the collection {rows} of width {dim}: publish it again"
        )
    return index


def _recall(
    index: Any,
    vectors: np.ndarray,
    sample: np.ndarray,
    threshold: np.ndarray,
    k: int,
    parameters: dict[str, int] | None,
) -> float:
    _, ids = search(index, sample, k, parameters=parameters)
    found = np.asarray(vectors[np.maximum(ids, 0).ravel()], dtype=np.float32)
    scores = np.einsum("qd,qkd->qk", sample, found.reshape(*ids.shape, -1))
    return float(((ids >= 0) & (scores >= threshold[:, None] - _TIE)).mean())


def _sample(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the rows (all, where there are fewer), float32, in their order."""
    if count >= len(vectors):
        return np.asarray(vectors, dtype=np.float32)
    rows = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    return np.asarray(vectors[np.sort(rows)], dtype=np.float32)
