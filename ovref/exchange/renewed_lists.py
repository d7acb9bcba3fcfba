"""The indexes over all inverted lists of a collection published without its deleted references."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ovref.reduce.list_index import (
    KINDS,
    index_lists,
    partition_indexes,
    queries_of_each,
    read_lists,
)
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.places import sha256_of


class RenewedLists:
    """The indexes over all inverted lists of a partitioned collection, made anew if deletions are
    carried out, since a partition then has other lists."""

    def __init__(self, folder: Path, manifest: fmt.AnyManifest, partitions: int) -> None:
        """
        Args:
            folder: for files of about the size of the indexes; created.
            manifest: of the collection; if it has no such indexes, none are made.
            partitions: number of partitions.
        """
        self._folder, self._manifests = folder, list[fmt.Manifest]()
        self._asked = queries_of_each(partitions)
        self._wanted = isinstance(manifest, fmt.PartitionedManifest) and manifest.visual_lists
        folder.mkdir()

    def add(self, manifest: fmt.Manifest, paths: Mapping[str, Path]) -> None:
        """Takes the lists of the next partition."""
        if not self._wanted:
            return
        for role, kind in KINDS.items():
            path = paths[f"{kind}_index"]
            for one in partition_indexes(role, [("", manifest)]):
                own, some = read_lists(
                    Store.open(str(path.parent)), replace(one, path=path.name), self._asked,
                    np.random.default_rng(len(self._manifests)),
                )  # fmt: skip
                np.savez(self._folder / f"{role}_{len(self._manifests):05d}", own=own, some=some)
        self._manifests.append(manifest)

    def renewed(
        self, manifest: fmt.PartitionedManifest, own: dict[str, Path]
    ) -> tuple[fmt.PartitionedManifest, dict[str, Path]]:
        """The manifest, and the files of the collection beside its partitions, with new indexes."""
        if not self._wanted:
            return manifest, own
        infos: dict[str, Any] = dict.fromkeys(fmt.LISTS)
        files = {role: file for role, file in manifest.files.items() if role not in fmt.LISTS}
        own = {role: path for role, path in own.items() if role not in fmt.LISTS}
        for role, kind in KINDS.items():
            indexes = partition_indexes(role, [("", one) for one in self._manifests])
            if not indexes:
                continue
            out = own[role] = self._folder / f"{role}.faiss"
            infos[role] = index_lists(
                map(_loaded, sorted(self._folder.glob(f"{role}_*.npz"))),
                sum(one.lists for one in indexes), getattr(manifest, kind).dim, out,
                seed=ReduceSpec().seed,
            )  # fmt: skip
            files[role] = fmt.FileInfo(
                path=out.name, bytes=out.stat().st_size, sha256=sha256_of(out)
            )
        manifest = replace(manifest, files=files, **infos)
        return replace(manifest, format_version=fmt.version_of(manifest)), own


def _loaded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return found["own"], found["some"]
