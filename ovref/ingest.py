"""The steps that look at a whole corpus in order: `ingest` cuts it into shards, `select` caps it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ovref.contract import Dropped
from ovref.records import Caption
from ovref.storage.steps import StepFolder


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """How far a pass over a corpus has come, or what it gave in the end."""

    shards: int
    captions: int
    """Kept."""
    dropped: dict[str, int]
    """Given up, by reason."""
    finished: bool


def ingest(
    captions: Iterable[Caption | Dropped],
    target: StepFolder,
    shard_size: int,
    on_progress: Callable[[IngestSummary], None] | None = None,
) -> IngestSummary:
    """Cuts a corpus into caption shards `000000`, `000001`, ... of `shard_size`, in its order.

    A caption whose key was seen before is dropped (`duplicate_caption`); so is each `Dropped` of
    the reader. Done again after an interruption it reads the corpus from its beginning and writes
    only the missing shards; once `target.complete()` is known it returns without reading. The
    identity of `target` must hold the corpus's identity and `shard_size`.

    Args:
        on_progress: called after every shard, written or found.

    Raises:
        InputError: the corpus has no usable caption, or differs from the one that the committed
            shards were cut from.
    """
    raise NotImplementedError
