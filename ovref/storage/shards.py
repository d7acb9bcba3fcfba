"""The files of one shard: writing them to a temporary folder, reading them back."""

import contextlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ovref.contract import Dropped
from ovref.errors import StorageError
from ovref.records import ImageRecord, Reference
from ovref.storage import codec
from ovref.storage.codec import Record
from ovref.storage.scratch import scratch_folder
from ovref_inference.places import FULL_DISK

ROW_GROUP = 1024
"""Rows buffered before they are written; constant, so that equal records give equal bytes."""

ENCODERS = min(4, os.cpu_count() or 1)
"""Threads that encode image records, each of which takes milliseconds."""

EMPTY = pa.schema([("key", pa.string())])
"""Schema of the sidecar of a shard without outputs, whose kind is unknown."""


_NUMBERS = ("visual", "textual", "box_xyxy", "measures", "area", "score", "seed")
"""Columns of references that hardly ever repeat a value. In dictionaries, embeddings take four
times as long to write and to read, and more bytes."""


def reference_options(schema: pa.Schema) -> dict[str, Any]:
    """Options of `pq.ParquetWriter` for references: dictionaries of texts alone."""
    return {"use_dictionary": text_columns(schema)}


def text_columns(schema: pa.Schema) -> list[str]:
    """Paths in Parquet of a table's columns of texts, also of those in structs."""
    return [path for field in schema if field.name not in _NUMBERS for path in _paths_in(field)]


class ShardFiles:
    """The files of an unfinished shard, in a temporary folder. Use as a context manager.

    Records are written in the order of `add`. Memory: a row group of metadata and a few image
    records, which threads encode.
    """

    def __init__(self) -> None:
        self.count = 0
        self._folder = scratch_folder()
        self._tar: tarfile.TarFile | None = None
        self._sidecar: pq.ParquetWriter | None = None
        self._sidecar_file: BinaryIO | None = None
        self._schema: pa.Schema | None = None
        self._rows: list[dict[str, Any]] = []
        self._kind = ""
        self._encoders: ThreadPoolExecutor | None = None
        self._encoding: deque[tuple[str, Future[dict[str, bytes]]]] = deque()

    def __enter__(self) -> "ShardFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._encoders is not None:
            self._encoders.shutdown(cancel_futures=True)
        # Open files are unfinished and disappear with the folder; closing them on a full disk
        # would raise a second error that hides the first.
        with contextlib.suppress(OSError):
            if self._sidecar is not None:
                self._sidecar.close()
        for file in (self._tar, self._sidecar_file):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._folder.cleanup()

    def add(self, record: Record) -> None:
        """Writes one record. Errors of an image record may be raised by a later call, or `finish`.

        Raises:
            TypeError: it is not a record, or of another kind than the records before it.
            ValueError: it cannot be encoded (`codec.encode`, `codec.table`).
            StorageError: the temporary disk is full.
        """
        kind = codec.kind_of(record)
        if self._schema is None:
            self._kind, self._schema = kind, codec.schema(record)
        if kind != self._kind:
            raise TypeError(f"{record.key} is of kind {kind} in a shard of kind {self._kind}")
        with full_disk_explained(self._folder.name):
            if isinstance(record, ImageRecord):
                self._encode_ahead(record)
            elif not isinstance(record, Reference):
                self._write_sample(record.key, codec.encode(record))
            self._rows.append(codec.row(record))
            if len(self._rows) == ROW_GROUP:
                self._write_rows()
        self.count += 1

    def finish(self, drops: Iterable[Dropped]) -> dict[str, Path]:
        """Completes the files: extension -> path, of `tar`, `parquet` and `drops.jsonl`."""
        with full_disk_explained(self._folder.name):
            if self._schema is None:
                self._schema = EMPTY
            self._write_encoded(leave=0)
            sidecar, file = self._write_rows()
            sidecar.close()
            file.close()
            files = {"parquet": self._path("parquet")}
            if self._tar is not None:
                self._tar.close()
                files["tar"] = self._path("tar")
            lines = sorted((drop.key, drop.reason) for drop in drops)
            if lines:
                files["drops.jsonl"] = self._path("drops.jsonl")
                with open(files["drops.jsonl"], "w", encoding="utf-8") as text:
                    for key, reason in lines:
                        text.write(json.dumps({"key": key, "reason": reason}) + "\n")
        return files

    def _path(self, extension: str) -> Path:
        return Path(self._folder.name) / f"shard.{extension}"

    def _encode_ahead(self, record: ImageRecord) -> None:
        if self._encoders is None:
            self._encoders = ThreadPoolExecutor(ENCODERS)
        self._encoding.append((record.key, self._encoders.submit(codec.encode, record)))
        self._write_encoded(leave=2 * ENCODERS)

    def _write_encoded(self, leave: int) -> None:
        """Writes encoded records, and waits until at most this many are still being encoded."""
        while self._encoding and (len(self._encoding) > leave or self._encoding[0][1].done()):
            key, sample = self._encoding.popleft()
            self._write_sample(key, sample.result())

    def _write_sample(self, key: str, sample: dict[str, bytes]) -> None:
        if self._tar is None:
            self._tar = tarfile.open(  # noqa: SIM115 (closed by finish or __exit__)
                self._path("tar"), "w", format=tarfile.USTAR_FORMAT
            )
        for extension, data in sample.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        _forget_members(self._tar)

    def _write_rows(self) -> tuple[pq.ParquetWriter, BinaryIO]:
        """Writes the buffered rows; the first call opens the sidecar."""
        if self._sidecar is None or self._sidecar_file is None:
            self._sidecar_file = open(self._path("parquet"), "wb")  # noqa: SIM115 (likewise)
            options = reference_options(self._schema) if self._kind == "reference" else {}
            self._sidecar = pq.ParquetWriter(
                self._sidecar_file, self._schema, compression="zstd", version="2.6", **options
            )
        if self._rows:
            self._sidecar.write_table(codec.table(self._rows, self._schema), ROW_GROUP)
        self._rows.clear()
        return self._sidecar, self._sidecar_file


