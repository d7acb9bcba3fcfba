"""Runs a chain of stages over one shard: read, apply, account, commit."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ovref.contract import Dropped, Stage, base_key
from ovref.errors import AccountingError
from ovref.storage.shards import ShardFiles
from ovref.storage.steps import Commit, StepFolder


def run_shard(
    stages: Sequence[Stage], source: StepFolder, target: StepFolder, shard: str, attempt: int = 0
) -> Commit:
    """Reads `shard` of `source`, applies the stages in turn, commits the same name in `target`.

    Records flow one by one; a `Dropped` passes the later stages untouched. A shard that `target`
    has already is not run again: its marker is returned.

    Raises:
        AccountingError: a stage left an input unanswered, answered an unknown key, or answered
            with one key twice. Nothing is committed.
        StorageError: the source shard is damaged, or the target cannot be written (full disk).
        Exception: whatever a stage raises; nothing is committed.
    """
    if (earlier := target.commit_of(shard)) is not None:
        return earlier
    started = time.monotonic()
    drops: list[Dropped] = []
    # Closed at the end in any case: an unfinished read keeps its temporary copy.
    with contextlib.closing(source.read(shard)) as reader, ShardFiles() as files:
        inputs = _Counted(reader)
        records: Iterable[Any] = inputs
        for number, stage in enumerate(stages, start=1):
            name = getattr(stage, "__name__", type(stage).__name__)
            where = f"stage {number} of {len(stages)}, {name}, shard {shard}"
            records = _accounted(stage, records, drops, where)
        for record in records:
            files.add(record)
        return target.publish(
            shard, files, inputs=inputs.count, drops=drops, started=started, attempt=attempt
        )


class _Counted:
    """An iterator that knows how many items it has given."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.count = 0
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self.count += 1
            yield item


def _accounted(
    stage: Stage, records: Iterable[Any], drops: list[Dropped], where: str
) -> Iterator[Any]:
    """The stage's output records, its drops put aside, each input checked to be answered."""
    given: set[str] = set()
    answered: set[str] = set()
    outputs: set[str] = set()
    given_up: set[str] = set()

    def feed() -> Iterator[Any]:
        for record in records:
            given.add(base_key(record.key))
            yield record

    fed = feed()
    for item in stage(fed):
        key = item.key
        if base_key(key) not in given:
            raise AccountingError(f"{where}: answered {key!r}, which it was not given")
        answered.add(base_key(key))
        if isinstance(item, Dropped):
            # One region may be given up twice: a stage numbers those that the last one left.
            if "#" not in key and key in given_up:
                raise AccountingError(f"{where}: dropped {key!r} twice")
            given_up.add(key)
            drops.append(item)
            continue
        if key in outputs:
            raise AccountingError(f"{where}: gave two records with the key {key!r}")
        outputs.add(key)
        yield item
    for _ in fed:  # what the stage did not care to take is unanswered too
        pass
    missing = sorted(given - answered)
    if missing:
        raise AccountingError(
            f"{where}: left {len(missing)} of {len(given)} inputs without an output or a drop: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
