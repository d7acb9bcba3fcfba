"""Reads caption corpora of every format, record by record, from disk or an object store.

A corpus that cannot be read at all raises InputError. A single bad record becomes a `Dropped` whose
key is `line:<file>:<number>` and whose reason is one of `DROP_REASONS`.
"""

import csv
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import PurePosixPath

import pyarrow as pa
from fsspec import AbstractFileSystem

from ovref.ahead import map_ahead
from ovref.contract import Dropped
from ovref.corpora import class_labels, formats, image_formats
from ovref.corpora.listing import open_place, shown
from ovref.corpora.mixture import corpora_of, interleaved
from ovref.corpora.spec import (
    FOLDERS,
    MINIATURE,
    NO_IMAGE_COLUMN,
    CorpusSpec,
    corpus_files,
    corpus_id,
    is_mixture,
)
from ovref.errors import InputError
from ovref.identity import normalised, record_key
from ovref.records import Caption, Noun, Segments
from ovref_inference.places import describe, store_errors

DROP_REASONS = (
    "undecodable_text",
    "empty_caption",
    "caption_too_long",
    "malformed_record",
    "missing_image",
    "no_labels",
)

COLUMNS_OF_LABELS = ("csv", "tsv", "jsonl", "parquet", "webdataset")
"""Formats in which the column of labels must be named."""

NO_TEXT = re.compile("[\x00-\x1f\x7f\ufffd]")
"""Control characters, and the replacement character of failed decoding."""


IMAGES_AHEAD = 16
"""Number of image files read ahead; see `ovref.ahead.READERS`."""


def read_captions(spec: CorpusSpec, *, images: bool = False) -> Iterator[Caption | Dropped]:
    """The captions of a corpus in order, `spec.draws` of each; bad records become drops.

    Texts are normalised (NFC, single spaces), so equal keys mean equal texts. Duplicates are kept;
    `ingest` drops them. Memory: one record, one block of a Parquet file, IMAGES_AHEAD images.

    Args:
        images: whether to read the image of every caption. It becomes part of the key but is not
            decoded here; a caption without an image is dropped as `missing_image`.

    Raises:
        InputError: the corpus is missing, unreadable or of another format, lacks the named column
            or the requested images, or has no records.
    """
    if not is_mixture(spec):
        yield from limited(spec.limit, _records(spec, images))
        return
    corpora = corpora_of(spec)
    streams = [_first(one.limit, _records(one, images)) for one, _ in corpora]
    yield from limited(spec.limit, interleaved(streams, [weight for _, weight in corpora]))


def limited(
    limit: int | None, records: Generator[Dropped | Iterator[Caption], None, None]
) -> Iterator[Caption | Dropped]:
    """The captions and drops of these records, until `limit` records have had captions."""
    with closing(_first(limit, records)) as first:
        for record in first:
            if isinstance(record, Dropped):
                yield record
            else:
                yield from record


def _first(
    limit: int | None, records: Generator[Dropped | Iterator[Caption], None, None]
) -> Generator[Dropped | Iterator[Caption], None, None]:
    """Up to `limit` records; drops do not count."""
    good = 0
    with closing(records):
        for record in records:
            yield record
            good += not isinstance(record, Dropped)
            if good == limit:
                return


def _records(spec: CorpusSpec, images: bool) -> Generator[Dropped | Iterator[Caption], None, None]:
    """The captions of each record of a corpus, or its drop."""
    if not images:
        spec = replace(spec, images=None, image_column=None)
    place, files = spec.images, [(None, spec.path, "miniature")]
    if not spec.path.startswith(MINIATURE):
        fs, found = corpus_files(spec)
        files = [(fs, path, written) for path, written in found]
        if found[0][1] in FOLDERS:
            place = spec.path
    name = corpus_id(spec)
    records = 0
    for fs, path, written in files:
        if images:
            _check_has_images(spec, path, written)
        rows = _rows(spec, fs, path, written)
        for row in _with_images(rows, _ImageFolder(place)) if images else rows:
            records += 1
            yield _caption(spec, name, PurePosixPath(path).name, row, images)
    if not records:
        raise InputError(
            f"the corpus {spec.path} ({files[0][2]}) holds no record; expected at least one caption"
        )


def _check_has_images(spec: CorpusSpec, path: str, written: str) -> None:
    if written == "text":
        raise InputError(f"images are required, but the text file {path} has captions only")
    if written in ("coco", "open_images") and spec.images is None:
        raise InputError(f"images are required: set `images` to the image folder of {path}")
    if written in ("csv", "tsv", "jsonl", "parquet") and spec.image_column is None:
        raise InputError(f"images are required: name their column in {path} with `image_column`")


def _with_images(
    rows: Iterator[formats.CorpusRow], folder: "_ImageFolder"
) -> Iterator[formats.CorpusRow]:
    """Replaces the file names in rows by the files' bytes, which are read ahead."""

    def filled(row: formats.CorpusRow) -> formats.CorpusRow:
        return row._replace(image=folder.read(row.image)) if isinstance(row.image, str) else row

    return map_ahead(filled, rows, IMAGES_AHEAD)


