"""Prototypes of a noun: from its own references or, if it is rare, also from its neighbours'.

The builder stores them; a query recomputes them by the same rules if necessary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ovref_inference.collection.class_support import ClassSupport
from ovref_inference.collection.clustering import MAX_SEED, spherical_kmeans
from ovref_inference.collection.exact import faiss_module
from ovref_inference.collection.index import one_thread
from ovref_inference.ranges import STRICT, require_at_least, require_within


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    """How references become prototypes (VOCSeg 3.1; its best values are k = 10, N = 10)."""

    __pydantic_config__ = STRICT

    k: int = 10
    """Prototypes per noun, at least 1; fewer if there are fewer references."""
    min_references: int = 10
    """A noun with fewer references than this, or than `k`, is rare."""
    neighbours: int = 10
    """Number of nearest nouns in text space, itself included, whose references a rare noun uses at
    first; fewer for a small vocabulary (see `neighbours_among`)."""
    max_references: int = 50_000
    """Maximum number of references that are clustered per noun; beyond it a random sample is
    used."""
    iterations: int = 20
    """Maximum number of k-means iterations."""
    seed: int = 0
    """Seed of k-means and of the sample."""

    def __post_init__(self) -> None:
        for name in ("k", "min_references", "neighbours", "max_references", "iterations"):
            require_at_least(name, getattr(self, name), 1)
        require_within("seed", self.seed, 0, MAX_SEED)
        if self.max_references < self.k:
            raise ValueError(
                f"k must be at most max_references, found {self.k} and {self.max_references}"
            )

    @property
    def needed(self) -> int:
        """Number of references below which a noun is rare."""
        return max(self.k, self.min_references)

    def neighbours_among(self, nouns: int) -> int:
        """Number of nouns whose references a rare noun uses at first: at most 1% of the vocabulary.

        VOCSeg's N = 10 was tuned with a vocabulary of 15,000 nouns, where the ten nearest are
        close. With 27 nouns they are a third of the vocabulary; there the search starts with the
        noun alone and grows, as in the paper, until there are enough references.
        """
        return min(self.neighbours, max(1, nouns // 100))


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Prototypes of n classes."""

    vectors_nkd: np.ndarray
    """(n, K, d) float32, L2-normalised; rows from `counts` on are zero."""
    counts: np.ndarray
    """(n,) int64: number of prototypes of each class; 0 without support in the collection."""
    nouns: tuple[tuple[str, ...], ...]
    """For each class, the collection's nouns whose references were used, nearest first; empty
    where references were retrieved by text."""
    support: tuple[ClassSupport, ...] = ()
    """The support of each class; empty if it was not determined."""

    def supported(self, support: tuple[ClassSupport, ...]) -> "Prototypes":
        """The same with this support, in which classes without support have no prototypes."""
        none = [one.source == "none" for one in support]
        if not any(none):
            return replace(self, support=support)
        return replace(
            self,
            vectors_nkd=np.where(np.array(none)[:, None, None], 0.0, self.vectors_nkd),
            counts=np.where(none, 0, self.counts),
            nouns=tuple(() if missing else n for missing, n in zip(none, self.nouns, strict=True)),
            support=support,
        )


def neighbours_of(
    embedding: np.ndarray,
    vocabulary: np.ndarray,
    counts: np.ndarray,
    config: PrototypeConfig,
    own: int | None = None,
) -> list[int]:
    """The nouns whose references represent a rare or unknown noun (VOCSeg 3.1, rare nouns).

    Starts with the `config.neighbours_among` nouns most similar in text space and adds one noun
    at a time until together they have `config.needed` references or there are no more nouns.

    Args:
        embedding: (d,) text embedding of the noun, L2-normalised.
        vocabulary: (v, d) text embeddings of the collection's nouns, L2-normalised.
        counts: (v,) their numbers of references; nouns without any are skipped.
        own: index of the noun itself if it is in the vocabulary; it comes first.

    Returns:
        Indices into the vocabulary, most similar first; ties go to the lower index.
    """
    similarity = (vocabulary @ embedding).astype(np.float64)
    if own is not None:
        similarity[own] = np.inf
    order = np.argsort(-similarity, kind="stable")
    order = order[counts[order] > 0]
    total = np.cumsum(counts[order])
    enough = int(np.searchsorted(total, config.needed)) + 1
    return [int(i) for i in order[: max(enough, config.neighbours_among(len(counts)))]]


