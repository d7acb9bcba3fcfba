"""Opens and lists the locations of corpora, following symbolic links."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from ovref.errors import InputError
from ovref_inference import places
from ovref_inference.places import is_local

MAGIC = "*?["
"""Characters that make a path component a pattern."""


def open_place(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path on it. Listings are not cached.

    Raises:
        InputError: the protocol of the URL is unknown.
        MissingPackageError: the protocol's package is not installed.
    """
    if "://" not in place:  # not parsed as chained URLs: `a::b` is a file name
        local = fsspec.filesystem("file")
        return local, local._strip_protocol(place)
    protocol = place.rpartition("::")[2].partition("://")[0]
    try:
        return places.open_place(place, use_listings_cache=False)
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise InputError(f"cannot open {place}: {error}") from error
        raise InputError(
            f"cannot open {place}: unknown protocol {protocol}://; expected a local path, or a URL "
            f"that fsspec knows, such as s3://, gs://, hf:// or https://"
        ) from error


def shown(place: str) -> str:
    """The location for messages: a relative path also has its absolute path."""
    expanded = os.path.expanduser(place)
    if "://" in place or os.path.isabs(expanded):
        return place
    return f"{place} (relative to the current folder: {os.path.abspath(expanded)})"


def entries(fs: AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    """The entries of a folder without hidden ones, as fsspec's dicts sorted by name.

    A symbolic link has the type and size of its target; a broken link counts as a file, so that
    reading it raises an error.
    """
    found = []
    for item in fs.ls(folder, detail=True):
        path = item["name"].rstrip("/")
        if path == folder or path.rpartition("/")[2].startswith("."):
            continue  # S3 lists the marker of a folder inside it
        kind = item["type"]
        if item.get("islink"):
            kind = "directory" if os.path.isdir(path) else "file"
        found.append(item | {"name": path, "type": kind})
    return sorted(found, key=lambda item: item["name"])


def walk(
    fs: AbstractFileSystem, folder: str, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each folder from `folder` downwards, with its `entries`.

    Folders that the caller removes from the list are not walked. Links back to a parent folder
    (`above`) are not followed.
    """
    folder = folder.rstrip("/")
    inside = entries(fs, folder)
    yield folder, inside
    if is_local(fs):
        above = (*above, os.path.realpath(folder))
    for item in inside:
        if item["type"] == "directory" and not links_to_parent(item, above):
            yield from walk(fs, item["name"], above)


def find(fs: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """All files below a folder by path, without hidden ones; follows local links."""
    if is_local(fs):
        inside = [item for _, items in walk(fs, folder) for item in items]
        return {item["name"]: item for item in inside if item["type"] != "directory"}
    found = fs.find(folder, detail=True)
    return {name: found[name] for name in found if "/." not in name.removeprefix(folder)}


def links_to_parent(item: dict[str, Any], above: tuple[str, ...]) -> bool:
    """Whether an entry is a link to one of these folders (real paths)."""
    return bool(item.get("islink")) and os.path.realpath(item["name"]) in above


def matches(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """The files that match a pattern with `*`, `?`, `[...]` or `**`, in order of name.

    A path component that exists literally is not a pattern: `photos [2019]/*.txt`.
    """
    parts = pattern.split("/")
    plain = next(at for at, part in enumerate(parts) if any(mark in part for mark in MAGIC))
    found = _matches(fs, "/".join(parts[:plain]), parts[plain:])
    return sorted(set(found))


def _matches(fs: AbstractFileSystem, folder: str, parts: list[str]) -> Iterator[str]:
    part, *rest = parts
    literal = f"{folder}/{part}" if folder or fs.root_marker else part
    is_plain = "*" not in part and (not any(mark in part for mark in MAGIC) or fs.exists(literal))
    if is_plain and rest:
        yield from _matches(fs, literal, rest)
    elif is_plain:
        if fs.isfile(literal):
            yield literal
    elif part == "**":
        for below, inside in walk(fs, folder or fs.root_marker):
            if rest:
                yield from _matches(fs, below, rest)
            else:
                yield from (item["name"] for item in inside if item["type"] != "directory")
    else:
        for item in entries(fs, folder or fs.root_marker):
            if not fnmatchcase(PurePosixPath(item["name"]).name, part):
                continue
            if rest and item["type"] == "directory":
                yield from _matches(fs, item["name"], rest)
            elif not rest and item["type"] != "directory":
                yield item["name"]
