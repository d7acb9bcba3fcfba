"""Nearest neighbours by cosine: which faiss index, how it is built, searched and measured.

How many inverted lists a search must look into depends on k and on the kind of query: a class name
has its 350 nearest references in many more lists than a region has its 10 nearest. So recall is
measured at several k, with queries like those that the index will get, and every search takes the
`nprobe` for its own k.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection.format import SearchPoint
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors

EXACT_BELOW = 20_000
TRAIN_PER_LIST = 39
"""Training rows of one list: faiss' minimum; twice as many did not improve the recall."""
MEASURED_K = (10, 20, 70, 150, 350)
"""Neighbours that recall is measured for: of RetCLIP and CorrCLIPv2 (10, 20), FOSSIL (70, 150) and
FreeDA (350)."""
TARGET_RECALL = 0.95
TAIL = 4
"""How many times as much as the mean the worst tenth of the queries may miss. Rare nouns have their
references in lists of frequent ones; at a mean of 0.95 they keep a recall of 0.8."""
RECALL_QUERIES = 512
"""Queries of one measurement, which gives the mean recall to about 0.01."""
_ONE_SIDED_95 = 1.645
_CHUNK_ROWS = 65_536
_TIE = 1e-6
"""Rounding of a cosine in float32. References of one noun in equal captions tie; in others their
cosines differ by up to 1e-3, so that a wider tolerance would count nearly any as found."""


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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """faiss on one thread: two are many times slower on small k-means, and add up otherwise."""
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


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


def build_index(vectors: Vectors, factory: str | None = None, *, seed: int = 0) -> Any:
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


