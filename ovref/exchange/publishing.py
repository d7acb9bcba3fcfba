"""Publishes a collection for others: its files, a data set card, checksums and images.

    README.md           the card, made from the manifest (with the Hub's front matter)
    SHA256SUMS          checksums of all other files, for `sha256sum -c`
    samples.png         crops of some references with their masks
    pictures.json, pictures-*.parquet       the images, unless left out
    collection.json     the manifest, written last as the commit, and the files it names
    partitions/         of a partitioned collection; those that are there already are not sent

Files that opening a collection does not need are not named by its manifest. Nothing of deleted
references is published: where there are any, the collection, or that partition of it, is made again
without them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ovref.errors import InputError, MismatchError
from ovref.exchange.card import SAMPLES, SUMS, card
from ovref.exchange.picture_files import INDEX
from ovref.exchange.renewed_lists import RenewedLists
from ovref.identity import fingerprint
from ovref.reduce.compact import compact, compacted_fingerprint
from ovref.reduce.int8 import in_int8
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub, opening, store
from ovref_inference.collection.nouns import read_nouns
from ovref_inference.errors import CollectionError
from ovref_inference.places import sha256_of

CARD = "README.md"
REMOVED = ("pictures-*.parquet", INDEX, SAMPLES, "partitions/*", "*_lists.*faiss")
"""Files of an earlier publication that a later one without them removes."""

WritePictures = Callable[[Path], Iterable[str]]
"""Writes the images of a collection, or its samples, into a folder; gives the name of each file
once it is whole, after which it is taken away."""


def publish(
    collection_url: str,
    target: str,
    *,
    title: str,
    evaluation: dict[str, Any] | None = None,
    write_pictures: WritePictures | None = None,
    replace: bool = False,
    int8: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Publishes a collection at a folder, an object store or the Hub.

    Args:
        collection_url: the collection.
        target: folder, fsspec URL, or hf://user/name, which is created if it does not exist.
        title: title of the card.
        evaluation: content of the collection's evaluation.json, for the card.
        write_pictures: writes `samples.png` and the images into the folder that it gets.
        replace: whether another collection at `target` may be replaced.
        int8: converts embeddings to int8 (`reduce.int8`), which makes another collection; nothing
            if they are int8 already.
        storage_options: fsspec's options for `collection_url`.

    Returns:
        `files` and `bytes`.

    Raises:
        CollectionError: there is no collection, or one of its files is damaged.
        InputError: the evaluation is invalid or belongs to another collection; `target` has a
            revision; or the Hub cannot be reached, or refuses.
        MismatchError: `target` holds another collection, and `replace` is not set.
        StorageError: the target cannot be written.
    """
    on_hub = target.startswith(hub.PREFIX)
    if on_hub and hub.hub_place(target).revision:
        raise InputError(f"publish to a repository, not to a revision of it: {target}")
    manifest, own, pieces = _pieces(collection_url, storage_options)
    if evaluation is not None and not _is_evaluation(evaluation):
        raise InputError(
            "the evaluation is not an evaluation.json of `ovref evaluate`: expected caption, data, "
            "rows and collection"
        )
    if evaluation is not None and measured_of(evaluation) != manifest.fingerprint:
        raise InputError(
            f"the evaluation is of the collection {measured_of(evaluation)[:12]}, this one is "
            f"{manifest.fingerprint[:12]}: evaluate it again"
        )
    prints = [piece.wanted(int8) for piece in pieces]
    wanted = prints[0]
    if isinstance(manifest, fmt.PartitionedManifest):
        same = all(one.manifest.fingerprint == new for one, new in zip(pieces, prints, strict=True))
        wanted = manifest.fingerprint if same else fingerprint([manifest.fingerprint, *prints])
    there = _fingerprint_at(target)
    is_other = there not in (None, wanted)
    if is_other and there != manifest.fingerprint and not replace:
        raise MismatchError(
            f"{target} holds another collection (fingerprint {str(there)[:12]}, this one has "
            f"{wanted[:12]}); choose another place, or give --replace"
        )
    with tempfile.TemporaryDirectory() as scratch:
        place = _OnHub(target) if on_hub else _InStore(target, there is not None, is_other)
        sums: dict[str, str] = {}
        size = 0

        def send(name: str, digest: str = "") -> None:
            nonlocal size
            sums[name] = digest or sha256_of(folder / name)
            size += (folder / name).stat().st_size
            place.send(folder / name, name)

        def send_files(files: dict[str, fmt.FileInfo], paths: dict[str, Path], prefix: str) -> None:
            for role, path in paths.items():
                _link(path, folder / prefix / files[role].path)
                send(prefix + files[role].path, files[role].sha256)  # just checked, or just written

        folder = Path(scratch, "files")
        folder.mkdir()
        # One at a time, so that there is never more than one file of images on this disk.
        for name in write_pictures(folder) if write_pictures is not None else ():
            send(name)
        published: list[fmt.Manifest] = []
        deleted = any(piece.manifest.counts["tombstones"] for piece in pieces)
        lists = RenewedLists(Path(scratch, "lists"), manifest, len(pieces)) if deleted else None
        counts: list[tuple[str, int]] = []
        for piece, new in zip(pieces, prints, strict=True):
            with tempfile.TemporaryDirectory(dir=scratch) as work:
                made, paths = piece.made(int8, new, Path(work))
                published.append(made)
                if lists is not None:
                    lists.add(made, paths)
                counts += _counts(paths["nouns"])
                if not piece.prefix:
                    send_files(made.files, paths, "")
                    continue
                (folder / piece.prefix).mkdir(parents=True)
                content = fmt.manifest_bytes(made)
                if _is_there(f"{target}/{piece.prefix}", made):
                    sums |= {piece.prefix + one.path: one.sha256 for one in made.files.values()}
                    sums[piece.prefix + fmt.MANIFEST] = hashlib.sha256(content).hexdigest()
                    size += sum(one.bytes for one in made.files.values()) + len(content)
                    continue
                send_files(made.files, paths, piece.prefix)
                (folder / piece.prefix / fmt.MANIFEST).write_bytes(content)
                send(piece.prefix + fmt.MANIFEST)
        if isinstance(manifest, fmt.PartitionedManifest):
            if lists is not None:
                manifest, own = lists.renewed(manifest, own)
            send_files(manifest.files, own, "")
            manifest = _of_partitions(manifest, published, wanted)
        else:
            (manifest,) = published
        text = card(manifest, title, target, evaluation, list(sums), counts)
        (folder / CARD).write_text(text, encoding="utf-8")
        send(CARD)
        content = fmt.manifest_bytes(manifest)
        sums[fmt.MANIFEST] = hashlib.sha256(content).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        (folder / SUMS).write_text(lines, encoding="utf-8")
        send(SUMS)
        (folder / fmt.MANIFEST).write_bytes(content)
        place.finish(folder / fmt.MANIFEST, set(sums), manifest.fingerprint)
    return {"files": len(sums), "bytes": size + len(content)}


