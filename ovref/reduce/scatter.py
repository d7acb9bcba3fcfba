"""From reference shards to the references of each partition, on the store alone.

    counts     nouns of a group of shards, and how often each occurs
    nouns      text embeddings of some nouns
    plan       the tree, and the partition of every noun
    scattered  references of a group of shards, sorted by partition

Each is a step (`storage.steps`) and each of its shards a task: committed by its marker, not run
again after a kill, and made by any worker that can see the store. A task holds one group of shards;
`plan` holds the vocabulary. Files with parts for several partitions have one row group for each,
which is read back by ranges.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ovref.ahead import READERS, map_ahead
from ovref.errors import StorageError
from ovref.reduce.inputs import Divisible, different_widths
from ovref.reduce.partition_tree import Tree, divide, leaves_of
from ovref.reduce.vector_file import VectorFile
from ovref.storage.scratch import scratch_folder
from ovref.storage.shards import TableFile, full_disk_explained, text_columns
from ovref.storage.steps import StepFolder
from ovref_inference.collection.retrieve import Texts, class_embeddings

GROUP_ROWS = 65_536
"""References of a group of shards: 200 MB at a width of 768 + 768."""
NOUNS_A_TASK = 4096
"""Nouns that one task encodes; each task loads the text encoder."""
EmbedNouns = Callable[[list[str]], np.ndarray]
"""(n, d_textual) float32 of n nouns. Picklable."""
PLAN = "plan"
"""The only shard of the step `plan`."""
_LEAVES = b"leaves"
"""Metadata of a file in parts: JSON, the leaf of each row group."""

_ADDED_UP = 1_000_000
"""Rows of counts, some 20 MB, that are held before they are added up."""

COUNTED = pa.schema([("noun", pa.string()), ("count", pa.int64())])
PLANNED = pa.schema(
    [
        ("noun", pa.string()),
        ("count", pa.int64()),
        ("leaf", pa.int32()),
        ("embedding", pa.list_(pa.float32())),
    ]
)
"""Embedding: null for a noun that the grown collection has."""


def groups_of(inputs: Sequence[Divisible]) -> dict[str, Divisible]:
    """The references in groups of about `GROUP_ROWS`, in their order, by name."""
    found = [group for one in inputs for group in one.groups(GROUP_ROWS)]
    return {f"{number:06d}": group for number, group in enumerate(found)}


def count_nouns(target: StepFolder, name: str, group: Divisible) -> None:
    """A task: commits the nouns of a group, sorted, with their numbers."""
    started = time.monotonic()
    totals: Counter[str] = Counter()
    for column in group.nouns():
        found = column.value_counts()
        columns = (found.field(number).to_pylist() for number in (0, 1))
        totals.update(dict(zip(*columns, strict=True)))
    nouns = sorted(totals)
    table = pa.table([nouns, [totals[noun] for noun in nouns]], schema=COUNTED)
    with TableFile(COUNTED) as file:
        file.write(table)
        target.publish(name, file, inputs=group.rows, started=started)


def total_counts(counts: StepFolder) -> pa.Table:
    """Number of references of every noun (`COUNTED`), in order of the nouns."""
    totals, some = COUNTED.empty_table(), list[pa.Table]()
    for table in map_ahead(counts.table, counts.committed()):
        some.append(table)
        # The same nouns come in every table: they are added up before they are many more.
        if sum(map(len, some)) > max(len(totals), _ADDED_UP):
            totals, some = _added_up([totals, *some]), []
    return _added_up([totals, *some])


def _added_up(tables: list[pa.Table]) -> pa.Table:
    """The total number of references of each noun, sorted by UTF-8 bytes, as Python sorts
    strings."""
    grouped = pa.concat_tables(tables).group_by("noun", use_threads=False)
    summed = grouped.aggregate([("count", "sum")]).sort_by("noun")
    return pa.table([summed.column("noun"), summed.column("count_sum")], schema=COUNTED)


def vocabulary(totals: pa.Table, known: pa.Table | None) -> pa.Table:
    """The nouns with their numbers, and the leaf of those that the grown collection has.

    Args:
        totals: of `total_counts`.
        known: columns `noun` and `leaf`; None if no collection is grown.

    Returns:
        `totals` with a column `leaf`, int32: null for new nouns.
    """
    leaf = pa.nulls(len(totals), pa.int32())
    if known is not None:
        nouns = known.column("noun").combine_chunks()
        leaf = known.column("leaf").take(pc.index_in(totals.column("noun"), value_set=nouns))
    return totals.append_column(PLANNED.field("leaf"), leaf)


def encode_each(texts: Texts, templates: tuple[str, ...], nouns: list[str]) -> np.ndarray:
    """(n, d_textual) float32 of n nouns, each encoded alone as in `noun_prototypes`."""
    return np.stack([class_embeddings(texts, [noun], templates)[0] for noun in nouns])


def encode_nouns(target: StepFolder, name: str, nouns: pa.Array, embed: EmbedNouns) -> None:
    """A task: commits the embeddings of some nouns."""
    started = time.monotonic()
    columns = {"noun": nouns, "embedding": _lists(embed(nouns.to_pylist()))}
    table = pa.table(columns, schema=pa.schema([PLANNED.field(name) for name in columns]))
    with TableFile(table.schema) as file:
        file.write(table)
        target.publish(name, file, inputs=len(nouns), started=started)


def make_plan(
    target: StepFolder, nouns: pa.Table, encoded: StepFolder, most: int, tree: Tree | None
) -> None:
    """A task: commits the leaf of every noun, and the tree if it is new.

    Embeddings are on the temporary disk meanwhile, 3 kB a noun at a width of 768, and as many again
    are in the file that is committed.

    Args:
        nouns: of `vocabulary`.
        encoded: the step with the embeddings of new nouns, in their order.
        most: references of a partition.
        tree: of the collection that is grown; None divides the nouns anew.

    Raises:
        StorageError: `encoded` has embeddings of more or fewer nouns, or the disk is full.
    """
    started = time.monotonic()
    leaves, counts = nouns.column("leaf"), nouns.column("count").to_numpy()
    is_new = pc.is_null(leaves).to_numpy()
    leaf_of = leaves.fill_null(-1).to_numpy().astype(np.int64)
    with scratch_folder() as folder:
        vectors = _embeddings(encoded, int(is_new.sum()), Path(folder, "embeddings"))
        if tree is None:
            tree, leaf_of[is_new] = divide(vectors, counts[is_new], most)
        else:
            leaf_of[is_new] = leaves_of(tree, vectors)
        embedding_of = np.where(is_new, np.cumsum(is_new) - 1, -1)
        # Of a leaf, those that have an embedding first, so that the others need no placeholder.
        order = np.lexsort([~is_new, leaf_of])
        there, starts = np.unique(leaf_of[order], return_index=True)
        stops = np.append(starts, len(order))[1:]
        with TableFile(_in_parts(PLANNED, there.tolist())) as file:
            for leaf, start, stop in zip(there, starts, stops, strict=True):
                rows = order[start:stop]
                embeddings = _lists(vectors[embedding_of[rows[is_new[rows]]]])
                missing = pa.nulls(len(rows) - len(embeddings), embeddings.type)
                if len(missing):
                    embeddings = pa.concat_arrays([embeddings, missing])
                texts = nouns.column("noun").take(pa.array(rows)).combine_chunks()
                columns = [texts, counts[rows], np.full(len(rows), leaf, np.int32), embeddings]
                file.write(pa.table(columns, schema=PLANNED))
                del embeddings, missing, columns  # before those of the next leaf are read
            tree.save(file.path("npz"))
            target.publish(PLAN, file, inputs=len(nouns), started=started)


def scatter(target: StepFolder, name: str, group: Divisible, plan: StepFolder) -> None:
    """A task: commits the references of a group, one row group for each partition in order.

    Raises:
        InputError: shards differ in the widths of their embeddings.
        StorageError: a noun is not in the plan.
    """
    started = time.monotonic()
    with plan.table_by_ranges(PLAN) as planned:
        nouns = planned.read(columns=["noun", "leaf"], use_threads=False)
    tables: list[pa.Table] = []
    for table in group.tables():
        if tables and _widths(table) != _widths(tables[0]):
            label = table.column("shard")[0].as_py()
            raise different_widths(label, _widths(table), _widths(tables[0]))
        tables.append(table)
    whole = pa.concat_tables(tables).combine_chunks()
    del tables
    text = whole.column("noun").combine_chunks().field("text")
    rows = pc.index_in(text, value_set=nouns.column("noun").combine_chunks())
    if rows.null_count:
        unknown = text.filter(pc.is_null(rows))[0].as_py()
        raise StorageError(
            f"{group.name} have the noun {unknown!r}, which they did not have when their nouns "
            "were counted: they are damaged; verify them, and make the damaged ones again"
        )
    leaves = nouns.column("leaf").to_numpy()[rows.to_numpy()]
    order = np.argsort(leaves, kind="stable")
    there, starts = np.unique(leaves[order], return_index=True)
    schema = _in_parts(whole.schema, there.tolist())
    texts_only = text_columns(whole.schema)
    options: dict[str, Any] = {
        "compression": dict.fromkeys(texts_only, "zstd"), "use_dictionary": texts_only,
        "write_statistics": False,
    }  # fmt: skip
    with TableFile(schema, **options) as file:
        for of_leaf in np.split(order, starts[1:]):
            file.write(whole.take(pa.array(of_leaf)))
        target.publish(name, file, inputs=group.rows, started=started)


@dataclass(frozen=True)
class PartitionReferences:
    """The new references of one partition: `inputs.References` from scattered files."""

    scattered: StepFolder
    groups: tuple[str, ...]
    """Shards of that step, in the order of the references."""
    leaf: int
    rows: int
    content: str
    """Fingerprint of all that affects the references of this leaf."""
    ahead: int
    """Row groups that are read ahead; a partition may have most of a group's references."""
    passed_filters: bool

    @property
    def where(self) -> str:
        return self.scattered.store.url

    @property
    def identity(self) -> dict[str, Any] | None:
        if not self.rows:
            return None
        # Shards are those of the whole collection, whose manifest names them.
        return {"step": "scattered", "fingerprint": self.content, "shards": [], "leaf": self.leaf}

    @property
    def drops(self) -> dict[str, int]:
        return {}

    def tables(self) -> Iterator[pa.Table]:
        def read(group: str) -> pa.Table | None:
            return read_part(self.scattered, group, self.leaf)

        for table in map_ahead(read, self.groups if self.rows else (), self.ahead):
            if table is not None:
                yield table


