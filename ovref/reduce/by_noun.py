"""The visual embeddings sorted by noun, on disk: a shuffle in two passes.

Nouns are assigned to partitions by a hash of their text. The first pass reads the matrix once, in
order, and splits each span of rows by partition; the second joins each partition's pieces and sorts
them by noun. Each task holds one span or one partition.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ovref.reduce.phases import RunTasks, Task
from ovref.reduce.rows import Rows
from ovref_inference.collection.format import write_vectors

SPAN_ROWS = 131_072
PARTITION_BYTES = 256 << 20


@dataclass(frozen=True)
class NounTable:
    """The nouns of a table of references, and the ids of each noun's references."""

    nouns: list[str]
    """Sorted."""
    starts: np.ndarray
    """(nouns + 1,) int64: index of each noun's first id in `order`."""
    order: np.ndarray
    """(references,) int64: ids sorted by noun, then by id."""

    @property
    def counts(self) -> np.ndarray:
        """(nouns,) int64: number of references of each noun."""
        return np.diff(self.starts)


def read_vocabulary(path: Path) -> NounTable:
    """Reads the nouns of references.parquet."""
    with pq.ParquetFile(path, read_dictionary=["noun"]) as file:
        column = file.read(columns=["noun"]).column("noun")
    encoded = column.combine_chunks().dictionary_encode()
    words = encoded.dictionary.to_pylist()
    in_order = sorted(range(len(words)), key=words.__getitem__)
    rank = np.empty(len(words), dtype=np.int64)
    rank[in_order] = np.arange(len(words))
    codes = rank[encoded.indices.to_numpy()]
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(words) + 1))
    return NounTable([words[i] for i in in_order], starts, order)


def partition_by_noun(
    vectors: Path, vocabulary: NounTable, wanted: np.ndarray, out: Path, run_tasks: RunTasks
) -> int:
    """Writes `by_noun_<p>.npy`, the rows of each partition, and the files that `NounRows` needs.

    Args:
        wanted: (nouns,) bool: the nouns whose rows are needed.

    Returns:
        The number of partitions.
    """
    rows, dim = Rows(vectors).shape
    counts = np.where(wanted, vocabulary.counts, 0)
    partitions = max(1, -(-int(counts.sum()) * dim * 2 // PARTITION_BYTES))
    partition_of = np.array([_hashed(noun) % partitions for noun in vocabulary.nouns])
    partition_of[~wanted] = -1
    noun_of = np.empty(rows, dtype=np.int32)
    noun_of[vocabulary.order] = np.repeat(np.arange(len(counts)), vocabulary.counts)
    begins = np.zeros(len(counts), dtype=np.int64)
    for partition in range(partitions):
        here = partition_of == partition
        begins[here] = np.cumsum(counts[here]) - counts[here]
    for name, array in (
        ("noun_of", noun_of), ("partition_of", partition_of), ("begins", begins),
        ("order", vocabulary.order), ("starts", vocabulary.starts),
    ):  # fmt: skip
        np.save(out / f"{name}.npy", array, allow_pickle=False)
    spans = range(0, rows, SPAN_ROWS)
    first: list[Task] = [partial(_scatter, vectors, start, partitions, out) for start in spans]
    second: list[Task] = [partial(_collect, p, list(spans), dim, out) for p in range(partitions)]
    for tasks in (first, second):
        for _ in run_tasks(tasks):
            pass
    return partitions


class NounRows:
    """Reads the embeddings of nouns from the files of `partition_by_noun`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Plain arrays over the mapped files: slicing a `memmap` takes several times as long.
        self._partition_of, self._begins, self._order, self._starts = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in ("partition_of", "begins", "order", "starts")
        )
        self._files: dict[int, Rows] = {}

    def ids(self, noun: int) -> np.ndarray:
        """(n,) int64, ascending: ids of a noun's references, including deleted ones."""
        return self._order[self._starts[noun] : self._starts[noun + 1]]

    def vectors(self, nouns: Sequence[int], ids: np.ndarray) -> np.ndarray:
        """(len(ids), d) float16 embeddings of ascending `ids`, all of them ids of these nouns."""
        found = np.zeros((0, 0), dtype=np.float16)
        for noun in nouns:
            at = np.searchsorted(ids, own := self.ids(noun))
            here = np.flatnonzero(at < len(ids))
            here = here[ids[at[here]] == own[here]]
            partition = int(self._partition_of[noun])
            if partition not in self._files:
                self._files[partition] = Rows(_partition_file(self._folder, partition))
            rows = self._files[partition][int(self._begins[noun]) + here]
            if not found.size:
                found = np.empty((len(ids), rows.shape[1]), dtype=np.float16)
            found[at[here]] = rows
        return found


def _hashed(noun: str) -> int:
    return int.from_bytes(hashlib.blake2b(noun.encode(), digest_size=8).digest(), "little")


def _scatter(vectors: Path, start: int, partitions: int, out: Path) -> None:
    """Writes one span of rows, sorted by partition, and the rows per partition."""
    halves = Rows(vectors)[start : start + SPAN_ROWS]
    noun_of = np.load(out / "noun_of.npy", mmap_mode="r", allow_pickle=False)
    partition_of = np.load(out / "partition_of.npy", allow_pickle=False)
    owner = partition_of[noun_of[start : start + len(halves)]]
    order = np.argsort(owner, kind="stable")
    order = order[owner[order] >= 0]
    sizes = np.bincount(owner[order], minlength=partitions)
    write_vectors(out / f"span_{start:012d}.npy", halves[order])
    np.save(out / f"span_{start:012d}.sizes.npy", sizes, allow_pickle=False)


def _collect(partition: int, spans: list[int], dim: int, out: Path) -> None:
    """Joins one partition's rows of all spans, sorted by noun, then by id."""
    nouns, pieces = [np.zeros(0, dtype=np.int32)], []
    noun_of = np.load(out / "noun_of.npy", mmap_mode="r", allow_pickle=False)
    partition_of = np.load(out / "partition_of.npy", allow_pickle=False)
    for start in spans:
        sizes = np.load(out / f"span_{start:012d}.sizes.npy", allow_pickle=False)
        pieces.append((int(sizes[:partition].sum()), int(sizes[partition])))
        here = noun_of[start : start + SPAN_ROWS]
        nouns.append(here[partition_of[here] == partition])
    order = np.argsort(np.concatenate(nouns), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # Each piece is read straight into its place, so that the partition is in memory only once.
    found, done = np.empty((len(order), dim), dtype=np.float16), 0
    for start, (at, count) in zip(spans, pieces, strict=True):
        found[place[done : done + count]] = Rows(out / f"span_{start:012d}.npy")[at : at + count]
        done += count
    write_vectors(_partition_file(out, partition), found)


def _partition_file(folder: Path, partition: int) -> Path:
    return folder / f"by_noun_{partition:06d}.npy"
