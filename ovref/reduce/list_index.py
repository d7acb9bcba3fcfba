"""The index over the inverted lists of all partitions, of each kind of embedding.

A search of a partitioned collection finds the nearest lists by it, instead of comparing the query
with the centroids of all partitions. It is an inverted file of their centroids in 8 bits, laid out
as other indexes, so that it is read in place too; ids count the lists, partition after partition.
Cosines are then wrong by less than a thousandth, which exchanges lists that are about as near. One
task for each kind makes it, from what it reads of each partition's index by ranges.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ovref.ahead import map_ahead
from ovref.reduce import ivf
from ovref.reduce.int8 import int8_index
from ovref.reduce.rows import Rows
from ovref.storage.file_store import Store
from ovref.storage.scratch import scratch_folder
from ovref.storage.shards import TableFile
from ovref.storage.steps import StepFolder
from ovref_inference.collection import format as fmt
from ovref_inference.collection.index import (
    RECALL_QUERIES,
    TRAIN_PER_LIST,
    RecallQueries,
    list_count,
    one_thread,
    read_index,
    sample,
    tune,
)
from ovref_inference.collection.remote_index import entry_bytes, parsed_header

LEAST_LISTS = 20_000
"""Lists of all partitions together from which they have an index."""
LIST_RECALL = 0.98
"""Share of the nearest lists that is found, at least; a search reads others instead of the rest."""
CELLS = 8
"""Lists of the index itself, times the square root of the lists that it has, at most `MOST_CELLS`:
more than for references, since centroids lie apart. A list is about as large as what is read of it
at least, 32 kB."""
MOST_CELLS = 4096
"""So that a search keeps at most 13 MB of them at a width of 768; a training sample is 0.5 GB."""
NEAREST = tuple(2**power for power in range(4, 13))
"""Numbers of nearest lists for which recall is measured."""
PART_ROWS = 4 * ivf.BLOCK
"""Centroids that are assigned and written at a time: 200 MB at a width of 768."""
KINDS = dict(zip(fmt.LISTS, ("visual", "textual"), strict=True))
"""Role of the file -> kind of embedding."""
_INFO = pa.schema([("info", pa.string())])


@dataclass(frozen=True, kw_only=True)
class PartitionIndex:
    """The index file of one kind of one partition."""

    path: str
    """In the store of the collection."""
    bytes: int
    rows: int
    dim: int
    factory: str

    @property
    def lists(self) -> int:
        return list_count(self.factory)


def partition_indexes(
    role: str, parts: Iterable[tuple[str, fmt.Manifest]]
) -> list[PartitionIndex]:
    """Those that have inverted lists, in the order of the partitions, of which path and manifest
    are given."""
    kind, found = KINDS[role], []
    for path, manifest in parts:
        file, info = manifest.files[f"{kind}_index"], getattr(manifest, f"{kind}_index")
        if list_count(info.factory):
            found.append(PartitionIndex(
                path=f"{path}/{file.path}", bytes=file.bytes, rows=manifest.counts["references"],
                dim=getattr(manifest, kind).dim, factory=info.factory,
            ))  # fmt: skip
    return found


def has_list_index(indexes: Sequence[PartitionIndex]) -> bool:
    """Whether a collection with these gets one."""
    return sum(one.lists for one in indexes) >= LEAST_LISTS


def make_list_index(
    target: StepFolder, role: str, collection: Store, indexes: Sequence[PartitionIndex], seed: int
) -> None:
    """A task: commits the index over the lists of these indexes, and its IndexInfo."""
    started = time.monotonic()
    asked = queries_of_each(len(indexes))

    def read(numbered: tuple[int, PartitionIndex]) -> tuple[np.ndarray, np.ndarray]:
        number, one = numbered
        return read_lists(collection, one, asked, np.random.default_rng([seed, number]))

    lists = sum(one.lists for one in indexes)
    with TableFile(_INFO) as file:
        every = map_ahead(read, enumerate(indexes), threads=2)
        info = index_lists(every, lists, indexes[0].dim, file.path("faiss"), seed=seed)
        file.write(pa.table([[json.dumps(asdict(info))]], schema=_INFO))
        target.publish(role, file, inputs=lists, started=started)


def queries_of_each(indexes: int) -> int:
    """Number of embeddings that `read_lists` takes from each of this number of indexes."""
    return -(-RECALL_QUERIES // indexes)


def index_lists(
    every: Iterable[tuple[np.ndarray, np.ndarray]], lists: int, dim: int, out: Path, *, seed: int
) -> fmt.IndexInfo:
    """Writes the index over the lists of several indexes.

    Args:
        every: what `read_lists` gives of each.
        lists: of all.
        seed: of the samples.
    """
    queries = []
    with scratch_folder() as folder:
        centroids = Path(folder, "centroids.npy")
        with fmt.VectorWriter(centroids, lists, dim) as writer:
            for own, some in every:
                writer.append(own)
                queries.append(some)
        asked = np.concatenate(queries)
        chosen = np.random.default_rng(seed).permutation(len(asked))[:RECALL_QUERIES]
        return index_centroids(centroids, asked[np.sort(chosen)], out, seed=seed)


def read_info(step: StepFolder, role: str) -> fmt.IndexInfo:
    """What `make_list_index` found of the index."""
    return fmt.index_info(json.loads(step.table(role).column("info")[0].as_py()))


def read_lists(
    collection: Store, one: PartitionIndex, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The (lists, d) float32 centroids of an index, and (count, d) float32 embeddings, each of a
    random list that is not empty, as substitutes for queries."""
    entry = entry_bytes(one.factory, one.dim)
    with collection.by_ranges(one.path, one.bytes) as file:
        header = file.read(one.bytes - one.rows * entry)
        index, starts, sizes = parsed_header(
            [(0, header)], one.bytes, one.rows, one.dim, one.factory,
            f"{collection.url}/{one.path}",
        )  # fmt: skip
        codes = np.empty((count, index.code_size), dtype=np.uint8)
        for row, number in enumerate(rng.choice(np.flatnonzero(sizes), count)):
            file.seek(int(starts[number] + rng.integers(sizes[number]) * index.code_size))
            codes[row] = np.frombuffer(file.read(index.code_size), dtype=np.uint8)
    return ivf.centroids_of(index), index.sq.decode(codes)