def read_part(
    step: StepFolder, shard: str, leaf: int, columns: list[str] | None = None
) -> pa.Table | None:
    """The rows of one leaf in a file of several; None if it has none."""
    with step.table_by_ranges(shard) as file:
        leaves = json.loads(file.schema_arrow.metadata[_LEAVES])
        if leaf not in leaves:
            return None
        return file.read_row_group(leaves.index(leaf), columns=columns, use_threads=False)


def planned_embeddings(plan: StepFolder, leaf: int) -> dict[str, np.ndarray]:
    """The embeddings of a leaf's new nouns, (d_textual,) float32 each."""
    table = read_part(plan, PLAN, leaf, ["noun", "embedding"])
    if table is None:
        return {}
    table = table.filter(pc.is_valid(table.column("embedding")))
    vectors = np.asarray(table.column("embedding").combine_chunks().flatten())
    nouns = table.column("noun").to_pylist()
    return dict(zip(nouns, vectors.reshape(len(nouns), -1), strict=True)) if nouns else {}


def planned_sizes(plan: StepFolder, leaves: int) -> np.ndarray:
    """(leaves,) int64: new references of each leaf."""
    with plan.table_by_ranges(PLAN) as file:
        table = file.read(columns=["leaf", "count"], use_threads=False)
    weights = table.column("count").to_numpy()
    counts = np.zeros(leaves, dtype=np.int64)
    np.add.at(counts, table.column("leaf").to_numpy(), weights)
    return counts


