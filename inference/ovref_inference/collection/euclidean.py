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
    collection: ReferenceCollection,
    text_embeddings: np.ndarray,
    *,
    n: int,
    k: int,
    seed: int = 0,
    norms: bool = False,
) -> Prototypes:
    """As `ReferenceCollection.fossil_prototypes`, clustered by `euclidean_kmeans`.

    Args:
        norms: whether the embeddings have the norms that they had before they were normalised.

    Raises:
        ValueError: the collection has no norms.
    """
    require_at_least("n", n, 1)
    norms_n1 = collection.norms if norms else None
    if norms and norms_n1 is None:
        raise ValueError(
            f"{collection.url} has no norms of visual embeddings: build it with embed.norms=true"
        )
    found, width = collection.search_text(text_embeddings, n).ids, collection.manifest.visual.dim
    prefetch_rows(collection.visual, found[found >= 0])
    per_class = []
    for ids_n in found:
        ids_n = ids_n[ids_n >= 0]
        if not len(ids_n):
            per_class.append(np.zeros((0, width), dtype=np.float32))
            continue
        points_nd = l2_normalised(as_float32(collection.visual[ids_n]))
        if norms_n1 is not None:
            points_nd *= as_float32(norms_n1[ids_n])
        per_class.append(euclidean_kmeans(points_nd, k, seed=seed))
    vectors_nkd, counts = stacked(per_class, width)
    return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=((),) * len(counts))


def euclidean_kmeans(vectors_nd: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """Centroids by Euclidean distances from a random start, as `faiss.Kmeans` finds them.

    Args:
        vectors_nd: (n, d), n >= 1, finite and not zero; clustered as they are.
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
    directions_nd = l2_normalised(vectors_nd)
    if k >= len(directions_nd):
        return directions_nd
    points_nd = np.ascontiguousarray(vectors_nd, dtype=np.float32)
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
