"""Runs a chain of stages over one shard: read, apply, account, commit."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ovref.contract import Dropped, Stage, base_key
from ovref.errors import AccountingError
from ovref.storage.commits import Commit
from ovref.storage.shards import ShardFiles
from ovref.storage.steps import StepFolder


def run_shard(
    stages: Sequence[Stage],
    source: StepFolder,
    target: StepFolder,
    shard: str,
    attempt: int = 0,
    without: Mapping[int, str] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Commit:
    """Reads `shard` of `source`, applies the stages in turn, commits the same name in `target`.

    Records flow one by one; a `Dropped` bypasses the later stages. A shard that `target` already
    has is not run again; its commit is returned.

    Args:
        without: index of a record in the shard -> reason to drop it before any stage. The bytes are
            the same as if a first stage dropped it.
        watch: called after every output with the number of inputs answered and of drops so far.

    Raises:
        AccountingError: a stage left an input unanswered, answered an unknown key, or used a key
            twice. Nothing is committed.
        StorageError: the source shard is damaged, or the target cannot be written (full disk).
        Exception: whatever a stage raises; nothing is committed.
    """
    if (earlier := target.commit_of(shard)) is not None:
        return earlier
    started = time.monotonic()
    drops: list[Dropped] = []
    # Always closed: an unfinished read keeps its temporary copy, an unfinished stage its threads.
    with contextlib.closing(source.read(shard)) as reader, ShardFiles() as files:
        inputs = _Counted(reader, without or {}, drops)
        answers = _Answers(drops)
        with contextlib.closing(_applied(stages, inputs, drops, shard)) as records:
            for record in records:
                files.add(record)
                if watch is not None:
                    watch(answers.count(record.key), len(drops))
        return target.publish(
            shard, files, inputs=inputs.count, drops=drops, started=started, attempt=attempt
        )


def run_alone(stages: Sequence[Stage], record: Any) -> None:
    """Applies the stages to one record, encodes the outputs, and discards them.

    For finding a record that kills its process; this call then does not return.

    Raises:
        Exception: whatever a stage raises.
    """
    records: Iterable[Any] = iter([record])
    for stage in stages:
        records = _undropped(stage(iter(records)))
    with ShardFiles() as files:
        for output in records:
            files.add(output)
        files.finish([])


def _applied(
    stages: Sequence[Stage], inputs: Iterable[Any], drops: list[Dropped], shard: str
) -> Generator[Any, None, None]:
    records = inputs
    for number, stage in enumerate(stages, start=1):
        name = getattr(stage, "__name__", type(stage).__name__)
        where = f"stage {number} of {len(stages)}, {name}, shard {shard}"
        records = _accounted(stage, records, drops, where)
    yield from records


def _undropped(items: Iterable[Any]) -> Iterator[Any]:
    return (item for item in items if not isinstance(item, Dropped))


class _Counted:
    """The records of a shard without excluded ones, and the number of all records read."""

    def __init__(
        self, items: Iterable[Any], without: Mapping[int, str], drops: list[Dropped]
    ) -> None:
        self.count = 0
        self._items, self._without, self._drops = iter(items), without, drops

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self._items):
            self.count += 1
            if number in self._without:
                self._drops.append(Dropped(item.key, self._without[number]))
            else:
                yield item


class _Answers:
    """Counts the inputs answered by an output or by a drop of the whole record."""

    def __init__(self, drops: Sequence[Dropped]) -> None:
        self._drops, self._seen = drops, 0
        self._keys: set[str] = set()

    def count(self, key: str) -> int:
        """The number of answered inputs after the output `key`."""
        self._keys.add(base_key(key))
        self._keys.update(drop.key for drop in self._drops[self._seen :] if "#" not in drop.key)
        self._seen = len(self._drops)
        return len(self._keys)


def _accounted(
    stage: Stage, records: Iterable[Any], drops: list[Dropped], where: str
) -> Iterator[Any]:
    """Yields the stage's output records, collects its drops, and checks that inputs are
    answered."""
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
            raise AccountingError(f"{where}: answered {key!r}, which is not one of its inputs")
        answered.add(base_key(key))
        if isinstance(item, Dropped):
            # A region's key may be dropped twice: each stage numbers the regions that it receives.
            if "#" not in key and key in given_up:
                raise AccountingError(f"{where}: dropped {key!r} twice")
            given_up.add(key)
            drops.append(item)
            continue
        if key in outputs:
            raise AccountingError(f"{where}: returned two records with the key {key!r}")
        outputs.add(key)
        yield item
    for _ in fed:  # inputs that the stage did not read are unanswered, too
        pass
    missing = sorted(given - answered)
    if missing:
        raise AccountingError(
            f"{where}: left {len(missing)} of {len(given)} inputs without an output or a drop: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
