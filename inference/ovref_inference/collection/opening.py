"""Finds the files of a collection: in a local folder, on an object store or on the Hub."""

from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_inference.collection.file_cache import cache_folder, cached, problem_of
from ovref_inference.collection.remote import SMALL_BLOCK_BYTES, BlockCache, RemoteFile
from ovref_inference.collection.remote_index import CODE_BYTES
from ovref_inference.collection.threads import THREADS, in_threads
from ovref_inference.errors import CollectionError
from ovref_inference.places import describe, is_local, open_place, store_errors

Verify = Literal["quick", "full"]
IN_PLACE_BYTES = 32 << 20
"""Least size of a remote file that is read where it is; a smaller one is copied in a second."""


def read_manifest(url: str, *, storage_options: dict[str, Any] | None = None) -> fmt.AnyManifest:
    """The manifest of the collection at `url`, which may be partitioned. Raises CollectionError
    like `opened`."""
    if url.startswith(hub.PREFIX):
        return _parsed_hub_manifest(url, hub.download(url, fmt.MANIFEST))
    fs, root = open_store(url, storage_options)
    path = f"{root}/{fmt.MANIFEST}"
    try:
        content = fs.cat_file(path, start=0)  # from there on: its size is not asked for first
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


def read_partitions(
    url: str, manifest: fmt.PartitionedManifest, *, storage_options: dict[str, Any] | None = None
) -> list[fmt.Manifest]:
    """The manifests of the partitions of the collection at `url`; they count deletions.

    Raises:
        CollectionError: a partition is missing, or is not the one that `manifest` names.
    """

    def read(one: tuple[fmt.PartitionInfo, str]) -> fmt.Manifest:
        own = read_manifest(one[1], storage_options=storage_options)
        return fmt.checked_partition(own, *one)

    places = zip(manifest.partitions, manifest.places(url), strict=True)
    return in_threads(read, list(places), THREADS)


def block_cache(cache: str | Path | None, cache_bytes: int) -> BlockCache:
    """The blocks of remote files: the folder `blocks` of `cache`, or of `cache_folder()`.

    Args:
        cache_bytes: of all blocks; beyond it the least recently used ones are deleted.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    return BlockCache(folder / "blocks", cache_bytes)


def opened(
    url: str,
    *,
    blocks: BlockCache | None,
    roles: Container[str] | None = None,
    in_place_bytes: int | None = None,
    cache: str | Path | None = None,
    verify: Verify = "quick",
    storage_options: dict[str, Any] | None = None,
) -> tuple[fmt.AnyManifest, dict[str, Path | RemoteFile]]:
    """The manifest of the collection at `url` and the files that it names, without those of
    partitions.

    Args:
        roles: of the files that are wanted; None for all.
        blocks: remote files of `in_place_bytes` or more are read by ranges through this cache, and
            not copied; their sizes are checked, their checksums are not. None copies all. Smaller
            files, and indexes without inverted lists, are copied anyway; tables of references and
            of tombstones never are.
        in_place_bytes: None takes `IN_PLACE_BYTES`. With fewer, references and tombstones are read
            in place however small they are.
        cache, verify: as in `store.fetch`.

    Raises:
        CollectionError: missing, truncated, foreign or of another version; the message names the
            file.
    """
    if verify not in ("quick", "full"):
        raise ValueError(f'verify must be "quick" or "full", found {verify!r}')
    full = verify == "full"
    least = IN_PLACE_BYTES if in_place_bytes is None else in_place_bytes
    if url.startswith(hub.PREFIX):
        return _opened_on_hub(url, roles, cache, full, blocks, least)
    manifest = read_manifest(url, storage_options=storage_options)
    fs, root = open_store(url, storage_options)
    files: dict[str, Path | RemoteFile] = {}
    for role, info in _wanted(manifest, roles).items():
        path = f"{root}/{info.path}"
        if is_local(fs):
            if problem := problem_of(Path(path), info, full=full):
                raise CollectionError(f"{path} {problem}; publish the collection again")
            files[role] = Path(path)
        elif blocks is not None and _readable_in_place(manifest, role, least):
            files[role] = RemoteFile(fs, path, info.bytes, info.sha256, blocks, _block_bytes(role))
        else:
            files[role] = cached(fs, path, info, cache, full=full)
    return manifest, files


def _opened_on_hub(
    url: str, roles: Container[str] | None, cache: str | Path | None, full: bool,
    blocks: BlockCache | None, least: int,
) -> tuple[fmt.AnyManifest, dict[str, Path | RemoteFile]]:  # fmt: skip
    manifest_path = hub.download(url, fmt.MANIFEST, cache)
    manifest = _parsed_hub_manifest(url, manifest_path)
    files: dict[str, Path | RemoteFile] = {}
    for role, info in _wanted(manifest, roles).items():
        if blocks is not None and _readable_in_place(manifest, role, least):
            fs, address = hub.file_by_ranges(url, info.path, manifest_path)
            files[role] = RemoteFile(
                fs, address, info.bytes, info.sha256, blocks, _block_bytes(role)
            )
            continue
        path = files[role] = hub.download(url, info.path, cache)
        if problem := problem_of(path, info, full=full):
            raise CollectionError(
                f"{info.path} of {url} {problem}; delete {path} and open it again"
            )
    return manifest, files


def _wanted(manifest: fmt.AnyManifest, roles: Container[str] | None) -> dict[str, fmt.FileInfo]:
    return {role: info for role, info in manifest.files.items() if roles is None or role in roles}


def _block_bytes(role: str) -> int | None:
    return SMALL_BLOCK_BYTES if role == "prototypes" or role in fmt.LISTS else None


def _readable_in_place(manifest: fmt.AnyManifest, role: str, least: int) -> bool:
    if role == "partition_tree" or role in fmt.LISTS:
        return True  # only growing reads the one, a search parts of the others
    if role in ("references", "tombstones") and least < IN_PLACE_BYTES:
        return True  # of many partitions, where opening would copy what nobody may read
    if manifest.files[role].bytes < least or role == "tombstones":
        return False
    if role not in ("visual_index", "textual_index"):
        return True
    factory: str = getattr(manifest, role).factory
    return factory.startswith("IVF") and factory.endswith(tuple(CODE_BYTES))


def _parsed_hub_manifest(url: str, path: Path) -> fmt.AnyManifest:
    return fmt.parse_manifest(path.read_bytes(), f"{url}/{fmt.MANIFEST}")


def open_store(url: str, storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    if str(url).startswith(hub.PREFIX):
        raise CollectionError(
            f"{url} is not changed where it lies: change a local copy and `ovref publish` it there"
        )
    try:
        fs, root = open_place(str(url), **(storage_options or {}))
    except ValueError as error:
        raise CollectionError(f"{url} cannot be opened: {error}") from error
    return fs, root.rstrip("/")
