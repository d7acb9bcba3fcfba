"""Nouns are divided into balanced parts that stay together in text space."""

import numpy as np
import pytest

from ovref.errors import StorageError
from ovref.reduce.partition_tree import divide, read_tree
from ovref_inference.vectors import l2_normalised


def topics(topics=8, nouns=40, dim=16, seed=0):
    """Text embeddings of nouns around some topics, the topic of each, and counts of long tail."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((topics, dim))
    of = rng.permutation(np.repeat(np.arange(topics), nouns))
    vectors = centres[of] + 0.2 * rng.standard_normal((len(of), dim))
    counts = rng.permutation(1000 // (1 + np.arange(len(of)))) + 1
    return l2_normalised(vectors).astype(np.float32), of, counts


def test_parts_hold_no_more_than_they_may_and_are_about_as_large():
    vectors, _, counts = topics()
    most = 1200  # more than any noun has
    tree, leaf_of = divide(vectors, counts, most)
    sizes = np.bincount(leaf_of, weights=counts, minlength=tree.leaves)
    assert counts.sum() / most <= tree.leaves <= counts.sum() / most + 2
    assert sizes.max() <= most and np.median(sizes) > 0.8 * most
    assert [tree.leaf_of(vector) for vector in vectors] == leaf_of.tolist()


@pytest.mark.parametrize(("times", "leaves"), [(3.9, 4), (4, 5), (4.1, 5), (12.9, 13), (0.99, 1)])
def test_nouns_slightly_beyond_the_limit_are_not_halved(times, leaves):
    """As many parts as it takes, one more where each would have to be full to the last one."""
    rng = np.random.default_rng(1)
    vectors = l2_normalised(rng.standard_normal((3000, 8))).astype(np.float32)
    counts = rng.integers(1, 30, 3000)
    tree, leaf_of = divide(vectors, counts, round(counts.sum() / times))
    sizes = np.bincount(leaf_of, weights=counts)
    assert tree.leaves == leaves and sizes.max() < 1.3 * sizes.min()


def test_neighbours_share_a_part():
    vectors, of, _ = topics()
    tree, leaf_of = divide(vectors, np.ones(len(vectors), np.int64), 80)
    assert 4 <= tree.leaves <= 8
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    shared = leaf_of[similarity.argmax(axis=1)] == leaf_of
    assert shared.mean() > 0.9
    by_chance = leaf_of[np.random.default_rng(0).permutation(len(of))] == leaf_of
    assert by_chance.mean() < 0.4


@pytest.mark.parametrize("counts", [[5], [900, 1, 1, 1, 1, 1], [50] * 6])
def test_one_noun_is_not_divided(counts):
    vectors = topics()[0][: len(counts)]
    tree, leaf_of = divide(vectors, np.array(counts), 40)
    sizes = np.bincount(leaf_of, weights=counts)
    alone = np.bincount(leaf_of) == 1
    assert ((sizes <= 40) | alone).all()
    assert leaf_of.min() == 0 and leaf_of.max() == tree.leaves - 1
    assert [tree.leaf_of(vector) for vector in vectors] == leaf_of.tolist()


def test_equal_embeddings_stay_together_whatever_the_limit():
    vectors = np.repeat(topics()[0][:2], 3, axis=0)
    tree, leaf_of = divide(vectors, np.full(6, 10), 10)
    assert tree.leaves == 2 and leaf_of.tolist() in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)


def test_the_principal_direction_is_that_of_a_decomposition():
    vectors, _, counts = topics()
    tree, _ = divide(vectors, counts, counts.sum() - 1)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    expected = np.linalg.svd(centred)[2][0]
    assert abs(expected @ tree.directions[0]) == pytest.approx(1, abs=1e-5)


def test_a_tree_is_kept_in_a_file_of_the_same_bytes(tmp_path):
    vectors, _, counts = topics()
    tree, leaf_of = divide(vectors, counts, 1200)
    for name in ("one.npz", "two.npz"):
        tree.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    found = read_tree(tmp_path / "one.npz", "one")
    assert [found.leaf_of(vector) for vector in vectors] == leaf_of.tolist()
    (tmp_path / "two.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(StorageError, match="two is not a partition tree"):
        read_tree(tmp_path / "two.npz", "two")


def test_one_heavy_noun_beside_a_light_one_is_cut_off_at_once():
    vectors = topics()[0][:2]
    tree, leaf_of = divide(vectors, np.array([1, 10**12]), 10)
    assert tree.leaves == 2 and sorted(leaf_of.tolist()) == [0, 1]
