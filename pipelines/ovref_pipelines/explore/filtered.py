"""References that the filters of a reduction dropped, and the counts before and after each
filter."""

import random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovref.errors import InputError, StorageError
from ovref.exchange.picture_files import Picture
from ovref.reduce.filter import DROPPED
from ovref.storage.file_store import Store
from ovref_pipelines.engine.summary import filter_warnings
from ovref_pipelines.explore.library import Library
from ovref_pipelines.output import WORK, build_config

SHOWN = 24
"""References shown per filter, sampled at random."""
COLUMNS = ["key", "noun", "caption", "score", "area", "shard", "reason"]


def filtered(library: Library) -> dict[str, Any]:
    """`steps`, the counts before and after each filter; `warnings`; and `dropped`, for each filter
    a sample of the references that it dropped, each with its `row` for `dropped_image`.

    A build keeps the list of dropped references where it was reduced; without it `dropped` is None.
    """
    summary = library.open().collection.manifest.build.get("summary") or {}
    steps, warnings = summary.get("filter") or [], filter_warnings(summary)
    found: dict[str, Any] = {"steps": steps, "warnings": warnings, "dropped": None}
    table = _table(library)
    if table is None:
        return found
    found["dropped"] = {}
    for reason in sorted(pc.unique(table.column("reason")).to_pylist()):
        rows = pc.indices_nonzero(pc.equal(table.column("reason"), reason)).to_pylist()
        rows = sorted(random.Random(0).sample(rows, min(SHOWN, len(rows))))
        known = table.take(rows).to_pylist()
        found["dropped"][reason] = [
            {"row": row, **one} for row, one in zip(rows, known, strict=True)
        ]
    return found


def dropped_image(library: Library, row: int) -> Picture:
    """The picture of a dropped reference.

    Raises:
        InputError: the row does not exist, or the build that made its image is not available.
        StorageError: the image's shard is damaged.
    """
    table = _table(library)
    if table is None or not 0 <= row < len(table):
        raise InputError(f"there is no dropped reference with the number {row}")
    (one,) = table.slice(row, 1).to_pylist()
    return library.image_of(one["shard"], one["key"])


def _table(library: Library) -> pa.Table | None:
    """The list written by the reduction that made the collection, read once; None if it is not
    here."""
    opened = library.open()
    if not opened.dropped:
        opened.dropped.append(_read(library))
    return opened.dropped[0]


def _read(library: Library) -> pa.Table | None:
    if library.build is None:
        return None
    work = build_config(library.build.store).get("work")
    place = Store.open(work) if work else library.build.store.child(WORK)
    name = f"{library.open().collection.manifest.fingerprint[:16]}-{DROPPED}"
    if not place.exists(name):
        return None
    try:
        with place.local_copy(name) as path, open(path, "rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{place.url}/{name} is damaged: {error}") from error
    # Earlier versions kept only key, noun and reason, which are not enough for a picture.
    return table if set(COLUMNS) <= set(table.column_names) else None
