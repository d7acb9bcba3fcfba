"""Nearest neighbours by cosine: choosing, building, searching and measuring faiss indices.

The number of inverted lists that a search must probe depends on k and on the kind of query: the 350
nearest references of a class name are spread over many more lists than the 10 nearest of a region.
So recall is measured at several k, with queries like those that the index will serve, and each
search uses the `nprobe` for its own k.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection.exact import CHUNK_ROWS, exact_search, faiss_module
from ovref_inference.collection.format import SearchPoint
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors

EXACT_BELOW = 20_000
TRAIN_PER_LIST = 39
"""Training rows per list: faiss' minimum; twice as many did not improve recall."""
MEASURED_K = (10, 20, 70, 150, 350)
"""Values of k for which recall is measured: those of RetCLIP and CorrCLIPv2 (10, 20), FOSSIL (70,
150) and FreeDA (350)."""
TARGET_RECALL = 0.95
TAIL = 4
"""Allowed ratio of the miss rate of the worst 10% of the queries to the mean miss rate. References
of rare nouns are in lists of frequent ones; at a mean of 0.95 they keep a recall of 0.8."""
RECALL_QUERIES = 512
"""Number of queries per measurement; enough for a mean recall accurate to about 0.01."""
_ONE_SIDED_95 = 1.645
_MATRIX_QUERIES = 100
"""Queries from which it is faster to decode an exact float16 index, `_DECODED_ROWS` at a time, and
multiply matrices: 20,000 vectors of 768 numbers take 4.2 ms a query otherwise, 1.1 ms with 171."""
_DECODED_ROWS = 8192
_TIE = 1e-6
"""Rounding of a cosine in float32. References of one noun tie if their captions are equal;
otherwise their cosines differ by up to 1e-3, so a wider tolerance would count nearly any of them as
found."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits faiss to one thread: two are many times slower for small k-means, and sum in another
    order."""
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def choose_index(n: int, dim: int) -> str:
    """The faiss factory string for n vectors of width dim.

        n < 20k       SQfp16                     exact; a search is a few milliseconds
        n < 10M       IVF<c>,SQfp16              c = the power of two nearest 4 sqrt(n)
        n < 300M      IVF65536_HNSW32,SQfp16
        above         IVF262144_HNSW32,SQfp16

    The numbers of lists are the lowest of faiss' guidelines (4 to 16 sqrt(n)), since building takes
    time in proportion to them. Codes are always float16: embeddings are stored in float16, so
    nothing is lost to them and only probing can miss a neighbour, whereas product quantisation
    loses a third or more. Either serves from disk.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"an index needs n >= 1 vectors of dim >= 1, found n={n}, dim={dim}")
    if n < EXACT_BELOW:
        return "SQfp16"
    if n < 10_000_000:
        return f"IVF{2 ** round(np.log2(4 * np.sqrt(n)))},SQfp16"
    if n < 300_000_000:
        return "IVF65536_HNSW32,SQfp16"
    return "IVF262144_HNSW32,SQfp16"


def list_count(factory: str) -> int:
    """Inverted lists of an index of this factory string; 0 for an exact one."""
    name = factory.partition(",")[0].partition("_")[0]
    return int(name.removeprefix("IVF")) if name.startswith("IVF") else 0


def training_rows(n: int, factory: str) -> tuple[int, int]:
    """Number of rows to train an inverted file of n rows on, and of first rows to sample them from.

    They are sampled from no more rows than the smallest collection with as many lists has. A
    collection that grows within that range then keeps its centroids and gets the index of one that
    was built at once. (0, 0) for an index without lists.
    """
    if not factory.startswith("IVF"):
        return 0, 0
    lists = list_count(factory)
    least = {65_536: 10_000_000, 262_144: 300_000_000}.get(lists, lists * lists // 32)
    among = min(n, max(least, EXACT_BELOW))
    return min(TRAIN_PER_LIST * lists, among), among


def build_index(vectors: Vectors, factory: str | None = None, *, seed: int = 0) -> Any:
    """A trained and filled faiss index by inner product, in memory; row i gets id i.

    Uses one thread, so that equal input gives an equal index.

    Args:
        vectors: (n, d) L2-normalised, float16 or float32, possibly memory-mapped; read in chunks.
        factory: faiss factory string; None takes `choose_index`.
        seed: of the training sample.
    """
    faiss = faiss_module()
    n, dim = vectors.shape
    factory = factory or choose_index(n, dim)
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if factory.endswith(",SQfp16"):
        index.by_residual = False  # the code of a float16 vector is that vector
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        if not index.is_trained:
            index.train(sample(vectors, getattr(index, "nlist", 1) * TRAIN_PER_LIST, seed))
        for start in range(0, n, CHUNK_ROWS):
            index.add(np.asarray(vectors[start : start + CHUNK_ROWS], dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return index


def nprobe_for(k: int, curve: Sequence[SearchPoint]) -> int | None:
    """Number of lists to probe for the k nearest, from the manifest's curve; None without a curve.

    Takes the setting of the next larger measured k. Beyond the largest one, `nprobe` grows in
    proportion to k.
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

    A query whose lists hold fewer than k rows is repeated with twice as many lists, until it finds
    k or all lists were probed.

    Args:
        queries: (m, d) L2-normalised.
        k: at least 1.
        nprobe: number of inverted lists to probe first; None for an exact index.
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


def search_settings(excluded: np.ndarray) -> dict[str, Any]:
    """Search parameters that leave these ids out."""
    faiss = faiss_module()
    return {"sel": faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))} if len(excluded) else {}


