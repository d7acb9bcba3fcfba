"""The references of an undivided collection, read in groups as shards are (`inputs.Divisible`)."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ovref.errors import CollectionError, InputError
from ovref.ops.quality import usable_rows
from ovref.reduce.run import changed_meanwhile
from ovref.storage.codec import NOUN
from ovref.storage.scratch import scratch_folder
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.checks import check_counts
from ovref_inference.collection.indexed_vectors import textual_vectors
from ovref_inference.collection.nouns import group_embeddings, read_nouns
from ovref_inference.collection.opening import block_cache, opened
from ovref_inference.collection.reference_table import open_references
from ovref_inference.collection.remote import CACHE_BYTES, RemoteFile
from ovref_inference.vectors import check_readable

Files = Mapping[str, Path | RemoteFile]
"""Role -> file."""


@dataclass(frozen=True, kw_only=True)
class CollectionRows:
    """Consecutive references of a collection, without deleted ones.

    What is read of a remote collection is in a scratch folder meanwhile.
    """

    where: str
    storage_options: dict[str, Any] = field(repr=False)
    fingerprint: str
    tombstones: str
    """SHA-256 of the deletions."""
    textual: str
    """Role of the file with the textual embeddings."""
    start: int
    stop: int
    rows: int
    """How many of those from `start` to before `stop` are not deleted."""

    @property
    def name(self) -> str:
        return f"the references {self.start} to {self.stop - 1} of {self.where}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"collection": self.fingerprint, "tombstones": self.tombstones}

    @property
    def drops(self) -> dict[str, int]:
        return {}

    @property
    def passed_filters(self) -> bool:
        return True

    @property
    def changed(self) -> bool:
        options = self.storage_options
        return not self._are_of(collections.read_manifest(self.where, storage_options=options))

    def groups(self, rows: int) -> list["CollectionRows"]:
        with self._opened("tombstones") as (_, files):
            deleted = fmt.read_tombstones(files["tombstones"])
        found = []
        for start in range(self.start, self.stop, rows):
            stop = min(start + rows, self.stop)
            first, last = np.searchsorted(deleted, [start, stop]).tolist()
            found.append(replace(self, start=start, stop=stop, rows=stop - start - (last - first)))
        return [group for group in found if group.rows]

    def nouns(self) -> Iterator[pa.StringArray]:
        with self._opened("references", "tombstones") as (_, files):
            for _, table in self._tables(files, ["noun"]):
                yield table.column("noun").combine_chunks()

    def tables(self) -> Iterator[pa.Table]:
        roles = ("references", "visual", self.textual, "norms", "tombstones")
        with self._opened(*roles) as (manifest, files):
            matrices = {
                "visual": fmt.open_vectors_anywhere(files["visual"]),
                "textual": textual_vectors(files, manifest),
            }
            norms = fmt.open_vectors_anywhere(files["norms"]) if "norms" in files else None
            for ids, table in self._tables(files, None):
                vectors = {role: matrix[ids] for role, matrix in matrices.items()}
                for role, vectors_nd in vectors.items():
                    if not (fine := usable_rows(vectors_nd)).all():
                        raise CollectionError(
                            f"the {role} embedding of reference {ids[~fine][0]} of {self.where} is "
                            "no unit vector: its file was damaged; `ovref verify` the collection"
                        )
                yield _sidecar(table, vectors, None if norms is None else norms[ids][:, 0])

    def embeddings_of(self, nouns: list[str]) -> np.ndarray:
        """(n, d_textual) float32 of n nouns, as the collection has them."""
        found: dict[str, np.ndarray] = {}
        wanted = set(nouns)
        with (
            self._opened("nouns") as (_, files),
            fmt.open_table(files["nouns"], fmt.NOUN_SCHEMA) as file,
        ):
            for group in range(file.num_row_groups):
                names = file.read_row_group(group, columns=["noun"]).column("noun").to_pylist()
                if wanted.isdisjoint(names):
                    continue
                pairs = zip(names, group_embeddings(file, group, files["nouns"]), strict=True)
                found |= {noun: vector for noun, vector in pairs if noun in wanted}
        if missing := sorted(wanted - found.keys()):
            raise CollectionError(
                f"the vocabulary of {self.where} lacks the nouns {missing[:10]} of its references: "
                "it was damaged; `ovref verify` the collection"
            )
        return np.stack([found[noun] for noun in nouns])

    def _tables(
        self, files: Files, columns: list[str] | None
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Ids and rows, one row group of the file at a time, none empty."""
        deleted = fmt.read_tombstones(files["tombstones"])
        with fmt.open_table(files["references"], fmt.REFERENCE_SCHEMA) as file:
            first = 0
            for group in range(file.num_row_groups):
                stop = first + file.metadata.row_group(group).num_rows
                ids = np.arange(max(first, self.start), min(stop, self.stop))
                ids = ids[~np.isin(ids, deleted)]
                if len(ids):
                    table = file.read_row_group(group, columns=columns, use_threads=False)
                    yield ids, table.take(pa.array(ids - first))
                first = stop

    @contextlib.contextmanager
    def _opened(self, *roles: str) -> Iterator[tuple[fmt.Manifest, Files]]:
        """The manifest and these files, where they are there.

        Raises:
            MismatchError: the collection is no longer the same.
        """
        with _files(self.where, self.storage_options, roles) as (manifest, files):
            if not self._are_of(manifest):
                raise changed_meanwhile(self.where)
            yield fmt.undivided(manifest, self.where), files

    def _are_of(self, manifest: fmt.AnyManifest) -> bool:
        return (
            manifest.fingerprint == self.fingerprint
            and manifest.files["tombstones"].sha256 == self.tombstones
        )


