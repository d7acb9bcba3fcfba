import numpy as np
import pytest

from ovref.ops.prototypes import nearest_nouns, support_nouns


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_support(counts, textual, min_references, max_neighbours):
    supports = []
    for noun in range(len(counts)):
        nearest = sorted(
            (other for other in range(len(counts)) if other != noun),
            key=lambda other: (-float(textual[noun] @ textual[other]), other),
        )
        support = [noun]
        while (
            sum(counts[other] for other in support) < min_references
            and len(support) - 1 < max_neighbours
            and nearest
        ):
            support.append(nearest.pop(0))
        supports.append(support)
    return supports


@pytest.mark.parametrize(("min_references", "max_neighbours"), [(1, 3), (8, 3), (30, 9), (500, 99)])
def test_support_equals_the_papers_loop(min_references, max_neighbours):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 12, 30)
    textual = unit(rng.standard_normal((30, 8))).astype(np.float32)
    found = support_nouns(counts, textual, min_references, max_neighbours)
    expected = slow_support(counts, textual, min_references, max_neighbours)
    assert [list(support) for support in found] == expected


def test_no_neighbours_wanted_or_there():
    textual = unit([[1, 0], [0, 1]])
    assert [list(s) for s in support_nouns(np.array([1, 1]), textual, 5, 0)] == [[0], [1]]
    assert [list(s) for s in support_nouns(np.array([1]), textual[:1], 5, 10)] == [[0]]


def test_equal_cosines_are_ordered_by_row():
    textual = unit([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert nearest_nouns(textual, np.array([1]), 3).tolist() == [[0, 2, 3]]
    assert nearest_nouns(textual, np.array([0, 3]), 99).shape == (2, 3)
