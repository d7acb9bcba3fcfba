"""A faiss index on an object store: a query reads the inverted lists that it probes."""

import contextlib
import mmap
import tempfile
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.collection.inverted_lists import search_lists
from ovref_inference.collection.remote import RemoteFile
from ovref_inference.errors import CollectionError

LIST_BYTES = 32 << 20
"""Inverted lists in memory at a time, of all partitions that are searched together."""
_ID_BYTES = 8
CODE_BYTES = {",SQfp16": 2, ",SQ8": 1}
"""End of the factory string -> bytes of a number in its inverted lists."""


class RemoteIndex:
    """An `IVF…,SQfp16` or `IVF…,SQ8` index, searched as faiss searches it, with the same results.

    Its centroids are read at the first search. Safe to search from several threads, one of which
    searches at a time.
    """

    def __init__(self, file: RemoteFile, rows: int, dim: int, factory: str) -> None:
        self.file, self.ntotal, self.d = file, rows, dim
        self._code_bytes = CODE_BYTES[f",{factory.rpartition(',')[2]}"] * dim
        self.list_bytes = LIST_BYTES
        self._lock = threading.Lock()

    @property
    def nlist(self) -> int:
        """Inverted lists."""
        with self._lock:
            return int(self._header[0].nlist)

    @property
    def quantizer(self) -> Any:
        """The index of the lists' centroids."""
        with self._lock:
            return self._header[0].quantizer

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
        """As `inverted_lists.search_lists`, reading these lists."""
        with self._lock:
            index, starts, sizes = self._header
            groups = self._groups(lists_mp, sizes)
            # An allocator would keep much of this for itself afterwards.
            most = max(size for *_, size in groups)
            memory = np.frombuffer(mmap.mmap(-1, max(most, 1)), dtype=np.uint8)
            parts = []
            for first, last, _ in groups:
                near = cosines_mp[first:last], lists_mp[first:last]
                with self._loaded(near[1], index, starts, sizes, memory):
                    parts.append(search_lists(index, queries[first:last], k, *near, params=params))
        scores, ids = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(ids)

    @cached_property
    def _header(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """The index with empty lists; where each list begins in the file, and its entries."""
        import faiss

        entry = self._entry_bytes
        begin = self.file.size - self.ntotal * entry
        with tempfile.TemporaryDirectory() as scratch:
            # faiss reads the centroids, and from the sizes of the lists where each one would be;
            # the lists themselves are a hole in this file.
            path = Path(scratch, "header.faiss")
            with open(path, "wb") as file:
                if begin > 0:
                    file.write(self.file.read([0], [begin]).data)
                file.truncate(self.file.size)
            try:
                index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            except RuntimeError as error:
                raise CollectionError(f"cannot read the index {self.file}: {error}") from error
            if not hasattr(index, "nlist") or (index.ntotal, index.d) != (self.ntotal, self.d):
                raise CollectionError(
                    f"the index {self.file} holds {index.ntotal} vectors of width {index.d}, the "
                    f"collection {self.ntotal} of width {self.d}: publish it again"
                )
            lists = index.invlists
            sizes = np.array([lists.list_size(number) for number in range(index.nlist)])
            if lists.code_size != entry - _ID_BYTES or sizes.sum() != self.ntotal:
                raise CollectionError(
                    f"the index {self.file} does not hold {self._code_bytes} bytes of each vector "
                    "list by list; open the collection with copy=True"
                )
            held: Any = faiss.OnDiskInvertedLists()
            held.nlist, held.code_size = index.nlist, lists.code_size
            held.lists.resize(index.nlist)
            index.replace_invlists(held, True)
            held.this.disown()  # they are the index's now
        starts = begin + (np.cumsum(sizes) - sizes) * entry
        return index, starts, sizes

    @property
    def _entry_bytes(self) -> int:
        return self._code_bytes + _ID_BYTES

    def _groups(self, lists_mp: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int, int]]:
        """Consecutive queries whose lists fit into memory together, first and last + 1, and the
        bytes of these lists; one query always fits."""
        groups: list[tuple[int, int, int]] = []

        def size_of(lists: set[int]) -> int:
            return int(sizes[list(lists)].sum()) * self._entry_bytes

        first, seen, held = 0, set[int](), 0
        for number, row in enumerate(lists_mp.tolist()):
            lists = set(row) - {-1}
            more = size_of(lists - seen)
            if number > first and held + more > self.list_bytes:
                groups.append((first, number, held))
                first, seen, held, more = number, set(), 0, size_of(lists)
            seen |= lists
            held += more
        return [*groups, (first, len(lists_mp), held)]

    @contextlib.contextmanager
    def _loaded(
        self,
        lists_mp: np.ndarray,
        index: Any,
        starts: np.ndarray,
        sizes: np.ndarray,
        memory: np.ndarray,
    ) -> Iterator[None]:
        """Within it the index has these lists, in this memory, and no others."""
        import faiss

        wanted = np.unique(lists_mp[lists_mp >= 0])
        there = np.zeros(len(sizes), dtype=np.uint64)
        there[wanted] = sizes[wanted]
        lengths = sizes[wanted] * self._entry_bytes
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