class TableFile:
    """The files of a shard that is a table of another kind than the records of `codec`.

    Use as a context manager. Equal tables, written in equal parts, give equal bytes.
    """

    def __init__(self, schema: pa.Schema, **options: Any) -> None:
        """`options`: for `pq.ParquetWriter`."""
        self.count = 0
        self._folder = scratch_folder()
        self._writer = pq.ParquetWriter(
            self.path("parquet"), schema, **{"compression": "zstd", "version": "2.6"} | options
        )

    def __enter__(self) -> "TableFile":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # as in ShardFiles
            self._writer.close()
        self._folder.cleanup()

    def path(self, extension: str) -> Path:
        """Where another file of the shard may be written before `finish`."""
        return Path(self._folder.name) / f"shard.{extension}"

    def write(self, table: pa.Table) -> None:
        """Writes a table as one row group. Raises StorageError: the temporary disk is full."""
        with full_disk_explained(self._folder.name):
            self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.count += len(table)

    def finish(self, drops: Iterable[Dropped]) -> dict[str, Path]:
        """Completes the files: extension -> path. There are no drops."""
        with full_disk_explained(self._folder.name):
            self._writer.close()
        return {path.suffix[1:]: path for path in Path(self._folder.name).iterdir()}


def read_tar(path: Path, name: str) -> Iterator[Record]:
    """The records of a tar, in order. `name` is for messages.

    Raises:
        StorageError: it is not a tar, or holds something that is not a record.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for key, sample in _samples(tar):
                yield codec.decode(key, sample)
    except (tarfile.TarError, ValueError) as error:
        raise StorageError(f"{name} is not a shard of ovref: {error}") from error


def read_drops(data: bytes) -> list[Dropped]:
    """The drops of a `drops.jsonl`."""
    return [Dropped(**json.loads(line)) for line in data.splitlines()]


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, sample = "", dict[str, bytes]()
    while (member := tar.next()) is not None:
        _forget_members(tar)
        name, _, extension = member.name.partition(".")
        file = tar.extractfile(member) if member.isreg() else None
        if file is None:
            raise ValueError(f"member {member.name!r} is not a regular file")
        codec.check_key(name)
        if name != key:
            if key:
                yield key, sample
            key, sample = name, {}
        sample[extension] = file.read()
    if key:
        yield key, sample


def _forget_members(tar: tarfile.TarFile) -> None:
    """Empties tarfile's list of members, which would grow with every sample."""
    tar.members.clear()  # type: ignore[attr-defined]  # the stubs lack it


@contextlib.contextmanager
def full_disk_explained(folder: str) -> Iterator[None]:
    """Raises StorageError in place of the error of a full disk; `folder` is on it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise StorageError(
                f"the temporary folder {folder} is full ({error}): free space or set TMPDIR to a "
                "larger disk"
            ) from error
        raise


def _paths_in(field: pa.Field) -> list[str]:
    """Paths in Parquet of a column that is a text or a struct of such."""
    if not pa.types.is_struct(field.type):
        return [field.name]
    return [f"{field.name}.{path}" for inner in field.type for path in _paths_in(inner)]
