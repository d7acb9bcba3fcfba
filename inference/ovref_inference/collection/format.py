"""The reference collection on disk, format versions 2, 3 and 5; no other module knows its files.

    collection.json         the manifest (`Manifest`); written last, it is the commit
    references.parquet      one row per reference (`REFERENCE_SCHEMA`), row i has id i
    visual.f16.npy          (references, d_visual) float16, L2-normalised
    textual.f16.npy         (references, d_textual) float16, L2-normalised
    visual.faiss            index over the visual embeddings, by inner product
    textual.faiss           index over the textual retrieval embeddings
    nouns.parquet           one row per noun (`NOUN_SCHEMA`), sorted by noun
    prototypes.f16.npy      (prototypes, d_visual) float16, L2-normalised; nouns name slices of it
    tombstones.parquet      deleted ids, each with a reason (`TOMBSTONE_SCHEMA`)
    norms.f16.npy           norms of the visual embeddings, (references, 1), if `embed.norms`

Version 3 stores embeddings in 8 bits: visual.int8.npy and textual.int8.npy, (references, d + 2)
int8 (`int8`), and inverted lists of the visual index hold 8-bit codes. Prototypes stay float16.

Version 5 is version 2 or 3 without a file of textual embeddings: the codes of the textual index
are these embeddings in float16 (`indexed_vectors`).

Versions 4 and 6 are folders of such collections, with a manifest of their own (`manifest`).

The manifest names each file with its size and SHA-256. A collection that is published again under
the same URL keeps unchanged files; a changed one is stored as `<stem>.<hash>.<suffix>`, so that a
process with the old version open never reads a mixture. Nothing is ever pickled. Equal content
gives equal bytes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref_inference.collection.int8 import Int8Vectors
from ovref_inference.collection.manifest import (  # noqa: F401 - the manifest is part of the format
    EMBEDDINGS,
    FILES,
    FORMAT_VERSION,
    IN_INDEX_VERSION,
    INT8_FILES,
    INT8_VERSION,
    LISTS,
    LISTS_VERSION,
    MANIFEST,
    OPTIONAL_FILES,
    PARTITION_IDS,
    PARTITIONED_VERSION,
    READABLE_VERSIONS,
    AnyManifest,
    EncoderInfo,
    FileInfo,
    Heading,
    IndexInfo,
    Manifest,
    PartitionedManifest,
    PartitionInfo,
    SearchPoint,
    checked_partition,
    file_names,
    index_info,
    manifest_bytes,
    parse_manifest,
    undivided,
    version_of,
)
from ovref_inference.collection.remote import (
    Layout,
    RemoteFile,
    RemoteTable,
    RemoteVectors,
)
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors

REFERENCE_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("noun", pa.string()),
        ("caption", pa.string()),
        ("span_start", pa.int32()),
        ("span_end", pa.int32()),
        ("x0", pa.int32()),
        ("y0", pa.int32()),
        ("x1", pa.int32()),
        ("y1", pa.int32()),
        ("area", pa.float32()),
        ("score", pa.float32()),
        ("source", pa.string()),
        ("shard", pa.string()),
        ("seed", pa.int64()),
    ]
)
"""Box: pixels, right and bottom exclusive. Area: fraction of the image. Seed: null for a real
image."""

NOUN_SCHEMA = pa.schema(
    [
        ("noun", pa.string()),
        ("count", pa.int64()),
        ("embedding", pa.list_(pa.float32())),
        ("prototype_start", pa.int64()),
        ("prototype_stop", pa.int64()),
        ("neighbours", pa.list_(pa.string())),
    ]
)
"""Embedding: `retrieve.class_embeddings` of the noun, d_textual. Neighbours: other nouns whose
references its prototypes were also made from; empty unless the noun is rare."""

TOMBSTONE_SCHEMA = pa.schema([("id", pa.int64()), ("reason", pa.string())])

ROW_GROUP = 8192
"""Rows per row group of references.parquet, the smallest part that can be read."""


class VectorWriter:
    """Writes a (rows, dim) float16 .npy chunk by chunk; the number of rows must be known in
    advance.

        with VectorWriter(path, rows, dim) as writer:
            writer.append(vectors)          # (n, dim)

    Raises ValueError for a chunk of another width or with values that are not finite in float16,
    and on exit if the number of rows is not the announced one.
    """

    def __init__(self, path: str | Path, rows: int, dim: int) -> None:
        self.path, self.rows, self.dim, self.written = Path(path), rows, dim, 0
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"{self.path}: expected (n, {self.dim}), found {vectors.shape}")
        halves = np.ascontiguousarray(vectors, dtype="<f2")
        bad = ~np.isfinite(halves).all(axis=1)
        if bad.any():
            row = self.written + int(np.flatnonzero(bad)[0])
            raise ValueError(f"{self.path}: row {row} has a value that is not finite")
        self._file.write(halves.tobytes())
        self.written += len(halves)

    def __enter__(self) -> "VectorWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if kind is None and self.written != self.rows:
            raise ValueError(f"{self.path}: {self.rows} rows announced, {self.written} written")


class TableWriter:
    """Writes a Parquet file of one schema; the chunks do not affect its bytes.

    with TableWriter(path, REFERENCE_SCHEMA) as writer:
        writer.append({"id": [...], "key": [...], ...})
    """

    def __init__(self, path: str | Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._pending = schema.empty_table()
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", version="2.6")

    def append(self, columns: Mapping[str, Any]) -> None:
        """Columns by name, as lists or arrays; nulls are allowed in `seed` alone."""
        table = pa.Table.from_pydict(dict(columns), schema=self._schema)
        for name in self._schema.names:
            if name != "seed" and table.column(name).null_count:
                raise ValueError(f"column {name} has empty values")
        self._pending = pa.concat_tables([self._pending, table])
        while self._pending.num_rows >= ROW_GROUP:
            self._write(self._pending.slice(0, ROW_GROUP))
            self._pending = self._pending.slice(ROW_GROUP)

    def _write(self, table: pa.Table) -> None:
        self._writer.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self._pending.num_rows:
            self._write(self._pending)
        self._writer.close()


def write_table(path: str | Path, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
    """Writes a whole table at once."""
    with TableWriter(path, schema) as writer:
        writer.append(columns)


def write_vectors(path: str | Path, vectors: Vectors) -> None:
    """Writes a (rows, dim) matrix, converting some rows at a time to save memory."""
    rows, dim = vectors.shape
    with VectorWriter(path, rows, dim) as writer:
        for start in range(0, len(vectors), ROW_GROUP):
            writer.append(vectors[start : start + ROW_GROUP])


def open_vectors(path: str | Path) -> np.memmap:
    """The (rows, dim) float16 matrix, memory-mapped read-only.

    Raises:
        CollectionError: missing, truncated, or not such a file.
    """
    vectors = _mapped(path)
    _check_vectors(vectors, path)
    return vectors


def _mapped(path: str | Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CollectionError(f"cannot read the vectors {path}: {error}") from error


def open_vectors_anywhere(file: Path | RemoteFile, expected: Layout | None = None) -> Vectors:
    """`open_vectors`, or one read by ranges; rows of int8 are decoded as they are read.

    Args:
        expected: the header of a remote file of this size is not read.
    """
    vectors: np.memmap | RemoteVectors
    vectors = RemoteVectors(file, expected) if isinstance(file, RemoteFile) else _mapped(file)
    if vectors.ndim == 2 and vectors.dtype == np.int8 and vectors.shape[1] > 2:
        return Int8Vectors(vectors)
    _check_vectors(vectors, file)
    return vectors


def open_matrix(files: Mapping[str, Path | RemoteFile], manifest: Manifest, role: str) -> Vectors:
    """`open_vectors_anywhere` of a file of the collection. The header of a remote one is not read
    if the file has the size that the manifest's numbers give."""
    file = files[role]
    if not isinstance(file, RemoteFile):
        return open_vectors_anywhere(file)
    rows = manifest.counts.get("prototypes" if role == "prototypes" else "references", 0)
    if role == "norms":
        return open_vectors_anywhere(file, Layout((rows, 1), np.dtype("<f2")))
    width = (manifest.textual if role == "textual" else manifest.visual).dim
    if manifest.embeddings == "int8" and role != "prototypes":
        return open_vectors_anywhere(file, Layout((rows, width + 2), np.dtype(np.int8)))
    return open_vectors_anywhere(file, Layout((rows, width), np.dtype("<f2")))


