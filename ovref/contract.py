"""The contract of the builder: a `Spec` is data, `build()` makes the `Stage` that does the work.

A stage is an iterator of records in, an iterator of records or `Dropped` out. It batches inside,
touches no files, and answers every input: by outputs, by a drop, or by both. Keys tell which input
an output answers: the part before `#` is the key of the input (`base_key`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Dropped:
    """One record (or, with `#`, one part of a record) that a stage gave up on purpose."""

    key: str
    reason: str
    """Short and countable, from a closed set per stage: `no_nouns`, `empty_mask`, ..."""


class Stage(Protocol):
    """Records in; records, or `Dropped`, out."""

    def __call__(self, records: Iterator[Any]) -> Iterator[Any]: ...


class Spec(Protocol):
    """Frozen, picklable, cheap to import. Its fields are all that affects the stage's bytes."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised by hand whenever the same fields would give other bytes."""

    def build(self) -> Stage: ...


def base_key(key: str) -> str:
    """The key of the input that a record or a drop answers."""
    return key.partition("#")[0]