def neighbours_of_many(
    rows: np.ndarray, vocabulary: np.ndarray, counts: np.ndarray, config: PrototypeConfig
) -> list[list[int]]:
    """`neighbours_of` for many nouns of the vocabulary.

    Memory: `vocabulary`, and a copy if a noun has no references.

    Args:
        rows: (n,) indices into the vocabulary, of the nouns asked for.
        vocabulary, counts: as for `neighbours_of`.
    """
    present = np.flatnonzero(counts > 0)
    at_first = config.neighbours_among(len(counts))
    # Each noun that is present has at least one reference, so more are never needed.
    few = min(at_first + config.needed, len(present))
    among = vocabulary if len(present) == len(vocabulary) else vocabulary[present]
    faiss = faiss_module()
    with one_thread():
        similarity, nearest = faiss.knn(
            vocabulary[rows], among, few, metric=faiss.METRIC_INNER_PRODUCT
        )
    found = []
    for own, values, columns in zip(rows.tolist(), similarity, present[nearest], strict=True):
        noun = columns[np.lexsort((columns, -values))]
        if counts[own] > 0:  # before others of the same embedding
            noun = np.concatenate([[own], noun[noun != own]])
        enough = int(np.searchsorted(np.cumsum(counts[noun]), config.needed)) + 1
        found.append([int(i) for i in noun[: max(enough, at_first)]])
    return found


def clustered_rows(rows: np.ndarray, config: PrototypeConfig) -> np.ndarray:
    """The reference ids to cluster: all, or a seeded random sample of `max_references`."""
    if len(rows) <= config.max_references:
        return rows
    rng = np.random.default_rng(config.seed)
    return np.sort(rng.choice(rows, config.max_references, replace=False))


def make_prototypes(vectors: np.ndarray, config: PrototypeConfig) -> np.ndarray:
    """(n, d) visual embeddings of a noun -> (min(k, n), d) float32 prototypes, L2-normalised."""
    return spherical_kmeans(vectors, config.k, seed=config.seed, iterations=config.iterations)


def retrieved_prototypes(
    sets: Iterable[np.ndarray], dim: int, *, k: int, seed: int, iterations: int
) -> Prototypes:
    """Prototypes of classes from the references retrieved for each (FOSSIL 3.3).

    k-means starts once, here as for stored prototypes: ten starts bring prototypes nearer to the
    references but segment no better (`tests/benchmarks/results/kmeans_starts.md`).

    Args:
        sets: (n_i, dim) visual embeddings of each class; n_i may be 0.
        k, seed, iterations: of `spherical_kmeans`.
    """
    per_class = [
        spherical_kmeans(vectors, k, seed=seed, iterations=iterations)
        if len(vectors)
        else np.zeros((0, dim), dtype=np.float32)
        for vectors in sets
    ]
    vectors_nkd, counts = stacked(per_class, dim)
    return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=((),) * len(counts))


def stacked(per_class: list[np.ndarray], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Each class's (K_i, d) -> (n, max K, d) float32, padded with zeros, and counts (n,)."""
    counts = np.array([len(vectors) for vectors in per_class], dtype=np.int64)
    width = int(counts.max(initial=0))
    vectors_nkd = np.zeros((len(per_class), width, dim), dtype=np.float32)
    for row, vectors in enumerate(per_class):
        vectors_nkd[row, : len(vectors)] = vectors
    return vectors_nkd, counts
