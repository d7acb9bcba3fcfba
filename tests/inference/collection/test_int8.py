import fsspec
import numpy as np
import pytest

from ovref_inference.collection import format as fmt
from ovref_inference.collection.int8 import Int8Vectors, decode_rows, encode_rows, write_int8
from ovref_inference.collection.remote import BlockCache, RemoteFile
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import l2_normalised, prefetch_rows


@pytest.fixture(scope="module")
def vectors():
    """Rows whose largest magnitudes differ, as of encoders with a few large dimensions."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((9000, 20)) * np.where(np.arange(20) == 3, 8, 1)
    drawn[::2, 3] = 0
    return l2_normalised(drawn).astype(np.float16)


def test_no_number_is_off_by_more_than_half_a_step(vectors):
    decoded = decode_rows(encode_rows(vectors)).astype(np.float64)
    largest = np.abs(vectors.astype(np.float64)).max(1, keepdims=True)
    # Half a step, and what float16 rounds off.
    assert (np.abs(decoded - vectors) <= largest * (0.5 / 127 + 2**-11)).all()
    assert (np.abs(decoded).max(1, keepdims=True) == largest).all()


def test_decoded_rows_are_encoded_to_the_same_bytes(vectors):
    once = encode_rows(vectors)
    np.testing.assert_array_equal(encode_rows(decode_rows(once)), once)


def test_zeros_stay_zeros_and_no_rows_are_none():
    assert (decode_rows(encode_rows(np.zeros((2, 5)))) == 0).all()
    assert encode_rows(np.zeros((0, 5))).shape == (0, 7)


@pytest.fixture
def places(vectors, tmp_path):
    """The matrix on a disk and on an object store."""
    path = tmp_path / "visual.int8.npy"
    write_int8(path, vectors)
    files = fsspec.filesystem("memory")
    files.pipe_file("/int8/visual.int8.npy", path.read_bytes())
    cache = BlockCache(tmp_path / "blocks")
    there = RemoteFile(files, "/int8/visual.int8.npy", path.stat().st_size, "a" * 64, cache)
    return [fmt.open_vectors_anywhere(place) for place in (path, there)]


def test_rows_are_read_alike_from_a_disk_and_by_ranges(vectors, places):
    decoded = decode_rows(encode_rows(vectors))
    for opened in places:
        assert isinstance(opened, Int8Vectors)
        assert opened.shape == (9000, 20) and len(opened) == 9000 and opened.dtype == np.float16
        prefetch_rows(opened, np.array([8999, 3]))
        keys = [slice(5, 9), slice(None, None, 100), -1, np.array([7, 3, 3])]
        for key in [*keys, np.array([[1, 2], [8999, 0]]), slice(4, 4)]:
            np.testing.assert_array_equal(opened[key], decoded[key])
            assert opened[key].dtype == np.float16


def test_a_matrix_of_another_type_is_refused(tmp_path):
    for number, wrong in enumerate((np.zeros((3, 4)), np.zeros((3, 2), np.int8))):
        np.save(path := tmp_path / f"{number}.npy", wrong)
        with pytest.raises(CollectionError, match=r"must hold a \(rows, dim\) float16 matrix"):
            fmt.open_vectors_anywhere(path)
    write_int8(path, np.ones((3, 4)))
    with pytest.raises(CollectionError, match="float16 matrix"):
        fmt.open_vectors(path)
