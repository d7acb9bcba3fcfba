"""The file formats of caption corpora: each reader yields all records of one file, valid or not."""

import csv
import io
import json
import tarfile
from collections import deque
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ovref.corpora.json_stream import stream_items
from ovref.corpora.spec import IMAGE_SUFFIXES, CorpusSpec
from ovref.errors import InputError

CAPTION_NAMES = ("caption", "text", "TEXT", "title", "sentence")
"""Caption columns to look for if none is configured."""

PARQUET_ROWS, PARQUET_IMAGES = 1024, 16
"""Rows decoded at a time: without images, and with images."""
PARQUET_BUFFER_BYTES = 1 << 20
TEXT_OR_BYTES = (
    pa.string(), pa.large_string(), pa.string_view(),
    pa.binary(), pa.large_binary(), pa.binary_view(),
)  # fmt: skip
FIRST_BLOCK = 1 << 16
"""Bytes of a text file that are examined to detect line ends."""
OBJECTS_TO_CHECK = 1000
"""Number of JSON objects, from the first on, of which one must have the caption field."""
LONGEST_MEMBER_BYTES = 1 << 28
"""A longer file inside a tar is a malformed record."""


class CorpusRow(NamedTuple):
    """One record as found in a file; its `text` is None if there is no usable caption field, and a
    list if it holds labels."""

    line: int | str
    text: Any
    image: Any = None
    """The encoded image, or the name of its file; None without an image."""
    source: str = ""
    """If set, appended to the file name in place of the line."""
    image_name: str | None = None
    """Name of the image that the caption describes, if every record of the format has one."""


def open_text(fs: AbstractFileSystem, path: str, newline: str | None = "\n") -> io.TextIOWrapper:
    """Opens a file as UTF-8 text; invalid bytes become lone surrogates, which each record is
    checked for.

    By default only `\\n` ends a line, since captions may contain other separators; `\\r` does if
    the first block has it and no `\\n`.
    """
    file = fs.open(path, "rb", compression="gzip" if path.endswith(".gz") else None)
    head = file.read(FIRST_BLOCK)
    found = None
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        found = "UTF-16 text"
    elif head[:2] == b"\x1f\x8b":
        found = "gzip; rename it to end in .gz"
    elif head[:4] == b"PAR1":
        found = "Parquet; rename it to end in .parquet"
    if found is not None:
        file.close()
        raise InputError(f"expected UTF-8 text in {path}, found {found}")
    file.seek(0)
    if newline == "\n" and b"\r" in head and b"\n" not in head:
        newline = "\r"
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    with open_text(fs, path) as file:
        for line, text in enumerate(file, start=1):
            yield CorpusRow(line, text)