def _rows(
    spec: CorpusSpec, fs: AbstractFileSystem | None, path: str, written: str
) -> Iterator[formats.CorpusRow]:
    if written == "miniature":
        yield from image_formats.read_miniature(spec)
        return
    reader = {
        "coco": formats.read_coco,
        "csv": formats.read_table,
        "tsv": formats.read_table,
        "jsonl": formats.read_jsonl,
        "parquet": formats.read_parquet,
        "text": formats.read_text,
        "webdataset": formats.read_webdataset,
        "imagefolder": image_formats.read_imagefolder,
        "class_folders": class_labels.read_class_folders,
        "open_images": class_labels.read_open_images,
    }[written]
    if spec.labels is not None and spec.caption_column is None and written in COLUMNS_OF_LABELS:
        raise InputError(f"name the column of labels in {path} with `caption_column`")
    if spec.repeats and written != "coco":
        raise InputError(
            f"repeats is for COCO's captions, which name their images; {path} is read as {written}"
        )
    if spec.image_column is not None and written in NO_IMAGE_COLUMN:
        raise InputError(f"image_column has no meaning in the format {written} of {path}")
    damage = (EOFError, zlib.error, tarfile.TarError, pa.ArrowException, csv.Error)
    try:
        yield from reader(spec, fs, path)
    except store_errors(*damage) as error:
        raise InputError(
            f"cannot read {path} of the corpus as {written}: {describe(error)}"
        ) from error


def _caption(
    spec: CorpusSpec, corpus: str, file: str, row: formats.CorpusRow, images: bool
) -> Dropped | Iterator[Caption]:
    """`spec.draws` captions of one row, or its drop."""
    where = f"{file}:{row.line}".encode("utf-8", "backslashreplace").decode()

    def dropped(reason: str) -> Dropped:
        return Dropped(f"line:{where}".replace("#", "%23"), reason)  # `#` would denote a part

    nouns: tuple[Noun, ...] = ()
    try:
        if spec.labels is not None:
            found = class_labels.labels_of_value(row.text, spec.labels)
            if not found:
                return dropped("malformed_record" if found is None else "no_labels")
            text, nouns, _ = class_labels.text_of_labels(found)
        elif isinstance(row.text, str | bytes):
            text = row.text.decode("utf-8") if isinstance(row.text, bytes) else row.text
            text = normalised(text)
        else:
            return dropped("malformed_record")
        text.encode("utf-8")  # fails for lone surrogates, from JSON escapes or undecodable bytes
    except UnicodeError:
        return dropped("undecodable_text")
    if NO_TEXT.search(text):
        return dropped("undecodable_text")
    if not text:
        return dropped("empty_caption")
    if len(text) > spec.max_characters:
        return dropped("caption_too_long")
    image = row.image if images else None
    if images and not (isinstance(image, bytes) and image):
        return dropped("missing_image")
    source = f"{file}:{row.source}" if row.source else where
    return draws_of(spec, corpus, text, source, image, nouns, image_name=row.image_name)


def draws_of(
    spec: CorpusSpec,
    corpus: str,
    text: str,
    source: str,
    image: bytes | None,
    nouns: tuple[Noun, ...] = (),
    segments: Segments | None = None,
    image_name: str | None = None,
) -> Iterator[Caption]:
    """`spec.draws` captions with the same text; `image_name` is for images that are not read."""
    digest = sha256(image).hexdigest() if isinstance(image, bytes) else None
    if spec.repeats and digest is None:
        digest = image_name
    for draw in range(spec.draws):
        yield Caption(
            key=record_key(corpus, text, draw, digest),
            text=text,
            source=source,
            draw=draw,
            image=image,
            labels=nouns,
            segments=segments,
        )


class _ImageFolder:
    """The image files that a corpus refers to."""

    def __init__(self, place: str | None):
        self._place = place
        if place is not None:
            self._fs, self._root = open_place(place)

    def read(self, name: str) -> bytes:
        """The file's bytes; empty if there is no such file. Thread-safe.

        Raises:
            InputError: `images`, the location of the files, is not set, or their names are web
                addresses.
        """
        if "://" in name:
            raise InputError(
                f"the image column holds addresses such as {name}; ovref downloads nothing. Fetch "
                f"the images first (img2dataset writes a WebDataset, which ovref reads)"
            )
        if self._place is None:
            raise InputError(
                f"the corpus names image files such as {name!r}; set `images` to their folder"
            )
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            return b""  # never outside of the folder
        try:
            return self._fs.cat_file(f"{self._root.rstrip('/')}/{name}")
        except (FileNotFoundError, IsADirectoryError):
            return b""
        except store_errors() as error:
            raise InputError(
                f"cannot read the image {name} in {shown(self._place)}: {describe(error)}"
            ) from error