def index_centroids(centroids: Path, queries: np.ndarray, out: Path, *, seed: int) -> fmt.IndexInfo:
    """Writes the index over a file of centroids.

    Args:
        centroids: (n, d) float16 .npy; beside it, files of twice its size are written.
        queries: (m, d) float32 L2-normalised, for which the lists probed are chosen.
        seed: of the training sample.
    """
    rows = Rows(centroids)
    cells = min(MOST_CELLS, 2 ** round(np.log2(CELLS * np.sqrt(len(rows)))))
    factory = f"IVF{cells},SQ8"
    with one_thread():
        few = sample(rows, TRAIN_PER_LIST * cells, seed)
        trained = ivf.train(few, cells, seed=seed)
        train_rows = len(few)
        del few
        groups, parts = ivf.cells_of(trained), []
        for start in range(0, len(rows), PART_ROWS):
            stop = min(start + PART_ROWS, len(rows))
            parts.append(ivf.write_part(
                centroids, groups, start, stop, centroids.with_name(f"part_{start:012d}")
            ))  # fmt: skip
        whole = centroids.with_name("float16.faiss")
        ivf.merge(ivf.empty_index(f"IVF{cells},SQfp16", trained), parts, whole)
        questions = RecallQueries(rows, queries, ks=NEAREST)
        curve = tune(read_index(whole), questions, target=LIST_RECALL)
        int8_index(whole, rows, factory, out)
    return fmt.IndexInfo(
        factory=factory, curve=curve, queries="stored rows", train_rows=train_rows
    )