@dataclass(frozen=True)
class _Piece:
    """A collection that is published, or a partition of one."""

    manifest: fmt.Manifest
    paths: dict[str, Path]
    prefix: str = ""
    """Before the names of its files at the target, such as `partitions/00000/`."""

    def wanted(self, int8: bool) -> str:
        """The fingerprint of what is published of it."""
        found = self.manifest.fingerprint
        if self.manifest.counts["tombstones"]:
            found = compacted_fingerprint(self.manifest, self.paths)
        return fingerprint([found, "int8"]) if self._converts(int8) else found

    def made(self, int8: bool, wanted: str, work: Path) -> tuple[fmt.Manifest, dict[str, Path]]:
        """What is published of it; new files are in `work`."""
        manifest, paths = self.manifest, self.paths
        if manifest.counts["tombstones"]:
            manifest, paths = compact(manifest, paths, work / "compact")
        if self._converts(int8):
            manifest, paths = in_int8(manifest, paths, work / "converted", wanted)
        return manifest, paths

    def _converts(self, int8: bool) -> bool:
        return int8 and self.manifest.embeddings != "int8"


def _pieces(
    url: str, storage_options: dict[str, Any] | None
) -> tuple[fmt.AnyManifest, dict[str, Path], list[_Piece]]:
    """The manifest of a collection, the files that it names, and what it consists of, all files
    checked."""
    options: dict[str, Any] = {"verify": "full", "storage_options": storage_options}
    manifest, found = opening.opened(url, blocks=None, **options)
    own = {role: path for role, path in found.items() if isinstance(path, Path)}
    if isinstance(manifest, fmt.Manifest):
        return manifest, own, [_Piece(manifest, own)]
    pieces = []
    for info, place in zip(manifest.partitions, manifest.places(url), strict=True):
        part, paths = store.fetch(place, **options)
        fmt.checked_partition(part, info, place)
        if part.counts["tombstones"] == part.counts["references"]:
            raise InputError(
                f"all references of the partition {place} are deleted: reduce the collection "
                "again without them, or undo a deletion"
            )
        pieces.append(_Piece(part, paths, f"{info.path}/"))
    return manifest, own, pieces


def _is_there(place: str, manifest: fmt.Manifest) -> bool:
    """Whether a partition is at a place already."""
    try:
        return store.read_manifest(place) == manifest
    except CollectionError:
        return False


