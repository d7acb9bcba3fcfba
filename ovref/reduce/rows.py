"""Rows of a matrix on disk, read rather than memory-mapped: mapped pages count as memory."""

import os
import weakref
from pathlib import Path

import numpy as np

from ovref_inference.collection.format import open_vectors


class Rows:
    """The (rows, dim) float16 matrix of a file, indexed by slices and by row numbers.

    rows = Rows(path)
    rows[100:200]                  # (100, dim), one read
    rows[np.array([7, 3, 3])]      # (3, dim), one read for each run of neighbouring rows
    """

    def __init__(self, path: str | Path) -> None:
        """Raises CollectionError like `open_vectors`."""
        mapped = open_vectors(path)
        self.path = Path(path)
        self.shape: tuple[int, int] = mapped.shape
        self._offset = mapped.offset
        # Kept open: a rare noun's references are some ten short reads.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError(f"the step of a slice of rows must be 1, found {step}")
            return self._read(start, max(start, stop))
        if len(key) and key[-1] - key[0] == len(key) - 1 and (key[1:] > key[:-1]).all():
            return self._read(key[0], key[-1] + 1)  # as a noun's references usually are
        wanted, inverse = np.unique(key, return_inverse=True)
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float16)
        cuts = np.flatnonzero(np.diff(wanted) > 1) + 1
        for first, last in zip([0, *cuts], [*cuts, len(wanted)], strict=True):
            if first < last:
                found[first:last] = self._read(wanted[first], wanted[last - 1] + 1)
        return found[inverse.reshape(-1)]

    def _read(self, start: int, stop: int) -> np.ndarray:
        dim = self.shape[1]
        found = np.empty((int(stop - start), dim), dtype="<f2")
        into, at = found.reshape(-1).view(np.uint8).data, self._offset + int(start) * dim * 2
        while into.nbytes:  # one call reads at most 2 GB
            count = os.preadv(self._descriptor, [into], at)
            if count == 0:
                raise ValueError(f"{self.path} ends before row {stop}")
            into, at = into[count:], at + count
        return found
