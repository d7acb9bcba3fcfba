"""Spherical k-means: a noun's (or a query's) many visual embeddings -> a few prototypes."""

from collections.abc import Sequence

import numpy as np

from ovref_inference.vectors import l2_normalised

BATCHED_UP_TO = 96
"""Sets of at most this many vectors are clustered together, through their cosines; for larger ones
that matrix costs more than the steps that it makes cheap."""
_BATCH_BYTES = 4 << 20


def spherical_kmeans(
    vectors: np.ndarray, k: int, *, seed: int = 0, iterations: int = 20
) -> np.ndarray:
    """Centroids of `vectors` by cosine similarity (FOSSIL 3.3, VOCSeg 3.1).

    k-means++ initialisation, then Lloyd's iterations until convergence. Equal input and seed give
    equal centroids. An empty cluster takes the vector farthest from its own centroid.

    Args:
        vectors: (n, d), n >= 1; normalised here.
        k: centroids wanted, >= 1.
        seed: of the initialisation.
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


def spherical_kmeans_many(
    sets: Sequence[np.ndarray], k: int, *, seed: int = 0, iterations: int = 20
) -> list[np.ndarray]:
    """`spherical_kmeans` of each set by itself: the same steps, many small sets at a time.

    A step of k-means needs only the cosines between the vectors of a set, (n, n), which are
    computed once; sets of one size go through numpy together. Rounding differs from that of
    `spherical_kmeans` in the last bits; what comes out for a set does not depend on the others.

    Args:
        sets: (n_i, d) each, n_i >= 1, of one width d.
        k, seed, iterations: as `spherical_kmeans`, the same for all sets.

    Returns:
        For each set (min(k, n_i), d) float32, L2-normalised.

    Raises:
        ValueError: as `spherical_kmeans`.
    """
    found: dict[int, np.ndarray] = {}
    small: dict[int, list[int]] = {}
    for number, vectors in enumerate(sets):
        if 1 <= k < len(vectors) <= BATCHED_UP_TO and vectors.ndim == 2:
            small.setdefault(len(vectors), []).append(number)
        else:
            found[number] = spherical_kmeans(vectors, k, seed=seed, iterations=iterations)
    for count, numbers in small.items():
        width = sets[numbers[0]].shape[1]
        at_once = max(1, _BATCH_BYTES // (4 * count * (width + count + 4 * k)))
        for start in range(0, len(numbers), at_once):
            batch = numbers[start : start + at_once]
            points_bnd = l2_normalised(np.stack([sets[number] for number in batch]))
            for number, centroids in zip(
                batch, _kmeans_of_batch(points_bnd, k, seed, iterations), strict=True
            ):
                found[number] = centroids
    return [found[number] for number in range(len(sets))]


def _kmeans_of_batch(points_bnd: np.ndarray, k: int, seed: int, iterations: int) -> np.ndarray:
    """(b, n, d) normalised float32 -> (b, k, d). A centroid is kept as its weights over the points,
    so that a step multiplies (k, n) by the (n, n) cosines and no vector is touched."""
    batch, count = points_bnd.shape[:2]
    cosines = points_bnd @ points_bnd.transpose(0, 2, 1)
    chosen_bk = _spread_start_of_batch(cosines, k, np.random.default_rng(seed))
    weights = np.zeros((batch, k, count), dtype=np.float32)
    np.put_along_axis(weights, chosen_bk[..., None], 1.0, axis=2)
    similarity = np.take_along_axis(cosines, chosen_bk[..., None], axis=1)
    active = np.arange(batch)
    assigned = np.full((batch, count), -1)
    for _ in range(iterations):
        nearest = similarity.argmax(axis=1)
        members = np.zeros((len(active), k, count), dtype=np.float32)
        np.put_along_axis(members, nearest[:, None], 1.0, axis=1)
        for row in np.flatnonzero((members.sum(axis=2) == 0).any(axis=1)):
            _fill_empty(nearest[row], similarity[row].T, k)
            members[row] = nearest[row] == np.arange(k)[:, None]
        moving = (nearest != assigned).any(axis=1)
        if not moving.all():
            if not moving.any():
                break
            active, cosines, similarity = active[moving], cosines[moving], similarity[moving]
            nearest, members = nearest[moving], members[moving]
        assigned = nearest
        sums = members @ cosines
        lengths = np.sqrt(np.maximum((sums * members).sum(axis=2, keepdims=True), 0.0))
        # Vectors that cancel out have no mean direction: that centroid stays where it is.
        moved = lengths > 1e-6
        lengths = np.where(moved, lengths, 1.0)
        similarity = np.where(moved, sums / lengths, similarity)
        weights[active] = np.where(moved, members / lengths, weights[active])
    centroids = weights @ points_bnd
    return centroids / np.linalg.norm(centroids, axis=2, keepdims=True)


def _spread_start_of_batch(cosines: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """`_spread_start` of each (n, n) matrix of cosines: (b, k) indices.

    Sets of one size use the same random numbers, as if each were alone.
    """
    batch, count = cosines.shape[:2]
    rows = np.arange(batch)
    chosen = np.empty((batch, k), dtype=np.int64)
    chosen[:, 0] = rng.integers(count)
    distance = 1.0 - cosines[rows, chosen[:, 0]]
    for number in range(1, k):
        distance = np.clip(distance, 0.0, None)
        np.put_along_axis(distance, chosen[:, :number], 0.0, axis=1)
        cumulative = np.cumsum(distance, axis=1, dtype=np.float64)
        sampled = rng.random() * cumulative[:, -1:]
        pick = np.minimum((cumulative <= sampled).sum(axis=1), count - 1)
        # Only duplicates are left.
        for row in np.flatnonzero(cumulative[:, -1] <= 1e-6):
            pick[row] = np.setdiff1d(np.arange(count), chosen[row, :number])[0]
        chosen[:, number] = pick
        distance = np.minimum(distance, 1.0 - cosines[rows, pick])
    return chosen


def _spread_start(points: np.ndarray, k: int, rng: np.random.Generator) -> list[int]:
    """Indices of k points, each sampled in proportion to its distance from those before."""
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
