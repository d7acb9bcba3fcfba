"""The partitions of a collection as if they were one: each class has the methods of what it joins.

Ids of references, and numbers of stored prototypes, are those of a partition plus its number times
`PARTITION_IDS`. Of partitions on an object store, requests go out in parallel.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ovref_inference.collection.joined_index import JoinedIndex
from ovref_inference.collection.manifest import PARTITION_IDS, by_partition
from ovref_inference.collection.nouns import Nouns
from ovref_inference.collection.parts import Parts, TunedIndex
from ovref_inference.collection.prototypes import PrototypeConfig, neighbours_of
from ovref_inference.collection.reference_table import ReferenceTable
from ovref_inference.collection.threads import in_threads
from ovref_inference.collection.words import Words, repeated
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors, check_readable, prefetch_rows

_ROWS = 4096
"""Rows that are read at a time where all are."""

def joined(
    parts: Sequence[Parts], url: str, *, lists: Mapping[str, TunedIndex], threads: int
) -> Parts:
    """The parts of all partitions together.

    Args:
        parts: by number of the partition.
        url: of the collection, for messages.
        lists: by role, the index over the inverted lists of all partitions, if there is one.
        threads: partitions that are asked at a time.

    Raises:
        CollectionError: a noun is in two partitions.
    """
    nouns = JoinedNouns([one.nouns for one in parts], threads)
    if twice := repeated(nouns.names.array):
        raise CollectionError(f"{url}: nouns are in two partitions: {', '.join(twice[:10])}")
    norms = [one.norms for one in parts if one.norms is not None]
    firsts = range(0, len(parts) * PARTITION_IDS, PARTITION_IDS)
    deleted = [one.deleted + first for one, first in zip(parts, firsts, strict=True)]
    return Parts(
        visual=JoinedVectors([one.visual for one in parts], threads),
        textual=JoinedVectors([one.textual for one in parts], threads),
        norms=JoinedVectors(norms, threads) if len(norms) == len(parts) else None,
        prototypes=JoinedVectors([one.prototypes for one in parts], threads),
        visual_index=JoinedIndex(
            [one.visual_index for one in parts], threads, lists.get("visual_lists")
        ),
        textual_index=JoinedIndex(
            [one.textual_index for one in parts], threads, lists.get("textual_lists")
        ),
        nouns=nouns,
        table=JoinedTable([one.table for one in parts]),
        deleted=np.concatenate(deleted),
    )


class JoinedVectors:
    """Matrices of one width, read by ids. A slice gives the rows whose ids lie in it, so that `[:]`
    gives all rows."""

    def __init__(self, parts: Sequence[Vectors], threads: int) -> None:
        self._parts, self._threads = parts, threads
        self.shape: tuple[int, ...] = (sum(map(len, parts)), parts[0].shape[1])
        self.dtype, self.ndim = np.dtype(np.float16), 2

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self._parts:
            for start in range(0, len(part), _ROWS):
                yield from part[start : start + _ROWS]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any, /) -> np.ndarray:
        if isinstance(key, slice):
            return self._between(key)
        ids: np.ndarray = np.asarray(key)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise IndexError(f"rows of several partitions are read by ids, not by {ids.dtype}")
        found = np.empty((ids.size, self.shape[1]), dtype=self.dtype)
        for number, where, rows in by_partition(ids.ravel()):
            found[where] = self._parts[self._checked(number)][rows]
        return found.reshape(*ids.shape, self.shape[1])

    def check_readable(self) -> None:
        """See `vectors.check_readable`."""
        for part in self._parts:
            check_readable(part)

    def prefetch(self, rows: np.ndarray) -> None:
        """See `vectors.prefetch_rows`."""
        in_threads(
            lambda one: prefetch_rows(self._parts[self._checked(one[0])], one[2]),
            list(by_partition(np.asarray(rows).ravel())),
            self._threads,
        )

    def _between(self, key: slice) -> np.ndarray:
        start = 0 if key.start is None else key.start
        stop = len(self._parts) * PARTITION_IDS if key.stop is None else key.stop
        if key.step not in (None, 1) or start < 0 or stop < 0:
            raise IndexError(f"rows of several partitions are read by ids, not by {key}")
        found = [np.zeros((0, self.shape[1]), dtype=self.dtype)]
        last = min(-(-stop // PARTITION_IDS), len(self._parts))
        for number in range(start // PARTITION_IDS, last):
            first = number * PARTITION_IDS
            found.append(self._parts[number][max(start - first, 0) : stop - first])
        return np.concatenate(found)

    def _checked(self, number: int) -> int:
        if not 0 <= number < len(self._parts):
            raise IndexError(f"there is no partition {number}, only 0 to {len(self._parts) - 1}")
        return number


class JoinedTable:
    """Tables of references."""

    def __init__(self, parts: Sequence[ReferenceTable]) -> None:
        self._parts = parts

    def close(self) -> None:
        for part in self._parts:
            part.close()

    @property
    def columns(self) -> list[str]:
        return self._parts[0].columns

    def has(self, ids: np.ndarray) -> np.ndarray:
        found = np.zeros(len(ids), dtype=bool)
        for number, where, rows in by_partition(ids):
            if 0 <= number < len(self._parts):
                found[where] = self._parts[number].has(rows)
        return found

    def read(self, columns: list[str] | None, without: np.ndarray) -> pa.Table:
        tables = []
        for number, part in enumerate(self._parts):
            first = number * PARTITION_IDS
            low, high = np.searchsorted(without, [first, first + PARTITION_IDS])
            table = part.read(columns, without[low:high] - first)
            if "id" in table.column_names:
                at = table.column_names.index("id")
                ids = pa.array(table.column(at).to_numpy() + first)
                table = table.set_column(at, table.schema.field(at), ids)
            tables.append(table)
        return pa.concat_tables(tables)

    def rows(self, ids: np.ndarray) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for number, where, rows in by_partition(ids):
            for at, row in zip(where.tolist(), self._parts[number].rows(rows), strict=True):
                found[at] = row | {"id": int(ids[at])}
        return [found[at] for at in range(len(ids))]

    def ids_of(
        self, keys: Sequence[str], sources: Sequence[str], nouns: Sequence[str]
    ) -> np.ndarray:
        found = (part.ids_of(keys, sources, nouns) for part in self._parts)
        return np.concatenate([ids + n * PARTITION_IDS for n, ids in enumerate(found)])


class JoinedNouns:
    """Vocabularies that share no noun, sorted together.

    A rare noun borrows from its neighbours within its partition, so that its stored prototypes
    hold; an unknown noun, or one without references, from the nearest nouns of all partitions
    (`tests/benchmarks/results/partitioned_miou.md`).
    """

    def __init__(self, parts: Sequence[Nouns], threads: int) -> None:
        self._parts, self._threads = parts, threads
        together = pa.concat_arrays([part.names.array for part in parts])
        self._order = pc.sort_indices(together).to_numpy().astype(np.int32)
        self.names = Words(together.take(pa.array(self._order)))
        sizes = np.array([len(part.names) for part in parts], dtype=np.int32)
        starts = np.cumsum(sizes, dtype=np.int32) - sizes
        place = np.empty_like(self._order)
        place[self._order] = np.arange(len(place), dtype=np.int32)
        self._rows = np.split(place, starts[1:])
        """For each partition, the row here of each of its own rows."""
        self._part = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)[self._order]
        self._own_row = self._order - starts[self._part]

    @cached_property
    def counts(self) -> np.ndarray:
        return self._of_all(lambda part: part.counts)

    @cached_property
    def embeddings(self) -> np.ndarray:
        return self._of_all(Nouns.read_embeddings)

    def embeddings_of(self, rows: Sequence[int]) -> np.ndarray:
        """As `Nouns.embeddings_of`; of other partitions nothing is read."""
        return np.stack(self._each(rows, Nouns.embeddings_of))

    def lenders(self, row: int | None, embedding: np.ndarray, config: PrototypeConfig) -> list[int]:
        """As `Nouns.lenders`."""
        if row is None or not self.counts[row]:
            return neighbours_of(embedding, self.embeddings, self.counts, config)
        number, own = int(self._part[row]), int(self._own_row[row])
        return self._rows[number][self._parts[number].lenders(own, embedding, config)].tolist()

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        found = np.empty(len(ids), dtype=np.int64)

        def of_one(one: tuple[int, np.ndarray, np.ndarray]) -> None:
            number, where, rows = one
            found[where] = self._rows[number][self._parts[number].rows_of(rows)]

        in_threads(of_one, list(by_partition(ids)), self._threads)
        return found

    def references_of(self, rows: Sequence[int]) -> list[np.ndarray]:
        found = self._each(rows, Nouns.references_of)
        firsts = self._part[np.asarray(rows, dtype=np.int64)].astype(np.int64) * PARTITION_IDS
        return [ids + first for ids, first in zip(found, firsts, strict=True)]

    def stored(self, row: int) -> tuple[slice, list[int]] | None:
        """As `Nouns.stored`; None also for a noun without references."""
        number, own = int(self._part[row]), int(self._own_row[row])
        if not self.counts[row] or (found := self._parts[number].stored(own)) is None:
            return None
        span, used = found
        first = number * PARTITION_IDS
        return slice(first + span.start, first + span.stop), self._rows[number][used].tolist()

    def _each(
        self, rows: Sequence[int], function: Callable[[Nouns, list[int]], Iterable[np.ndarray]]
    ) -> list[np.ndarray]:
        """What `function` gives for each of these rows, asked of its partition by its row there."""
        wanted = np.asarray(rows, dtype=np.int64)
        found = [np.zeros(0)] * len(wanted)

        def of_one(number: int) -> None:
            where = np.flatnonzero(self._part[wanted] == number)
            own = self._own_row[wanted[where]].tolist()
            for at, one in zip(where.tolist(), function(self._parts[number], own), strict=True):
                found[at] = one

        in_threads(of_one, np.unique(self._part[wanted]).tolist(), self._threads)
        return found

    def _of_all(self, function: Callable[[Nouns], np.ndarray]) -> np.ndarray:
        """What `function` gives for the rows of each vocabulary, in the order of all nouns."""
        return np.concatenate(in_threads(function, self._parts, self._threads))[self._order]
