"""Vectors in a local file, of which only those are in memory that are asked for."""

import os
from pathlib import Path

import numpy as np

from ovref.errors import StorageError


class VectorFile:
    """(n, d) float32 in a file, one row after another. Rows are read as those of an array are.

    Not mapped into memory, because pages that were read would count as the process's own.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._path = path

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), d) float32. Raises StorageError: the file ends before a row."""
        found = np.empty((len(rows), self.shape[1]), np.float32)
        size = found.itemsize * self.shape[1]
        # One read for each run of rows that follow each other.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        stops = np.append(starts, len(rows))[1:]
        content = found.reshape(-1).view(np.uint8).data
        with open(self._path, "rb", buffering=0) as file:
            for start, stop in zip(starts, stops, strict=True):
                self._fill(file.fileno(), content[start * size : stop * size], rows[start] * size)
        return found

    def _fill(self, file: int, wanted: memoryview, offset: int) -> None:
        while wanted:  # the system reads at most 2 GB at once
            read = os.preadv(file, [wanted], offset)
            if not read:
                raise StorageError(f"{self._path} is shorter than {self.shape[0]} vectors")
            wanted, offset = wanted[read:], offset + read
