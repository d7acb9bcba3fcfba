"""Rows of a file of vectors are those of the array that was written."""

import numpy as np
import pytest

from ovref.errors import StorageError
from ovref.reduce.vector_file import VectorFile


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 2, 6, 7, 9], [9, 2, 2, 1], range(10)])
def test_rows_are_those_of_the_array(tmp_path, rows):
    whole = np.random.default_rng(0).standard_normal((10, 7)).astype(np.float32)
    whole.tofile(tmp_path / "vectors")
    rows = np.array(rows, dtype=np.int64)
    found = VectorFile(tmp_path / "vectors", whole.shape)[rows]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[rows])


def test_a_file_that_is_too_short_is_refused(tmp_path):
    np.zeros((3, 7), np.float32).tofile(tmp_path / "vectors")
    with pytest.raises(StorageError, match="shorter than 4 vectors"):
        VectorFile(tmp_path / "vectors", (4, 7))[np.array([2, 3])]
