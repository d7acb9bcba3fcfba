"""Reading many objects of a store, one after another, without waiting for each."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 8
"""Reads at a time: an object store answers late, but many at once."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`read(item)` of each item in turn, the next `READERS` being read meanwhile in threads.

    What `read` raises is raised here, in its turn. No more than `READERS + 1` results are held.
    """
    with ThreadPoolExecutor(READERS) as pool:
        reads: deque[Future[Result]] = deque()
        for item in items:
            reads.append(pool.submit(read, item))
            if len(reads) > READERS:
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()