def _search(
    index: Any, queries: np.ndarray, k: int, nprobe: int | None, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    faiss = faiss_module()
    exact = isinstance(index, faiss.IndexScalarQuantizer)
    exact_halves = exact and index.code_size == 2 * index.d  # others hold no float16
    if exact_halves and len(queries) >= _MATRIX_QUERIES:
        return exact_search(_codes(index), queries, k, excluded=excluded, rows=_DECODED_ROWS)
    if nprobe is None:
        options = faiss.SearchParameters(**search_settings(excluded))
    else:
        options = faiss.SearchParametersIVF(nprobe=nprobe, **search_settings(excluded))
    scores, ids = index.search(queries, k, params=options)
    scores[ids < 0] = -np.inf
    return scores, ids


def _codes(index: Any) -> np.ndarray:
    """The (n, d) float16 vectors of an exact index, without a copy; valid as long as it is."""
    raw = faiss_module().rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return raw.view("<f2").reshape(index.ntotal, index.d)


class RecallQueries:
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
            ks: numbers of neighbours to measure for, capped at the number of rows.
            own: (m,) row of each query, excluded from its own neighbours; None if queries are not
                rows.
            excluded: sorted ids of deleted rows, which are not neighbours of any query.
        """
        deleted = 0 if excluded is None else len(excluded)
        others = len(vectors) - deleted - (own is not None)
        self.ks = sorted({min(k, others) for k in ks})
        self.own, self.excluded = own, excluded
        self.queries = np.ascontiguousarray(queries, dtype=np.float32)
        # A row is its own nearest neighbour, so it comes first.
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
    ) -> "RecallQueries":
        """Uses some of the rows as queries, as substitutes for unseen regions."""
        rows = np.arange(len(vectors))
        if excluded is not None:
            rows = np.setdiff1d(rows, excluded)
        rows = rows[_sampled(len(rows), count, seed)]
        queries = np.asarray(vectors[rows], dtype=np.float32)
        return cls(vectors, queries, ks=ks, own=rows, excluded=excluded)

    def recalls(
        self, index: Any, nprobe: int | None = None, vectors: Vectors | None = None
    ) -> dict[int, np.ndarray]:
        """k -> (queries,) recall@k.

        A returned row counts if it scores no worse than the k-th true neighbour, up to rounding:
        references of one noun often tie, and any of the tied rows is correct.

        Args:
            vectors: (n, d), the rows, for an index whose own scores are not exact.
        """
        excluded = np.zeros(0, dtype=np.int64) if self.excluded is None else self.excluded
        k = self.ks[-1] + (self.own is not None)
        scores, ids = _search(index, self.queries, k, nprobe, excluded)
        if vectors is not None:
            for query, found, of_one in zip(self.queries, ids, scores, strict=True):
                of_one[:] = np.asarray(vectors[np.maximum(found, 0)], np.float32) @ query
            scores[ids < 0] = -np.inf
        if self.own is not None:
            left_out = ids == self.own[:, None]
            left_out[:, -1] |= ~left_out.any(axis=1)  # not found, so drop one neighbour
            scores = scores[~left_out].reshape(len(self.queries), k - 1)
        return {
            k: (scores[:, :k] >= self._lowest[k][:, None] - _TIE).mean(axis=1)
            if k
            else np.ones(len(self.queries))
            for k in self.ks
        }


def tune(
    index: Any, questions: RecallQueries, *, target: float = TARGET_RECALL
) -> tuple[SearchPoint, ...]:
    """The smallest power-of-two `nprobe` that reaches `target` recall, for each k of `questions`.

    The lower end of the one-sided 95% confidence interval over queries must reach the target;
    otherwise a setting that is too small could win by chance, and other queries would find less. In
    addition, the mean miss rate of the worst 10% of the queries may be at most `TAIL` times 1 -
    `target`.

    Returns:
        One point for each k, none for an exact index. A recall is below the target only if all
        lists were probed.
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
            mean, tenth = mean_and_worst_tenth(recalls)
            found.append(SearchPoint(k=k, nprobe=nprobe, recall=mean, worst_tenth=tenth))
        if len(found) == len(questions.ks):
            return tuple(found)
        nprobe = min(2 * nprobe, index.nlist)


def mean_and_worst_tenth(recalls: np.ndarray) -> tuple[float, float]:
    """The mean recall of queries, and that of the 10% with the lowest; both to four digits."""
    worst = np.sort(recalls)[: -(-len(recalls) // 10)]
    return round(float(recalls.mean()), 4), round(float(worst.mean()), 4)


def write_index(index: Any, path: str | Path) -> None:
    """Writes the index to a local file."""
    faiss_module().write_index(index, str(path))


def read_index(path: str | Path, *, rows: int | None = None, dim: int | None = None) -> Any:
    """Opens the index memory-mapped.

    Args:
        rows, dim: expected number and width of its vectors; None accepts any.

    Raises:
        CollectionError: missing, truncated, or with other vectors than the collection.
    """
    faiss = faiss_module()
    try:
        # One flag maps IVF lists, the other flat and graph codes.
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
    """A random sample of `count` rows (all if there are fewer), float32, in their order.

    Args:
        of: sample from the first this many rows only.
    """
    among = len(vectors) if of is None else min(of, len(vectors))
    rows = _sampled(among, count, seed)
    found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):  # so that it is in memory once
        found[start : start + CHUNK_ROWS] = vectors[rows[start : start + CHUNK_ROWS]]
    return found


def _sampled(among: int, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` of the rows, ascending."""
    rows = np.random.default_rng(seed).choice(among, min(count, among), replace=False)
    return np.sort(rows)
