"""The indexes of a collection's partitions, searched as one."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovref_inference.collection.index import nprobe_for
from ovref_inference.collection.manifest import PARTITION_IDS
from ovref_inference.collection.parts import TunedIndex
from ovref_inference.collection.remote_index import LIST_BYTES, RemoteIndex
from ovref_inference.collection.threads import in_threads

_MORE = 4
"""How many times as many lists are asked for again, if those were too few."""
_AT_ONCE = 1 << 20
"""Pairs of a query and a list that are compared at a time: some 100 MB."""
_NONE = np.zeros(0, dtype=np.int64)


class JoinedIndex:
    """Indexes searched as one: the inverted lists nearest to a query in any of them.

    Each index names the lists that it would probe by its own settings. The index that has the
    nearest list is searched as it was tuned, the others in those of their lists that are at least
    as near as the last one probed there. Exact indexes are all searched. Probing all that were
    named reads several times as much (`tests/benchmarks/results/partitioned_lists.md`).

    The nearest lists come from an index over the lists of all, if there is one. Then an index
    without such a list is not touched, and centroids of none are read. Otherwise each query is
    compared with the centroids of all.
    """

    def __init__(
        self, parts: Sequence[TunedIndex], threads: int, lists: TunedIndex | None = None
    ) -> None:
        """
        Args:
            parts: by number of the partition.
            threads: of them that are asked at a time.
            lists: over the centroids of all parts, one after the other.
        """
        self._parts, self._threads, self._lists = parts, threads, lists
        self._sizes = np.array([part.lists for part in parts])
        self._ends = np.cumsum(self._sizes)
        for part in parts:
            if isinstance(part.index, RemoteIndex):
                part.index.list_bytes = LIST_BYTES // min(threads, len(parts))

    def search(
        self, queries: np.ndarray, k: int, excluded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `TunedIndex.search`; equal scores by ascending ids."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        nprobes = np.array([nprobe_for(k, part.curve) or 0 for part in self._parts])
        total = sum(part.index.ntotal for part in self._parts)
        best, there = _Best(len(queries), min(k, total)), min(k, total - len(excluded))

        def search_whole(number: int) -> None:
            gone = self._deleted(number, excluded)
            scores, ids = self._parts[number].search(queries, k, gone)
            best.add(np.arange(len(queries)), scores, _global(ids, number))

        in_threads(search_whole, np.flatnonzero(nprobes == 0).tolist(), self._threads)
        exact_scores, exact_ids = best.scores.copy(), best.ids.copy()
        wanted, times = np.arange(len(queries)), 1
        while nprobes.any() and len(wanted):
            best.scores[wanted], best.ids[wanted] = exact_scores[wanted], exact_ids[wanted]
            need = np.minimum(nprobes * times, self._sizes)
            every = bool((need == self._sizes)[nprobes > 0].all())
            if every:
                self._search_every_list(queries, k, excluded, wanted, nprobes, best)
                break
            near = self._near(queries[wanted], need)
            self._search_lists(queries, k, excluded, wanted, near, best)
            # Those whose lists hold too few are looked for in more.
            wanted, times = np.flatnonzero((best.ids >= 0).sum(axis=1) < there), 4 * times
        return best.scores, best.ids

    def _search_lists(
        self,
        queries: np.ndarray,
        k: int,
        excluded: np.ndarray,
        wanted: np.ndarray,
        near: "_Lists",
        best: "_Best",
    ) -> None:
        """Adds what those of the `wanted` queries find in their lists."""

        def search_one(one: "_Lists") -> None:
            number = int(one.parts[0])
            some, cosines, lists = one.by_query()
            found = self._parts[number].search_lists(
                queries[wanted[some]], k, cosines, lists, self._deleted(number, excluded)
            )
            best.add(wanted[some], found[0], _global(found[1], number))

        in_threads(search_one, near.by_part(), self._threads)

    def _search_every_list(
        self,
        queries: np.ndarray,
        k: int,
        excluded: np.ndarray,
        wanted: np.ndarray,
        nprobes: np.ndarray,
        best: "_Best",
    ) -> None:
        """Adds what the `wanted` queries find in all lists. Names those of one part at a time: of
        all parts they would take gigabytes."""

        def search_one(number: int) -> None:
            lists = np.tile(np.arange(self._sizes[number]), (len(wanted), 1))
            cosines = np.zeros(lists.shape, dtype=np.float32)
            found = self._parts[number].search_lists(
                queries[wanted], k, cosines, lists, self._deleted(number, excluded)
            )
            best.add(wanted, found[0], _global(found[1], number))

        in_threads(search_one, np.flatnonzero(nprobes).tolist(), self._threads)

    def _near(self, queries: np.ndarray, need: np.ndarray) -> "_Lists":
        """The lists in which each query is looked for.

        Args:
            need: (parts,) lists that each part names.
        """
        if self._lists is not None:
            return self._near_by_index(queries, need, self._lists)
        numbers, found = np.flatnonzero(need), list[_Lists]()
        step = max(1, _AT_ONCE // int(need.sum()))
        for start in range(0, len(queries), step):
            some = queries[start : start + step]

            def of_one(number: int, some: np.ndarray = some) -> tuple[np.ndarray, np.ndarray]:
                return self._parts[number].nearest_lists(some, int(need[number]))

            each = in_threads(of_one, numbers.tolist(), self._threads)
            cosines, lists = (np.concatenate(kind, axis=1) for kind in zip(*each, strict=True))
            parts = np.tile(np.repeat(numbers, need[numbers]), (len(some), 1))
            order = np.argsort(-cosines, axis=1, kind="stable")
            cosines, lists, parts = (
                np.take_along_axis(values, order, axis=1) for values in (cosines, lists, parts)
            )
            rows, columns = np.nonzero(_chosen(cosines, parts, need)[0])
            near = (values[rows, columns] for values in (parts, lists, cosines))
            found.append(_Lists(start + rows, *near))
        return _Lists.joined(found)

    def _near_by_index(
        self, queries: np.ndarray, need: np.ndarray, index: TunedIndex
    ) -> "_Lists":
        total, starts = int(self._ends[-1]), self._ends - self._sizes
        # Of 8 to 100 partitions 2 to 60 times as many lists are near as one of them probes.
        count = min(int(2 * len(need) ** 0.5 * need.max()), total)
        pending, found = np.arange(len(queries)), list[_Lists]()
        while len(pending):
            later = []
            step = max(1, _AT_ONCE // count)
            for some in np.split(pending, range(step, len(pending), step)):
                cosines, numbers = index.search(queries[some], count, _NONE)
                parts = np.searchsorted(self._ends, numbers, side="right")
                chosen, enough = _chosen(cosines, parts, need)
                enough |= count == total
                rows, columns = np.nonzero(chosen & enough[:, None])
                near = parts, numbers - starts[parts], cosines
                found.append(_Lists(some[rows], *(values[rows, columns] for values in near)))
                later.append(some[~enough])
            pending, count = np.concatenate(later), min(_MORE * count, total)
        return _Lists.joined(found)

    def _deleted(self, number: int, excluded: np.ndarray) -> np.ndarray:
        """Those of the sorted ids that are in a partition, as its own."""
        first = number * PARTITION_IDS
        low, high = np.searchsorted(excluded, [first, first + PARTITION_IDS])
        return excluded[low:high] - first


@dataclass(frozen=True)
class _Lists:
    """Pairs of a query and an inverted list; those of a query are in the order of its cosines."""

    rows: np.ndarray
    """(n,) number of the query."""
    parts: np.ndarray
    """(n,) number of the partition."""
    lists: np.ndarray
    """(n,) number of the list in it."""
    cosines: np.ndarray
    """(n,) float32."""

    @staticmethod
    def joined(every: list["_Lists"]) -> "_Lists":
        """The pairs of all, one after the other."""
        values = zip(*map(_Lists.flat, every), strict=True)
        return _Lists(*map(np.concatenate, values))

    def flat(self) -> tuple[np.ndarray, ...]:
        return self.rows, self.parts, self.lists, self.cosines

    def by_part(self) -> list["_Lists"]:
        """The pairs of each partition, sorted by query."""
        order = np.lexsort((self.rows, self.parts))
        cuts = np.flatnonzero(np.diff(self.parts[order])) + 1
        every = ([values[some] for some in np.split(order, cuts)] for values in self.flat())
        return [_Lists(*one) for one in zip(*every, strict=True)] if len(order) else []

    def by_query(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The queries of pairs that are sorted by them; cosines and lists of each, a row each, -inf
        and -1 where others have more."""
        some, starts, counts = np.unique(self.rows, return_index=True, return_counts=True)
        row = np.repeat(np.arange(len(some)), counts)
        column = np.arange(len(self.rows)) - np.repeat(starts, counts)
        cosines = np.full((len(some), counts.max()), -np.inf, dtype=np.float32)
        lists = np.full(cosines.shape, -1, dtype=np.int64)
        cosines[row, column], lists[row, column] = self.cosines, self.lists
        return some, cosines, lists


