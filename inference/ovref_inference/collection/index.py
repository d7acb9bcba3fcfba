"""Nearest neighbours by cosine: which faiss index, built how, and how good it measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.errors import CollectionError

EXACT_BELOW = 20_000
TRAIN_PER_LIST = 39
"""What faiss' k-means asks for at least; twice as many did not find more neighbours."""
TARGET_RECALL = 0.95
RECALL_QUERIES = 512
"""The recall of a search is measured with so many, to about 0.01."""
_ONE_SIDED_95 = 1.645
_CHUNK_ROWS = 65_536
_TIE = 1e-6
"""Rounding of a cosine in float32. References of one noun in equal captions tie; in others their
cosines differ by less than 1e-3, so that a wider tolerance would count nearly any as found."""


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
        n < 10M       IVF<c>,SQfp16              c = the power of two nearest 4 sqrt(n)
        n < 300M      IVF65536_HNSW32,SQfp16
        above         IVF262144_HNSW32,SQfp16

    The numbers of lists are the lowest of faiss' guidelines (4 to 16 sqrt(n)), since building takes
    time in proportion to them. Codes are always float16: embeddings are stored in float16, so
    nothing is lost to them and only probing can miss a neighbour, whereas product quantisation
    loses a third or more. IVF also serves from disk.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"an index needs n >= 1 vectors of dim >= 1, found n={n}, dim={dim}")
    if n < EXACT_BELOW:
        return "Flat"
    if n < 10_000_000:
        return f"IVF{2 ** round(np.log2(4 * np.sqrt(n)))},SQfp16"
    if n < 300_000_000:
        return "IVF65536_HNSW32,SQfp16"
    return "IVF262144_HNSW32,SQfp16"


def training_rows(n: int, factory: str) -> tuple[int, int]:
    """How many rows an inverted file of n is trained on, and among how many of the first.

    They are drawn from no more rows than the smallest collection with as many lists has, so that a
    collection that grows within that range keeps its centroids and needs no other index than one
    that was built at once. (0, 0) for an index without lists.
    """
    if not factory.startswith("IVF"):
        return 0, 0
    lists = int(factory.removeprefix("IVF").partition(",")[0].partition("_")[0])
    least = {65_536: 10_000_000, 262_144: 300_000_000}.get(lists, lists * lists // 32)
    among = min(n, max(least, EXACT_BELOW))
    return min(TRAIN_PER_LIST * lists, among), among


def build_index(vectors: np.ndarray, factory: str | None = None, *, seed: int = 0) -> Any:
    """A trained and filled faiss index by inner product, in memory; row i gets id i.

    On one thread, so that equal input gives an equal index.

    Args:
        vectors: (n, d) L2-normalised, float16 or float32, possibly memory-mapped; read in chunks.
        factory: faiss factory string; None takes `choose_index`.
        seed: of the training sample.
    """
    faiss = faiss_module()
    n, dim = vectors.shape
    factory = factory or choose_index(n, dim)
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if factory.endswith("SQfp16"):
        index.by_residual = False  # the code of a float16 vector is that vector
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        if not index.is_trained:
            index.train(sample(vectors, getattr(index, "nlist", 1) * TRAIN_PER_LIST, seed))
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
    """Like `search`, by comparing with every row, in chunks; of equals the lowest row comes first.

    Args:
        vectors: (n, d), anything that gives rows by slices.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(vectors), _CHUNK_ROWS):
        scores = queries @ np.asarray(vectors[start : start + _CHUNK_ROWS], dtype=np.float32).T
        if scores.shape[1] > k:
            # Rows as good as the k-th are all kept, since which of them comes first is not chance.
            lowest = np.partition(scores, -k, axis=1)[:, -k]
            rows = np.flatnonzero((scores >= np.maximum(lowest, best[:, -1])[:, None]).any(axis=0))
            scores = scores[:, rows]
        else:
            rows = np.arange(scores.shape[1])
        every = np.broadcast_to(start + rows, scores.shape)
        scores, every = np.concatenate([best, scores], axis=1), np.concatenate([ids, every], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.take_along_axis(every, order, axis=1)
    return best, ids


def measure_recall(
    index: Any,
    vectors: np.ndarray,
    *,
    k: int = 10,
    queries: int = RECALL_QUERIES,
    seed: int = 0,
    parameters: dict[str, int] | None = None,
) -> float:
    """Recall@k against exact search, in [0, 1], over some of the rows as queries.

    Queries stand for regions and texts that the collection has not seen, so a row is not its own
    neighbour: it asks for the k nearest others. A returned row counts when it scores no worse than
    the k-th of those (but for rounding): references of one noun tie often, and any of the tied is
    as right as another.
    """
    return float(_recalls(index, vectors, _ask(vectors, k, queries, seed), parameters).mean())


def tune(
    index: Any,
    vectors: np.ndarray,
    *,
    k: int = 10,
    queries: int = RECALL_QUERIES,
    seed: int = 0,
    target: float = TARGET_RECALL,
) -> tuple[dict[str, int], float]:
    """The smallest power-of-two `nprobe` (IVF) or `efSearch` (HNSW) that reaches `target` recall@k.

    It is reached when the lower end of the recall's 95% confidence interval (one-sided, over
    queries) is: the smallest setting whose measurement happens to be high enough would else be
    taken, and other queries would find less.

    Returns:
        The search parameters, `{}` for an exact index, and the recall measured with them, as by
        `measure_recall`. The recall is below the target only when no setting reaches it.
    """
    if hasattr(index, "nlist"):
        name, largest = "nprobe", index.nlist
    elif hasattr(index, "hnsw"):
        name, largest = "efSearch", len(vectors)
    else:
        return {}, 1.0
    asked = _ask(vectors, k, queries, seed)
    value = 1 if name == "nprobe" else k
    while True:
        value = min(value, largest)
        recalls = _recalls(index, vectors, asked, {name: value})
        low = recalls.mean() - _ONE_SIDED_95 * recalls.std() / np.sqrt(len(recalls))
        if low >= target or value == largest:
            return {name: value}, float(recalls.mean())
        value *= 2


def write_index(index: Any, path: str | Path) -> None:
    """Writes the index to a local file."""
    faiss_module().write_index(index, str(path))


def read_index(path: str | Path, *, rows: int | None = None, dim: int | None = None) -> Any:
    """The index, served from disk through a memory map.

    Args:
        rows, dim: of the vectors that it must be over; None takes any.

    Raises:
        CollectionError: missing, cut off, or over other rows or another width than the collection.
    """
    faiss = faiss_module()
    try:
        # IVF lists map with one flag, flat and graph codes with the other.
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise CollectionError(f"cannot read the index {path}: {error}") from error
    if rows not in (None, index.ntotal) or dim not in (None, index.d):
        raise CollectionError(
            f"the index {path} holds {index.ntotal} vectors of width {index.d}, "
            f"the collection {rows} of width {dim}: publish it again"
        )
    return index


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Rows as queries, and what the k nearest others of each score."""

    rows: np.ndarray
    queries: np.ndarray
    k: int
    threshold: np.ndarray
    """(queries,) float32: the score of the k-th nearest other."""