def read_coco(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    names = {}
    try:
        if spec.images is not None:
            with open_text(fs, path) as file:
                for _, item in stream_items(file, "images"):
                    if isinstance(item, dict):
                        names[item.get("id")] = item.get("file_name")
        caption = spec.caption_column or "caption"
        check = _FieldCheck(path, (caption,))
        with open_text(fs, path) as file:
            for number, (_, item) in enumerate(stream_items(file, "annotations"), start=1):
                if not isinstance(item, dict):
                    yield CorpusRow(number, None)
                    continue
                check.see(item)
                image = item.get("image_id")
                name = names.get(image) if isinstance(image, int | str) else None
                yield CorpusRow(
                    line=number,
                    text=item.get(caption),
                    image=None if spec.images is None else name or b"",
                    source=f"image {image}:caption {item.get('id')}",
                    image_name=f"image {image}",
                )
    except ValueError as error:
        raise InputError(
            f"{path} is not COCO JSON: {error}. A list of captions is read as JSON Lines (.jsonl): "
            f"one object per line"
        ) from error
    check.finish()


def read_table(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    # Published caption TSVs (CC3M, CC12M) have no quoting: quotation marks are literal.
    tabs = PurePosixPath(path.removesuffix(".gz")).suffix.lower() == ".tsv" or spec.format == "tsv"
    with open_text(fs, path, newline="") as file:
        lines = _Lines(file)
        rows = (
            csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
        )
        caption, image = spec.caption_column, spec.image_column
        if not isinstance(caption, int):
            header = next(rows, [])
            caption = _caption_name(spec, path, header)
            caption = header.index(caption)
        if isinstance(image, str):
            if isinstance(spec.caption_column, int):
                raise InputError(
                    f"caption_column is a number, so {path} is read without a header line; give "
                    f"image_column as a number too, found {image!r}"
                )
            if image not in header:
                raise InputError(_no_column(image, path, header))
            image = header.index(image)
        widest = max(caption, -1 if image is None else image)
        too_narrow, line = True, 0
        while True:
            lines.taken.clear()
            try:
                row = next(rows, None)
                if len(lines.taken) > 1:
                    # An unclosed quotation mark swallows lines; intended quoting is well-formed.
                    next(csv.reader(lines.taken, strict=True))
            except csv.Error:
                lines.put_back()
                yield CorpusRow(lines.number, None)
                continue
            if row is None:
                break
            line = lines.number
            if len(row) > widest:
                too_narrow = False
                yield CorpusRow(line, row[caption], None if image is None else row[image])
            else:
                yield CorpusRow(line, None)
        if line and too_narrow:
            raise InputError(
                f"no line of {path} has a column {widest} (counted from 0); expected "
                f"{'tabs' if tabs else 'commas'} between the columns"
            )


class _Lines:
    """The lines of a table; a malformed record consumes only its first line."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._again = file, deque[str]()
        self.taken: list[str] = []
        """Lines of the current record."""
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.taken.append(self._again.popleft() if self._again else next(self._file))
        self.number += 1
        return self.taken[-1]

    def put_back(self) -> None:
        """Puts back all lines of the record but the first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def _caption_name(spec: CorpusSpec, path: str, columns: list[str]) -> str:
    if spec.caption_column is None:
        for name in CAPTION_NAMES:
            if name in columns:
                return name
        raise InputError(
            f"no caption column in {path}: expected one of {', '.join(CAPTION_NAMES)}, found "
            f"{_listed(columns)}. Name it with caption_column (a number, from 0, where the file "
            f"has no header line)"
        )
    if spec.caption_column not in columns:
        raise InputError(_no_column(spec.caption_column, path, columns))
    return spec.caption_column


def _no_column(name: str | int, path: str, columns: list[str]) -> str:
    return f"no column {name!r} in {path}; it has {_listed(columns)}"


def _listed(columns: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in columns[:20]) or "no columns"


def read_jsonl(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    named = CAPTION_NAMES if spec.caption_column is None else (spec.caption_column,)
    lines, check = 0, _FieldCheck(path, named)
    with open_text(fs, path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            lines += 1
            try:
                item = json.loads(text)
            except (ValueError, RecursionError):
                item = None
            if not isinstance(item, dict):
                yield CorpusRow(line, None)
                continue
            check.see(item)
            yield CorpusRow(line, _field(spec, item), item.get(spec.image_column))
    if lines and not check.objects:
        raise InputError(f"{path} is not JSON Lines: none of its {lines} lines is a JSON object")
    check.finish()


class _FieldCheck:
    """Refuses a file in which no JSON object has the caption field."""

    def __init__(self, path: str, named: tuple[str | int, ...]) -> None:
        self._path, self._named = path, named
        self._fields: dict[str, None] = {}
        self._found = False
        self.objects = 0

    def see(self, item: dict[str, Any]) -> None:
        self.objects += 1
        if not self._found:
            self._fields |= dict.fromkeys(item)
            self._found = any(name in item for name in self._named)
        if self.objects == OBJECTS_TO_CHECK:
            self.finish()

    def finish(self) -> None:
        if self.objects and not self._found:
            raise InputError(
                f"no object of {self._path} has a field {' or '.join(map(repr, self._named))}; "
                f"they have {_listed(list(self._fields))}. Name the caption's field with "
                f"caption_column"
            )


def _field(spec: CorpusSpec, item: dict[Any, Any]) -> Any:
    if spec.caption_column is not None:
        return item.get(spec.caption_column)
    return next((item[name] for name in CAPTION_NAMES if name in item), None)


def read_parquet(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    # Buffered and without pre_buffer, or else a whole row group of images is read into memory.
    with (
        fs.open(path, "rb") as handle,
        pq.ParquetFile(handle, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file,
    ):
        columns = file.schema_arrow.names
        wanted: list[str | int] = [_caption_name(spec, path, columns)]
        # A bytes column is decoded record by record, so that one bad text is one drop.
        texts_field = file.schema_arrow.field(wanted[0])
        lists = spec.labels is not None and pa.types.is_list(texts_field.type)
        if lists:
            _check_type(path, texts_field.type.value_field, TEXT_OR_BYTES, "lists of text")
        else:
            _check_type(path, texts_field, TEXT_OR_BYTES, "text")
        raw = pa.list_(pa.large_binary()) if lists else pa.large_binary()
        if spec.image_column is not None:
            if spec.image_column not in columns:
                raise InputError(_no_column(spec.image_column, path, columns))
            wanted.append(spec.image_column)
            field = file.schema_arrow.field(spec.image_column)
            if not pa.types.is_struct(field.type):
                _check_type(path, field, TEXT_OR_BYTES, "encoded images, or their file names")
        row, rows = 0, PARQUET_ROWS if len(wanted) == 1 else PARQUET_IMAGES
        for batch in file.iter_batches(batch_size=rows, columns=wanted):
            # As bytes, because Arrow does not verify UTF-8.
            texts = batch.column(wanted[0]).cast(raw).to_pylist()
            images = batch.column(wanted[1]).to_pylist() if len(wanted) > 1 else [None] * len(texts)
            for text, image in zip(texts, images, strict=True):
                row += 1
                if isinstance(image, dict):  # Hugging Face's image feature: {bytes, path}
                    image = image.get("bytes") or image.get("path")
                yield CorpusRow(row, text, image)


def _check_type(path: str, field: pa.Field, allowed: tuple[pa.DataType, ...], what: str) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if kind not in allowed:
        raise InputError(f"the column {field.name!r} of {path} holds {field.type}, expected {what}")


def read_webdataset(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    """Reads samples: adjacent members whose base names are equal up to the first dot.

    Raises:
        InputError: the members of a sample are not adjacent.
    """
    parts_by_name: dict[int, tuple[bool, bool]] = {}  # by a hash of the name, which is smaller
    for row in _samples(spec, fs, path):
        parts = (row.text is not None, row.image is not None)
        if parts_by_name.setdefault(hash(row.line), parts) != parts:
            raise InputError(
                f"the members of the sample {row.line} of {path} are not adjacent, as a "
                f"WebDataset requires: pack the files again, sorted by name "
                f"(`tar --sort=name -cf ...`)"
            )
        yield row


def _samples(spec: CorpusSpec, fs: AbstractFileSystem, path: str) -> Iterator[CorpusRow]:
    compression = "gzip" if path.endswith(".gz") else None
    with (
        fs.open(path, "rb", compression=compression) as handle,
        tarfile.open(fileobj=handle, mode="r|") as tar,
    ):
        name, parts = "", dict[str, bytes | None]()
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem:
                continue  # `.DS_Store` and the like are not samples
            sample = f"{folder}/{stem}" if folder else stem
            if sample != name:
                if name:
                    yield _sample(spec, name, parts)
                name, parts = sample, {}
            suffix = f".{suffix.lower()}"
            if suffix in (".txt", ".json", *IMAGE_SUFFIXES):
                file = tar.extractfile(member) if member.size <= LONGEST_MEMBER_BYTES else None
                parts[suffix] = file.read() if file is not None else None
        if name:
            yield _sample(spec, name, parts)


def _sample(spec: CorpusSpec, name: str, parts: dict[str, bytes | None]) -> CorpusRow:
    text = parts.get(".txt")
    if text is None or spec.caption_column is not None:
        try:
            fields = json.loads(parts.get(".json") or b"null")
        except (ValueError, RecursionError):
            fields = None
        text = _field(spec, fields) if isinstance(fields, dict) else None
    image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    return CorpusRow(name, text, image)
