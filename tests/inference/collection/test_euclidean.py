"""Plain k-means of faiss: centroids are means, chosen no worse than by a slow loop."""

import numpy as np
import pytest

from ovref_inference.collection.euclidean import euclidean_kmeans, euclidean_prototypes
from ovref_inference.segmenters.fossil import FossilConfig
from ovref_inference.vectors import l2_normalised


def slow_kmeans(points, k, seed):
    """Lloyd's steps from a random start, until nothing moves."""
    centroids = points[np.random.default_rng(seed).choice(len(points), k, replace=False)]
    for _ in range(50):
        nearest = [min(range(k), key=lambda c: np.sum((p - centroids[c]) ** 2)) for p in points]
        centroids = np.stack([
            points[[n == c for n in nearest]].mean(0) if c in nearest else centroids[c]
            for c in range(k)
        ])  # fmt: skip
    return centroids


def spread(points, centroids):
    """Mean squared distance to the nearest centroid."""
    return np.mean([min(np.sum((p - c) ** 2) for c in centroids) for p in points])


def test_clusters_are_found_as_by_a_slow_loop():
    rng = np.random.default_rng(0)
    centres = l2_normalised(rng.normal(size=(3, 6)))
    points = l2_normalised(np.repeat(centres, 20, 0) + 0.05 * rng.normal(size=(60, 6)))
    found = euclidean_kmeans(5 * points, 3, seed=1)
    assert found.shape == (3, 6) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    best = min(spread(points, slow_kmeans(points, 3, seed)) for seed in range(5))
    tries = [spread(points, euclidean_kmeans(points, 3, seed=seed)) for seed in range(5)]
    assert min(tries) == pytest.approx(best, rel=0.02)
    np.testing.assert_array_equal(found, euclidean_kmeans(5 * points, 3, seed=1))


def test_no_more_centroids_than_vectors_and_bad_input():
    points = l2_normalised(np.random.default_rng(0).normal(size=(4, 5)))
    np.testing.assert_allclose(euclidean_kmeans(points, 9), points, atol=1e-6)
    with pytest.raises(ValueError, match="n >= 1"):
        euclidean_kmeans(points[:0], 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        euclidean_kmeans(points, 0)


def test_prototypes_are_of_the_references_that_were_retrieved(tmp_path):
    from colour_world import Texts, collection

    with collection(tmp_path, {"red": 6, "green": 5}) as world:
        texts_cd = Texts().encode(["red", "green"])
        found = euclidean_prototypes(world, texts_cd, n=4, k=1)
        ids = world.search_text(texts_cd, 4).ids
        for vector_d, ids_n in zip(found.vectors_nkd[:, 0], ids, strict=True):
            mean_d = l2_normalised(world.visual[ids_n].astype(np.float32)).mean(0)
            np.testing.assert_allclose(vector_d, mean_d / np.linalg.norm(mean_d), atol=1e-3)
        assert found.counts.tolist() == [1, 1]
    assert FossilConfig().clustering == "spherical"
