"""The images of a collection's references: published with it, or in the output of its build."""

from collections.abc import Iterator, Sequence
from typing import Any

from ovref.contract import base_key
from ovref.errors import InputError
from ovref.exchange.contact_sheet import contact_sheet
from ovref.exchange.picture_files import Picture, PublishedPictures, has_pictures, picture_of
from ovref.records import ImageRecord
from ovref_pipelines.output import open_build


def reference_pictures(
    collection_url: str, rows: Sequence[dict[str, Any]], build: str | None = None
) -> list[Picture | None]:
    """The picture of each of these rows of a collection; None if it no longer exists.

    Args:
        rows: of `ReferenceCollection.rows`.
        build: output of the build that made them; None uses the images published with the
            collection, otherwise those of the build in its parent folder.

    Raises:
        InputError: there are no images of this collection.
        StorageError: the images are damaged.
    """
    found = dict(_pictures(collection_url, rows, build))
    return [found.get(row["key"]) for row in rows]


def each_picture(
    collection_url: str, rows: Sequence[dict[str, Any]], build: str | None = None
) -> Iterator[tuple[dict[str, Any], Picture]]:
    """The pictures that are there, one at a time, each with its row. Arguments and errors as of
    `reference_pictures`."""
    of_key = {row["key"]: row for row in rows}
    for key, picture in _pictures(collection_url, rows, build):
        yield of_key[key], picture


def reference_sheet(
    collection_url: str,
    rows: Sequence[dict[str, Any]],
    titles: Sequence[tuple[str, str]],
    build: str | None = None,
) -> tuple[bytes, int]:
    """A contact sheet of references, each with two lines of text, and how many of them have an
    image. Other arguments and errors as of `reference_pictures`."""
    pictures = reference_pictures(collection_url, rows, build)
    boxes = [(row["x0"], row["y0"], row["x1"], row["y1"]) for row in rows]
    there = sum(picture is not None for picture in pictures)
    return contact_sheet(pictures, boxes, titles), there


def _pictures(
    collection_url: str, rows: Sequence[dict[str, Any]], build: str | None
) -> Iterator[tuple[str, Picture]]:
    if build is None and has_pictures(collection_url):
        return PublishedPictures(collection_url).pictures([row["key"] for row in rows])
    return _of_build(build_of(collection_url, build), rows)


def build_of(collection_url: str, build: str | None) -> str:
    """The given build, or else the collection's parent folder."""
    return build or collection_url.rstrip("/").rpartition("/")[0] or "/"


def _of_build(url: str, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Picture]]:
    try:
        output = open_build(url)
    except InputError as error:
        raise InputError(
            f"there are no images of the collection: none were published with it, and {error}. "
            "Give the output of the build that made it with --build"
        ) from error
    step = output.step("images")
    shards: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        shard = row["shard"].rpartition("/")[2]
        shards.setdefault(shard, {}).setdefault(base_key(row["key"]), []).append(row["key"])
    known = set(step.committed())
    for shard, wanted in shards.items():
        if shard not in known:
            continue
        for record in step.read(shard):
            if not isinstance(record, ImageRecord):
                continue
            for key in wanted.pop(record.key, ()):
                yield key, picture_of(record, key)
            if not wanted:
                break
