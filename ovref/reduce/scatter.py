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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ovref.ahead import READERS, map_ahead
from ovref.errors import StorageError
from ovref.reduce.inputs import Divisible, different_widths
from ovref.reduce.partition_tree import Tree, divide
from ovref.storage.shards import TableFile, text_columns
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


def total_counts(counts: StepFolder) -> dict[str, int]:
    """Number of references of every noun, in order of the nouns."""
    totals: Counter[str] = Counter()
    for table in map_ahead(counts.table, counts.committed()):
        columns = (table.column(name).to_pylist() for name in ("noun", "count"))
        totals.update(dict(zip(*columns, strict=True)))
    return {noun: totals[noun] for noun in sorted(totals)}


def encode_each(texts: Texts, templates: tuple[str, ...], nouns: list[str]) -> np.ndarray:
    """(n, d_textual) float32 of n nouns, each encoded alone as in `noun_prototypes`."""
    return np.stack([class_embeddings(texts, [noun], templates)[0] for noun in nouns])


def encode_nouns(target: StepFolder, name: str, nouns: list[str], embed: EmbedNouns) -> None:
    """A task: commits the embeddings of some nouns."""
    started = time.monotonic()
    columns = {"noun": pa.array(nouns), "embedding": _lists(embed(nouns))}
    table = pa.table(columns, schema=pa.schema([PLANNED.field(name) for name in columns]))
    with TableFile(table.schema) as file:
        file.write(table)
        target.publish(name, file, inputs=len(nouns), started=started)


def make_plan(
    target: StepFolder,
    counts: Mapping[str, int],
    encoded: StepFolder,
    most: int,
    known: Mapping[str, int],
    tree: Tree | None,
) -> None:
    """A task: commits the leaf of every noun, and the tree if it is new.

    Args:
        counts: number of references of each noun.
        encoded: the step with embeddings of all of them that are not in `known`.
        most: references of a partition.
        known: the leaf of each noun of the collection that is grown.
        tree: of that collection; None divides the nouns anew.
    """
    started = time.monotonic()
    new = [noun for noun in counts if noun not in known]
    vectors = _embeddings(encoded, len(new))
    if tree is None:
        sizes = np.array([counts[noun] for noun in new], dtype=np.int64)
        tree, leaves = divide(vectors, sizes, most)
    else:
        leaves = np.array([tree.leaf_of(vector) for vector in vectors], dtype=np.int64)
    leaf_of = {**known, **dict(zip(new, leaves.tolist(), strict=True))}
    row_of = {noun: row for row, noun in enumerate(new)}
    nouns_of: dict[int, list[str]] = {}
    for noun in counts:
        nouns_of.setdefault(leaf_of[noun], []).append(noun)
    order = sorted(nouns_of)
    with TableFile(_in_parts(PLANNED, order)) as file:
        for leaf in order:
            nouns = nouns_of[leaf]
            # Those that have an embedding first, so that the others need no placeholder.
            with_one = [noun for noun in nouns if noun in row_of]
            nouns = with_one + [noun for noun in nouns if noun not in row_of]
            embeddings = _lists(vectors[[row_of[noun] for noun in with_one]])
            missing = pa.nulls(len(nouns) - len(with_one), embeddings.type)
            file.write(
                pa.table(
                    [
                        nouns, [counts[noun] for noun in nouns],
                        np.full(len(nouns), leaf, np.int32),
                        pa.concat_arrays([embeddings, missing]),
                    ],
                    schema=PLANNED,
                )
            )  # fmt: skip
        tree.save(file.path("npz"))
        target.publish(PLAN, file, inputs=len(counts), started=started)


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


def _embeddings(encoded: StepFolder, nouns: int) -> np.ndarray:
    """(nouns, d) float32 in the order of the step. Held once: they are most of the plan's
    memory."""
    vectors, at = np.zeros((0, 0), np.float32), 0
    for table in map_ahead(encoded.table, encoded.committed(), threads=1):
        column = table.column("embedding").combine_chunks()
        part = np.asarray(column.flatten()).reshape(len(column), -1)
        if not at:
            vectors = np.empty((nouns, part.shape[1]), np.float32)
        vectors[at : at + len(part)] = part
        at += len(part)
    if at != nouns:
        raise StorageError(
            f"{encoded.store.url} holds the embeddings of {at} nouns, expected {nouns}: reduce "
            "into a new folder"
        )
    return vectors


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
