"""Publishes collections to, and fetches them from, local folders and object stores."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection import index as indexes
from ovref_inference.collection.checks import check_counts
from ovref_inference.collection.indexed_vectors import textual_vectors
from ovref_inference.collection.nouns import read_nouns
from ovref_inference.collection.opening import (
    Verify,
    open_store,
    opened,
    read_manifest,
    read_partitions,
)
from ovref_inference.collection.threads import THREADS, in_threads
from ovref_inference.errors import CollectionError
from ovref_inference.places import (
    describe,
    is_local,
    sha256_of,
    store_errors,
    whole_file,
)


def publish(
    folder: str | Path,
    url: str,
    manifest: fmt.Manifest,
    *,
    storage_options: dict[str, Any] | None = None,
) -> fmt.Manifest:
    """Checks the files in `folder` (named as in `format.EMBEDDINGS`) and publishes them at `url`.

    The manifest is written last and replaced atomically: whoever opens `url` sees either the
    previous collection or this one. Unchanged files are not sent again, and files that the new
    manifest does not name are removed.

    Args:
        folder: local; may be the target itself.
        url: local path or fsspec URL.
        manifest: all but `counts`, `files` and `settled_tombstones`, which are filled in here;
            prototypes must exclude the references that have a tombstone.

    Returns:
        The manifest as written.

    Raises:
        CollectionError: a file is missing, files disagree, or there is no reference at all.
    """
    folder = Path(folder)
    paths = {role: folder / name for role, name in fmt.file_names(manifest).items()}
    for path in paths.values():
        if not path.is_file():
            raise CollectionError(f"cannot publish {folder}: {path.name} is missing")
    optional = {role: folder / name for role, name in fmt.OPTIONAL_FILES.items()}
    paths |= {role: path for role, path in optional.items() if path.is_file()}
    counts = check_counts(paths, manifest, read_nouns(paths["nouns"]))
    if counts["references"] == 0:
        raise CollectionError(f"cannot publish {folder}: it holds no reference")
    for role, encoder in (("visual", manifest.visual), ("textual", manifest.textual)):
        indexes.read_index(paths[f"{role}_index"], rows=counts["references"], dim=encoder.dim)
    textual_vectors(paths, dataclasses.replace(manifest, counts=counts))[:1]  # checks the index
    fs, root = open_store(url, storage_options)
    fs.makedirs(root, exist_ok=True)
    before = _manifest_before(fs, root)
    files = _sent(fs, root, paths, before)
    complete = dataclasses.replace(manifest, settled_tombstones=counts["tombstones"])
    return _commit(fs, root, complete, counts, files, before)


def publish_partitioned(
    url: str,
    manifest: fmt.PartitionedManifest,
    *,
    files: Mapping[str, Path],
    storage_options: dict[str, Any] | None = None,
) -> fmt.PartitionedManifest:
    """Publishes a partitioned collection whose partitions are at `url` already: its manifest is
    written last and replaced atomically. Partitions that the manifest before it named and the new
    one does not are removed.

    Args:
        url: folder or fsspec URL; partitions are at the paths below it that the manifest names.
        manifest: all but `counts` and `files`, which are filled in here.
        files: role -> local file to send with it, such as `partition_tree`.

    Raises:
        CollectionError: a partition is missing, or is not the one that the manifest names.
    """
    parts = read_partitions(url, manifest, storage_options=storage_options)
    names = "references", "nouns", "prototypes", "tombstones"
    counts = {name: sum(part.counts[name] for part in parts) for name in names}
    fs, root = open_store(url, storage_options)
    before = _manifest_before(fs, root)
    return _commit(fs, root, manifest, counts, _sent(fs, root, files, before), before)


def tombstone(
    url: str, ids: list[int], reason: str, *, storage_options: dict[str, Any] | None = None
) -> fmt.AnyManifest:
    """Deletes references from a published collection: they are never returned again.

    Their rows stay, so that ids keep their meaning; prototypes made from them are recomputed on use
    until the collection is reduced again. One writer at a time. Of a partitioned collection one
    partition after the other is changed: after an error, delete the same references again.

    Args:
        ids: of references; those already deleted keep their first reason.
        reason: why, stored with each tombstone.

    Raises:
        CollectionError: there is no readable collection at `url`.
        ValueError: an id that the collection does not have.
    """
    manifest = read_manifest(url, storage_options=storage_options)
    if isinstance(manifest, fmt.PartitionedManifest):
        for place, own in _within_partitions(url, manifest, ids):
            tombstone(place, own, reason, storage_options=storage_options)
        return manifest
    total = manifest.counts["references"]
    unknown = [i for i in ids if not 0 <= i < total]
    if unknown:
        raise ValueError(f"{url} has references 0 to {total - 1}, not {unknown[:10]}")
    old = read_tombstones(url, storage_options=storage_options)
    new = fmt.tombstone_columns(set(ids) - set(old["id"]), reason)
    columns = {name: old[name] + new[name] for name in fmt.TOMBSTONE_SCHEMA.names}
    return _replace_tombstones(url, manifest, columns, storage_options)


def untombstone(
    url: str, ids: list[int], *, storage_options: dict[str, Any] | None = None
) -> fmt.AnyManifest:
    """Undoes deletions. One writer at a time.

    Prototypes made without these references stay as they are until the collection is reduced again.

    Raises:
        CollectionError: there is no readable collection at `url`.
        ValueError: an id that is not deleted.
    """
    manifest = read_manifest(url, storage_options=storage_options)
    old = read_tombstones(url, storage_options=storage_options)
    back = set(ids)
    if not back <= set(old["id"]):
        raise ValueError(f"{url}: references {sorted(back - set(old['id']))[:10]} are not deleted")
    if isinstance(manifest, fmt.PartitionedManifest):
        for place, own in _within_partitions(url, manifest, ids):
            untombstone(place, own, storage_options=storage_options)
        return manifest
    kept = [row for row, reference in enumerate(old["id"]) if reference not in back]
    columns = {name: [old[name][row] for row in kept] for name in fmt.TOMBSTONE_SCHEMA.names}
    settled = sum(row < manifest.settled_tombstones for row in kept)
    manifest = dataclasses.replace(manifest, settled_tombstones=settled)
    return _replace_tombstones(url, manifest, columns, storage_options)


def read_tombstones(
    url: str, *, storage_options: dict[str, Any] | None = None
) -> dict[str, list[Any]]:
    """The deleted references of the collection at `url`, in the order of their deletion: columns
    `id` and `reason`; partition by partition. Raises CollectionError like `read_manifest`."""
    manifest = read_manifest(url, storage_options=storage_options)
    if isinstance(manifest, fmt.PartitionedManifest):
        every: dict[str, list[Any]] = {"id": [], "reason": []}
        found = in_threads(
            lambda place: read_tombstones(place, storage_options=storage_options),
            manifest.places(url), THREADS,
        )  # fmt: skip
        for number, own in enumerate(found):
            every["id"] += [number * fmt.PARTITION_IDS + i for i in own["id"]]
            every["reason"] += own["reason"]
        return every
    name = manifest.files["tombstones"].path
    with tempfile.TemporaryDirectory() as scratch:
        if url.startswith(hub.PREFIX):
            path = hub.download(url, name)
        else:
            fs, root = open_store(url, storage_options)
            path = Path(scratch, fmt.FILES["tombstones"])
            try:
                fs.get_file(f"{root}/{name}", str(path))
            except store_errors() as error:
                raise CollectionError(f"cannot read {root}/{name}: {describe(error)}") from error
        with fmt.open_table(path, fmt.TOMBSTONE_SCHEMA) as table:
            return table.read().to_pydict()


def _within_partitions(
    url: str, manifest: fmt.PartitionedManifest, ids: Iterable[int]
) -> list[tuple[str, list[int]]]:
    """The URL of each partition that has some of these references, and their ids in it.

    Raises:
        ValueError: an id that the collection does not have.
    """
    found: dict[int, list[int]] = {}
    unknown = []
    for reference in sorted(set(ids)):
        number, row = divmod(int(reference), fmt.PARTITION_IDS)
        known = 0 <= number < len(manifest.partitions)
        if known and row < manifest.partitions[number].references:
            found.setdefault(number, []).append(row)
        else:
            unknown.append(reference)
    if unknown:
        raise ValueError(f"{url} has no references {unknown[:10]}")
    places = manifest.places(url)
    return [(places[number], rows) for number, rows in found.items()]


def _replace_tombstones(
    url: str,
    manifest: fmt.Manifest,
    columns: dict[str, list[Any]],
    storage_options: dict[str, Any] | None,
) -> fmt.Manifest:
    fs, root = open_store(url, storage_options)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, fmt.FILES["tombstones"])
        fmt.write_table(path, fmt.TOMBSTONE_SCHEMA, columns)
        sha256 = sha256_of(path)
        info = fmt.FileInfo(
            path=f"tombstones.{sha256[:12]}.parquet", bytes=path.stat().st_size, sha256=sha256
        )
        _put(fs, path, f"{root}/{info.path}")
    files = {**manifest.files, "tombstones": info}
    counts = {**manifest.counts, "tombstones": len(columns["id"])}
    return _commit(fs, root, manifest, counts, files, manifest)


def fetch(
    url: str,
    *,
    cache: str | Path | None = None,
    verify: Verify = "quick",
    storage_options: dict[str, Any] | None = None,
) -> tuple[fmt.Manifest, dict[str, Path]]:
    """The manifest and local files of the collection at `url`, which must not be partitioned.

    A local collection is used in place. A remote one is copied to the cache, each file named by the
    hash of its content, so that only changed files are copied again.

    Args:
        cache: folder; None uses $OVREF_CACHE or the platform's cache folder. For `hf://` it is
            huggingface_hub's cache folder, and None uses that library's default.
        verify: "quick" checks all sizes and the checksums of files up to 8 MiB, "full" all.

    Raises:
        CollectionError: missing, truncated, foreign, partitioned or of another version; the message
            names the file.
    """
    manifest, found = opened(
        url, blocks=None, cache=cache, verify=verify, storage_options=storage_options
    )
    paths = {role: path for role, path in found.items() if isinstance(path, Path)}
    return fmt.undivided(manifest, url), paths


def _manifest_before(fs: Any, root: str) -> fmt.AnyManifest | None:
    """The manifest at `root`; None if there is none that can be read."""
    path = f"{root}/{fmt.MANIFEST}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return None
    try:
        return fmt.parse_manifest(fs.cat_file(path), path)
    except CollectionError:
        # Publishing again repairs a truncated or outdated collection.
        return None


def _sent(
    fs: Any, root: str, paths: Mapping[str, Path], before: fmt.AnyManifest | None
) -> dict[str, fmt.FileInfo]:
    """Sends the files that the manifest before did not name with the same content."""
    files = {}
    for role, path in paths.items():
        sha256, name = sha256_of(path), path.name
        known = before.files.get(role) if before is not None else None
        if known and known.sha256 == sha256 and fs.exists(f"{root}/{known.path}"):
            name = known.path
        else:
            if known and known.path == name:
                stem, _, suffix = name.partition(".")
                name = f"{stem}.{sha256[:12]}.{suffix}"
            _put(fs, path, f"{root}/{name}")
        files[role] = fmt.FileInfo(path=name, bytes=path.stat().st_size, sha256=sha256)
    return files


def _commit(
    fs: Any,
    root: str,
    manifest: Any,
    counts: dict[str, int],
    files: dict[str, fmt.FileInfo],
    before: fmt.AnyManifest | None,
) -> Any:
    """Writes the manifest, then removes what only the one before named."""
    version = fmt.version_of(manifest)
    complete = dataclasses.replace(manifest, counts=counts, files=files, format_version=version)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, fmt.MANIFEST)
        path.write_bytes(fmt.manifest_bytes(complete))
        _put(fs, path, f"{root}/{fmt.MANIFEST}")
    for name in sorted(_named(before) - _named(complete)):
        if fs.exists(f"{root}/{name}"):
            fs.rm(f"{root}/{name}", recursive=True)
    return complete


def _named(manifest: fmt.AnyManifest | None) -> set[str]:
    """Files, and folders of partitions, that a manifest names."""
    if manifest is None:
        return set()
    names = {info.path for info in manifest.files.values()}
    if isinstance(manifest, fmt.PartitionedManifest):
        names |= {info.path for info in manifest.partitions}
    return names


def _put(fs: Any, path: Path, target: str) -> None:
    """Copies a local file atomically: `target` is complete or unchanged."""
    if not is_local(fs):
        # Object stores show an object only after its upload is complete.
        fs.put_file(str(path), target)
        return
    if Path(target).exists() and Path(target).samefile(path):
        return
    with (
        whole_file(Path(target)) as scratch, open(path, "rb") as source, open(scratch, "wb") as copy
    ):  # fmt: skip
        shutil.copyfileobj(source, copy, 1 << 24)
        copy.flush()
        os.fsync(copy.fileno())
