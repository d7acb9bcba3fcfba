"""Publishes collections to, and fetches them from, local folders and object stores."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection import index as indexes
from ovref_inference.collection.checks import check_counts
from ovref_inference.collection.file_cache import cache_folder, cached, problem_of
from ovref_inference.collection.nouns import read_nouns
from ovref_inference.collection.remote import CACHE_BYTES, BlockCache, RemoteFile
from ovref_inference.collection.remote_index import CODE_BYTES
from ovref_inference.errors import CollectionError
from ovref_inference.places import (
    describe,
    is_local,
    open_place,
    sha256_of,
    store_errors,
    whole_file,
)

Verify = Literal["quick", "full"]
IN_PLACE_BYTES = 32 << 20
"""Least size of a remote file that is read where it is; a smaller one is copied in a second."""


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
    names = fmt.EMBEDDINGS[manifest.embeddings]
    paths = {role: folder / name for role, name in names.items()}
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
    fs, root = _open_store(url, storage_options)
    fs.makedirs(root, exist_ok=True)
    before = _files_before(fs, root)
    files = {}
    for role, path in paths.items():
        sha256 = sha256_of(path)
        known = before.get(role)
        if known and known.sha256 == sha256 and fs.exists(f"{root}/{known.path}"):
            name = known.path
        else:
            name = (names | fmt.OPTIONAL_FILES)[role]
            if known and known.path == name:
                stem, _, suffix = name.partition(".")
                name = f"{stem}.{sha256[:12]}.{suffix}"
            _put(fs, path, f"{root}/{name}")
        files[role] = fmt.FileInfo(path=name, bytes=path.stat().st_size, sha256=sha256)
    complete = dataclasses.replace(manifest, settled_tombstones=counts["tombstones"])
    return _commit(fs, root, complete, counts, files, before)


def tombstone(
    url: str, ids: list[int], reason: str, *, storage_options: dict[str, Any] | None = None
) -> fmt.Manifest:
    """Deletes references from a published collection: they are never returned again.

    Their rows stay, so that ids keep their meaning; prototypes made from them are recomputed on use
    until the collection is reduced again. One writer at a time.

    Args:
        ids: of references; those already deleted keep their first reason.
        reason: why, stored with each tombstone.

    Raises:
        CollectionError: there is no readable collection at `url`.
        ValueError: an id that the collection does not have.
    """
    manifest = read_manifest(url, storage_options=storage_options)
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
) -> fmt.Manifest:
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
    kept = [row for row, reference in enumerate(old["id"]) if reference not in back]
    columns = {name: [old[name][row] for row in kept] for name in fmt.TOMBSTONE_SCHEMA.names}
    settled = sum(row < manifest.settled_tombstones for row in kept)
    manifest = dataclasses.replace(manifest, settled_tombstones=settled)
    return _replace_tombstones(url, manifest, columns, storage_options)


def read_tombstones(
    url: str, *, storage_options: dict[str, Any] | None = None
) -> dict[str, list[Any]]:
    """The deleted references of the collection at `url`, in the order of their deletion: columns
    `id` and `reason`. Raises CollectionError like `read_manifest`."""
    manifest = read_manifest(url, storage_options=storage_options)
    name = manifest.files["tombstones"].path
    with tempfile.TemporaryDirectory() as scratch:
        if url.startswith(hub.PREFIX):
            path = hub.download(url, name)
        else:
            fs, root = _open_store(url, storage_options)
            path = Path(scratch, fmt.FILES["tombstones"])
            try:
                fs.get_file(f"{root}/{name}", str(path))
            except store_errors() as error:
                raise CollectionError(f"cannot read {root}/{name}: {describe(error)}") from error
        with fmt.open_table(path, fmt.TOMBSTONE_SCHEMA) as table:
            return table.read().to_pydict()


def _replace_tombstones(
    url: str,
    manifest: fmt.Manifest,
    columns: dict[str, list[Any]],
    storage_options: dict[str, Any] | None,
) -> fmt.Manifest:
    fs, root = _open_store(url, storage_options)
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
    return _commit(fs, root, manifest, counts, files, manifest.files)


def read_manifest(url: str, *, storage_options: dict[str, Any] | None = None) -> fmt.Manifest:
    """The manifest of the collection at `url`. Raises CollectionError like `fetch`."""
    if url.startswith(hub.PREFIX):
        return _parsed_hub_manifest(url, hub.download(url, fmt.MANIFEST))
    fs, root = _open_store(url, storage_options)
    path = f"{root}/{fmt.MANIFEST}"
    try:
        content = fs.cat_file(path)
    except FileNotFoundError as error:
        hint = "check the URL, or publish the collection again if its build was interrupted"
        if fs.exists(f"{root}/collection/{fmt.MANIFEST}"):  # of the build whose output this is
            hint = f"there is one at {url.rstrip('/')}/collection"
        raise CollectionError(
            f"no reference collection at {url}: {fmt.MANIFEST} is missing there; {hint}"
        ) from error
    except store_errors() as error:
        raise CollectionError(f"cannot read {path}: {describe(error)}") from error
    return fmt.parse_manifest(content, path)


def fetch(
    url: str,
    *,
    cache: str | Path | None = None,
    verify: Verify = "quick",
    storage_options: dict[str, Any] | None = None,
) -> tuple[fmt.Manifest, dict[str, Path]]:
    """The manifest and local files of the collection at `url`.

    A local collection is used in place. A remote one is copied to the cache, each file named by the
    hash of its content, so that only changed files are copied again.

    Args:
        cache: folder; None uses $OVREF_CACHE or the platform's cache folder. For `hf://` it is
            huggingface_hub's cache folder, and None uses that library's default.
        verify: "quick" checks all sizes and the checksums of files up to 8 MiB, "full" all.

    Raises:
        CollectionError: missing, truncated, foreign or of another version; the message names the
            file.
    """
    if verify not in ("quick", "full"):
        raise ValueError(f'verify must be "quick" or "full", found {verify!r}')
    manifest, found = _opened(url, cache, verify == "full", storage_options, None)
    return manifest, {role: path for role, path in found.items() if isinstance(path, Path)}


def locate(
    url: str,
    *,
    cache: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    storage_options: dict[str, Any] | None = None,
) -> tuple[fmt.Manifest, dict[str, Path | RemoteFile]]:
    """The manifest and files of the collection at `url`, without copying its large files.

    A remote file of `IN_PLACE_BYTES` or more is read by ranges, through a cache of blocks on disk;
    its sizes are checked, its checksum is not. Smaller files, and indexes without inverted lists,
    are copied as by `fetch`.

    Args:
        cache: as in `fetch`; blocks are kept in its folder `blocks`, or in `cache_folder()`.
        cache_bytes: of all blocks; beyond it the least recently used ones are deleted.

    Raises:
        CollectionError: as `fetch`.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    blocks = BlockCache(folder / "blocks", cache_bytes)
    return _opened(url, cache, False, storage_options, blocks)


