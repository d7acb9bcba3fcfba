"""Checks that the files of a collection belong together, before publishing and when opening."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ovref_inference.collection import format as fmt
from ovref_inference.collection.int8 import Int8Vectors
from ovref_inference.collection.nouns import NounTable
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.collection.words import are_sorted
from ovref_inference.errors import CollectionError


def check_counts(
    paths: Mapping[str, Path | RemoteFile], manifest: fmt.Manifest, nouns: NounTable
) -> dict[str, int]:
    """Counts of the files' rows, after checking that all files belong together.

    Args:
        paths: role -> file.
        nouns: `nouns.read_nouns` of the vocabulary.

    Raises:
        CollectionError: rows or widths of two files disagree, ids are not row numbers, or the
            vocabulary does not fit; the message names the files.
    """
    matrices = paths.keys() & {"visual", "textual", "prototypes"}
    opened = {role: fmt.open_vectors_anywhere(paths[role]) for role in sorted(matrices)}
    shapes = {role: vectors.shape for role, vectors in opened.items()}
    for role, vectors in opened.items():
        wanted = "float16" if role == "prototypes" else manifest.embeddings
        if isinstance(vectors, Int8Vectors) != (wanted == "int8"):
            raise CollectionError(
                f"{paths[role]} does not hold {wanted} numbers, as the manifest says: they do not "
                "belong to one collection"
            )
    schemas = {
        "references": fmt.REFERENCE_SCHEMA,
        "nouns": fmt.NOUN_SCHEMA,
        "tombstones": fmt.TOMBSTONE_SCHEMA,
    }
    rows = {}
    for role, schema in schemas.items():
        with fmt.open_table(paths[role], schema) as table:
            rows[role] = table.metadata.num_rows
    rows["prototypes"] = shapes["prototypes"][0]
    if "norms" in paths:
        shapes["norms"] = fmt.open_vectors_anywhere(paths["norms"]).shape
    for role in shapes.keys() - {"prototypes"}:
        if shapes[role][0] != rows["references"]:
            raise CollectionError(
                f"{paths[role]} has {shapes[role][0]} rows, {paths['references']} has "
                f"{rows['references']}: they do not belong to one collection"
            )
    for role, encoder in (
        ("visual", manifest.visual),
        ("textual", manifest.textual),
        ("prototypes", manifest.visual),
    ):
        if role in shapes and shapes[role][1] != encoder.dim:
            raise CollectionError(
                f"{paths[role]} has width {shapes[role][1]}, the manifest's encoder "
                f"{encoder.model} has {encoder.dim}"
            )
    _check_ids(paths["references"])
    _check_nouns(paths["nouns"], nouns, rows, manifest.textual.dim)
    return rows


def _check_ids(path: Path | RemoteFile) -> None:
    """Checks ids through the statistics of each row group, so that no column is read."""
    start = 0
    with fmt.open_table(path, fmt.REFERENCE_SCHEMA) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            found = group.column(fmt.REFERENCE_SCHEMA.get_field_index("id")).statistics
            if (found.min, found.max) != (start, start + group.num_rows - 1):
                raise CollectionError(
                    f"{path}: row {start} and those after it must have their row numbers as ids, "
                    f"found {found.min} to {found.max}"
                )
            start += group.num_rows


def _check_nouns(
    path: Path | RemoteFile, table: NounTable, rows: Mapping[str, int], dim: int
) -> None:
    starts, stops = table.prototype_starts, table.prototype_stops
    problems = {
        "nouns are not sorted, each once": not are_sorted(table.names.array),
        f"counts do not add up to {rows['references']} references": (
            table.counts.sum() != rows["references"]
        ),
        f"slices do not tile {rows['prototypes']} prototypes": not np.array_equal(
            np.append(0, stops), np.append(starts, rows["prototypes"])
        ),
        f"embeddings are not {dim} wide": table.embedding_values != len(table.names) * dim,
        "neighbours are not in the vocabulary": bool((table.neighbours < 0).any()),
    }
    for problem, found in problems.items():
        if found:
            raise CollectionError(f"{path}: {problem}; reduce the collection again")
