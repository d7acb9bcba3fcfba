"""Phase 1: all reference shards, in the order of their names, into one table and two matrices.

A collection that is being grown comes first, unchanged, so that its ids stay the same.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ovref.errors import InputError
from ovref.ops.quality import usable_rows
from ovref.reduce.grow import Base
from ovref.reduce.inputs import References, different_widths, no_references
from ovref.reduce.phases import Report
from ovref.storage import codec
from ovref_inference.collection.format import (
    FILES,
    OPTIONAL_FILES,
    REFERENCE_SCHEMA,
    ROW_GROUP,
    TableWriter,
    VectorWriter,
    open_table,
    open_vectors_anywhere,
)
from ovref_inference.collection.indexed_vectors import textual_vectors

MEASURES = "measures.npz"
"""(rows,) float32 by name beside the matrices: `Reference.measures`, NaN where there are none."""
USABLE = "usable.npy"
"""(rows,) bool beside the matrices: False for rows whose vectors cannot be indexed, which are zero
in the matrices."""


@dataclass(frozen=True)
class _Batch:
    label: str
    columns: dict[str, Any]
    """Columns of REFERENCE_SCHEMA without `id`."""
    visual: np.ndarray
    textual: np.ndarray
    measures: dict[str, np.ndarray] = field(default_factory=dict)
    """(rows,) float32 each."""


def gather(
    base: Base | None, inputs: Sequence[References], out: Path, report: Report
) -> dict[str, Any]:
    """Writes references.parquet, visual.f16.npy, textual.f16.npy and usable.npy into `out`.

    Memory: a few shards at a time.

    Raises:
        InputError: there are no references, or shards differ in embedding width.
    """
    existing = base.rows if base else 0
    rows = existing + sum(one.rows for one in inputs)
    if rows == 0:
        raise no_references(inputs)
    parts = _parts(base, inputs)
    first = next(parts)
    widths = (first.visual.shape[1], first.textual.shape[1])
    usable = np.zeros(rows, dtype=bool)
    measures: dict[str, Any] = {}
    with (
        TableWriter(out / FILES["references"], REFERENCE_SCHEMA) as references,
        VectorWriter(out / FILES["visual"], rows, widths[0]) as visual,
        VectorWriter(out / FILES["textual"], rows, widths[1]) as textual,
    ):
        start = 0
        for part in itertools.chain([first], parts):
            found = (part.visual.shape[1], part.textual.shape[1])
            if found != widths:
                raise different_widths(part.label, found, widths)
            stop = start + len(part.visual)
            usable[start:stop] = fine = usable_rows(part.visual) & usable_rows(part.textual)
            visual.append(np.where(fine[:, None], part.visual, 0))
            textual.append(np.where(fine[:, None], part.textual, 0))
            references.append({**part.columns, "id": np.arange(start, stop)})
            for name, values in part.measures.items():
                if name not in measures:
                    measures[name] = np.full(rows, np.nan, np.float32)
                measures[name][start:stop] = values
            start = stop
            report("gather", start, rows)
    np.save(out / USABLE, usable, allow_pickle=False)
    np.savez(out / MEASURES, **measures)
    if (norms := measures.get("norm")) is not None:
        if np.isnan(norms).any():
            raise InputError(
                f"{int(np.isnan(norms).sum())} of {rows} references have no norm of their visual "
                "embedding, and the others do: grow with the embed.norms that the collection has"
            )
        with VectorWriter(out / OPTIONAL_FILES["norms"], rows, 1) as writer:
            writer.append(norms[:, None])
    return {
        "existing": existing,
        "references": rows,
        "dim_visual": widths[0],
        "dim_textual": widths[1],
    }


def _parts(base: Base | None, inputs: Sequence[References]) -> Iterator[_Batch]:
    if base:
        visual = open_vectors_anywhere(base.paths["visual"])
        textual = textual_vectors(base.paths, base.manifest)
        norms = open_vectors_anywhere(base.paths["norms"]) if "norms" in base.paths else None
        with open_table(base.paths["references"], REFERENCE_SCHEMA) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                here = slice(group * ROW_GROUP, group * ROW_GROUP + len(table))
                columns = {name: table.column(name) for name in table.column_names}
                kept = {} if norms is None else {"norm": norms[here, 0].astype(np.float32)}
                yield _Batch("of the grown collection", columns, visual[here], textual[here], kept)
    for table in itertools.chain.from_iterable(one.tables() for one in inputs):
        label = table.column("shard")[0].as_py()
        visual_nd, textual_nd = (codec.matrix(table, name) for name in ("visual", "textual"))
        yield _Batch(label, _columns(table), visual_nd, textual_nd, _measures(table))


def _measures(table: pa.Table) -> dict[str, np.ndarray]:
    if "measures" not in table.column_names:
        return {}
    struct = table.column("measures").combine_chunks()
    return {one.name: struct.field(one.name).to_numpy() for one in struct.type}


def _columns(table: pa.Table) -> dict[str, Any]:
    """A sidecar's rows as columns of REFERENCE_SCHEMA, without `id`."""
    noun = table.column("noun").combine_chunks()
    box_n4 = table.column("box_xyxy").combine_chunks().flatten().to_numpy().reshape(-1, 4)
    return {
        "key": table.column("key"),
        "noun": noun.field("text"),
        "caption": table.column("caption"),
        "span_start": noun.field("start"),
        "span_end": noun.field("end"),
        "x0": box_n4[:, 0],
        "y0": box_n4[:, 1],
        "x1": box_n4[:, 2],
        "y1": box_n4[:, 3],
        "area": table.column("area").cast(pa.float32()),
        "score": table.column("score").cast(pa.float32()),
        "source": table.column("source"),
        "shard": table.column("shard"),
        "seed": table.column("seed"),
    }
