"""The contract of the builder: a `Spec` is data, `build()` makes the `Stage` that does the work.

A stage maps an iterator of records to an iterator of records or `Dropped`. It batches internally,
touches no files, and answers every input with outputs, a drop, or both. The part of an output's key
before `#` is the key of the input that it answers (`base_key`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Dropped:
    """A record (or, with `#`, a part of one) that a stage dropped deliberately."""

    key: str
    reason: str
    """One of a fixed set of short names per stage, to be counted: `no_nouns`, `empty_mask`, ..."""


class Stage(Protocol):
    """Records in; records, or `Dropped`, out."""

    def __call__(self, records: Iterator[Any]) -> Iterator[Any]: ...


class Spec(Protocol):
    """Frozen, picklable, cheap to import. Only its fields affect the stage's bytes."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised by hand whenever the same fields give different bytes."""

    def build(self) -> Stage: ...


def base_key(key: str) -> str:
    """The key of the input that a record or a drop answers."""
    return key.partition("#")[0]


def part_of_key(key: str) -> int:
    """The number after `#` in a key; 0 without one."""
    return int(key.partition("#")[2] or 0)
