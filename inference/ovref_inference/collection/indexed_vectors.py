"""Textual embeddings that a collection stores in its textual index alone (format 5).

The codes of an `SQfp16` index, exact or with inverted lists, are the float16 embeddings themselves,
so nothing is lost by leaving out the matrix; only the order is another.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors

_ID_HALVES = 4
"""An id in an inverted list has 8 bytes, as many as four numbers."""


def textual_vectors(paths: Mapping[str, Path | RemoteFile], manifest: fmt.Manifest) -> Vectors:
    """The textual embeddings of a collection, from their matrix or else from their index.

    Args:
        paths: role -> file.
    """
    if "textual" in paths:
        return fmt.open_matrix(paths, manifest, "textual")
    return IndexedVectors(
        paths["textual_index"], manifest.counts["references"], manifest.textual.dim
    )


class IndexedVectors:
    """(n, d) float16 vectors of an `SQfp16` index; vector i has id i.

    Where each is in the file is found at the first reading, and takes 8 bytes a vector.
    """

    def __init__(self, file: Path | RemoteFile, rows: int, dim: int) -> None:
        self._file = file
        self.shape: tuple[int, ...] = (rows, dim)
        self.dtype, self.ndim = np.dtype(np.float16), 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any, /) -> np.ndarray:
        rows = np.arange(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        halves, starts = self._located
        dim = self.shape[1]
        found = np.empty((rows.size, dim), dtype=self.dtype)
        for at, start in enumerate(starts[rows].ravel().tolist()):
            found[at] = halves[start : start + dim]
        return found.reshape(*rows.shape, dim)

    def check_readable(self) -> None:
        """Raises CollectionError if the index is read by ranges: its ids are all over it."""
        if isinstance(self._file, RemoteFile):
            raise CollectionError(
                f"the textual embeddings of this collection are stored in {self._file} alone, "
                "where they cannot be read by ranges: use a copy of the collection in a local "
                "folder (in Python, open it with copy=True), or reduce it with "
                "reduce.textual_embeddings=stored"
            )

    @cached_property
    def _located(self) -> tuple[np.ndarray, np.ndarray]:
        """The file's end as float16 numbers, and where in it each vector begins."""
        self.check_readable()
        path = Path(str(self._file))
        rows, dim = self.shape
        index = indexes.read_index(path, rows=rows, dim=dim)
        has_lists = hasattr(index, "nlist")
        code_size = index.invlists.code_size if has_lists else index.code_size
        entry = dim + (_ID_HALVES if has_lists else 0)
        begin = path.stat().st_size - 2 * rows * entry
        if code_size != 2 * dim or begin < 0:
            raise CollectionError(
                f"{path} holds {code_size} bytes of each textual embedding, expected {2 * dim}, "
                "the embedding in float16: reduce the collection again"
            )
        halves = np.memmap(path, "<f2", "r", offset=begin, shape=(rows * entry,))
        if not has_lists:
            return halves, np.arange(rows) * dim
        starts = np.full(rows, -1, dtype=np.int64)
        at = 0
        for number in range(index.nlist):
            # Its codes, then its ids.
            size = index.invlists.list_size(number)
            ids = halves[at + size * dim : at + size * entry].view("<i8")
            starts[ids[(ids >= 0) & (ids < rows)]] = at + np.arange(size) * dim
            at += size * entry
        if at != len(halves) or (starts < 0).any():
            raise CollectionError(f"{path} is not an index of all references: publish it again")
        return halves, starts