def _ask(vectors: np.ndarray, k: int, queries: int, seed: int) -> _Asked:
    rows = _drawn(len(vectors), queries, seed)
    asked = np.asarray(vectors[rows], dtype=np.float32)
    k = min(k, len(vectors) - 1)
    exact, _ = exact_search(vectors, asked, k + 1)  # nothing is nearer than the row itself
    return _Asked(rows=rows, queries=asked, k=k, threshold=exact[:, -1])


def _recalls(
    index: Any, vectors: np.ndarray, asked: _Asked, parameters: dict[str, int] | None
) -> np.ndarray:
    """(queries,) the recall of each."""
    if asked.k == 0:
        return np.ones(len(asked.rows))
    _, ids = search(index, asked.queries, asked.k + 1, parameters=parameters)
    left_out = ids == asked.rows[:, None]
    left_out[:, -1] |= ~left_out.any(axis=1)  # the row itself was not found, so one is too many
    ids = ids[~left_out].reshape(-1, asked.k)
    found = np.asarray(vectors[np.maximum(ids, 0).ravel()], dtype=np.float32)
    scores = np.einsum("qd,qkd->qk", asked.queries, found.reshape(*ids.shape, -1))
    return ((ids >= 0) & (scores >= asked.threshold[:, None] - _TIE)).mean(axis=1)


def sample(vectors: np.ndarray, count: int, seed: int, *, of: int | None = None) -> np.ndarray:
    """`count` of the rows (all, where there are fewer), float32, in their order.

    Args:
        of: only the first so many rows are drawn from.
    """
    among = len(vectors) if of is None else min(of, len(vectors))
    rows = _drawn(among, count, seed)
    found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), _CHUNK_ROWS):  # so that it is in memory once
        found[start : start + _CHUNK_ROWS] = vectors[rows[start : start + _CHUNK_ROWS]]
    return found


def _drawn(among: int, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` of the rows, ascending."""
    rows = np.random.default_rng(seed).choice(among, min(count, among), replace=False)
    return np.sort(rows)
