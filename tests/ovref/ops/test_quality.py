import numpy as np
import pytest

from ovref.ops.quality import (
    agreement_with_others,
    count_on_other_images,
    first_of_near_duplicates,
    noun_agreement,
    usable_rows,
)


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_usable_rows_are_finite_and_unit():
    rows = np.array([[1, 0], [np.nan, 0], [np.inf, 1], [0, 0], [0.6, 0.8], [2, 0]], np.float16)
    assert usable_rows(rows).tolist() == [True, False, False, False, True, False]
    assert usable_rows(np.zeros((0, 3), np.float16)).shape == (0,)


def slow_agreement(vectors, nouns, images, k):
    shares = []
    for row in range(len(vectors)):
        others = [j for j in range(len(vectors)) if images[j] != images[row]]
        others.sort(key=lambda j: -vectors[row] @ vectors[j])
        agreeing = sum(nouns[j] == nouns[row] for j in others[:k])
        available = sum(nouns[j] == nouns[row] for j in others)
        shares.append(agreeing / min(k, available) if available else np.nan)
    return np.array(shares)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_noun_agreement_equals_the_definition(k):
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((40, 6)))
    nouns = rng.integers(0, 5, 40)
    nouns[0] = 99  # a noun that no other image shows
    images = rng.integers(0, 20, 40)
    neighbours = np.argsort(-(vectors @ vectors.T), axis=1)
    available = count_on_other_images(nouns, images)
    found = noun_agreement(neighbours, np.arange(40), nouns, images, available, k)
    np.testing.assert_array_equal(found, slow_agreement(vectors, nouns, images, k))
    assert np.isnan(found[0])


def test_noun_agreement_ignores_padding_and_its_own_image():
    nouns = np.array([1, 1, 1, 2])
    images = np.array([0, 0, 1, 2])
    # Row 0: itself and its neighbour on image 0 are not asked; row 2 agrees, row 3 does not.
    neighbours = np.array([[0, 1, 3, 2, -1]])
    rows = np.array([0])
    available = count_on_other_images(nouns, images)
    assert noun_agreement(neighbours, rows, nouns, images, available, k=1).tolist() == [0.0]
    assert noun_agreement(neighbours, rows, nouns, images, available, k=2).tolist() == [1.0]


def test_elsewhere_counts_other_images():
    nouns = np.array([5, 5, 5, 7, 5])
    images = np.array([1, 1, 2, 1, 3])
    assert count_on_other_images(nouns, images).tolist() == [2, 2, 3, 0, 3]


def slow_first_of_near_duplicates(vectors, min_cosine, existing):
    kept = []
    for row in range(len(vectors)):
        if row < existing or all(vectors[row] @ vectors[other] < min_cosine for other in kept):
            kept.append(row)
    return kept


@pytest.mark.parametrize("existing", [0, 5, 20, 60])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_near_duplicates_are_dropped_greedily_in_order(block, existing):
    rng = np.random.default_rng(1)
    vectors = unit(rng.standard_normal((60, 3)))
    keep = first_of_near_duplicates(vectors, 0.9, existing=existing, block=block)
    assert np.flatnonzero(keep).tolist() == slow_first_of_near_duplicates(vectors, 0.9, existing)
    assert keep.sum() >= existing
    assert keep.sum() < 60 or existing == 60


def test_near_duplicates_of_nothing_and_of_equal_rows():
    assert first_of_near_duplicates(np.zeros((0, 4)), 0.5).shape == (0,)
    same = np.tile(unit([[1.0, 2.0]]), (5, 1))
    for min_cosine in (0.99, 1.0):
        keep = first_of_near_duplicates(same.astype(np.float16), min_cosine)
        assert keep.tolist() == [True, False, False, False, False]


def test_one_that_is_unlike_the_others_is_suspicious():
    rng = np.random.default_rng(0)
    vectors_nd = rng.normal([1, 0, 0, 0], 0.05, (40, 4)).astype(np.float32)
    vectors_nd[7] = [0, 1, 0, 0]
    agreement, odd = agreement_with_others(vectors_nd)
    assert odd[7] and odd.sum() <= 4 and agreement.argmin() == 7
    agreement, odd = agreement_with_others(np.zeros((6, 4), np.float32))  # of a file of holes
    assert not agreement.any() and not odd.any()
    assert agreement_with_others(vectors_nd[:1])[0].tolist() == [1.0]
