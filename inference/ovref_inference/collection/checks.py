"""Checks that the files of a collection belong together, before publishing and when opening."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ovref_inference.collection import format as fmt
from ovref_inference.collection.int8 import Int8Vectors
from ovref_inference.collection.nouns import NounTable
from ovref_inference.collection.reference_table import open_references
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.collection.words import are_sorted
from ovref_inference.errors import CollectionError


def check_counts(
    paths: Mapping[str, Path | RemoteFile], manifest: fmt.Manifest, nouns: NounTable
) -> dict[str, int]:
    """Counts of the files' rows, after checking that all files belong together.

    Files that are read in place are read as little as possible: matrices have the size that the
    manifest says, references are checked when they are first read (`open_references`), and
    tombstones are read if the manifest counts any.

    Args:
        paths: role -> file.
        nouns: `nouns.read_nouns` of the vocabulary.

    Raises:
        CollectionError: rows or widths of two files disagree, ids are not row numbers, or the
            vocabulary does not fit; the message names the files.
    """
    matrices = paths.keys() & {"visual", "textual", "prototypes"}
    opened = {role: fmt.open_matrix(paths, manifest, role) for role in sorted(matrices)}
    shapes = {role: vectors.shape for role, vectors in opened.items()}
    for role, vectors in opened.items():
        wanted = "float16" if role == "prototypes" else manifest.embeddings
        if isinstance(vectors, Int8Vectors) != (wanted == "int8"):
            raise CollectionError(
                f"{paths[role]} does not hold {wanted} numbers, as the manifest says: they do not "
                "belong to one collection"
            )
    rows = {"nouns": len(nouns.names), "prototypes": shapes["prototypes"][0]}
    references, tombstones = paths["references"], paths["tombstones"]
    if isinstance(references, RemoteFile):
        rows["references"] = manifest.counts.get("references", 0)
    else:
        with open_references(references) as table:
            rows["references"] = table.metadata.num_rows
    if isinstance(tombstones, RemoteFile) and not manifest.counts.get("tombstones"):
        rows["tombstones"] = 0
    else:
        with fmt.open_table(tombstones, fmt.TOMBSTONE_SCHEMA) as table:
            rows["tombstones"] = table.metadata.num_rows
    if "norms" in paths:
        shapes["norms"] = fmt.open_matrix(paths, manifest, "norms").shape
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
    _check_nouns(paths["nouns"], nouns, rows, manifest.textual.dim)
    return rows


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