def _chosen(
    cosines: np.ndarray, parts: np.ndarray, need: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the nearest lists are read; see `JoinedIndex`.

    Args:
        cosines: (m, n) descending.
        parts: (m, n) the part of each list.
        need: (parts,) lists that each names.

    Returns:
        (m, n) bool, and (m,) bool: whether the part with the nearest list has all that it names
        among these.
    """
    order = np.argsort(parts, axis=1, kind="stable")
    grouped = np.take_along_axis(parts, order, axis=1)
    places = np.arange(parts.shape[1])
    begins = np.zeros(parts.shape, dtype=np.int64)
    begins[:, 1:] = np.where(grouped[:, 1:] != grouped[:, :-1], places[1:], 0)
    rank = np.empty(parts.shape, dtype=np.int64)
    """Place of a list among those of its part, from 1."""
    np.put_along_axis(rank, order, places - np.maximum.accumulate(begins, axis=1) + 1, axis=1)
    named = need[parts]
    first = np.take_along_axis(parts, (named > 0).argmax(axis=1)[:, None], axis=1)
    last = (parts == first) & (rank == named)
    least = np.where(last, cosines, -np.inf).max(axis=1, keepdims=True)
    return (rank <= named) & (cosines >= least), last.any(axis=1)


class _Best:
    """The best references found so far for each of some queries. Threads may add to it."""

    def __init__(self, queries: int, width: int) -> None:
        self.scores = np.full((queries, width), -np.inf, dtype=np.float32)
        self.ids = np.full((queries, width), -1, dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, rows: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
        """Takes what was found for these queries; ids that they have not had yet."""
        with self._lock:
            scores = np.concatenate([self.scores[rows], scores], axis=1)
            ids = np.concatenate([self.ids[rows], ids], axis=1)
            order = np.lexsort((ids, -scores))[:, : self.ids.shape[1]]
            self.scores[rows] = np.take_along_axis(scores, order, axis=1)
            self.ids[rows] = np.take_along_axis(ids, order, axis=1)


def _global(ids: np.ndarray, number: int) -> np.ndarray:
    return np.where(ids >= 0, ids + number * PARTITION_IDS, -1)
