"""An optional step between nouns and images that limits the number of prompts per noun.

Captions mention men, tables and streets thousands of times as often as cactuses, and image
generation is nearly all of a build's cost. This is the only step that processes its shards in
order, because each decision depends on earlier ones; it reads only text and is fast.

It can also reorder the prompts so that nouns take turns, and a build that is stopped half-way has
references of all of them.
"""

import base64
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from ovref.config import STRICT
from ovref.contract import Dropped, Stage
from ovref.errors import InputError
from ovref.records import Noun, Prompt
from ovref.run_shard import run_shard
from ovref.storage.ahead import read_ahead
from ovref.storage.commits import Commit
from ovref.storage.scratch import scratch_folder
from ovref.storage.steps import StepFolder

SPOOLS = 128
"""Files that reordering distributes the prompts to; one at a time is held in memory."""


@dataclass(frozen=True, kw_only=True)
class SelectPrompts:
    """Settings of the step, and its identity (`identity.spec_identity`)."""

    __pydantic_config__ = STRICT
    name: ClassVar[str] = "select_prompts"
    version: ClassVar[int] = 1

    max_per_noun: int | None = None
    """A prompt is kept while one of its nouns has been kept fewer times than this; None keeps
    all."""
    order: Literal["corpus", "rare_first"] = "corpus"
    """`corpus` keeps the order of the corpus. `rare_first` takes a first prompt for every noun,
    then a second one, and so on, so that a noun with three captions does not come after the
    thousandth
    caption of the most frequent noun."""

    def __post_init__(self) -> None:
        if self.max_per_noun is None and self.order == "corpus":
            raise ValueError("either max_per_noun or order must be given, or nothing is selected")
        if self.max_per_noun is not None and self.max_per_noun < 1:
            raise ValueError(f"max_per_noun must be at least 1, found {self.max_per_noun}")


def select_prompts(
    spec: SelectPrompts,
    source: StepFolder,
    target: StepFolder,
    on_progress: Callable[[Commit], None] | None = None,
) -> None:
    """Selects from the prompts of `source`, shard by shard in order, until `target` is complete.

    Prompts that are not kept are dropped (`nouns_capped`). After an interruption, the next call
    resumes with the missing shards. Memory: a count for each noun and, to reorder, at most 20
    bytes for each prompt and the lines of one spool.

    Args:
        on_progress: called after every shard, whether written now or found.

    Raises:
        InputError: the shards of `source` are not complete, so the order is not known.
        StorageError, AccountingError: as `run_shard`.
    """
    shards = source.complete()
    if shards is None:
        raise InputError(
            f"{source.store.url} is not complete: selecting needs all of its shards, in order"
        )
    if spec.order == "rare_first":
        _rare_first(spec, source, target, shards, on_progress)
    else:
        _in_place(spec, source, target, shards, on_progress)
    target.finish(shards)


def _in_place(
    spec: SelectPrompts,
    source: StepFolder,
    target: StepFolder,
    shards: list[str],
    on_progress: Callable[[Commit], None] | None,
) -> None:
    kept: Counter[str] = Counter()
    for shard in shards:
        commit = run_shard([_under_the_cap(spec, kept)], source, target, shard)
        # Counted from the committed shard, which an earlier or a concurrent run may have written.
        if commit.outputs:
            nouns_of_prompts = target.table(shard, ["nouns"])["nouns"].to_pylist()
            kept.update(noun["text"] for nouns in nouns_of_prompts for noun in nouns)
        if on_progress is not None:
            on_progress(commit)


def _under_the_cap(spec: SelectPrompts, kept_before: Counter[str]) -> Stage:
    def select(records: Iterator[Prompt]) -> Iterator[Prompt | Dropped]:
        kept = kept_before.copy()
        for prompt in records:
            if _turn(spec, kept, [noun.text for noun in prompt.nouns]) is None:
                yield Dropped(prompt.key, "nouns_capped")
            else:
                yield prompt

    return select


