"""The references of an open collection, row by row: references.parquet."""

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovref_inference.collection.format import REFERENCE_SCHEMA, open_table
from ovref_inference.collection.remote import RemoteFile, RemoteTable
from ovref_inference.errors import CollectionError


def open_references(path: str | Path | RemoteFile) -> pq.ParquetFile:
    """references.parquet, opened.

    Raises:
        CollectionError: it cannot be read, or ids are not row numbers, by the statistics of each
            row group, so that no column is read.
    """
    file, start = open_table(path, REFERENCE_SCHEMA), 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        found = group.column(REFERENCE_SCHEMA.get_field_index("id")).statistics
        if (found.min, found.max) != (start, start + group.num_rows - 1):
            raise CollectionError(
                f"{path}: row {start} and those after it must have their row numbers as ids, "
                f"found {found.min} to {found.max}"
            )
        start += group.num_rows
    return file


class ReferenceTable:
    """references.parquet, opened when it is first read; reads only the row groups that are needed.
    Thread-safe."""

    def __init__(self, path: Path | RemoteFile, rows: int) -> None:
        """
        Args:
            rows: how many it has. Reading raises CollectionError if that is wrong.
        """
        self._path, self._rows = path, rows
        self._lock = threading.RLock()

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if "_file" in self.__dict__:
            self._file.close()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return REFERENCE_SCHEMA.names

    def has(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool: whether there are references with these (n,) ids, deleted or not."""
        return (ids >= 0) & (ids < self._rows)

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
        with self._lock:
            starts = self._starts
        group_of = np.searchsorted(starts, ids, side="right") - 1
        for group, table in self._groups(np.unique(group_of).tolist(), None):
            inside = np.unique(ids[group_of == group])
            rows = table.take(pa.array(inside - starts[group])).to_pylist()
            found.update(zip(inside.tolist(), rows, strict=True))
        return [found[i] for i in ids.tolist()]

    def ids_of(
        self, keys: Sequence[str], sources: Sequence[str], nouns: Sequence[str]
    ) -> np.ndarray:
        """Ids that match any of the three, ascending; see `ReferenceCollection.ids_of`."""
        found = [np.zeros(0, dtype=np.int64)]
        with self._lock:
            starts = self._starts
        for group, table in self._groups(range(len(starts) - 1), ["key", "source", "noun"]):
            images = pc.list_element(pc.split_pattern(table.column("key"), "#"), 0)
            named = np.zeros(len(table), dtype=bool)
            for column, wanted in (
                (table.column("key"), keys), (images, keys),
                (table.column("source"), sources), (table.column("noun"), nouns),
            ):  # fmt: skip
                if wanted:
                    values = pa.array(list(wanted), type=pa.string())
                    named |= pc.is_in(column, value_set=values).to_numpy()
            found.append(np.flatnonzero(named) + starts[group])
        return np.concatenate(found)

    def _groups(
        self, groups: Sequence[int], columns: list[str] | None
    ) -> Iterator[tuple[int, pa.Table]]:
        """These row groups, each with its number; missing ones are requested together."""
        if isinstance(self._file, RemoteTable):
            self._file.prefetch(groups, columns)
        for group in groups:
            with self._lock:
                table = self._file.read_row_group(group, columns=columns)
            yield group, table

    @cached_property
    def _file(self) -> pq.ParquetFile:
        file = open_references(self._path)
        if file.metadata.num_rows != self._rows:
            raise CollectionError(
                f"{self._path} has {file.metadata.num_rows} rows, the collection {self._rows} "
                "references: they do not belong together"
            )
        return file

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each row group, and the number of rows."""
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        return np.cumsum([0, *(group.num_rows for group in groups)])