def rows_of_collection(
    url: str, storage_options: dict[str, Any]
) -> tuple[CollectionRows, fmt.Manifest]:
    """All references of the undivided collection at `url`, whose files are checked as when it is
    opened, and its manifest.

    Raises:
        InputError: it is partitioned, or all references are deleted.
        CollectionError: it cannot be read.
    """
    manifest = collections.read_manifest(url, storage_options=storage_options)
    if isinstance(manifest, fmt.PartitionedManifest):
        raise InputError(
            f"{url} is partitioned already, and nothing divides it anew but a new reduction of its "
            "shards, with another reduce.partition_references"
        )
    total, deleted = manifest.counts["references"], manifest.counts["tombstones"]
    if deleted == total:
        raise InputError(f"all references of {url} are deleted: nothing is left to convert")
    rows = CollectionRows(
        where=url, storage_options=storage_options, fingerprint=manifest.fingerprint,
        tombstones=manifest.files["tombstones"].sha256,
        textual="textual" if "textual" in manifest.files else "textual_index", start=0, stop=total,
        rows=total - deleted,
    )  # fmt: skip
    roles = ("references", "visual", rows.textual, "norms", "nouns", "prototypes", "tombstones")
    with rows._opened(*roles) as (_, files):
        counts = check_counts(files, manifest, read_nouns(files["nouns"]))
        if counts != manifest.counts:
            raise CollectionError(
                f"{url}: the manifest counts {manifest.counts}, the files hold {counts}"
            )
        open_references(files["references"]).close()
        check_readable(textual_vectors(files, manifest))
    return rows, manifest


@contextlib.contextmanager
def _files(
    url: str, storage_options: dict[str, Any], roles: tuple[str, ...]
) -> Iterator[tuple[fmt.AnyManifest, Files]]:
    """A manifest and files that it names; those of an object store are read by ranges."""
    with scratch_folder() as folder:
        yield opened(
            url, blocks=block_cache(folder, CACHE_BYTES), roles=roles, in_place_bytes=0,
            cache=folder, storage_options=storage_options,
        )  # fmt: skip


def _sidecar(
    table: pa.Table, vectors: Mapping[str, np.ndarray], norms: np.ndarray | None
) -> pa.Table:
    """Rows of a collection as a sidecar of references.

    Args:
        vectors: (n, d) float16 by column.
        norms: (n,) of the visual embeddings.
    """
    noun = [table.column(name).combine_chunks() for name in ("noun", "span_start", "span_end")]
    box_n4 = np.stack([table.column(side).to_numpy() for side in ("x0", "y0", "x1", "y1")], axis=1)
    columns = {
        "key": table.column("key"),
        "noun": pa.StructArray.from_arrays(noun, fields=list(NOUN)),
        "caption": table.column("caption"),
        "box_xyxy": _lists(box_n4),
        "area": table.column("area").cast(pa.float64()),
        "score": table.column("score").cast(pa.float64()),
        "source": table.column("source"),
        "seed": table.column("seed"),
        **{name: _lists(vectors_nd) for name, vectors_nd in vectors.items()},
        "shard": table.column("shard"),
    }
    if norms is not None:
        norm = pa.array(norms.astype(np.float32))
        columns["measures"] = pa.StructArray.from_arrays([norm], ["norm"])
    return pa.table(columns)


def _lists(values_nd: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values_nd).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_nd.shape[1])
