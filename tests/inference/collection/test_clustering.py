"""Spherical k-means against an exhaustive search, and on its edge cases."""

import itertools

import numpy as np
import pytest

from ovref_inference.collection import clustering
from ovref_inference.collection.clustering import spherical_kmeans, spherical_kmeans_many
from ovref_inference.vectors import l2_normalised


def objective(points, centroids):
    return float((points @ centroids.T).max(axis=1).sum())


def best_objective(points, k):
    """The best over every assignment of points to k clusters."""
    best = -np.inf
    for assignment in itertools.product(range(k), repeat=len(points)):
        sums = [points[np.array(assignment) == j].sum(axis=0) for j in range(k)]
        best = max(best, sum(np.linalg.norm(total) for total in sums))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_of_all_assignments(seed):
    points = l2_normalised(np.random.default_rng(seed).standard_normal((8, 3)))
    found = max(objective(points, spherical_kmeans(points, 3, seed=s)) for s in range(8))
    assert found == pytest.approx(best_objective(points, 3), rel=1e-5)


def test_separate_groups_are_found_whatever_the_seed():
    rng = np.random.default_rng(0)
    centres = np.eye(6)[:4]
    points = np.concatenate([c + 0.05 * rng.standard_normal((30, 6)) for c in centres])
    for seed in range(10):
        centroids = spherical_kmeans(rng.permutation(points), 4, seed=seed)
        matched = (centroids @ centres.T).argmax(axis=1)
        assert sorted(matched.tolist()) == [0, 1, 2, 3]
        assert (centroids @ centres.T).max(axis=1).min() > 0.99


def test_each_step_does_not_worsen_the_objective():
    points = l2_normalised(np.random.default_rng(3).standard_normal((200, 16)))
    values = [objective(points, spherical_kmeans(points, 7, iterations=i)) for i in range(1, 12)]
    assert all(later >= earlier - 1e-3 for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0]


def test_equal_input_and_seed_give_equal_centroids():
    points = np.random.default_rng(4).standard_normal((100, 8))
    one, two = (spherical_kmeans(points.copy(), 5, seed=9) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("k", [4, 5, 100])
def test_as_many_clusters_as_vectors_gives_the_vectors(k):
    points = np.random.default_rng(5).standard_normal((4, 3))
    np.testing.assert_allclose(spherical_kmeans(points, k), l2_normalised(points))


def test_one_cluster_is_the_normalised_mean():
    points = l2_normalised(np.random.default_rng(6).standard_normal((50, 5)) + 1)
    mean = points.mean(axis=0)
    np.testing.assert_allclose(
        spherical_kmeans(points, 1)[0], mean / np.linalg.norm(mean), atol=1e-5
    )


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_give_finite_unit_centroids_that_cover_all_of_them(seed):
    points = np.repeat(np.eye(4)[:2], [50, 1], axis=0)
    centroids = spherical_kmeans(points, 3, seed=seed)
    assert centroids.shape == (3, 4)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose((points @ centroids.T).max(axis=1), 1.0, atol=1e-6)


def test_opposite_vectors_leave_no_nan():
    points = np.array([[1.0, 0.0], [-1.0, 0.0]] * 5)
    centroids = spherical_kmeans(points, 1)
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(np.linalg.norm(centroids), 1.0)


def test_empty_clusters_take_the_worst_placed_vectors_of_those_with_several():
    nearest = np.array([0, 0, 0, 2, 0])
    own = [0.9, 0.3, 0.5, 0.1, 0.8]
    similarity = np.full((5, 4), -1.0)
    similarity[np.arange(5), nearest] = own
    clustering._fill_empty(nearest, similarity, 4)
    # Clusters 1 and 3 were empty; the fourth vector is placed worst of all, but it is alone.
    assert nearest.tolist() == [0, 1, 3, 2, 0]


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.zeros((0, 3)), 2, "n >= 1"),
        (np.ones(3), 2, "n >= 1"),
        (np.ones((2, 3)), 0, "k must be"),
        (np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), 2, "zero or not finite"),
        (np.array([[1.0, np.nan], [1.0, 0.0], [0.0, 1.0]]), 2, "zero or not finite"),
    ],
)
def test_bad_input_is_refused(vectors, k, message):
    with pytest.raises(ValueError, match=message):
        spherical_kmeans(vectors, k)


def sets_of_vectors(rng):
    """Of many sizes, some alike, with duplicates, opposites and single vectors among them."""
    sizes = [1, 2, 3, 4, 5, 5, 5, 9, 9, 20, 20, 20, 60, 61, 96, 97, 300]
    sets = [rng.standard_normal((size, 16)) + rng.standard_normal(16) for size in sizes]
    sets.append(np.repeat(np.eye(16)[:2], [50, 1], axis=0))
    sets.append(np.concatenate([np.eye(16)[:5], -np.eye(16)[:5]] * 4))
    return [vectors.astype(np.float16) for vectors in sets]


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_many_sets_at_once_are_clustered_as_each_alone(k, iterations):
    sets = sets_of_vectors(np.random.default_rng(7))
    found = spherical_kmeans_many(sets, k, seed=3, iterations=iterations)
    for vectors, centroids in zip(sets, found, strict=True):
        alone = spherical_kmeans(vectors, k, seed=3, iterations=iterations)
        np.testing.assert_allclose(centroids, alone, atol=2e-5)


def test_what_a_set_gets_does_not_depend_on_the_others(monkeypatch):
    sets = sets_of_vectors(np.random.default_rng(8))
    together = spherical_kmeans_many(sets, 4, seed=1)
    monkeypatch.setattr(clustering, "_BATCH_BYTES", 1)
    for vectors, centroids in zip(sets, together, strict=True):
        (alone,) = spherical_kmeans_many([vectors], 4, seed=1)
        np.testing.assert_array_equal(alone, centroids)


def test_no_sets_give_nothing_and_a_bad_one_is_refused():
    assert spherical_kmeans_many([], 3) == []
    for bad in (np.zeros((0, 3)), np.ones(3), np.zeros((5, 3)), np.full((5, 3), np.nan)):
        with pytest.raises(ValueError, match="vectors"):
            spherical_kmeans_many([np.eye(3), bad], 2)
