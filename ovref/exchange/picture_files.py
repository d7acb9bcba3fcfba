"""The images of a published collection, with its references' masks, in a few large files.

    pictures.json               the files with their rows, sizes and checksums
    pictures-00000.parquet      one row per image, sorted by key (`SCHEMA`)

They are not part of the collection's manifest: opening it does not fetch them. The column `image`
has the layout in which the Hugging Face Hub displays images.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovref.contract import base_key, part_of_key
from ovref.errors import StorageError
from ovref.ops.run_lengths import mask_of, rle
from ovref.records import YES, ImageRecord
from ovref.storage.copies import Copies
from ovref.storage.file_store import Store
from ovref.stored_images import decode_image
from ovref_inference.collection import hub
from ovref_inference.errors import CollectionError
from ovref_inference.images import box_of
from ovref_inference.places import sha256_of

INDEX = "pictures.json"
VERSION = 1
FILE_BYTES = 256 << 20
"""Size at which a new file is begun."""
KEPT = 4
"""Files of an object store whose copies are kept."""

_REGION = pa.struct(
    [
        ("number", pa.int32()),
        ("noun", pa.string()),
        ("score", pa.float32()),
        ("source", pa.string()),
        ("box_xyxy", pa.list_(pa.int32())),
        ("size_hw", pa.list_(pa.int32())),
        ("counts", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("regions", pa.list_(_REGION)),
    ],
    metadata={
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}),
    },
)
"""Regions: the reference `<key>#<number>`, its mask in COCO's run-length encoding at `size_hw`."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The image and the mask of a reference."""

    image_hwc: np.ndarray
    """(H, W, 3) uint8."""
    mask_hw: np.ndarray | None
    """(H, W) bool; None if it no longer exists."""
    heatmap_hw: np.ndarray | None = None
    """(h, w) float16 attribution heatmap in [0, 1]; None if there is none."""


def write_pictures(
    records: Iterable[ImageRecord], wanted: frozenset[str], folder: Path
) -> Iterator[str]:
    """Writes the images of the wanted references, with the regions of these.

    Args:
        records: written in this order, but sorted within each file.
        wanted: keys of references.
        folder: target folder.

    Yields:
        As `write_image_rows`.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            every = range(len(record.regions))
            numbers = {number: number for number in every if f"{record.key}#{number}" in wanted}
            if numbers:
                yield image_row(record, numbers)

    return write_image_rows(rows(), folder)


def write_image_rows(images: Iterable[dict[str, Any]], folder: Path) -> Iterator[str]:
    """Writes rows of SCHEMA into files.

    Yields:
        The name of each file once it is whole, pictures.json the last. It may be taken away before
        the next one is asked for.
    """
    files: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    size = 0
    for row in images:
        rows.append(row)
        size += len(row["image"]["bytes"])
        if size >= FILE_BYTES:
            files.append(_write(rows, folder, len(files)))
            rows, size = [], 0
            yield files[-1]["path"]
    if rows:
        files.append(_write(rows, folder, len(files)))
        yield files[-1]["path"]
    index = {"version": VERSION, "files": files, "images": sum(file["rows"] for file in files)}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    yield INDEX


class PublishedPictures:
    """The images of a collection that was published with images."""

    def __init__(self, url: str) -> None:
        """Raises StorageError or CollectionError if there are none or their version differs."""
        self._url = url
        self._checked: set[str] = set()
        self._copies = None if url.startswith(hub.PREFIX) else Copies(Store.open(url), KEPT)
        with self._open(INDEX) as file:
            try:
                tree = json.load(file)
                version, self._files = tree["version"], tree["files"]
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(f"{url}/{INDEX} is damaged: {error!r}") from error
        if version != VERSION:
            raise StorageError(
                f"{url}/{INDEX} has version {version!r}, expected {VERSION}: use the version of "
                "ovref that wrote it"
            )

    def _open(self, name: str) -> BufferedReader:
        if self._copies is None:
            return open(hub.download(self._url, name), "rb")
        return self._copies.open(name)

    @contextmanager
    def _parquet(self, file: Mapping[str, Any]) -> Iterator[pq.ParquetFile]:
        """Fetches one of the files and checks its size and, the first time, its checksum.

        Raises:
            StorageError: it is cut off or damaged.
        """
        with self._open(file["path"]) as opened:
            if (size := os.fstat(opened.fileno()).st_size) != file["bytes"]:
                raise StorageError(
                    f"{self._url}/{file['path']} has {size} bytes, expected {file['bytes']}: it is "
                    "cut off; publish the collection again"
                )
            if file["path"] not in self._checked:
                if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                    raise StorageError(
                        f"{self._url}/{file['path']} is damaged: its SHA-256 is not the one in "
                        f"{INDEX}; publish the collection again"
                    )
                self._checked.add(file["path"])
            yield pq.ParquetFile(opened)

    def pictures(self, keys: Iterable[str]) -> Iterator[tuple[str, Picture]]:
        """The available pictures of these references, file by file."""
        wanted: dict[str, list[str]] = {}
        for key in keys:
            wanted.setdefault(base_key(key), []).append(key)
        for file in self._files:
            with self._parquet(file) as parquet:
                for group in _groups(parquet, wanted):
                    table = parquet.read_row_group(group)
                    here = pc.is_in(table.column("key"), pa.array(list(wanted)))
                    for row in table.filter(here).to_pylist():
                        for key in wanted[row["key"]]:
                            yield key, _picture(row, key)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every image as a row of SCHEMA."""
        for file in self._files:
            with self._parquet(file) as parquet:
                for group in range(parquet.num_row_groups):
                    yield from parquet.read_row_group(group).to_pylist()


