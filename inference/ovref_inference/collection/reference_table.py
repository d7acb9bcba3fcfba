"""The references of an open collection, row by row: references.parquet."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ovref_inference.collection.format import REFERENCE_SCHEMA, open_table
from ovref_inference.collection.remote import RemoteFile


class ReferenceTable:
    """references.parquet; reads only the row groups that are needed. Thread-safe."""

    def __init__(self, path: Path | RemoteFile) -> None:
        self._file = open_table(path, REFERENCE_SCHEMA)
        self._lock = threading.Lock()
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.cumsum([0, *sizes])

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return self._file.schema_arrow.names

    def has(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool: whether there are references with these (n,) ids, deleted or not."""
        return (ids >= 0) & (ids < self._starts[-1])

    def read(self, columns: list[str] | None, without: np.ndarray) -> pa.Table:
        """The rows of these columns, None for all columns, but for those of the ids `without`."""
        with self._lock:
            table = self._file.read(columns=columns)
        kept = np.ones(len(table), dtype=bool)
        kept[without] = False
        return table if kept.all() else table.filter(pa.array(kept))

    def rows(self, ids: np.ndarray) -> list[dict[str, Any]]:
        """One dict of `REFERENCE_SCHEMA` for each of the (n,) ids, which must exist."""
        found: dict[int, dict[str, Any]] = {}
        group_of = np.searchsorted(self._starts, ids, side="right") - 1
        for group in np.unique(group_of).tolist():
            inside = np.unique(ids[group_of == group])
            with self._lock:
                table = self._file.read_row_group(group)
            rows = table.take(pa.array(inside - self._starts[group])).to_pylist()
            found.update(zip(inside.tolist(), rows, strict=True))
        return [found[i] for i in ids.tolist()]

    def ids_of(
        self, keys: Sequence[str], sources: Sequence[str], nouns: Sequence[str]
    ) -> np.ndarray:
        """Ids that match any of the three, ascending; see `ReferenceCollection.ids_of`."""
        found = [np.zeros(0, dtype=np.int64)]
        for group in range(self._file.num_row_groups):
            with self._lock:
                table = self._file.read_row_group(group, columns=["key", "source", "noun"])
            images = pc.list_element(pc.split_pattern(table.column("key"), "#"), 0)
            named = np.zeros(len(table), dtype=bool)
            for column, wanted in (
                (table.column("key"), keys), (images, keys),
                (table.column("source"), sources), (table.column("noun"), nouns),
            ):  # fmt: skip
                if wanted:
                    values = pa.array(list(wanted), type=pa.string())
                    named |= pc.is_in(column, value_set=values).to_numpy()
            found.append(np.flatnonzero(named) + self._starts[group])
        return np.concatenate(found)