def _turn(spec: SelectPrompts, kept: Counter[str], nouns: list[str]) -> int | None:
    """How often the rarest of these nouns was kept, and counts them; None if it reached the cap."""
    turn = min((kept[noun] for noun in nouns), default=None)
    if turn is None or (spec.max_per_noun is not None and turn >= spec.max_per_noun):
        return None
    kept.update(nouns)
    return turn


def _rare_first(
    spec: SelectPrompts,
    source: StepFolder,
    target: StepFolder,
    shards: list[str],
    on_progress: Callable[[Commit], None] | None,
) -> None:
    """Writes shards of the source's size, under the source's names; the last ones may be empty.

    A prompt that is not kept is dropped in the shard that it came from.
    """
    ranks, begins = _ranks(spec, source, shards)
    size = max(int(np.diff(begins).max(initial=0)), 1)
    together = -(-len(shards) // SPOOLS)
    done = set(target.committed())
    for shard in done & set(shards):
        if on_progress is not None:
            on_progress(target.required(shard))
    with scratch_folder() as folder:
        spools = [Path(folder, f"{at:06d}") for at in range(0, len(shards), together)]
        wanted = [
            not done.issuperset(shards[at : at + together])
            for at in range(0, len(shards), together)
        ]
        with ExitStack() as opened:
            files = [
                opened.enter_context(open(path, "w", encoding="utf-8")) if needed else None
                for path, needed in zip(spools, wanted, strict=True)
            ]
            for number, shard in enumerate(shards if any(wanted) else []):
                for rank, prompt in zip(
                    ranks[begins[number] : begins[number + 1]], source.read(shard), strict=True
                ):
                    file = files[rank // size // together] if rank >= 0 else None
                    if file is not None and isinstance(prompt, Prompt):
                        file.write(_line(int(rank), prompt))
        for group, path in enumerate(spools):
            if not wanted[group]:
                continue
            lines = _of_spool(path)
            path.unlink()
            for number in range(group * together, min((group + 1) * together, len(shards))):
                if shards[number] in done:
                    continue
                here = range(number * size, (number + 1) * size)
                kept = [_prompt(lines.pop(rank)) for rank in here if rank in lines]
                drops = _dropped(source, shards[number], ranks[begins[number] : begins[number + 1]])
                inputs = len(kept) + len(drops)
                commit = target.commit(shards[number], kept, inputs=inputs, drops=drops)
                if on_progress is not None:
                    on_progress(commit)


def _ranks(
    spec: SelectPrompts, source: StepFolder, shards: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """New position of every prompt, -1 if it is not kept; and the start of each shard."""
    kept: Counter[str] = Counter()
    turns = array("i")
    begins = [0]
    for table in read_ahead(source.table, shards):
        if table.num_rows:
            for nouns in table["nouns"].to_pylist():
                turn = _turn(spec, kept, [noun["text"] for noun in nouns])
                turns.append(-1 if turn is None else turn)
        begins.append(len(turns))
    turn_n = np.frombuffer(turns, dtype=np.int32)
    order = np.argsort(turn_n, kind="stable")[int((turn_n < 0).sum()) :]
    ranks = np.full(len(turn_n), -1, dtype=np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return ranks, np.array(begins)


def _dropped(source: StepFolder, shard: str, ranks: np.ndarray) -> list[Dropped]:
    keys = source.table(shard, ["key"])["key"].to_pylist()
    return [Dropped(key, "nouns_capped") for key, rank in zip(keys, ranks, strict=True) if rank < 0]


def _line(rank: int, prompt: Prompt) -> str:
    tree = asdict(prompt)
    if prompt.image is not None:
        tree["image"] = base64.b64encode(prompt.image).decode()
    return f"{rank} {json.dumps(tree)}\n"


def _of_spool(path: Path) -> dict[int, str]:
    """Lines by rank, as text, which takes less than half the memory of prompts."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            rank, _, tree = line.partition(" ")
            found[int(rank)] = tree
    return found


def _prompt(line: str) -> Prompt:
    tree = json.loads(line)
    nouns = tuple(Noun(**noun) for noun in tree["nouns"])
    image = None if tree["image"] is None else base64.b64decode(tree["image"])
    return Prompt(**tree | {"nouns": nouns, "image": image})
