"""An optional step between nouns and images: no more prompts of common nouns than are of use.

Captions speak of men, tables and streets thousands of times as often as of cactuses, and drawing
is nearly all of a build's cost. This step is the one that must look at its shards in order, since
what it keeps depends on what it has kept; it reads text alone and is quick.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ovref.config import STRICT
from ovref.contract import Dropped, Stage
from ovref.errors import InputError
from ovref.records import Prompt
from ovref.run_shard import run_shard
from ovref.storage.steps import Commit, StepFolder


@dataclass(frozen=True, kw_only=True)
class SelectPrompts:
    """What the step's identity is made of (`identity.spec_identity`)."""

    __pydantic_config__ = STRICT
    name: ClassVar[str] = "select_prompts"
    version: ClassVar[int] = 1

    max_per_noun: int
    """A prompt is kept while one of its nouns has been kept fewer times than this."""

    def __post_init__(self) -> None:
        if self.max_per_noun < 1:
            raise ValueError(f"max_per_noun must be at least 1, found {self.max_per_noun}")


def select_prompts(
    spec: SelectPrompts,
    source: StepFolder,
    target: StepFolder,
    on_progress: Callable[[Commit], None] | None = None,
) -> None:
    """Selects from the prompts of `source`, shard by shard in order, until `target` is complete.

    Prompts not kept are dropped (`nouns_capped`). Done again after an interruption it goes on
    with the first missing shard, with the counts that the committed ones hold.

    Args:
        on_progress: called after every shard, made or found.

    Raises:
        InputError: the shards of `source` are not complete, so the order is not known.
        StorageError, AccountingError: as `run_shard`.
    """
    shards = source.complete()
    if shards is None:
        raise InputError(
            f"{source.store.url} is not complete: selecting needs all of its shards, in order"
        )
    kept: Counter[str] = Counter()
    for shard in shards:
        commit = run_shard([_under_the_cap(spec, kept)], source, target, shard)
        # From what stands in the shard, since it may be of an earlier run or of a faster one.
        if commit.outputs:
            nouns_of_prompts = target.table(shard, ["nouns"])["nouns"].to_pylist()
            kept.update(noun["text"] for nouns in nouns_of_prompts for noun in nouns)
        if on_progress is not None:
            on_progress(commit)
    target.finish(shards)


def _under_the_cap(spec: SelectPrompts, kept_before: Counter[str]) -> Stage:
    def select(prompts: Iterator[Prompt]) -> Iterator[Prompt | Dropped]:
        kept = kept_before.copy()
        for prompt in prompts:
            if any(kept[noun.text] < spec.max_per_noun for noun in prompt.nouns):
                kept.update(noun.text for noun in prompt.nouns)
                yield prompt
            else:
                yield Dropped(prompt.key, "nouns_capped")

    return select
