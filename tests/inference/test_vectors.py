"""Prefetched rows: whole pages of the file that cover them, and nothing else."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from ovref_inference import ReferenceCollection
from ovref_inference.collection import reference_collection as module
from ovref_inference.collection.format import open_vectors, write_vectors
from ovref_inference.vectors import prefetch_rows

PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_WILLNEED"), reason="the platform takes no advice"
)


class Recorded(mmap.mmap):
    """A mapping that records the advice it is given, and passes it on."""

    fails = False

    def madvise(self, option, start, length):
        self.__dict__.setdefault("advice", []).append((option, start, length))
        if self.fails:
            raise OSError(22, "no advice here")
        super().madvise(option, start, length)


@pytest.fixture
def mapped(tmp_path: Path):
    """Makes a (rows, dim) matrix: the mapping of its file, and the matrix in it."""

    def make(rows: int, dim: int) -> tuple[Recorded, np.ndarray]:
        path = tmp_path / f"{rows}x{dim}.npy"
        write_vectors(path, np.arange(rows * dim).reshape(rows, dim) % 1000)
        with open(path, "rb") as file:
            mapping = Recorded(file.fileno(), 0, access=mmap.ACCESS_READ)
        offset = len(mapping) - rows * dim * 2
        return mapping, np.ndarray((rows, dim), np.float16, buffer=mapping, offset=offset)

    return make


def pages(mapping: Recorded) -> list[int]:
    """The pages of all advice given; checks each range."""
    found = []
    for option, start, length in mapping.__dict__.get("advice", []):
        assert option == mmap.MADV_WILLNEED and start % PAGE == 0
        assert length > 0 and start + length <= len(mapping)
        assert (start + length) % PAGE == 0 or start + length == len(mapping)
        found += range(start // PAGE, -(-(start + length) // PAGE))
    return found


def slow_pages(mapping: Recorded, matrix: np.ndarray, rows: list[int]) -> list[int]:
    """The page of every byte of the rows, byte by byte."""
    offset = len(mapping) - matrix.nbytes
    wide = matrix.shape[1] * 2
    return sorted({(offset + row * wide + byte) // PAGE for row in rows for byte in range(wide)})


@pytest.mark.parametrize("dim", [3, 768, PAGE // 2, PAGE + 5])
def test_the_pages_of_the_rows_are_announced_once_each(mapped, dim):
    mapping, matrix = mapped(41, dim)
    for rows in ([0], [40], [0, 40], [7, 7, 3], list(range(41)), [39, 40, 5, 6, 20]):
        mapping.__dict__.clear()
        prefetch_rows(matrix, np.array(rows))
        assert pages(mapping) == slow_pages(mapping, matrix, rows)


def test_rows_on_neighbouring_pages_are_one_range(mapped):
    mapping, matrix = mapped(100, PAGE // 4)  # half a page each
    prefetch_rows(matrix, np.array([50, 0, 1, 2, 51, 52]))
    assert len(mapping.advice) == 2


def test_a_part_of_a_mapping_is_announced_where_it_lies(mapped):
    mapping, matrix = mapped(60, 768)
    prefetch_rows(matrix[50:], np.array([4]))
    assert pages(mapping) == slow_pages(mapping, matrix, [54])


def test_what_cannot_be_announced_is_left_alone(mapped):
    mapping, matrix = mapped(60, 8)
    prefetch_rows(matrix, np.zeros(0, np.int64))
    prefetch_rows(matrix[:0], np.zeros(0, np.int64))
    prefetch_rows(matrix[:, ::2], np.array([3]))
    assert not mapping.__dict__
    prefetch_rows(np.ones((5, 3), np.float16), np.array([1, 4]))
    prefetch_rows(np.ones((5, 3), np.float16)[1:], np.array([1]))
    mapping.fails = True
    prefetch_rows(matrix, np.array([3]))
    assert len(mapping.advice) == 1


def test_a_file_opened_as_a_collection_does_is_a_mapping_that_can_be_announced(tmp_path):
    path = tmp_path / "vectors.npy"
    write_vectors(path, np.ones((5000, 8)))
    vectors = open_vectors(path)
    assert isinstance(vectors.base, mmap.mmap)
    prefetch_rows(vectors, np.array([0, 4999]))
    assert (vectors == 1).all()


def test_a_collection_announces_what_it_reads_before_it_reads(published, built, monkeypatch):
    announced = []

    def record(matrix, rows):
        announced.append((matrix is opened.visual, np.unique(rows).tolist()))

    monkeypatch.setattr(module, "prefetch_rows", record)
    with ReferenceCollection.open(published) as opened:
        opened.prototypes(["dog", "cat"])
        first, second = (built.nouns.index(noun) for noun in ("cat", "dog"))
        assert announced == [(False, list(range(4 * first, 4 * first + 8))), (True, [])]
        assert second == first + 1
        announced.clear()
        opened.prototypes(["dog", "cat"], k=3)
        both = np.flatnonzero(np.isin(built.noun_of, [first, second]))
        assert announced == [(False, []), (True, both.tolist())]
        announced.clear()
        support = opened.search_text(built.noun_embeddings, k=6)
        opened.fossil_prototypes(built.noun_embeddings, n=6, k=2)
        assert announced == [(True, np.unique(support.ids).tolist())]
