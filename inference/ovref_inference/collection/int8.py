"""Embeddings in 8 bits a number: rows of whole numbers from -127 to 127, each with its scale.

A row of width d is stored as d + 2 bytes: the numbers, then its largest magnitude in float16. So a
row is read by one range, and a row that was decoded and is encoded again keeps its bytes. A scale
for each row loses less than one for each dimension (`tests/benchmarks/results/int8.md`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.vectors import Vectors, prefetch_rows

_CHUNK_ROWS = 8192
_LARGEST = 127


def encode_rows(vectors_nd: np.ndarray) -> np.ndarray:
    """(n, d) finite vectors -> (n, d + 2) int8."""
    vectors_nd = np.asarray(vectors_nd, dtype=np.float32)
    largest_n1 = np.abs(vectors_nd).max(axis=1, keepdims=True, initial=0).astype("<f2")
    scale_n1 = largest_n1.astype(np.float32) / _LARGEST
    scaled_nd = vectors_nd / np.where(scale_n1 > 0, scale_n1, 1)
    codes_nd = np.rint(scaled_nd).clip(-_LARGEST, _LARGEST).astype(np.int8)
    return np.concatenate([codes_nd, largest_n1.view(np.int8)], axis=1)


def decode_rows(stored: np.ndarray) -> np.ndarray:
    """(..., d + 2) int8 -> (..., d) float16."""
    largest = np.ascontiguousarray(stored[..., -2:]).view("<f2").astype(np.float32)
    return (stored[..., :-2] * (largest / _LARGEST)).astype(np.float16)


class Int8Vectors:
    """(n, d) float16 vectors of an int8 matrix, decoded as they are read."""

    def __init__(self, stored: Any) -> None:
        """
        Args:
            stored: (n, d + 2) int8, memory-mapped or read by ranges.
        """
        self._stored = stored
        self.shape: tuple[int, ...] = (stored.shape[0], stored.shape[1] - 2)
        self.dtype, self.ndim = np.dtype(np.float16), 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any, /) -> np.ndarray:
        return decode_rows(np.asarray(self._stored[key]))

    def prefetch(self, rows: np.ndarray) -> None:
        """See `vectors.prefetch_rows`."""
        prefetch_rows(self._stored, rows)


def write_int8(path: str | Path, vectors: Vectors) -> None:
    """Writes (n, d) vectors as an (n, d + 2) int8 .npy, some rows at a time."""
    rows, dim = vectors.shape
    header = {"descr": "|i1", "fortran_order": False, "shape": (rows, dim + 2)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, _CHUNK_ROWS):
            file.write(encode_rows(vectors[start : start + _CHUNK_ROWS]).tobytes())