def has_pictures(url: str) -> bool:
    """Whether a collection was published with its images."""
    if not url.startswith(hub.PREFIX):
        return Store.open(url).exists(INDEX)
    try:
        hub.download(url, INDEX)
    except CollectionError:
        return False
    return True


def picture_of(record: ImageRecord, key: str) -> Picture:
    """The picture of the reference `key`, which is one of the record's regions."""
    number, image_hwc = part_of_key(key), record.image_hwc()
    if number >= len(record.regions):
        return Picture(image_hwc=image_hwc, mask_hw=None)
    heatmap_hw = None if record.heatmaps_nhw is None else record.heatmaps_nhw[number]
    mask_hw = record.regions[number].mask_hw == YES
    return Picture(image_hwc=image_hwc, mask_hw=mask_hw, heatmap_hw=heatmap_hw)


def _picture(row: dict[str, Any], key: str) -> Picture:
    number, mask_hw = part_of_key(key), None
    for region in row["regions"]:
        if region["number"] == number:
            size = region["size_hw"]
            mask_hw = mask_of({"size": size, "counts": region["counts"]}, tuple(size))
    return Picture(image_hwc=decode_image(row["image"]["bytes"]), mask_hw=mask_hw)


def _groups(parquet: pq.ParquetFile, wanted: Mapping[str, Any]) -> list[int]:
    """Row groups that may contain one of the keys, by the statistics of the first column."""
    keys, found = sorted(wanted), []
    for group in range(parquet.num_row_groups):
        limits = parquet.metadata.row_group(group).column(0).statistics
        at = bisect_right(keys, limits.max)
        if at and keys[at - 1] >= limits.min:
            found.append(group)
    return found


def image_row(record: ImageRecord, numbers: Mapping[int, int]) -> dict[str, Any]:
    """A row of SCHEMA.

    Args:
        record: the image.
        numbers: by the place of a region in it, the number in the key of its reference; others are
            left out.
    """
    regions = []
    for place, number in numbers.items():
        region = record.regions[place]
        mask_hw = region.mask_hw == YES
        code = rle(mask_hw)
        regions.append(
            {
                "number": number,
                "noun": region.noun.text,
                "score": region.score,
                "source": region.source,
                "box_xyxy": list(box_of(mask_hw)),
                "size_hw": code["size"],
                "counts": code["counts"],
            }
        )
    suffix = "png" if record.image.startswith(b"\x89PNG") else "jpg"
    return {
        "key": record.key,
        "image": {"bytes": record.image, "path": f"{record.key}.{suffix}"},
        "caption": record.caption,
        "source": record.source,
        "regions": regions,
    }


def _write(rows: list[dict[str, Any]], folder: Path, number: int) -> dict[str, Any]:
    path = folder / f"pictures-{number:05d}.parquet"
    rows.sort(key=lambda row: row["key"])
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, path, compression="zstd", row_group_size=128)
    return {
        "path": path.name,
        "rows": len(rows),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
