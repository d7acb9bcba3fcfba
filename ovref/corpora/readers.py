"""Reads caption corpora of every format, record by record, from disk or an object store.

A corpus that cannot be read at all raises InputError. A single bad record becomes a `Dropped` whose
key is `line:<file>:<number>` and whose reason is one of `DROP_REASONS`.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow as pa
from fsspec import AbstractFileSystem

from ovref.contract import Dropped
from ovref.corpora import formats
from ovref.corpora.spec import CorpusSpec, corpus_files, corpus_id, open_place, store_errors
from ovref.errors import InputError
from ovref.identity import normalised, record_key
from ovref.records import Caption

DROP_REASONS = (
    "undecodable_text",
    "empty_caption",
    "caption_too_long",
    "malformed_record",
    "missing_image",
)

NO_TEXT = re.compile("[\x00-\x1f\x7f\ufffd]")
"""Control characters, and the mark that an earlier decoding has failed."""


def read_captions(spec: CorpusSpec) -> Iterator[Caption | Dropped]:
    """The captions of a corpus in its own order, one for each draw; bad records as drops.

    Texts are normalised (NFC, single blanks), so equal keys mean equal texts. Equal captions are
    all passed on; finding duplicates is the ingest's work. Memory stays bounded: one record, one
    block of a Parquet file, one image.

    Raises:
        InputError: the corpus is missing, unreadable, of another format, lacks the named column,
            or holds no record at all.
    """
    fs, files = corpus_files(spec)
    name = corpus_id(spec)
    images = _ImageFolder(spec.images)
    records = good = 0
    for path, written in files:
        for row in _rows(spec, fs, path, written):
            records += 1
            answer = _caption(spec, name, PurePosixPath(path).name, row, images)
            if isinstance(answer, Dropped):
                yield answer
                continue
            yield from answer
            good += 1
            if good == spec.limit:
                return
    if not records:
        raise InputError(
            f"the corpus {spec.path} ({files[0][1]}) holds no record; expected at least one caption"
        )


def _rows(
    spec: CorpusSpec, fs: AbstractFileSystem, path: str, written: str
) -> Iterator[formats.Row]:
    reader = {
        "coco": formats.read_coco,
        "csv": formats.read_table,
        "tsv": formats.read_table,
        "jsonl": formats.read_jsonl,
        "parquet": formats.read_parquet,
        "text": formats.read_text,
        "webdataset": formats.read_webdataset,
    }[written]
    if spec.image_column is not None and written in ("coco", "text", "webdataset"):
        raise InputError(f"image_column has no meaning in the format {written} of {path}")
    try:
        yield from reader(spec, fs, path)
    except (*store_errors(), EOFError, zlib.error, tarfile.TarError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path} of the corpus as {written}: {error}") from error


def _caption(
    spec: CorpusSpec, corpus: str, file: str, row: formats.Row, images: "_ImageFolder"
) -> Dropped | list[Caption]:
    where = f"{file}:{row.line}".encode("utf-8", "backslashreplace").decode()

    def dropped(reason: str) -> Dropped:
        return Dropped(f"line:{where}".replace("#", "%23"), reason)  # `#` would name a part

    if not isinstance(row.text, str | bytes):
        return dropped("malformed_record")
    try:
        text = row.text.decode("utf-8") if isinstance(row.text, bytes) else row.text
        text = normalised(text)
        text.encode("utf-8")  # lone surrogates, from JSON escapes or undecodable bytes, cannot
    except UnicodeError:
        return dropped("undecodable_text")
    if NO_TEXT.search(text):
        return dropped("undecodable_text")
    if not text:
        return dropped("empty_caption")
    if len(text) > spec.max_characters:
        return dropped("caption_too_long")
    image = row.image
    if isinstance(image, str):
        image = images.read(image)
    elif image is None and spec.image_column is not None:
        image = b""
    if image is not None and not (isinstance(image, bytes) and image):
        return dropped("missing_image")
    return [
        Caption(
            key=record_key(corpus, text, draw),
            text=text,
            source=f"{file}:{row.source}" if row.source else where,
            draw=draw,
            image=image,
        )
        for draw in range(spec.draws)
    ]


class _ImageFolder:
    """The image files that a corpus names."""

    def __init__(self, place: str | None):
        self._place = place
        if place is not None:
            self._fs, self._root = open_place(place)

    def read(self, name: str) -> bytes:
        """The file's bytes; empty when it is not there.

        Raises:
            InputError: the corpus names images and `images` does not say where they are, or the
                names are web addresses.
        """
        if "://" in name:
            raise InputError(
                f"the image column holds addresses such as {name}; ovref downloads nothing. Fetch "
                f"the images first (img2dataset writes a WebDataset that is read as it is)"
            )
        if self._place is None:
            raise InputError(
                f"the corpus names image files such as {name!r}; set `images` to their folder"
            )
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            return b""  # never outside the folder
        try:
            return self._fs.cat_file(f"{self._root.rstrip('/')}/{name}")
        except (FileNotFoundError, IsADirectoryError):
            return b""
        except store_errors() as error:
            raise InputError(f"cannot read the image {name} in {self._place}: {error}") from error
