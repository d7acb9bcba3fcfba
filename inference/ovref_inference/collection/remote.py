"""Files of a collection on an object store, read by ranges through a cache of blocks on disk."""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovref_inference.errors import CollectionError
from ovref_inference.places import describe, store_errors, whole_file

BLOCK_BYTES = 256 << 10
"""Smallest unit that is read and cached; at 100 MB/s it takes a tenth of a request of 30 ms."""
SMALL_BLOCK_BYTES = 32 << 10
"""The same where what is read together is smaller by far, as a noun's prototypes are."""
CACHE_BYTES = 10 << 30
_MEMORY_BYTES = 16 << 20
"""Small blocks that stay in memory as well, of all files of a cache; 171 classes need 8 MB."""
_RUN_BLOCKS = 32
"""Adjacent blocks of one request."""
_BATCH_BYTES = 16 << 20
"""In memory at a time on their way to the cache, of all files that are fetched from at once."""
_PARALLEL = 16
"""Requests at a time to a file system that has no parallel requests of its own."""


class BlockCache:
    """Blocks of remote files in a folder; the least recently used ones are deleted beyond a limit.

    Each block is a file that appears whole, so several processes may share the folder. A process
    keeps the small ones that it read last in memory too.
    """

    def __init__(self, folder: str | Path, limit: int = CACHE_BYTES) -> None:
        """
        Args:
            folder: created when the first block is written.
            limit: bytes of all blocks in the folder; may be exceeded by a hundredth.
        """
        self.folder, self.limit = Path(folder), limit
        self._written: int | None = None
        """Bytes written since the folder was last measured; None before the first time."""
        self._fetching, self._lock = 0, threading.Lock()
        self._held: dict[tuple[str, int], bytes] = {}
        """Blocks in memory, the least recently used one first."""
        self._held_bytes = 0

    @contextlib.contextmanager
    def batches(self, size: int) -> Iterator[Callable[[], int]]:
        """Within it blocks of one file are fetched; what it gives says how many of this size may be
        next, which are fewer while others fetch as well."""
        with self._lock:
            self._fetching += 1
        try:
            yield lambda: max(1, _BATCH_BYTES // self._fetching // size)
        finally:
            with self._lock:
                self._fetching -= 1

    def held(self, name: str, block: int) -> bytes | None:
        """The block of a file, if it is in memory."""
        with self._lock:
            content = self._held.pop((name, block), None)
            if content is not None:
                self._held[name, block] = content  # now the most recently used one
        return content

    def hold(self, name: str, block: int, content: bytes) -> None:
        """Keeps a block in memory, in place of those that were used least recently."""
        with self._lock:
            self._held_bytes += len(content) - len(self._held.pop((name, block), b""))
            self._held[name, block] = content
            while self._held_bytes > _MEMORY_BYTES:
                self._held_bytes -= len(self._held.pop(next(iter(self._held))))

    def has(self, name: str, block: int, size: int) -> bool:
        """Whether the block of a file is there, and whole."""
        if (name, block) in self._held:
            return True
        try:
            return os.stat(self._path(name, block)).st_size == size
        except OSError:
            return False

    def open(self, name: str, block: int, size: int) -> BinaryIO | None:
        """The block of a file, opened; None if it is not there or was truncated."""
        path = self._path(name, block)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        except OSError:
            return None  # never written, or deleted by another process
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # file systems that record no reading would lose the order of use
        return file

    def write(self, name: str, block: int, content: bytes) -> None:
        """Keeps a block. Raises OSError if the disk is full."""
        path = Path(self._path(name, block))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as scratch:
            scratch.write_bytes(content)
        if self._written is not None:
            self._written += len(content)
        if self._written is None or self._written > self.limit // 100:
            self._shrink()

    def _path(self, name: str, block: int) -> str:
        return f"{self.folder}/{name}/{block:08d}"

    def _shrink(self) -> None:
        """Deletes the least recently used blocks if there are too many, down to 9/10 of the
        limit."""
        self._written = 0
        blocks = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # another process may delete it just now
                        stat = entry.stat()
                        blocks.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in blocks)
        if total <= self.limit:
            return
        for _, size, path in sorted(blocks):
            if total <= self.limit * 9 // 10:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


