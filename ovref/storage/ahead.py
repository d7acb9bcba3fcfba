"""Reads many objects of a store in order, several at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 8
"""Concurrent reads: object stores have high latency but serve many requests at once."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`read(item)` of each item in order; threads read the next `READERS` ahead.

    Exceptions of `read` are raised here, in order. At most `READERS + 1` results are held.
    """
    with ThreadPoolExecutor(READERS) as pool:
        reads: deque[Future[Result]] = deque()
        for item in items:
            reads.append(pool.submit(read, item))
            if len(reads) > READERS:
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()
