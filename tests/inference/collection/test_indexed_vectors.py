"""Vectors read from the codes of an index are those that were put in."""

from types import SimpleNamespace

import numpy as np
import pytest

from ovref_inference import CollectionError
from ovref_inference.collection import index as indexes
from ovref_inference.collection.indexed_vectors import IndexedVectors
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.vectors import check_readable, l2_normalised

N, DIM = 700, 10


@pytest.fixture(scope="module")
def vectors():
    return l2_normalised(np.random.default_rng(0).standard_normal((N, DIM))).astype(np.float16)


@pytest.mark.parametrize("factory", ["SQfp16", "IVF8,SQfp16", "IVF8_HNSW4,SQfp16"])
def test_rows_are_those_that_were_indexed_bit_by_bit(vectors, factory, tmp_path):
    indexes.write_index(indexes.build_index(vectors, factory), tmp_path / "index")
    found = IndexedVectors(tmp_path / "index", N, DIM)
    check_readable(found)
    assert len(found) == N and found.shape == (N, DIM) and found.dtype == np.float16
    for key in (slice(None), slice(5, 9), slice(690, 900), np.array([[3, 3], [699, 0]]),
                [7, -1], 12, np.zeros((0, 4), np.int64)):  # fmt: skip
        np.testing.assert_array_equal(found[key].view(np.uint16), vectors[key].view(np.uint16))
    with pytest.raises(IndexError):
        found[[N]]


@pytest.mark.parametrize(
    ("factory", "rows", "dim", "message"),
    [
        ("Flat", N, DIM, "holds 40 bytes of each textual embedding, expected 20"),
        ("IVF8,SQ8", N, DIM, "holds 10 bytes of each textual embedding, expected 20"),
        ("IVF8,SQfp16", N + 1, DIM, "holds 700 vectors"),
        ("SQfp16", N, DIM + 1, "of width 10"),
    ],
)
def test_an_index_without_them_is_refused(vectors, factory, rows, dim, message, tmp_path):
    indexes.write_index(indexes.build_index(vectors, factory), tmp_path / "index")
    with pytest.raises(CollectionError, match=message):
        IndexedVectors(tmp_path / "index", rows, dim)[:1]


def test_an_index_that_lacks_a_row_is_refused(vectors, tmp_path):
    index = indexes.build_index(vectors[:-1], "IVF8,SQfp16")
    index.add_with_ids(vectors[:1].astype(np.float32), np.array([0]))
    indexes.write_index(index, tmp_path / "index")
    with pytest.raises(CollectionError, match="is not an index of all references"):
        IndexedVectors(tmp_path / "index", N, DIM)[0]


def test_one_that_is_read_by_ranges_says_so_before_it_is_read():
    cache = SimpleNamespace()
    found = IndexedVectors(RemoteFile(None, "/textual.faiss", 100, "hash", cache), N, DIM)
    for read in (lambda: check_readable(found), lambda: found[0]):
        with pytest.raises(CollectionError, match=r"textual.faiss alone.*copy=True"):
            read()
