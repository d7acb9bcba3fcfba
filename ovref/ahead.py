"""One way to work ahead: the next items are seen to in threads while the caller uses the last."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 8
"""Reads at a time: an object store answers late, but many at once."""


def map_ahead(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int = READERS
) -> Iterator[Result]:
    """`call(item)` of each item in turn, the next `threads` being made meanwhile in threads.

    What `call` raises is raised here, in its turn; what has not begun by then, or when the iterator
    is closed, is not begun any more. No more than `threads + 1` results are held. `items` are taken
    in the caller's thread.
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