def read_ahead(leaves: int) -> int:
    """How many row groups of a partition are read ahead, so that they are fewer than a group."""
    return max(1, min(READERS, leaves // 2))


def _embeddings(encoded: StepFolder, nouns: int, path: Path) -> VectorFile:
    """(nouns, d) in the order of the step, in a file at `path`."""
    width, there = 0, 0
    with full_disk_explained(str(path.parent)), path.open("wb") as file:
        for table in map_ahead(encoded.table, encoded.committed(), threads=1):
            column = table.column("embedding").combine_chunks()
            part = np.asarray(column.flatten())
            width, there = len(part) // len(column), there + len(column)
            file.write(part.data)
    if there != nouns:
        raise StorageError(
            f"{encoded.store.url} holds the embeddings of {there} nouns, expected {nouns}: reduce "
            "into a new folder"
        )
    return VectorFile(path, (nouns, width))


def _widths(table: pa.Table) -> tuple[int, ...]:
    return tuple(table.schema.field(name).type.list_size for name in ("visual", "textual"))


def _in_parts(schema: pa.Schema, leaves: list[int]) -> pa.Schema:
    return schema.with_metadata({_LEAVES: json.dumps(leaves).encode()})


def _lists(vectors_nd: np.ndarray) -> pa.Array:
    """A column of lists of float32."""
    n, d = vectors_nd.shape
    offsets = np.arange(n + 1, dtype=np.int32) * np.int32(d)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.ascontiguousarray(vectors_nd, np.float32).ravel())
    )
