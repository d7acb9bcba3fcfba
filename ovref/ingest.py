"""Splits a corpus into caption shards, in order, without duplicates."""

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

from ovref.contract import Dropped
from ovref.errors import InputError
from ovref.records import Caption
from ovref.storage.shards import ShardFiles
from ovref.storage.steps import StepFolder
from ovref_inference.ranges import require_at_least

UPLOADS = 8
"""Shards uploaded, or compared with the store, at a time; see `ovref.ahead.READERS`."""


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """Progress or result of a pass over a corpus."""

    shards: int
    captions: int
    """Captions kept."""
    dropped: dict[str, int]
    """Number of captions dropped, by reason."""
    finished: bool


def ingest(
    captions: Iterable[Caption | Dropped],
    target: StepFolder,
    shard_size: int,
    on_progress: Callable[[IngestSummary], None] | None = None,
) -> IngestSummary:
    """Splits a corpus into caption shards `000000`, `000001`, ... of `shard_size`, in order.

    Drops captions whose key was seen before (`duplicate_caption`) and captions that are not Unicode
    text (`undecodable_text`); counts the reader's drops. After an interruption, the next call reads
    the corpus from the beginning and writes only missing shards; if `target` is complete, it
    returns without reading. The identity of `target` must contain the corpus's identity and
    `shard_size`.

    Args:
        on_progress: called after every shard, whether new or already committed.

    Raises:
        InputError: the corpus has no usable caption, or differs from the one that the committed
            shards were made from.
    """
    require_at_least("shard_size", shard_size, 1)
    if target.complete() is not None:
        return _summary_of(target)
    committed = set(target.committed())
    items = first_of_each_key(captions)
    shards: list[str] = []
    kept, dropped = 0, Counter[str]()
    following: Caption | None = None
    # Not `ahead.map_ahead`: before the first upload, all checks that are under way must succeed.
    with ThreadPoolExecutor(UPLOADS) as pool:
        uploads: deque[Future[None]] = deque()
        checks: deque[Future[None]] = deque()
        while not shards or following is not None:
            shard = f"{len(shards):06d}"
            with ExitStack() as opened:
                files = None if shard in committed else opened.enter_context(ShardFiles())
                keys, drops, following = _fill(files, items, following, shard_size)
                dropped.update(drop.reason for drop in drops)
                if not keys:
                    raise no_usable_caption(dict(dropped))
                if files is None:
                    inputs = len(keys) + len(drops)
                    checks.append(pool.submit(_check_unchanged, target, shard, keys, inputs))
                else:
                    _wait_for(checks, 0)  # so that nothing is added from a changed corpus
                    inputs = len(keys) + len(drops)
                    held = opened.pop_all()
                    uploads.append(pool.submit(_publish, held, target, shard, files, inputs, drops))
            for futures in (uploads, checks):
                _wait_for(futures, UPLOADS)
            shards.append(shard)
            kept += len(keys)
            if on_progress is not None:
                on_progress(_summary(len(shards), kept, dropped, finished=False))
        for futures in (uploads, checks):
            _wait_for(futures, 0)
    surplus = sorted(committed - set(shards))
    if surplus:
        raise InputError(
            f"the corpus has become shorter: {target.store.url} has shard {surplus[0]}, the corpus "
            f"ends with {shards[-1]}; choose another output folder"
        )
    target.finish(shards)
    return _summary(len(shards), kept, dropped, finished=True)


class KeySet:
    """A set of keys that takes 11 to 22 bytes per key, so that a corpus fits in memory.

    Open addressing over 64-bit hashes. Two keys with the same hash count as one; the probability
    of any collision among n keys is n**2 / 2**65, one in a hundred thousand for 20 million.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, key: str) -> bool:
        """Adds `key`; False if it was present."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "big") or 1  # 0 marks a free slot
        slot = self._slot(value)
        if self._slots[slot] == value:
            return False
        self._slots[slot] = value
        self._count += 1
        if 4 * self._count > 3 * len(self._slots):
            self._double()
        return True

    def _slot(self, value: int) -> int:
        """The slot of `value`, or the free slot for it."""
        mask = len(self._slots) - 1
        slot = value & mask
        while self._slots[slot] not in (0, value):
            slot = (slot + 1) & mask
        return slot

    def _double(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._slots[self._slot(value)] = value


def first_of_each_key(captions: Iterable[Caption | Dropped]) -> Iterator[Caption | Dropped]:
    """Replaces captions with a repeated key, and text that cannot be encoded, by drops."""
    seen = KeySet()
    for item in captions:
        if isinstance(item, Dropped):
            yield item
        elif not _is_unicode(item.text) or not _is_unicode(item.source):
            yield Dropped(item.key, "undecodable_text")
        elif not seen.add(item.key):
            yield Dropped(item.key, "duplicate_caption")
        else:
            yield item


def _is_unicode(text: str) -> bool:
    # JSON can encode a lone surrogate, which is not a character.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_usable_caption(dropped: dict[str, int]) -> InputError:
    """The error of a corpus without usable captions."""
    return InputError(
        f"the corpus has no usable caption: it is empty or all were dropped {dropped}"
    )


def _fill(
    files: ShardFiles | None,
    items: Iterator[Caption | Dropped],
    first: Caption | None,
    shard_size: int,
) -> tuple[list[str], list[Dropped], Caption | None]:
    """Takes one shard's items, into `files` if given; also returns the first caption of the
    next."""
    keys: list[str] = []
    drops: list[Dropped] = []
    for item in items if first is None else chain([first], items):
        if isinstance(item, Dropped):
            drops.append(item)
            continue
        if len(keys) == shard_size:
            return keys, drops, item
        keys.append(item.key)
        if files is not None:
            files.add(item)
    return keys, drops, None


def _wait_for(futures: deque[Future[None]], but: int) -> None:
    """Waits for the oldest futures until `but` are left; raises their exceptions."""
    while len(futures) > but:
        futures.popleft().result()


def _publish(
    opened: ExitStack,
    target: StepFolder,
    shard: str,
    files: ShardFiles,
    inputs: int,
    drops: list[Dropped],
) -> None:
    with opened:
        target.publish(shard, files, inputs=inputs, drops=drops)


def _check_unchanged(target: StepFolder, shard: str, keys: list[str], inputs: int) -> None:
    commit = target.required(shard)
    if commit.inputs != inputs or target.table(shard, ["key"])["key"].to_pylist() != keys:
        raise InputError(
            f"the corpus has changed since the build began: shard {shard} of {target.store.url} "
            f"was made from {commit.inputs} other captions, now {inputs}; choose another output "
            "folder or restore the old corpus"
        )


def _summary_of(target: StepFolder) -> IngestSummary:
    commits = target.commits().values()
    dropped: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.dropped)
    return _summary(len(commits), sum(commit.outputs for commit in commits), dropped, finished=True)


def _summary(shards: int, captions: int, dropped: Counter[str], finished: bool) -> IngestSummary:
    counts = dict(sorted(dropped.items()))
    return IngestSummary(shards=shards, captions=captions, dropped=counts, finished=finished)
