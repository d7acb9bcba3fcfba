"""Images for a collection of arrays, published beside it as those of a build are."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ovref.ahead import map_ahead
from ovref.contract import base_key, part_of_key
from ovref.corpora.listing import open_place, shown
from ovref.errors import InputError
from ovref.exchange.picture_files import image_row, write_image_rows
from ovref.records import NO, YES, ImageRecord, Noun, Region
from ovref.storage.file_store import Store
from ovref.stored_images import UnusableImageError, plain_image
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.places import describe, store_errors

AHEAD = 16
"""Images read ahead: object stores have high latency but serve many requests at once."""


class Images:
    """The image files in a folder or under a URL, by their names in it."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._fs, root = open_place(place)
        self._root = root.rstrip("/")

    def check(self, names: Sequence[str]) -> None:
        """Raises InputError where one is not there, or is no name of a file inside."""
        for name in names:
            if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise InputError(f"images are named as they lie in {self._place}, found {name!r}")
        try:
            there = list(map_ahead(lambda name: self._fs.exists(self._path(name)), names, AHEAD))
        except store_errors() as error:
            raise InputError(f"cannot look into {shown(self._place)}: {describe(error)}") from error
        missing = [name for name, found in zip(names, there, strict=True) if not found]
        if missing:
            raise InputError(
                f"{shown(self._place)} lacks {len(missing)} of {len(names)} images, for one "
                f"{missing[0]}"
            )

    def read(self, name: str) -> tuple[bytes, np.ndarray]:
        """The file and its pixels, (H, W, 3) uint8. Raises InputError for what is no image."""
        try:
            return plain_image(self._fs.cat_file(self._path(name)))
        except store_errors(UnusableImageError) as error:
            raise InputError(
                f"cannot use the image {name} in {shown(self._place)}: {describe(error)}"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def add_pictures(collection_url: str, images: Images, names: Mapping[str, str]) -> None:
    """Publishes the images of a collection's references beside it.

    The mask of a reference is its box, or the whole image if it has none.

    Args:
        collection_url: where it is.
        names: by the key of a reference, its image; references of one image have keys that differ
            after `#` only.

    Raises:
        InputError: an image cannot be read.
        StorageError: the files cannot be written.
    """
    store = Store.open(collection_url)

    def rows() -> Iterator[dict[str, Any]]:
        with ReferenceCollection.open(collection_url) as collection:
            columns = ["key", "noun", "caption", "score", "source", "x0", "y0", "x1", "y1"]
            table = collection.to_table(columns).to_pylist()
        of_image: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            if row["key"] in names:
                of_image.setdefault(base_key(row["key"]), []).append(row)
        files = (names[some[0]["key"]] for some in of_image.values())
        read = map_ahead(images.read, files, AHEAD)
        for (key, some), (file, image_hwc) in zip(of_image.items(), read, strict=True):
            numbers = [part_of_key(row["key"]) for row in some]
            regions = [_region(row, image_hwc.shape[:2]) for row in some]
            record = ImageRecord(
                key=key, caption=some[0]["caption"], source=names[some[0]["key"]], image=file,
                regions=tuple(regions),
            )  # fmt: skip
            yield image_row(record, dict(enumerate(numbers)))

    with tempfile.TemporaryDirectory() as scratch:
        for name in write_image_rows(rows(), Path(scratch)):
            store.upload(Path(scratch, name), name)
            Path(scratch, name).unlink()


def _region(row: Mapping[str, Any], size_hw: tuple[int, ...]) -> Region:
    mask_hw = np.full(size_hw, NO, np.uint8)
    x0, y0, x1, y1 = (row[side] for side in ("x0", "y0", "x1", "y1"))
    box = (slice(max(y0, 0), y1), slice(max(x0, 0), x1))
    if x1 <= x0 or y1 <= y0 or not mask_hw[box].size:
        box = (slice(None), slice(None))
    mask_hw[box] = YES
    return Region(
        noun=Noun(text=row["noun"], start=0, end=0), mask_hw=mask_hw, score=row["score"],
        source=row["source"],
    )  # fmt: skip