def _opened(
    url: str,
    cache: str | Path | None,
    full: bool,
    storage_options: dict[str, Any] | None,
    blocks: BlockCache | None,
) -> tuple[fmt.Manifest, dict[str, Path | RemoteFile]]:
    if url.startswith(hub.PREFIX):
        return _opened_on_hub(url, cache, full, blocks)
    manifest = read_manifest(url, storage_options=storage_options)
    fs, root = _open_store(url, storage_options)
    files: dict[str, Path | RemoteFile] = {}
    for role, info in manifest.files.items():
        path = f"{root}/{info.path}"
        if is_local(fs):
            if problem := problem_of(Path(path), info, full=full):
                raise CollectionError(f"{path} {problem}; publish the collection again")
            files[role] = Path(path)
        elif blocks is not None and _readable_in_place(manifest, role):
            files[role] = RemoteFile(fs, path, info.bytes, info.sha256, blocks)
        else:
            files[role] = cached(fs, path, info, cache, full=full)
    return manifest, files


def _opened_on_hub(
    url: str, cache: str | Path | None, full: bool, blocks: BlockCache | None
) -> tuple[fmt.Manifest, dict[str, Path | RemoteFile]]:
    manifest_path = hub.download(url, fmt.MANIFEST, cache)
    manifest = _parsed_hub_manifest(url, manifest_path)
    files: dict[str, Path | RemoteFile] = {}
    for role, info in manifest.files.items():
        if blocks is not None and _readable_in_place(manifest, role):
            fs, address = hub.file_by_ranges(url, info.path, manifest_path)
            files[role] = RemoteFile(fs, address, info.bytes, info.sha256, blocks)
            continue
        path = files[role] = hub.download(url, info.path, cache)
        if problem := problem_of(path, info, full=full):
            raise CollectionError(
                f"{info.path} of {url} {problem}; delete {path} and open it again"
            )
    return manifest, files


def _readable_in_place(manifest: fmt.Manifest, role: str) -> bool:
    if manifest.files[role].bytes < IN_PLACE_BYTES or role == "tombstones":
        return False
    if role not in ("visual_index", "textual_index"):
        return True
    factory: str = getattr(manifest, role).factory
    return factory.startswith("IVF") and factory.endswith(tuple(CODE_BYTES))


def _parsed_hub_manifest(url: str, path: Path) -> fmt.Manifest:
    return fmt.parse_manifest(path.read_bytes(), f"{url}/{fmt.MANIFEST}")


def _open_store(url: str, storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    if str(url).startswith(hub.PREFIX):
        raise CollectionError(
            f"{url} is not changed where it lies: change a local copy and `ovref publish` it there"
        )
    try:
        fs, root = open_place(str(url), **(storage_options or {}))
    except ValueError as error:
        raise CollectionError(f"{url} cannot be opened: {error}") from error
    return fs, root.rstrip("/")


def _files_before(fs: Any, root: str) -> dict[str, fmt.FileInfo]:
    """Files that the manifest at `root` names; empty without a readable manifest."""
    path = f"{root}/{fmt.MANIFEST}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return {}
    try:
        return fmt.parse_manifest(fs.cat_file(path), path).files
    except CollectionError:
        # Publishing again repairs a truncated or outdated collection.
        return {}


def _commit(
    fs: Any,
    root: str,
    manifest: fmt.Manifest,
    counts: dict[str, int],
    files: dict[str, fmt.FileInfo],
    before: dict[str, fmt.FileInfo],
) -> fmt.Manifest:
    version = fmt.INT8_VERSION if manifest.embeddings == "int8" else fmt.FORMAT_VERSION
    complete = dataclasses.replace(manifest, counts=counts, files=files, format_version=version)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, fmt.MANIFEST)
        path.write_bytes(fmt.manifest_bytes(complete))
        _put(fs, path, f"{root}/{fmt.MANIFEST}")
    named = {info.path for info in files.values()}
    for info in before.values():
        if info.path not in named and fs.exists(f"{root}/{info.path}"):
            fs.rm_file(f"{root}/{info.path}")
    return complete


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
