"""The parts of an open collection, as `ReferenceCollection` uses them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection.checks import check_counts
from ovref_inference.collection.exact import faiss_module
from ovref_inference.collection.indexed_vectors import textual_vectors
from ovref_inference.collection.inverted_lists import search_lists
from ovref_inference.collection.nouns import Nouns, prefetch_nouns, read_nouns
from ovref_inference.collection.reference_table import ReferenceTable
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.collection.remote_index import RemoteIndex
from ovref_inference.errors import CollectionError
from ovref_inference.vectors import Vectors


@dataclass(frozen=True)
class TunedIndex:
    """An index and the curve that says how to search it."""

    index: Any
    curve: Sequence[fmt.SearchPoint]

    def search(
        self, queries: np.ndarray, k: int, excluded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `index.search`, with the `nprobe` for k."""
        nprobe = indexes.nprobe_for(k, self.curve)
        return indexes.search(self.index, queries, k, nprobe=nprobe, excluded=excluded)

    @property
    def lists(self) -> int:
        """Inverted lists; 0 of an exact index."""
        return getattr(self.index, "nlist", 0)

    def nearest_lists(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest inverted lists, at most all: cosines of a query to their centroids,
        descending, and their numbers, (m, count) each; `queries` are (m, d) float32."""
        found: tuple[np.ndarray, np.ndarray] = self.index.quantizer.search(queries, count)
        return found

    def search_lists(
        self,
        queries: np.ndarray,
        k: int,
        cosines: np.ndarray,
        lists: np.ndarray,
        excluded: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, in these lists alone; -1 is none. Where they hold fewer than k, the rest is
        -inf and -1."""
        params = faiss_module().SearchParametersIVF(
            nprobe=lists.shape[1], **indexes.search_settings(excluded)
        )
        k = min(k, self.index.ntotal)
        if isinstance(self.index, RemoteIndex):
            scores, ids = self.index.search_lists(queries, k, cosines, lists, params=params)
        else:
            scores, ids = search_lists(self.index, queries, k, cosines, lists, params=params)
        scores[ids < 0] = -np.inf
        return scores, ids


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Files of a collection, opened; of a partitioned one, those of all partitions as if they were
    one (`partitions.joined`)."""

    visual: Vectors
    textual: Vectors
    norms: Vectors | None
    prototypes: Vectors
    visual_index: Any
    """Has `search` like `TunedIndex`."""
    textual_index: Any
    nouns: Any
    """`Nouns`, or what has its public methods."""
    table: Any
    """`ReferenceTable`, or what has its public methods."""
    deleted: np.ndarray
    """(t,) int64: sorted ids of deleted references."""


def prefetch_parts(manifest: fmt.Manifest, paths: Mapping[str, Path | RemoteFile]) -> None:
    """Brings what `opened_parts` reads of remote files into the cache. Raises CollectionError if
    they cannot be read."""
    prefetch_nouns(paths["nouns"])
    tombstones = paths["tombstones"]
    if manifest.counts.get("tombstones") and isinstance(tombstones, RemoteFile):
        tombstones.prefetch([0], [tombstones.size])


def opened_parts(url: str, manifest: fmt.Manifest, paths: Mapping[str, Path | RemoteFile]) -> Parts:
    """Opens the files of one collection. Of one that is read in place only the vocabulary and the
    tombstones are read (`checks.check_counts`).

    Args:
        url: for messages.
        paths: role -> file.

    Raises:
        CollectionError: files do not belong together, or are not as the manifest says.
    """
    table = read_nouns(paths["nouns"])
    counts = check_counts(paths, manifest, table)
    if counts != manifest.counts:
        raise CollectionError(
            f"{url}: the manifest counts {manifest.counts}, the files hold {counts}"
        )
    rows = counts["references"]
    deleted = np.zeros(0, dtype=np.int64)
    if counts["tombstones"]:
        deleted = fmt.read_tombstones(paths["tombstones"])
    return Parts(
        visual=fmt.open_matrix(paths, manifest, "visual"),
        textual=textual_vectors(paths, manifest),
        norms=fmt.open_matrix(paths, manifest, "norms") if "norms" in paths else None,
        prototypes=fmt.open_matrix(paths, manifest, "prototypes"),
        visual_index=_index(
            paths["visual_index"], rows, manifest.visual.dim, manifest.visual_index
        ),
        textual_index=_index(
            paths["textual_index"], rows, manifest.textual.dim, manifest.textual_index
        ),
        nouns=Nouns(paths, table, deleted, manifest.settled_tombstones),
        table=ReferenceTable(paths["references"], rows),
        deleted=deleted,
    )


def opened_lists(
    manifest: fmt.PartitionedManifest, paths: Mapping[str, Path | RemoteFile],
    parts: Sequence[Parts],
) -> dict[str, TunedIndex]:  # fmt: skip
    """Opens the indexes over the inverted lists of all partitions.

    Args:
        paths: role -> file, of the whole collection.
        parts: of the partitions.

    Returns:
        role -> index; empty if the collection has none.

    Raises:
        CollectionError: a local one has another number of lists than the partitions, or another
            width; a remote one raises it when it is searched.
    """
    found = {}
    for role, kind in zip(fmt.LISTS, ("visual", "textual"), strict=True):
        if (info := getattr(manifest, role)) is not None:
            rows = sum(getattr(part, f"{kind}_index").lists for part in parts)
            found[role] = _index(paths[role], rows, getattr(manifest, kind).dim, info)
    return found


def _index(path: Path | RemoteFile, rows: int, dim: int, info: fmt.IndexInfo) -> TunedIndex:
    if isinstance(path, RemoteFile):
        return TunedIndex(RemoteIndex(path, rows, dim, info.factory), info.curve)
    return TunedIndex(indexes.read_index(path, rows=rows, dim=dim), info.curve)
