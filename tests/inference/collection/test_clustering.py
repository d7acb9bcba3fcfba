"""Spherical k-means against an exhaustive search, and on its edge cases."""

import itertools

import faiss
import numpy as np
import pytest

from ovref_inference.collection.clustering import spherical_kmeans
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


def test_arguments_out_of_range_are_refused():
    points = np.eye(3)
    for bad in ({"iterations": 0}, {"starts": 0}, {"seed": -1}, {"seed": 2**31}):
        with pytest.raises(ValueError, match="must be"):
            spherical_kmeans(points, 2, **bad)


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


@pytest.mark.parametrize("starts", [1, 10])
def test_threads_do_not_change_the_bytes_and_are_left_as_they_were(starts):
    points = np.random.default_rng(7).standard_normal((2000, 24))
    found, before = [], faiss.omp_get_max_threads()
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            found.append(spherical_kmeans(points, 10, starts=starts))
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("count", [20, 60, 150])
def test_ten_starts_leave_no_more_inertia_than_ten_random_ones(count):
    """FreeDA's ten, here by Lloyd's steps written down plainly; one start leaves clearly more."""
    one, ten, random = 0.0, 0.0, 0.0
    for number in range(8):
        rng = np.random.default_rng([8, number])
        centres = rng.standard_normal((12, 64))
        points = l2_normalised(centres[rng.integers(12, size=count)] + rng.normal(size=(count, 64)))
        one += count - objective(points, spherical_kmeans(points, 10))
        ten += count - objective(points, spherical_kmeans(points, 10, starts=10))
        random += count - max(objective(points, lloyd(points, 10, seed)) for seed in range(10))
    assert ten <= 1.02 * random
    assert ten < 0.98 * one


def lloyd(points, k, seed):
    """Spherical k-means from k random points."""
    centroids = points[np.random.default_rng(seed).choice(len(points), k, replace=False)]
    for _ in range(20):
        nearest = (points @ centroids.T).argmax(axis=1)
        for cluster in range(k):
            total = points[nearest == cluster].sum(axis=0)
            if np.linalg.norm(total) > 0:
                centroids[cluster] = total / np.linalg.norm(total)
    return centroids


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.zeros((0, 3)), 2, "n >= 1"),
        (np.ones(3), 2, "n >= 1"),
        (np.ones((2, 3)), 0, "k must be"),
        (np.zeros((1, 3)), 2, "zero or not finite"),
        (np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), 2, "zero or not finite"),
        (np.array([[1.0, np.nan], [1.0, 0.0], [0.0, 1.0]]), 2, "zero or not finite"),
    ],
)
def test_bad_input_is_refused(vectors, k, message):
    with pytest.raises(ValueError, match=message):
        spherical_kmeans(vectors, k)
