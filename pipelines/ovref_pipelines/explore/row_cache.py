"""Rows of references.parquet by id, read by row groups, of which the most recent are cached."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUPS = 256
"""Number of cached row groups, about 1 MB each."""
READERS = 4
"""Number of reader threads."""


class RowCache:
    """The table of a collection. Unlike `ReferenceCollection.rows` it caches, and includes deleted
    references. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with pq.ParquetFile(path, memory_map=True) as file:
            self._metadata = file.metadata
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self._group = lru_cache(GROUPS)(self._read)
        self._readers = ThreadPoolExecutor(READERS)

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """All columns of these references, in the order of `ids`."""
        wanted = np.asarray(ids, dtype=np.int64)
        group_of = np.searchsorted(self._starts, wanted, side="right") - 1
        numbers = np.unique(group_of).tolist()
        tables = dict(zip(numbers, self._readers.map(self._group, numbers), strict=True))
        found: list[dict[str, Any]] = []
        for reference, group in zip(wanted.tolist(), group_of.tolist(), strict=True):
            found += tables[group].slice(reference - self._starts[group], 1).to_pylist()
        return found

    def close(self) -> None:
        """Stops the reader threads."""
        self._readers.shutdown()

    def _read(self, number: int) -> pa.Table:
        # Each read opens the file anew, because an open file must not be shared between threads.
        with pq.ParquetFile(self._path, memory_map=True, metadata=self._metadata) as file:
            return file.read_row_group(number, use_threads=False)
