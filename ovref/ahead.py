"""Lookahead: threads process the next items while the caller uses the last result."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 8
"""Concurrent reads: object stores have high latency but serve many requests at once."""


def map_ahead(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int = READERS
) -> Generator[Result, None, None]:
    """Yields `call(item)` for each item, in order, while threads process the next `threads` items.

    Exceptions of `call` are raised in order, too. After an exception, or when the iterator is
    closed, no further call begins. At most `threads + 1` results are held. `items` is consumed in
    the caller's thread.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        calls: deque[Future[Result]] = deque()
        for item in items:
            calls.append(pool.submit(call, item))
            if len(calls) > threads:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
