"""Prototypes as the FOSSIL paper describes them: plain k-means by the library faiss.

The default of collections is `clustering.spherical_kmeans`: by cosines, with k-means++
initialisation.
"""

import numpy as np

from ovref_inference.collection.prototypes import Prototypes, stacked
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.ranges import require_at_least
from ovref_inference.vectors import as_float32, l2_normalised, prefetch_rows

STEPS = 25
"""Default number of iterations of faiss.Kmeans."""


def euclidean_prototypes(
    collection: ReferenceCollection, text_embeddings: np.ndarray, *, n: int, k: int, seed: int = 0
) -> Prototypes:
    """As `ReferenceCollection.fossil_prototypes`, clustered by `euclidean_kmeans`."""
    require_at_least("n", n, 1)
    found, width = collection.search_text(text_embeddings, n).ids, collection.manifest.visual.dim
    prefetch_rows(collection.visual, found[found >= 0])
    per_class = [
        euclidean_kmeans(as_float32(collection.visual[ids_n[ids_n >= 0]]), k, seed=seed)
        if (ids_n >= 0).any()
        else np.zeros((0, width), dtype=np.float32)
        for ids_n in found
    ]
    vectors_nkd, counts = stacked(per_class, width)
    return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=((),) * len(counts))


def euclidean_kmeans(vectors_nd: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """Centroids by Euclidean distances from a random start, as `faiss.Kmeans` finds them.

    Args:
        vectors_nd: (n, d), n >= 1; normalised here, as a collection holds them.
        k: centroids wanted, >= 1.
        seed: of the initialisation.

    Returns:
        (min(k, n), d) float32, L2-normalised, because prototypes are compared by cosines.

    Raises:
        ValueError: no vectors, k < 1, or a vector that is zero or not finite.
    """
    if vectors_nd.ndim != 2 or len(vectors_nd) == 0:
        raise ValueError(f"vectors must be (n, d) with n >= 1, found {vectors_nd.shape}")
    require_at_least("k", k, 1)
    points_nd = l2_normalised(vectors_nd)
    if k >= len(points_nd):
        return points_nd
    import faiss

    # All vectors are used, and faiss must not warn if there are few for each centroid.
    kmeans = faiss.Kmeans(
        points_nd.shape[1],
        k,
        niter=STEPS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points_nd),
    )
    kmeans.train(points_nd)
    return l2_normalised(kmeans.centroids)