def _check_vectors(vectors: np.memmap | RemoteVectors, path: object) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise CollectionError(
            f"{path} must hold a (rows, dim) float16 matrix, found {vectors.shape} {vectors.dtype}"
        )


def open_table(
    path: str | Path | RemoteFile, schema: pa.Schema, *, read_dictionary: list[str] | None = None
) -> pq.ParquetFile:
    """A Parquet file of the collection, memory-mapped or read by ranges, its schema checked.

    Args:
        read_dictionary: columns that are read as dictionaries.

    Raises:
        CollectionError: missing, truncated, or with another schema.
    """
    try:
        if isinstance(path, RemoteFile):
            file = RemoteTable(path, read_dictionary=read_dictionary)
        else:
            file = pq.ParquetFile(path, memory_map=True, read_dictionary=read_dictionary)
    except (OSError, pa.ArrowException) as error:
        raise CollectionError(f"cannot read the table {path}: {error}") from error
    expected = pa.schema(
        [
            field.with_type(pa.dictionary(pa.int32(), field.type))
            if field.name in (read_dictionary or ())
            else field
            for field in schema
        ]
    )
    if not file.schema_arrow.equals(expected):
        raise CollectionError(
            f"{path} has columns {file.schema_arrow.names}, expected {schema.names} "
            "with the types of this format version"
        )
    return file


def read_tombstones(path: str | Path | RemoteFile, *, skip: int = 0) -> np.ndarray:
    """The deleted ids, (t,) int64, sorted, without the first `skip` tombstones."""
    with open_table(path, TOMBSTONE_SCHEMA) as file:
        return np.unique(file.read(columns=["id"]).column("id").to_numpy()[skip:])


def tombstone_columns(ids: Iterable[int], reason: str) -> dict[str, list[Any]]:
    """Columns for TOMBSTONE_SCHEMA: the distinct ids, sorted, all with one reason."""
    unique = sorted(set(int(i) for i in ids))
    return {"id": unique, "reason": [reason] * len(unique)}
