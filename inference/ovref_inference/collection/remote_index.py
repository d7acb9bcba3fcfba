"""A faiss index on an object store: a query reads the inverted lists that it probes."""

import contextlib
import mmap
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection.exact import faiss_module
from ovref_inference.collection.index import list_count
from ovref_inference.collection.inverted_lists import search_lists
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.errors import CollectionError

LIST_BYTES = 32 << 20
"""Inverted lists in memory at a time, of all partitions that are searched together."""
_ID_BYTES = 8
CODE_BYTES = {",SQfp16": 2, ",SQ8": 1}
"""End of the factory string -> bytes of a number in its inverted lists."""
_CENTROIDS_AT = 98
"""Bytes of an index file before its centroids, if these are compared one by one."""


def entry_bytes(factory: str, dim: int) -> int:
    """Bytes of a vector in inverted lists, with its id."""
    return CODE_BYTES[f",{factory.rpartition(',')[2]}"] * dim + _ID_BYTES


def parsed_header(
    pieces: Sequence[tuple[int, bytes]], size: int, rows: int, dim: int, factory: str, where: str
) -> tuple[Any, np.ndarray, np.ndarray]:
    """An index of which the file's bytes before the inverted lists are known, or some of them.

    Args:
        pieces: where they are in the file, and these bytes; faiss takes others to be 0.
        size: of the whole file.
        rows, dim, factory: of the index.
        where: for messages.

    Returns:
        The index, whose lists cannot be read; where each one begins in the file; its entries.

    Raises:
        CollectionError: it is no such index.
    """
    faiss, entry = faiss_module(), entry_bytes(factory, dim)
    with tempfile.TemporaryDirectory() as scratch:
        # faiss maps the centroids, and reads from the sizes of the lists where each one would be;
        # the lists themselves are a hole in this file.
        path = Path(scratch, "header.faiss")
        with open(path, "wb") as file:
            for at, content in pieces:
                file.seek(at)
                file.write(content)
            file.truncate(size)
        try:
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise CollectionError(f"cannot read the index {where}: {error}") from error
    if not hasattr(index, "nlist") or (index.ntotal, index.d) != (rows, dim):
        raise CollectionError(
            f"the index {where} holds {index.ntotal} vectors of width {index.d}, the collection "
            f"{rows} of width {dim}: publish it again"
        )
    lists = index.invlists
    sizes = np.array([lists.list_size(number) for number in range(index.nlist)])
    known = index.nlist == list_count(factory) and lists.code_size == entry - _ID_BYTES
    if not known or sizes.sum() != rows:
        raise CollectionError(
            f"the index {where} does not hold {entry - _ID_BYTES} bytes of each vector list by "
            "list; open the collection with copy=True"
        )
    return index, size - rows * entry + (np.cumsum(sizes) - sizes) * entry, sizes


def _has_plain_centroids(factory: str) -> bool:
    return "_" not in factory


