"""The nouns that represent a rare one, one by one and many at a time."""

import numpy as np
import pytest

from ovref_inference.collection.prototypes import (
    PrototypeConfig,
    clustered_rows,
    neighbours_of,
    neighbours_of_many,
)
from ovref_inference.vectors import l2_normalised


@pytest.fixture(scope="module")
def vocabulary():
    return l2_normalised(np.random.default_rng(0).standard_normal((700, 12)))


@pytest.mark.parametrize("neighbours", [1, 4, 10])
@pytest.mark.parametrize("scarce", [False, True])
def test_many_at_a_time_are_as_one_by_one(vocabulary, neighbours, scarce):
    config = PrototypeConfig(k=4, min_references=20, neighbours=neighbours)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 6, size=700)
    if scarce:  # fewer references than are needed, in few nouns
        counts = np.where(np.arange(700) % 100 == 0, 2, 0)
    rows = rng.permutation(700)[:150]
    found = neighbours_of_many(rows, vocabulary, counts, config)
    for row, neighbours_of_row in zip(rows, found, strict=True):
        alone = neighbours_of(vocabulary[row], vocabulary, counts, config, int(row))
        assert neighbours_of_row == alone
        assert counts[alone].min() > 0


def test_a_rare_noun_starts_with_a_hundredth_of_the_vocabulary_at_most():
    config = PrototypeConfig()
    started = [config.neighbours_among(nouns) for nouns in (1, 27, 199, 200, 999, 1000, 15_000)]
    assert started == [1, 1, 1, 2, 9, 10, 10]


def test_in_a_small_vocabulary_only_as_many_neighbours_as_are_needed():
    vocabulary = l2_normalised(np.eye(27) + 0.1)
    counts = np.full(27, 30)
    counts[3] = 4
    used = neighbours_of(vocabulary[3], vocabulary, counts, PrototypeConfig(), own=3)
    assert used == [3, 0]  # the nearest that makes it ten references; equals by their order
    assert neighbours_of(vocabulary[5], vocabulary, counts, PrototypeConfig()) == [5]


def test_a_noun_comes_before_others_with_its_embedding():
    vocabulary, counts = np.repeat(np.eye(3), 2, axis=0), np.array([20, 3, 20, 3, 20, 3])
    config = PrototypeConfig(k=2, min_references=8)
    assert neighbours_of(vocabulary[3], vocabulary, counts, config, own=3) == [3, 2]
    assert neighbours_of_many(np.array([3]), vocabulary, counts, config) == [[3, 2]]


def test_of_very_many_references_some_of_all_are_clustered():
    rows, config = np.arange(100, 1100) * 3, PrototypeConfig(k=4, max_references=200)
    sampled = clustered_rows(rows, config)
    assert len(sampled) == 200 and (np.diff(sampled) > 0).all() and np.isin(sampled, rows).all()
    assert 70 < (sampled < rows[500]).sum() < 130  # as many of the first half as of the second
    np.testing.assert_array_equal(sampled, clustered_rows(rows, config))
    other = PrototypeConfig(k=4, max_references=200, seed=1)
    assert (sampled != clustered_rows(rows, other)).any()
    np.testing.assert_array_equal(clustered_rows(rows[:200], config), rows[:200])
