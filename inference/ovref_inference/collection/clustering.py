"""Spherical k-means: a noun's (or a query's) many visual embeddings -> a few prototypes."""

import numpy as np

from ovref_inference.collection.exact import faiss_module
from ovref_inference.collection.index import one_thread
from ovref_inference.ranges import require_at_least, require_within
from ovref_inference.vectors import l2_normalised

MAX_SEED = 2**31 - 1
"""faiss keeps the seed as a C int."""


def spherical_kmeans(
    vectors: np.ndarray, k: int, *, seed: int = 0, iterations: int = 20, starts: int = 1
) -> np.ndarray:
    """Centroids of `vectors` by cosine similarity (FOSSIL 3.3, VOCSeg 3.1), by `faiss.Kmeans`.

    k-means++ initialisation, then Lloyd iterations until convergence. Equal input and seed give
    equal centroids for any number of faiss threads. An empty cluster is filled with half of a
    larger one.

    Args:
        vectors: (n, d), n >= 1; normalised here.
        k: centroids wanted, >= 1.
        seed: of the initialisations, 0 to MAX_SEED.
        iterations: maximum number of iterations per start, >= 1.
        starts: initialisations, >= 1; the centroids of the highest sum of cosines are kept.

    Returns:
        (min(k, n), d) float32, L2-normalised; with k >= n the vectors themselves, in their order.

    Raises:
        ValueError: no vectors, an argument out of range, or a vector that is zero or not finite.
    """
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(f"vectors must be (n, d) with n >= 1, found {vectors.shape}")
    for name, value in (("k", k), ("iterations", iterations), ("starts", starts)):
        require_at_least(name, value, 1)
    require_within("seed", seed, 0, MAX_SEED)
    points = l2_normalised(vectors)
    count, width = points.shape
    if k >= count:
        return points
    faiss = faiss_module()
    kmeans = faiss.Kmeans(
        width,
        k,
        spherical=True,
        niter=iterations,
        nredo=starts,
        seed=seed,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        # All vectors are used, and faiss must not warn if there are few.
        min_points_per_centroid=1,
        max_points_per_centroid=count,
    )
    with one_thread():
        kmeans.train(points)
    centroids: np.ndarray = kmeans.centroids
    # Vectors that cancel out have no mean direction: use the vector farthest from all centroids.
    for row in np.flatnonzero(~centroids.any(axis=1)):
        centroids[row] = points[(points @ centroids.T).max(axis=1).argmin()]
    return centroids