class RemoteIndex:
    """An `IVF…,SQfp16` or `IVF…,SQ8` index, searched as faiss searches it, with the same results.

    Its centroids are read when `quantizer` is asked for the first time; a search of given lists
    reads none. Safe to search from several threads, one of which
    searches at a time.
    """

    def __init__(self, file: RemoteFile, rows: int, dim: int, factory: str) -> None:
        self.file, self.ntotal, self.d, self.factory = file, rows, dim, factory
        self.nlist = list_count(factory)
        self.list_bytes = LIST_BYTES
        self._lock = threading.Lock()

    @property
    def quantizer(self) -> Any:
        """The index of the lists' centroids."""
        with self._lock:
            return self._quantizer

    def search(self, queries: np.ndarray, k: int, *, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `faiss.IndexIVF.search`.

        Args:
            queries: (m, d) float32.
            k: neighbours, at least 1.
            params: faiss' SearchParametersIVF; its `nprobe` lists of each query are read.

        Raises:
            CollectionError: the file cannot be read, or is no such index.
        """
        cosines_mp, lists_mp = self.quantizer.search(queries, params.nprobe)
        return self.search_lists(queries, k, cosines_mp, lists_mp, params=params)

    def search_lists(
        self,
        queries: np.ndarray,
        k: int,
        cosines_mp: np.ndarray,
        lists_mp: np.ndarray,
        *,
        params: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `inverted_lists.search_lists`, reading each of these lists once; scores are -inf where
        the lists hold fewer."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        with self._lock:
            index, starts, sizes = self._header
            pieces = self._pieces(np.unique(lists_mp[lists_mp >= 0]), sizes)
            # An allocator would keep much of this for itself afterwards.
            most = max((int(sizes[piece].sum()) for piece in pieces), default=0)
            size = most * entry_bytes(self.factory, self.d)
            memory = np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)
            for piece in pieces:
                here = np.isin(lists_mp, piece)
                some = np.flatnonzero(here.any(axis=1))
                near = cosines_mp[some], np.where(here[some], lists_mp[some], -1)
                with self._loaded(piece, index, starts, sizes, memory):
                    found = search_lists(index, queries[some], k, *near, params=params)
                found[0][found[1] < 0] = -np.inf
                both = np.concatenate([scores[some], found[0]], axis=1)
                order = np.argsort(-both, axis=1, kind="stable")[:, :k]
                scores[some] = np.take_along_axis(both, order, axis=1)
                both = np.concatenate([ids[some], found[1]], axis=1)
                ids[some] = np.take_along_axis(both, order, axis=1)
        return scores, ids

    @cached_property
    def _quantizer(self) -> Any:
        if not _has_plain_centroids(self.factory):
            return self._header[0].quantizer
        self.file.prefetch([0], [self._begin])  # in one request
        _ = self._header  # checks the file
        size = self.nlist * self.d * 4
        quantizer = faiss_module().IndexFlatIP(self.d)
        quantizer.add(self.file.read([_CENTROIDS_AT], [size]).view("<f4").reshape(-1, self.d))
        return quantizer

    @property
    def _begin(self) -> int:
        """Where the inverted lists begin in the file."""
        return self.file.size - self.ntotal * entry_bytes(self.factory, self.d)

    @cached_property
    def _header(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """As `parsed_header`, the lists empty; the centroids are not read."""
        faiss, begin, pieces = faiss_module(), self._begin, [(0, b"")]
        if not _has_plain_centroids(self.factory):
            pieces = [(0, self.file.read([0], [max(begin, 0)]).tobytes())]
        elif (end := _CENTROIDS_AT + self.nlist * self.d * 4) < begin:
            after = self.file.read([end], [begin - end]).tobytes()
            pieces = [(0, self._before_centroids), (end, after)]
        index, starts, sizes = parsed_header(
            pieces, self.file.size, self.ntotal, self.d, self.factory, str(self.file)
        )
        held: Any = faiss.OnDiskInvertedLists()
        held.nlist, held.code_size = index.nlist, index.invlists.code_size
        held.lists.resize(index.nlist)
        index.replace_invlists(held, True)
        held.this.disown()  # they are the index's now
        return index, starts, sizes

    @property
    def _before_centroids(self) -> bytes:
        """The first bytes of such a file, so that they need not be read."""

        def flat(rows: int) -> bytes:
            return struct.pack("<iqqqBi", self.d, rows, 1 << 20, 1 << 20, 1, 0)

        return b"".join([
            b"IwSq", flat(self.ntotal), struct.pack("<QQ", self.nlist, 1),
            b"IxFI", flat(self.nlist), struct.pack("<Q", self.nlist * self.d),
        ])  # fmt: skip

    def _pieces(self, wanted: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        """These lists in parts that fit into memory, in their order; one list always fits."""
        ends = np.cumsum(sizes[wanted]) * entry_bytes(self.factory, self.d)
        pieces, start = [], 0
        while start < len(wanted):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + self.list_bytes, side="right"))
            pieces.append(wanted[start : max(stop, start + 1)])
            start = max(stop, start + 1)
        return pieces

    @contextlib.contextmanager
    def _loaded(
        self,
        wanted: np.ndarray,
        index: Any,
        starts: np.ndarray,
        sizes: np.ndarray,
        memory: np.ndarray,
    ) -> Iterator[None]:
        """Within it the index has these lists, in this memory, and no others."""
        faiss = faiss_module()
        there = np.zeros(len(sizes), dtype=np.uint64)
        there[wanted] = sizes[wanted]
        lengths = sizes[wanted] * entry_bytes(self.factory, self.d)
        self.file.read(starts[wanted], lengths, out=memory[: lengths.sum()])
        # These lists are made for a file that is mapped into memory. Here that memory is another,
        # so that nothing is copied.
        lists: Any = faiss.downcast_InvertedLists(index.invlists)
        lists.set_all_lists_sizes(faiss.swig_ptr(there))
        try:
            lists.ptr = faiss.swig_ptr(memory)
            yield
        finally:
            lists.ptr = None  # or faiss would unmap it
