"""The vocabulary of an open collection, and the noun of each reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref_inference.collection import format as fmt
from ovref_inference.collection.prototypes import PrototypeConfig, neighbours_of
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.collection.words import Words
from ovref_inference.errors import CollectionError

_COLUMNS = [name for name in fmt.NOUN_SCHEMA.names if name != "embedding"]


@dataclass(frozen=True, kw_only=True)
class NounTable:
    """nouns.parquet without the embeddings, which are nearly all of it."""

    names: Words
    """As they are in the file; `checks.check_counts` says whether they are sorted."""
    counts: np.ndarray
    """(nouns,) int64: references of each."""
    prototype_starts: np.ndarray
    """(nouns,) int64: where the stored prototypes of each begin."""
    prototype_stops: np.ndarray
    """(nouns,) int64."""
    neighbours: np.ndarray
    """(sum of their numbers,) int32: rows of the neighbours of each noun; -1 for a noun that is not
    in the vocabulary."""
    neighbour_starts: np.ndarray
    """(nouns + 1,) int64: where those of each noun begin."""
    embedding_values: int
    """How many numbers the embeddings hold together."""

    def neighbours_of(self, row: int) -> list[int]:
        """Rows of a noun's neighbours."""
        start, stop = self.neighbour_starts[row : row + 2].tolist()
        found: list[int] = self.neighbours[start:stop].tolist()
        return found


