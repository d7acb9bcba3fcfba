"""Several partitions of a collection asked at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 16
"""Partitions on an object store that are asked at a time."""

T = TypeVar("T")
Answer = TypeVar("Answer")


def in_threads(function: Callable[[T], Answer], items: Sequence[T], threads: int) -> list[Answer]:
    """`function` of each item; in this thread if `threads` is 1."""
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(function, items))
