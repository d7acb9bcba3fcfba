"""Rows of references.parquet by id, read by row groups, of which the most recent are cached."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref_inference.collection.manifest import PARTITION_IDS

GROUPS = 256
"""Number of cached row groups, about 1 MB each."""
READERS = 4
"""Number of reader threads."""


class RowCache:
    """The table of a collection. Unlike `ReferenceCollection.rows` it caches, and includes deleted
    references. Thread-safe."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """`paths` are of the collection's table, or of those of its partitions."""
        self._paths = paths
        self._starts: list[np.ndarray] = []
        self._metadata: list[pq.FileMetaData] = []
        for path in paths:
            with pq.ParquetFile(path, memory_map=True) as file:
                metadata = file.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._metadata.append(metadata)
            self._starts.append(np.cumsum([0, *groups]))
        self._group = lru_cache(GROUPS)(self._read)
        self._readers = ThreadPoolExecutor(READERS)

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """All columns of these references, in the order of `ids`."""
        places = []
        for reference in map(int, ids):
            part, row = divmod(reference, PARTITION_IDS)
            number = int(np.searchsorted(self._starts[part], row, side="right")) - 1
            places.append((reference, (part, number), row - int(self._starts[part][number])))
        groups = sorted({group for _, group, _ in places})
        tables = dict(zip(groups, self._readers.map(self._group, groups), strict=True))
        found: list[dict[str, Any]] = []
        for reference, group, row in places:
            (columns,) = tables[group].slice(row, 1).to_pylist()
            found.append(columns | {"id": reference})
        return found

    def _read(self, place: tuple[int, int]) -> pa.Table:
        # Each read opens the file anew, because an open file must not be shared between threads.
        part, group = place
        path, metadata = self._paths[part], self._metadata[part]
        with pq.ParquetFile(path, memory_map=True, metadata=metadata) as file:
            return file.read_row_group(group, use_threads=False)