class Nouns:
    """nouns.parquet. Embeddings and the nouns of references are read on first access."""

    def __init__(
        self,
        paths: Mapping[str, Path | RemoteFile],
        table: NounTable,
        deleted: np.ndarray,
        applied_tombstones: int,
    ) -> None:
        """
        Args:
            paths: role -> file.
            table: `read_nouns`.
            deleted: (t,) sorted ids of deleted references.
            applied_tombstones: number of tombstones that the stored prototypes already exclude.
        """
        self.names: Words = table.names
        self._table = table
        self._paths, self._deleted, self._applied_tombstones = paths, deleted, applied_tombstones

    @cached_property
    def counts(self) -> np.ndarray:
        """(nouns,) int64: references of each that are not deleted."""
        return self._table.counts - self._deleted_counts

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(nouns, d_textual) float32, L2-normalised."""
        return self.read_embeddings()

    def read_embeddings(self) -> np.ndarray:
        """`embeddings`, read again."""
        return read_noun_embeddings(self._paths["nouns"])

    def embeddings_of(self, rows: Sequence[int]) -> np.ndarray:
        """(n, d_textual) float32: `embeddings` of these nouns."""
        found: np.ndarray = self.embeddings[list(rows)]
        return found

    def lenders(self, row: int | None, embedding: np.ndarray, config: PrototypeConfig) -> list[int]:
        """The nouns whose references represent a rare noun, itself first; or, if `row` is None,
        those of an unknown one (`neighbours_of`)."""
        return neighbours_of(embedding, self.embeddings, self.counts, config, row)

    @cached_property
    def of_references(self) -> np.ndarray:
        """(references,) int32: the row of each reference's noun."""
        with fmt.open_table(
            self._paths["references"], fmt.REFERENCE_SCHEMA, read_dictionary=["noun"]
        ) as file:
            column = file.read(columns=["noun"]).column("noun").unify_dictionaries()
        if not len(column):
            return np.zeros(0, dtype=np.int32)
        # Unified dictionaries have the same words in every chunk, so they are looked up once.
        words = column.chunk(0).dictionary
        codes = self.names.rows_of(words)
        if (codes < 0).any():
            missing = words.filter(pa.array(codes < 0))[:10].to_pylist()
            raise CollectionError(f"{self._paths['nouns']} lacks the nouns {missing}")
        return np.concatenate([codes[chunk.indices.to_numpy()] for chunk in column.chunks])

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int: the row of the noun of each of the (n,) references."""
        return self.of_references[ids]

    def references_of(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Ids of the references of each of these nouns, ascending, without deleted ones."""
        order, starts = self._by_noun
        found = [order[starts[row] : starts[row + 1]] for row in rows]
        return [
            ids[~np.isin(ids, self._deleted)] if self._deleted_counts[row] else ids
            for row, ids in zip(rows, found, strict=True)
        ]

    def neighbours(self, row: int) -> list[int]:
        """Rows of the other nouns whose references went into a noun's stored prototypes."""
        return self._table.neighbours_of(row)

    def stored(self, row: int) -> tuple[slice, list[int]] | None:
        """The slice of a noun's stored prototypes and the nouns they were made from; None if they
        are missing or outdated."""
        start = int(self._table.prototype_starts[row])
        stop = int(self._table.prototype_stops[row])
        used = [row, *self.neighbours(row)]
        if stop == start or (self._not_applied is not None and self._not_applied[used].any()):
            return None
        return slice(start, stop), used

    @cached_property
    def _by_noun(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids sorted by noun, and the start of each noun's slice."""
        order = np.argsort(self.of_references, kind="stable")
        starts = np.searchsorted(self.of_references[order], np.arange(len(self.names) + 1))
        return order, starts

    @cached_property
    def _deleted_counts(self) -> np.ndarray:
        """(nouns,) int64: deleted references of each noun."""
        return self._count(self._deleted)

    @cached_property
    def _not_applied(self) -> np.ndarray | None:
        """(nouns,) int64: deleted references that the stored prototypes still contain; None if
        nothing is deleted."""
        if not len(self._deleted):
            return None
        return self._count(
            fmt.read_tombstones(self._paths["tombstones"], skip=self._applied_tombstones)
        )

    def _count(self, ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            return np.zeros(len(self.names), dtype=np.int64)
        return np.bincount(self.of_references[ids], minlength=len(self.names))


def prefetch_nouns(path: Path | RemoteFile) -> None:
    """Brings what `read_nouns` reads of a remote file into the cache. Raises like it."""
    if isinstance(path, RemoteFile):
        with fmt.open_table(path, fmt.NOUN_SCHEMA) as file:
            file.prefetch(range(file.num_row_groups), _COLUMNS)


def read_nouns(path: str | Path | RemoteFile) -> NounTable:
    """The columns of nouns.parquet but the embeddings.

    Raises:
        CollectionError: it cannot be read.
    """
    with fmt.open_table(path, fmt.NOUN_SCHEMA) as file:
        table = file.read(columns=_COLUMNS, use_threads=False)
        values = _embedding_values(file)
    names = Words(table.column("noun").combine_chunks())
    lists = table.column("neighbours").combine_chunks()
    return NounTable(
        names=names,
        counts=table.column("count").to_numpy(),
        prototype_starts=table.column("prototype_start").to_numpy(),
        prototype_stops=table.column("prototype_stop").to_numpy(),
        neighbours=names.rows_of(lists.flatten()),
        neighbour_starts=np.cumsum([0, *lists.value_lengths().to_numpy()]),
        embedding_values=values,
    )


def read_noun_embeddings(path: str | Path | RemoteFile) -> np.ndarray:
    """(nouns, d_textual) float32 of nouns.parquet.

    Raises:
        CollectionError: their widths differ.
    """
    with fmt.open_table(path, fmt.NOUN_SCHEMA) as file:
        parts: list[np.ndarray] = []
        for group in range(file.num_row_groups):
            vectors = group_embeddings(file, group, path)
            if parts and parts[0].shape[1] != vectors.shape[1]:
                widths = parts[0].shape[1], vectors.shape[1]
                raise CollectionError(f"{path}: embeddings have several widths, {widths}")
            parts.append(vectors)
    return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)


def group_embeddings(
    file: pq.ParquetFile, group: int, path: str | Path | RemoteFile
) -> np.ndarray:
    """(nouns, d_textual) float32 of one row group of nouns.parquet, which is at `path`.

    Raises:
        CollectionError: their widths differ.
    """
    column = file.read_row_group(group, columns=["embedding"]).column("embedding")
    lists = column.combine_chunks()
    widths = np.unique(lists.value_lengths().to_numpy())
    if len(widths) != 1:
        raise CollectionError(f"{path}: embeddings have several widths, {widths[:5]}")
    vectors: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, widths[0])
    return vectors


def _embedding_values(file: pq.ParquetFile) -> int:
    """How many numbers the embeddings hold, from the metadata alone."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    (leaf,) = [i for i, name in enumerate(paths) if name.startswith("embedding")]
    groups = range(file.num_row_groups)
    return sum(file.metadata.row_group(g).column(leaf).num_values for g in groups)
