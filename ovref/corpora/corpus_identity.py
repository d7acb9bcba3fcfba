"""A corpus's part of a fingerprint."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from ovref.corpora.image_formats import identify_miniature
from ovref.corpora.listing import find, open_place, shown
from ovref.corpora.mixture import corpora_of
from ovref.corpora.spec import (
    CAPTION_FILES,
    FOLDERS,
    MINIATURE,
    MIXTURE,
    CorpusSpec,
    LabelSpec,
    corpus_files,
    corpus_id,
    is_mixture,
)
from ovref.errors import InputError
from ovref_inference.places import describe, is_local, sha256_of, store_errors


def identify(spec: CorpusSpec) -> dict[str, Any]:
    """The corpus's part of a fingerprint: its contents and how they are read, not its location.

    Local files are hashed (SHA-256). Remote files are identified by size and the store's checksum
    (ETag), without a download, so the same corpus has a different identity on S3. For images that
    the corpus refers to, only the listing of `images` (names and sizes) is hashed; for an image
    folder, also its caption files. Raises InputError like `corpus_files`.
    """
    if is_mixture(spec):
        corpora = [identify(one) | {"weight": weight} for one, weight in corpora_of(spec)]
        return {
            "corpus_id": corpus_id(spec), "format": MIXTURE, "corpora": corpora,
            "limit": spec.limit,
        }  # fmt: skip
    if spec.path.startswith(MINIATURE):
        written, identities = "miniature", [identify_miniature(spec)]
    else:
        fs, files = corpus_files(spec)
        written = files[0][1]
        if written in FOLDERS:
            identities = [identify_folder(spec.path, captions=written == "imagefolder")]
        else:
            identities = [_identify_file(fs, name) for name, _ in files]
    identity = {
        "corpus_id": corpus_id(spec),
        "format": written,
        "files": identities,
        "images": None if spec.images is None else identify_folder(spec.images),
        "caption_column": spec.caption_column,
        "image_column": spec.image_column,
        "limit": spec.limit,
        "draws": spec.draws,
        "max_characters": spec.max_characters,
    }
    if spec.repeats:
        identity["repeats"] = True
    if spec.labels is None:
        return identity
    return identity | {"labels": identify_labels(spec.labels)}


def identify_labels(labels: LabelSpec) -> dict[str, Any]:
    """How labels are read; a file of names is identified by its contents."""
    found = dataclasses.asdict(labels)
    if labels.names and not labels.dataset:
        fs, path = open_place(labels.names)
        found["names"] = _identify_file(fs, path)
    return found


def _identify_file(fs: AbstractFileSystem, name: str) -> dict[str, Any]:
    try:
        info = fs.info(name)
        identity = {"name": PurePosixPath(name).name, "size": int(info["size"])}
        if not is_local(fs):
            return identity | {"checksum": str(info.get("ETag") or fs.checksum(name))}
        return identity | {"sha256": sha256_of(name)}
    except store_errors() as error:
        raise InputError(f"cannot read {name} of the corpus: {describe(error)}") from error


def identify_files(places: Iterable[Path]) -> list[Any]:
    """For folders a hash of the names and sizes in them, for files the name and size. Local
    only."""
    return [
        identify_folder(str(place)) if place.is_dir() else [place.name, place.stat().st_size]
        for place in places
    ]


def identify_folder(place: str, captions: bool = False) -> dict[str, Any]:
    """Hash of the names and sizes below a folder, and of its caption files' contents."""
    try:
        fs, root = open_place(place)
        entries = find(fs, root)
    except store_errors(ValueError) as error:
        raise InputError(f"cannot list the images at {shown(place)}: {describe(error)}") from error
    if not entries:
        raise InputError(f"there are no images at {shown(place)}; check `images`")
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(f"{name.removeprefix(root)}\0{entries[name]['size']}\n".encode())
        path = PurePosixPath(name)
        if captions and (path.suffix.lower() == ".txt" or path.name in CAPTION_FILES):
            # The listing has the checksums; one request per file would take hours.
            contents = entries[name].get("ETag") or _identify_file(fs, name)
            digest.update(f"{contents}\n".encode())
    kind = "captions_names_and_sizes_sha256" if captions else "names_and_sizes_sha256"
    return {"count": len(entries), kind: digest.hexdigest()}
