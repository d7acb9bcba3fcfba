"""Spherical k-means: a noun's (or a query's) many visual embeddings -> a few prototypes."""

import numpy as np
from ovref_inference.vectors import l2_normalised


def spherical_kmeans(
    vectors: np.ndarray, k: int, *, seed: int = 0, iterations: int = 20
) -> np.ndarray:
    """Centroids of `vectors` by cosine similarity (FOSSIL 3.3, VOCSeg 3.1).

    k-means++ start, then Lloyd's steps until nothing moves. Equal input and seed give equal
    centroids. A cluster that runs empty takes the vector farthest from its own centroid.

    Args:
        vectors: (n, d), n >= 1; normalised here.
        k: centroids wanted, >= 1.
        seed: of the start.
        iterations: at most this many steps.

    Returns:
        (min(k, n), d) float32, L2-normalised; with k >= n the vectors themselves, in their order.

    Raises:
        ValueError: no vectors, k < 1, or a vector that is zero or not finite.
    """
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(f"vectors must be (n, d) with n >= 1, found {vectors.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    points = l2_normalised(vectors)
    count = len(points)
    if k >= count:
        return points
    centroids = points[_spread_start(points, k, np.random.default_rng(seed))]
    assigned = np.full(count, -1)
    for _ in range(iterations):
        similarity = points @ centroids.T
        nearest = similarity.argmax(axis=1)
        _fill_empty(nearest, similarity, k)
        if np.array_equal(nearest, assigned):
            break
        assigned = nearest
        members = np.zeros((k, count), dtype=np.float32)
        members[assigned, np.arange(count)] = 1.0
        sums = members @ points
        lengths = np.linalg.norm(sums, axis=1)
        # Vectors that cancel out have no mean direction: that centroid stays where it is.
        moved = lengths > 1e-6
        centroids[moved] = sums[moved] / lengths[moved, None]
    return centroids


def _spread_start(points: np.ndarray, k: int, rng: np.random.Generator) -> list[int]:
    """Indices of k points, each drawn in proportion to its distance from those before."""
    chosen = [int(rng.integers(len(points)))]
    distance = 1.0 - points @ points[chosen[0]]
    for _ in range(k - 1):
        distance = np.clip(distance, 0.0, None)
        distance[chosen] = 0.0
        total = distance.sum(dtype=np.float64)
        if total > 1e-6:
            cumulative = np.cumsum(distance, dtype=np.float64)
            pick = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
            pick = min(pick, len(points) - 1)
        else:
            # Only duplicates are left.
            pick = int(np.setdiff1d(np.arange(len(points)), chosen)[0])
        chosen.append(pick)
        distance = np.minimum(distance, 1.0 - points @ points[pick])
    return chosen


def _fill_empty(nearest: np.ndarray, similarity: np.ndarray, k: int) -> None:
    """Gives each empty cluster the worst-placed point of a cluster that has several."""
    sizes = np.bincount(nearest, minlength=k)
    for empty in np.flatnonzero(sizes == 0):
        own = similarity[np.arange(len(nearest)), nearest]
        own = np.where(sizes[nearest] > 1, own, np.inf)
        worst = int(own.argmin())
        sizes[nearest[worst]] -= 1
        sizes[empty] += 1
        nearest[worst] = empty
        similarity[worst, empty] = np.inf