class RemoteFile:
    """A file of a known size and content on an fsspec file system, read by ranges."""

    def __init__(
        self, fs: Any, path: str, size: int, sha256: str, cache: BlockCache,
        block_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            fs, path: where it is.
            size: bytes.
            sha256: of its content, which names its blocks in the cache, together with their size if
                that is not BLOCK_BYTES.
            block_bytes: at most BLOCK_BYTES, which None takes. Blocks of another size are small and
                stay in memory as well.
        """
        self.fs, self.path, self.size, self.sha256, self.cache = fs, path, size, sha256, cache
        self.block_bytes = min(block_bytes or BLOCK_BYTES, BLOCK_BYTES)
        other = "" if self.block_bytes == BLOCK_BYTES else f"-{self.block_bytes}"
        self._blocks = sha256 + other
        self._small = block_bytes is not None

    def __str__(self) -> str:
        return self.path

    def read(self, starts: Any, lengths: Any, out: np.ndarray | None = None) -> np.ndarray:
        """The bytes of several ranges, one after the other, (sum of lengths,) uint8.

        Missing blocks are requested in parallel, adjacent ones together.

        Args:
            starts, lengths: (n,) integers; the ranges lie within the file.
            out: takes them; None makes an array.

        Raises:
            CollectionError: the file is missing or cannot be read.
        """
        starts = np.asarray(starts, dtype=np.int64)
        lengths = np.asarray(lengths, dtype=np.int64)
        found = np.empty(int(lengths.sum()), dtype=np.uint8) if out is None else out
        starts, lengths, targets = (
            values[lengths > 0] for values in (starts, lengths, np.cumsum(lengths) - lengths)
        )
        if not len(starts):
            return found
        # Neighbours in the file that are neighbours here too are one range.
        firsts = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
        starts, targets = starts[firsts], targets[firsts]
        lengths = np.add.reduceat(lengths, firsts)
        blocks, owners = self._blocks_of(starts, lengths)
        order = np.argsort(blocks, kind="stable")
        blocks, owners = blocks[order], owners[order]
        wanted, firsts = np.unique(blocks, return_index=True)
        self._bring(wanted.tolist())
        memory = found.data
        stops = np.append(firsts[1:], len(blocks))
        for block, first, stop in zip(wanted.tolist(), firsts, stops, strict=True):
            begin, size = block * self.block_bytes, self._block_size(block)
            with self._opened(block) as source:
                for owner in owners[first:stop]:
                    start, end = int(starts[owner]), int(starts[owner] + lengths[owner])
                    low, high = max(start, begin), min(end, begin + size)
                    target = int(targets[owner]) + low - start
                    source.seek(low - begin)
                    source.readinto(memory[target : target + high - low])
        return found

    def prefetch(self, starts: Any, lengths: Any) -> None:
        """Brings the blocks of these ranges into the cache, in parallel. Raises like `read`."""
        starts = np.asarray(starts, dtype=np.int64)
        lengths = np.asarray(lengths, dtype=np.int64)
        blocks, _ = self._blocks_of(starts[lengths > 0], lengths[lengths > 0])
        self._bring(np.unique(blocks).tolist())

    def open(self) -> io.BufferedReader:
        """The file as Python's own file objects are: seekable, binary, read-only."""
        return io.BufferedReader(_Raw(self), buffer_size=1 << 16)

    def _bring(self, blocks: list[int]) -> None:
        """Fetches those of these blocks, sorted and once each, that are not in the cache."""
        missing = [
            block
            for block in blocks
            if not self.cache.has(self._blocks, block, self._block_size(block))
        ]
        if not missing:
            return
        with self.cache.batches(self.block_bytes) as at_a_time:
            while missing:
                some, missing = missing[: (most := at_a_time())], missing[most:]
                self._fetch(some)

    def _opened(self, block: int) -> Any:
        """The block as a file; fetched again if it was deleted from the cache meanwhile."""
        if self._small and (content := self.cache.held(self._blocks, block)) is not None:
            return io.BytesIO(content)
        file = self.cache.open(self._blocks, block, self._block_size(block))
        file = file or io.BytesIO(self._fetch([block]))
        if self._small:
            with file:
                content = file.read()
            self.cache.hold(self._blocks, block, content)
            return io.BytesIO(content)
        return file

    def _block_size(self, block: int) -> int:
        return min(self.block_bytes, self.size - block * self.block_bytes)

    def _blocks_of(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks that ranges of one byte or more lie in, and the range of each."""
        firsts = starts // self.block_bytes
        counts = (starts + lengths - 1) // self.block_bytes - firsts + 1
        owners = np.repeat(np.arange(len(starts)), counts)
        steps = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        return firsts[owners] + steps, owners

    def _fetch(self, blocks: list[int]) -> bytes:
        """Brings blocks into the cache; returns the last one."""
        runs = _runs(blocks)
        begins = [first * self.block_bytes for first, _ in runs]
        ends = [min(last * self.block_bytes, self.size) for _, last in runs]
        content = b""
        answers = self._requested(begins, ends)
        for (first, last), begin, end, answer in zip(runs, begins, ends, answers, strict=True):
            self._check(answer, end - begin)
            for block in range(first, last):
                at = (block - first) * self.block_bytes
                content = answer[at : at + self._block_size(block)]
                self.cache.write(self._blocks, block, content)
        return content

    def _requested(self, begins: list[int], ends: list[int]) -> list[Any]:
        """Bytes or exceptions, for each range."""
        if getattr(self.fs, "async_impl", False):
            found: list[Any] = self.fs.cat_ranges(
                [self.path] * len(begins), begins, ends, on_error="return"
            )
            return found
        with ThreadPoolExecutor(_PARALLEL) as threads:
            return list(threads.map(self._one_request, begins, ends))

    def _one_request(self, begin: int, end: int) -> Any:
        try:
            return self.fs.cat_file(self.path, begin, end)
        except store_errors() as error:
            return error

    def _check(self, answer: Any, size: int) -> None:
        if isinstance(answer, FileNotFoundError):
            raise CollectionError(
                f"{self.path} is missing; open the collection again if it was published meanwhile, "
                "or else publish it again"
            ) from answer
        if isinstance(answer, store_errors()):
            raise CollectionError(f"cannot read {self.path}: {describe(answer)}") from answer
        if isinstance(answer, BaseException):
            raise answer
        if len(answer) != size:
            raise CollectionError(
                f"{self.path} gave {len(answer)} bytes where {size} were asked for: it is "
                "truncated, or its server does not serve ranges, and then the collection must be "
                "opened with copy=True"
            )


class RemoteTable(pq.ParquetFile):
    """A Parquet file that reads only the requested column chunks, in parallel."""

    def __init__(self, file: RemoteFile, **options: Any) -> None:
        self._remote = file
        super().__init__(file.open(), **options)

    def read(self, columns: list[str] | None = None, **options: Any) -> pa.Table:
        self.prefetch(range(self.num_row_groups), columns)
        return super().read(columns=columns, **options)

    def read_row_group(self, i: int, columns: list[str] | None = None, **options: Any) -> pa.Table:
        self.prefetch([i], columns)
        return super().read_row_group(i, columns=columns, **options)

    def close(self, force: bool = True) -> None:
        super().close(force=force)

    def prefetch(self, groups: Iterable[int], columns: list[str] | None = None) -> None:
        """Brings these columns of row groups into the cache, in parallel; None is all columns."""
        starts, lengths = [], []
        for group in map(self.metadata.row_group, groups):
            for chunk in map(group.column, range(group.num_columns)):
                if columns is None or chunk.path_in_schema.partition(".")[0] in columns:
                    offsets = [chunk.data_page_offset]
                    if chunk.has_dictionary_page:
                        offsets.append(chunk.dictionary_page_offset)
                    starts.append(min(offsets))
                    lengths.append(chunk.total_compressed_size)
        self._remote.prefetch(starts, lengths)


class _Raw(io.RawIOBase):
    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        size = max(min(len(buffer), self._file.size - self._at), 0)
        memoryview(buffer).cast("B")[:size] = self._file.read([self._at], [size]).data
        self._at += size
        return size


@dataclass(frozen=True)
class Layout:
    """Shape and numbers of a matrix in an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def file_bytes(self) -> int:
        """Size of the file, if numpy wrote its header."""
        header = io.BytesIO()
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, fields)
        return header.tell() + int(np.prod(self.shape)) * self.dtype.itemsize


class RemoteVectors:
    """A (n, d) matrix in an .npy file that reads only the requested rows."""

    def __init__(self, file: RemoteFile, expected: Layout | None = None) -> None:
        """
        Args:
            expected: the header of a file that is as large as this matrix is not read.

        Raises:
            CollectionError: the file cannot be read, or is no .npy file of its size.
        """
        self._file = file
        if expected is None or expected.file_bytes != file.size:
            expected = self._header()
        self.shape, self.dtype, self.ndim = expected.shape, expected.dtype, len(expected.shape)
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._offset = file.size - self.shape[0] * self._row_bytes

    def _header(self) -> Layout:
        """What the header says, if the file has the size for it."""
        try:
            with self._file.open() as header:
                version = np.lib.format.read_magic(header)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the .npy format")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
                size = header.tell() + int(np.prod(shape)) * dtype.itemsize
        except (ValueError, EOFError) as error:
            raise CollectionError(f"cannot read the vectors {self._file}: {error}") from error
        if fortran or dtype.hasobject or size != self._file.size:
            raise CollectionError(
                f"{self._file} has {self._file.size} bytes, its header says {size}: it is truncated"
            )
        return Layout(shape, dtype)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, key: Any, /) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                count = max(stop - start, 0)
                values = self._file.read(
                    [self._offset + start * self._row_bytes], [count * self._row_bytes]
                )
                return values.view(self.dtype).reshape(count, *self.shape[1:])
            key = np.arange(start, stop, step)
        rows: np.ndarray = np.asarray(key)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        values = self._file.read(*self._ranges(rows % max(len(self), 1)))
        return values.view(self.dtype).reshape(*rows.shape, *self.shape[1:])

    def prefetch(self, rows: np.ndarray) -> None:
        """Brings rows into the cache, in parallel."""
        self._file.prefetch(*self._ranges(rows))

    def _ranges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = self._offset + np.asarray(rows, dtype=np.int64).ravel() * self._row_bytes
        return starts, np.full(len(starts), self._row_bytes)


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Adjacent blocks together: first and last + 1 of each request."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block and block - runs[-1][0] < _RUN_BLOCKS:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
