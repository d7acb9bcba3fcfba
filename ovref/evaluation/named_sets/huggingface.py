"""Opens a folder of the Hugging Face `datasets` library as a labelled set, with only pyarrow.

Supports the output of `save_to_disk` (Arrow files with `state.json`) and folders of Parquet files
named `<split>-00000-of-00001.parquet`. Rows are read on demand.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref.errors import InputError
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.label_files import index_map
from ovref.evaluation.named_sets.opening import (
    Example,
    LabelledSet,
    check_sizes,
    class_list_of,
    looks_like,
    open_set,
)
from ovref.evaluation.named_sets.rules import labels_of_values
from ovref.stored_images import UnusableImageError, decode_image

_Row = Callable[[int], dict[str, Any]]

COLUMNS = ("image", "annotation")
"""Columns of the photographs and of the label files."""

_SPLITS = {"train": ("train", "training"), "val": ("validation", "val")}
"""Split of `open_set` -> names in Hugging Face data sets."""


def open_any_set(name: str, root: str | Path, split: str = "val", names: str = "") -> LabelledSet:
    """Opens a set with `open_set`, or from a folder of Hugging Face `datasets`, `root`, with the
    columns `image` and `annotation`."""
    for known in _SPLITS.get(split, ()):
        if has_split(Path(root), known):
            return open_huggingface(Path(root), known, name, names)
    return open_set(name, root, split, names)


def has_split(root: Path, split: str) -> bool:
    """Whether a folder has the files of a split."""
    patterns = (f"{split}/state.json", f"{split}-*.parquet", f"data/{split}-*.parquet")
    return any(next(root.glob(pattern), None) is not None for pattern in patterns)


def open_huggingface(root: Path, split: str, name: str, names: str = "") -> LabelledSet:
    """Opens a split whose column `annotation` contains files with the values of a named set.

    Args:
        root: folder of the data set.
        split: the data set's name of the split (`validation`, ...).
        name: the set of `SETS` whose published values are in the label files.
        names: a class list, as for `open_set`.

    Raises:
        InputError: the folder, split, column or set does not exist.
    """
    layouts = (
        [each for each in SETS[name].layouts if each.reader == "index"] if name in SETS else []
    )
    if not layouts:
        known = (k for k, v in SETS.items() if any(each.reader == "index" for each in v.layouts))
        raise InputError(f"name must be one of {', '.join(known)}, found {name!r}")
    schema, count, row = _rows(root, split)
    for column in COLUMNS:
        if column not in schema.names:
            raise InputError(
                f"{root}, split {split}, has no column {column!r}, only {', '.join(schema.names)}"
            )
    layout = layouts[0]
    table = layout.rule.table()

    def read(row_id: str) -> Example:
        where = root / split / row_id
        cells = row(int(row_id))
        image_file, label_file = (_file(cells[each], root, where) for each in COLUMNS)
        try:
            image_hwc = decode_image(image_file)
        except UnusableImageError as error:
            raise InputError(f"cannot read the image of {where}: {error}") from error
        values_hw = index_map(where, layout.rule.bits, label_file)
        try:
            label_hw = labels_of_values(values_hw, table)
        except ValueError as error:
            found = {int(value) for value in np.unique(values_hw)}
            raise InputError(
                f"{where} holds the values {error}, expected {layout.ids}"
                + looks_like(found, layout)
            ) from error
        check_sizes(where, image_hwc, where, label_hw)
        return Example(id=row_id, image_path=where, image_hwc=image_hwc, label_hw=label_hw)

    return LabelledSet(
        name=f"{name} of {root.name}, {split}, {count} images",
        class_list=class_list_of(SETS[name], names),
        convention=f"{name} in a folder of Hugging Face datasets; {layout.ids}",
        ids=tuple(str(number) for number in range(count)),
        read=read,
        folders=(root,),
    )


def _file(cell: Any, root: Path, where: Path) -> bytes:
    """The file in a cell of an image column: its bytes, or the contents of its path."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise InputError(
            f"{where} holds no image file, expected bytes or a path, found {cell!r:.80}"
        )
    if cell["bytes"]:
        return cell["bytes"]
    try:
        return (root / cell["path"]).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read an image of {where}: {error}") from error


def _rows(root: Path, split: str) -> tuple[pa.Schema, int, _Row]:
    """The columns, the number of rows, and a function that reads a row."""
    folder = root / split if (root / split / "state.json").is_file() else root
    state = folder / "state.json"
    try:
        if state.is_file():
            return _arrow(state)
        paths = sorted(root.glob(f"{split}-*.parquet")) or sorted(
            root.glob(f"data/{split}-*.parquet")
        )
        if paths:
            return _parquet(paths)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"cannot read the data set {root}: {error}") from error
    raise InputError(
        f"{root} has no split {split!r} of Hugging Face datasets; searched for "
        f"{split}/state.json, state.json, {split}-*.parquet and data/{split}-*.parquet"
    )


def _arrow(state: Path) -> tuple[pa.Schema, int, _Row]:
    content = json.loads(state.read_text(encoding="utf-8"))
    if content.get("_indices_files") or content.get("_indices_data_files"):
        raise InputError(
            f"{state.parent} was saved with a selection of rows; save `flatten_indices()` of it"
        )
    # Memory-mapped, so that only the pages of requested rows are read.
    tables = [
        pa.ipc.open_stream(pa.memory_map(str(state.parent / each["filename"]))).read_all()
        for each in content["_data_files"]
    ]
    table = pa.concat_tables(tables)
    return table.schema, len(table), lambda number: table.slice(number, 1).to_pylist()[0]


def _parquet(paths: list[Path]) -> tuple[pa.Schema, int, _Row]:
    files = [pq.ParquetFile(path) for path in paths]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    starts = [0]
    for file, group in groups:
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    kept: dict[int, pa.Table] = {}  # the last row group read

    def row(number: int) -> dict[str, Any]:
        index = next(i for i, start in enumerate(starts[1:]) if number < start)
        if index not in kept:
            kept.clear()
            file, group = groups[index]
            kept[index] = file.read_row_group(group)
        return kept[index].slice(number - starts[index], 1).to_pylist()[0]

    return files[0].schema_arrow, starts[-1], row