def nprobe_for(k: int, curve: Sequence[SearchPoint]) -> int | None:
    """Lists to search for the k nearest, from the curve in the manifest; None without a curve.

    The setting of the next larger k that was measured. Beyond the largest one nothing was
    measured, and lists are searched in proportion to k.
    """
    if not curve:
        return None
    for point in curve:
        if k <= point.k:
            return point.nprobe
    return -(-curve[-1].nprobe * k // curve[-1].k)


def search(
    index: Any,
    queries: np.ndarray,
    k: int,
    *,
    nprobe: int | None = None,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query, or all rows where there are fewer.

    A query whose lists hold fewer than k rows is searched again in twice as many, until it has k
    or all lists were searched.

    Args:
        queries: (m, d) L2-normalised.
        k: at least 1.
        nprobe: inverted lists to search at first; None for an exact index.
        excluded: sorted ids that are never returned.

    Returns:
        scores (m, min(k, rows)) float32, highest first, and ids of the same shape, int64; where
        exclusions leave fewer rows, the rest is -inf and -1.
    """
    excluded = np.zeros(0, dtype=np.int64) if excluded is None else excluded
    k = min(k, index.ntotal)
    there = min(k, index.ntotal - len(excluded))
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    nprobe = None if nprobe is None else min(nprobe, index.nlist)
    scores, ids = _search(index, queries, k, nprobe, excluded)
    while nprobe is not None and nprobe < index.nlist and there:
        short = np.flatnonzero(ids[:, there - 1] < 0)
        if not len(short):
            break
        nprobe = min(2 * nprobe, index.nlist)
        scores[short], ids[short] = _search(index, queries[short], k, nprobe, excluded)
    return scores, ids


def _search(
    index: Any, queries: np.ndarray, k: int, nprobe: int | None, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    faiss = faiss_module()
    settings: dict[str, Any] = {}
    if len(excluded):
        settings["sel"] = faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))
    if nprobe is None:
        options = faiss.SearchParameters(**settings)
    else:
        options = faiss.SearchParametersIVF(nprobe=nprobe, **settings)
    scores, ids = index.search(queries, k, params=options)
    scores[ids < 0] = -np.inf
    return scores, ids


def exact_search(
    vectors: Vectors, queries: np.ndarray, k: int, *, excluded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query, by comparing with every row, some of them at a time.

    Args:
        vectors: (n, d).
        queries: (m, d).
        excluded: ids that are never returned.

    Returns:
        scores (m, k) float32, highest first, and ids (m, k) int64; -inf and -1 beyond the rows.
    """
    faiss = faiss_module()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(vectors), _CHUNK_ROWS):
        chunk = np.asarray(vectors[start : start + _CHUNK_ROWS], dtype=np.float32)
        rows = np.arange(start, start + len(chunk))
        if excluded is not None and len(excluded):
            kept = ~np.isin(rows, excluded)
            rows, chunk = rows[kept], chunk[kept]
        if not len(rows):
            continue
        count = min(k, len(rows))
        scores, found = faiss.knn(queries, chunk, count, metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best, scores], axis=1)
        every = np.concatenate([ids, rows[found]], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.take_along_axis(every, order, axis=1)
    return best, ids


class Questions:
    """Queries for measuring recall, with the scores that true neighbours have at each k."""

    def __init__(
        self,
        vectors: Vectors,
        queries: np.ndarray,
        *,
        ks: Sequence[int] = MEASURED_K,
        own: np.ndarray | None = None,
        excluded: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            vectors: (n, d), all rows of the index.
            queries: (m, d) L2-normalised, m >= 1.
            ks: neighbours to measure for; more than there are rows count as all rows.
            own: (m,) the row that each query is, which is not its own neighbour; None for queries
                that are no rows.
            excluded: sorted ids of deleted rows, which are nobody's neighbours.
        """
        gone = 0 if excluded is None else len(excluded)
        others = len(vectors) - gone - (own is not None)
        self.ks = sorted({min(k, others) for k in ks})
        self.own, self.excluded = own, excluded
        self.queries = np.ascontiguousarray(queries, dtype=np.float32)
        # Nothing is nearer to a row than the row itself.
        first = int(own is not None)
        wanted = self.ks[-1] + first
        exact, _ = exact_search(vectors, self.queries, wanted, excluded=excluded)
        self._lowest = {k: exact[:, k - 1 + first] for k in self.ks if k}

    @classmethod
    def of_rows(
        cls,
        vectors: Vectors,
        *,
        count: int = RECALL_QUERIES,
        seed: int = 0,
        ks: Sequence[int] = MEASURED_K,
        excluded: np.ndarray | None = None,
    ) -> "Questions":
        """Some of the rows as queries: they stand for regions that the index has not seen."""
        rows = np.arange(len(vectors))
        if excluded is not None:
            rows = np.setdiff1d(rows, excluded)
        rows = rows[_sampled(len(rows), count, seed)]
        queries = np.asarray(vectors[rows], dtype=np.float32)
        return cls(vectors, queries, ks=ks, own=rows, excluded=excluded)

    def recalls(self, index: Any, nprobe: int | None = None) -> dict[int, np.ndarray]:
        """k -> (queries,) recall@k.

        A returned row counts when it scores no worse than the k-th true neighbour, but for
        rounding: references of one noun tie often, and any of the tied is as right as another.
        """
        excluded = np.zeros(0, dtype=np.int64) if self.excluded is None else self.excluded
        k = self.ks[-1] + (self.own is not None)
        scores, ids = _search(index, self.queries, k, nprobe, excluded)
        if self.own is not None:
            left_out = ids == self.own[:, None]
            left_out[:, -1] |= ~left_out.any(axis=1)  # not found, so one is too many
            scores = scores[~left_out].reshape(len(self.queries), k - 1)
        return {
            k: (scores[:, :k] >= self._lowest[k][:, None] - _TIE).mean(axis=1)
            if k
            else np.ones(len(self.queries))
            for k in self.ks
        }


def tune(
    index: Any, questions: Questions, *, target: float = TARGET_RECALL
) -> tuple[SearchPoint, ...]:
    """The smallest power-of-two `nprobe` that reaches `target` recall, for each k of `questions`.

    It is reached when the lower end of the recall's 95% confidence interval (one-sided, over
    queries) is: the smallest setting whose measurement happens to be high enough would else be
    taken, and other queries would find less. Besides, the tenth of the queries with the lowest
    recall may miss no more than `TAIL` times 1 - `target` in the mean.

    Returns:
        One point for each k, none for an exact index. A recall is below the target only when all
        lists were searched.
    """
    if not hasattr(index, "nlist"):
        return ()
    found: list[SearchPoint] = []
    nprobe = 1
    while True:
        for k, recalls in list(questions.recalls(index, nprobe).items())[len(found) :]:
            low = recalls.mean() - _ONE_SIDED_95 * recalls.std() / np.sqrt(len(recalls))
            worst = np.sort(recalls)[: -(-len(recalls) // 10)]
            reached = low >= target and 1 - worst.mean() <= TAIL * (1 - target) + 1e-9
            if not reached and nprobe < index.nlist:
                break
            found.append(
                SearchPoint(
                    k=k,
                    nprobe=nprobe,
                    recall=round(float(recalls.mean()), 4),
                    worst_tenth=round(float(worst.mean()), 4),
                )
            )
        if len(found) == len(questions.ks):
            return tuple(found)
        nprobe = min(2 * nprobe, index.nlist)


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


def sample(vectors: Vectors, count: int, seed: int, *, of: int | None = None) -> np.ndarray:
    """`count` of the rows (all, where there are fewer), float32, in their order.

    Args:
        of: only the first so many rows are drawn from.
    """
    among = len(vectors) if of is None else min(of, len(vectors))
    rows = _sampled(among, count, seed)
    found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), _CHUNK_ROWS):  # so that it is in memory once
        found[start : start + _CHUNK_ROWS] = vectors[rows[start : start + _CHUNK_ROWS]]
    return found


def _sampled(among: int, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` of the rows, ascending."""
    rows = np.random.default_rng(seed).choice(among, min(count, among), replace=False)
    return np.sort(rows)
