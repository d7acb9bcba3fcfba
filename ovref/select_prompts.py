"""An optional step between nouns and images that limits the number of prompts per noun.

Captions mention men, tables and streets thousands of times more often than cacti, and image
generation is nearly all of a build's cost. This is the only step that processes its shards in
order, because each decision depends on earlier ones; it reads only text and is fast. It can also
leave out prompts that nearly repeat an earlier one.

It can also choose the order in which later steps process the shards, so that a build that is
stopped early has references of as many nouns as possible. The order is that of the list in the
step's `complete.json`; the shards themselves do not depend on it.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from ovref.ahead import map_ahead
from ovref.config import STRICT
from ovref.errors import InputError
from ovref.identity import ADDED_LATER
from ovref.ops.near_captions import NearCaptions, Sketch
from ovref.run_shard import run_shard
from ovref.storage.commits import Commit
from ovref.storage.steps import StepFolder
from ovref_inference.ranges import require_at_least, require_within

COUNTED = 1 << 16
"""Number of prompts per noun beyond which further ones have no value for the order of shards."""


@dataclass(frozen=True, kw_only=True)
class SelectPrompts:
    """Settings of the step, which are also its identity (`identity.spec_identity`)."""

    __pydantic_config__ = STRICT
    name: ClassVar[str] = "select_prompts"
    version: ClassVar[int] = 2

    max_per_noun: int | None = None
    """A prompt is kept while one of its nouns has been kept fewer times than this; None keeps
    all."""
    order: Literal["corpus", "rare_first"] = "corpus"
    """Order in which later steps process the shards. `corpus` keeps that of the captions.
    `rare_first` starts with the shards whose nouns have had the fewest prompts so far, so that a
    build that is stopped early has more nouns, and more references of rare ones. Prompts stay in
    their shards; the effect is greater with smaller shards (`shard_size`)."""
    near_duplicates: float | None = field(default=None, metadata=ADDED_LATER)
    """A prompt is dropped if an earlier one that is kept has the same nouns and at least this
    Jaccard similarity of the words (those in common over those of either), at least 0.5; 0.8 is
    one word in ten exchanged. None keeps all but equal captions. See `ops.near_captions`."""

    def __post_init__(self) -> None:
        if self.max_per_noun is None and self.order == "corpus" and self.near_duplicates is None:
            raise ValueError(
                "either max_per_noun, order or near_duplicates must be given, or nothing is "
                "selected"
            )
        if self.max_per_noun is not None:
            require_at_least("max_per_noun", self.max_per_noun, 1)
        if self.near_duplicates is not None:
            require_within("near_duplicates", self.near_duplicates, 0.5, 1)


def select_prompts(
    spec: SelectPrompts,
    source: StepFolder,
    target: StepFolder,
    on_progress: Callable[[Commit], None] | None = None,
) -> None:
    """Selects prompts from every shard of `source`, until `target` is complete.

    Prompts of which the cap has enough, or that have no noun, are dropped as `nouns_capped`, of the
    rest those that repeat an earlier one as `near_duplicate_caption`; they do not count towards the
    cap or the order. After an interruption, the next call makes the missing shards. Memory: a count
    per noun, 8 bytes per dropped prompt, 8 bytes per noun of each shard to choose an order, and
    about 85 bytes per prompt to find near-duplicates.

    Args:
        on_progress: called after every shard, whether new or already committed.

    Raises:
        InputError: `source` is not complete, so the order is unknown.
        StorageError, AccountingError: see `run_shard`.
    """
    shards = source.complete()
    if shards is None:
        raise InputError(
            f"{source.store.url} is not complete: selecting needs all of its shards, in order"
        )
    choice = _choose(spec, source, shards)

    def make(shard: str) -> Commit:
        dropped = choice.dropped[shard].items()
        without = {number: reason for reason, numbers in dropped for number in numbers}
        return run_shard([], source, target, shard, without=without)

    for commit in map_ahead(make, shards):
        if on_progress is not None:
            on_progress(commit)
    target.finish(_rare_first(choice) if spec.order == "rare_first" else shards)


@dataclass(frozen=True)
class _Choice:
    dropped: dict[str, dict[str, array]]
    """Indices of the prompts of each shard that are dropped, by reason."""
    kept: dict[str, int]
    """Number of prompts kept in each shard."""
    nouns: dict[str, np.ndarray]
    """(2, n) int32: noun codes of the prompts kept in each shard, and their counts."""


def _choose(spec: SelectPrompts, source: StepFolder, shards: list[str]) -> _Choice:
    had: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    choice = _Choice({}, {}, {})
    near: NearCaptions | None = None
    columns = ["nouns"]
    if spec.near_duplicates is not None:
        prompts = sum(commit.outputs for commit in source.commits().values())
        near, columns = NearCaptions(prompts, spec.near_duplicates), ["nouns", "caption"]
    tables = map_ahead(lambda shard: source.table(shard, columns), shards)
    for shard, table in zip(shards, tables, strict=True):
        capped, repeated, kept, here = array("q"), array("q"), 0, Counter[str]()
        found = table["nouns"].to_pylist() if table.num_rows else []
        nouns = [[noun["text"] for noun in of_prompt] for of_prompt in found]
        sketches: list[Sketch] = []
        if near is not None and nouns:
            sketches = near.sketches(table["caption"].to_pylist(), nouns)
        for number, texts in enumerate(nouns):
            least = min((had[text] for text in texts), default=None)
            if least is None or (spec.max_per_noun is not None and least >= spec.max_per_noun):
                capped.append(number)
                continue
            if near is not None:
                if near.has(sketches[number]):
                    repeated.append(number)
                    continue
                near.add(sketches[number])
            kept += 1
            had.update(texts)
            here.update(texts)
        choice.dropped[shard] = {"nouns_capped": capped, "near_duplicate_caption": repeated}
        choice.kept[shard] = kept
        if spec.order == "rare_first":
            ids = [numbers.setdefault(text, len(numbers)) for text in here]
            choice.nouns[shard] = np.array([ids, list(here.values())], dtype=np.int32)
    return choice


def _rare_first(choice: _Choice) -> list[str]:
    """Greedy order of the shards by value per prompt, where a noun's n-th prompt has value 1 / n.

    The total value is monotone and submodular, so the greedy choice is near-optimal for every
    number of shards (Nemhauser, Wolsey and Fisher 1978), and a shard's value never increases: its
    last known value is an upper bound, so only the top shards are evaluated again (Minoux 1978).
    Values are integers, so that every machine finds the same order.
    """
    total = np.zeros(COUNTED + 1, dtype=np.int64)
    total[1:] = np.cumsum((1 << 32) // np.arange(1, COUNTED + 1))
    nouns = 1 + max((int(ids.max()) for ids, _ in choice.nouns.values() if ids.size), default=-1)
    had = np.zeros(nouns, dtype=np.int64)

    def value(shard: str) -> float:
        ids, counts = choice.nouns[shard]
        before = total[np.minimum(had[ids], COUNTED)]
        after = total[np.minimum(had[ids] + counts, COUNTED)]
        return int((after - before).sum()) / max(1, choice.kept[shard])

    # Ties go to the earliest in the corpus.
    waiting = [(-value(shard), place, shard) for place, shard in enumerate(choice.nouns)]
    heapq.heapify(waiting)
    order = []
    while waiting:
        _, place, shard = waiting[0]
        now = (-value(shard), place, shard)
        heapq.heapreplace(waiting, now)
        if waiting[0] == now:
            heapq.heappop(waiting)
            ids, counts = choice.nouns[shard]
            had[ids] += counts
            order.append(shard)
    return order