def _of_partitions(
    manifest: fmt.PartitionedManifest, parts: Sequence[fmt.Manifest], wanted: str
) -> fmt.PartitionedManifest:
    """The manifest of these partitions."""
    infos = [
        replace(info, fingerprint=part.fingerprint, references=part.counts["references"],
                nouns=part.counts["nouns"])
        for info, part in zip(manifest.partitions, parts, strict=True)
    ]  # fmt: skip
    counts = {name: sum(part.counts[name] for part in parts) for name in manifest.counts}
    return replace(
        manifest, fingerprint=wanted, counts=counts, partitions=tuple(infos),
        embeddings=parts[0].embeddings,
    )  # fmt: skip


class _InStore:
    """A folder or an object store that is published to."""

    def __init__(self, target: str, published: bool, is_other: bool) -> None:
        """`published` says whether there is a collection already, `is_other` whether another."""
        self._store, self._published = Store.open(target), published
        if is_other:  # first, so that nobody opens a mixture of both if this is cut off
            self._store.delete(fmt.MANIFEST)

    def send(self, path: Path, name: str) -> None:
        """Sends a file and takes it away."""
        self._store.upload(path, name)
        path.unlink()

    def finish(self, manifest: Path, names: set[str], fingerprint: str) -> None:
        """Sends the manifest, which is the commit; what an earlier publication had more goes."""
        # Of an earlier publication only: other folders have files of these names too.
        for name in self._store.list() if self._published else ():
            if any(fnmatch(name, pattern) for pattern in REMOVED) and name not in names:
                self._store.delete(name)
        self.send(manifest, manifest.name)


class _OnHub:
    """A repository of the Hub that is published to, in one commit: whoever opens the newest
    revision sees the old collection or this one."""

    def __init__(self, target: str) -> None:
        from huggingface_hub import HfApi

        self._target, self._place = target, hub.hub_place(target)
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self._operations: list[Any] = []
        with self._errors():
            self._api.create_repo(self._place.repository, repo_type="dataset", exist_ok=True)

    def send(self, path: Path, name: str) -> None:
        """Sends a large file and takes it away; a small one goes with the commit."""
        from huggingface_hub import CommitOperationAdd

        added = CommitOperationAdd(self._place.path(name), str(path))
        with self._errors():
            self._api.preupload_lfs_files(
                self._place.repository, additions=[added], repo_type="dataset"
            )
        self._operations.append(added)
        if added._is_uploaded:
            path.unlink()

    def finish(self, manifest: Path, names: set[str], fingerprint: str) -> None:
        """Commits; what an earlier publication had more goes."""
        from huggingface_hub import CommitOperationDelete

        self.send(manifest, manifest.name)
        wanted = {self._place.path(name) for name in names}
        patterns = [self._place.path(pattern) for pattern in REMOVED]
        with self._errors():
            known = self._api.list_repo_files(self._place.repository, repo_type="dataset")
            self._operations += [
                CommitOperationDelete(name)
                for name in known
                if any(fnmatch(name, pattern) for pattern in patterns) and name not in wanted
            ]
            self._api.create_commit(
                self._place.repository,
                self._operations,
                commit_message=f"Reference collection {fingerprint[:12]}",
                repo_type="dataset",
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise InputError(
                f"cannot publish to {self._target}: {str(error)[:300]}; `hf auth login` stores a "
                "token"
            ) from error


def _is_evaluation(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and {"caption", "data", "rows", "collection"} <= tree.keys()
        and isinstance(tree["rows"], list)
        and all(isinstance(row, dict) and "name" in row for row in tree["rows"])
    )


def measured_of(evaluation: Any) -> str:
    """The fingerprint of the collection that an evaluation.json measured; empty for other files."""
    collection = evaluation.get("collection") if isinstance(evaluation, dict) else None
    return collection.get("fingerprint", "") if isinstance(collection, dict) else ""


def _counts(path: Path) -> list[tuple[str, int]]:
    nouns = read_nouns(path)
    return list(zip(nouns.names, nouns.counts.tolist(), strict=True))


def _link(path: Path, target: Path) -> None:
    """Hard-links a file if possible, otherwise copies it."""
    path = path.resolve()  # the Hub's cache holds links
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _fingerprint_at(target: str) -> str | None:
    """The fingerprint of the collection at a target; None if there is none."""
    if target.startswith(hub.PREFIX):
        content = _manifest_on_hub(target)
    else:
        place = Store.open(target)
        content = place.read(fmt.MANIFEST) if place.exists(fmt.MANIFEST) else None
    if content is None:
        return None
    try:
        return str(json.loads(content)["fingerprint"])
    except (ValueError, TypeError, KeyError):
        return "unknown"


def _manifest_on_hub(target: str) -> bytes | None:
    """The manifest in a repository; None if there is no repository or no manifest."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    place, api = hub.hub_place(target), HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        if not api.file_exists(place.repository, place.path(fmt.MANIFEST), repo_type="dataset"):
            return None
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise InputError(f"cannot look up {target}: {str(error)[:300]}") from error
    return hub.download(target, fmt.MANIFEST).read_bytes()
