"""The references that a reduction reads: new shards of their steps, or what takes their place."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from ovref.ahead import map_ahead
from ovref.errors import InputError, MismatchError
from ovref.identity import fingerprint
from ovref.reduce.made_from import MadeFrom
from ovref.storage.commits import Commit
from ovref.storage.steps import StepFolder


class References(Protocol):
    """New references of a collection, in their order."""

    @property
    def where(self) -> str:
        """The URL that they are read from, for messages."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def identity(self) -> dict[str, Any] | None:
        """All that affects their bytes, as plain values; None if there are no new shards."""

    @property
    def drops(self) -> dict[str, int]:
        """The embed step's drops on the way to them, of records and regions, by reason."""

    @property
    def passed_filters(self) -> bool:
        """Whether they have been filtered when another collection was made of them, so that they
        are not filtered again."""

    def tables(self) -> Iterator[pa.Table]:
        """Sidecars of references (`storage.codec.COLUMNS`), none empty, with the column `shard`."""


class Divisible(References, Protocol):
    """References that workers read in groups. Picklable."""

    @property
    def name(self) -> str:
        """What they are called in messages."""

    @property
    def changed(self) -> bool:
        """Whether they are no longer there as they were when a reduction of them began."""

    def groups(self, rows: int) -> Sequence["Divisible"]:
        """All of them, in order, in non-empty groups of about `rows` references."""

    def nouns(self) -> Iterator[pa.StringArray]:
        """The nouns of all of them, in parts."""


@dataclass(frozen=True)
class Shards:
    """The shards of one references step that go into a collection."""

    step: StepFolder
    commits: dict[str, Commit]
    """Commits by shard, in the order of the names."""

    @property
    def where(self) -> str:
        return self.step.store.url

    @property
    def rows(self) -> int:
        return sum(commit.outputs for commit in self.commits.values())

    @property
    def identity(self) -> dict[str, Any] | None:
        if not self.commits:
            return None
        files = {
            shard: {extension: file.sha256 for extension, file in commit.files.items()}
            for shard, commit in self.commits.items()
        }
        return {
            "step": self.step.name,
            "fingerprint": self.step.fingerprint,
            "shards": list(self.commits),
            "content": fingerprint(files),
        }

    @property
    def drops(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for commit in self.commits.values():
            counts.update(commit.dropped)
            counts.update(commit.dropped_parts)
        return dict(counts)

    def label(self, shard: str) -> str:
        """The shard's name in the column `shard` of a collection, wherever the step is stored."""
        return f"{self.step.fingerprint[:12]}/{shard}"

    @property
    def full(self) -> list[str]:
        """Names of the shards that hold references."""
        return [shard for shard, commit in self.commits.items() if commit.outputs]

    @property
    def name(self) -> str:
        return f"the shards {self.full[0]} to {self.full[-1]} of {self.where}"

    @property
    def changed(self) -> bool:
        return False  # what a marker names stays

    @property
    def passed_filters(self) -> bool:
        return False

    def groups(self, rows: int) -> list["Shards"]:
        found: list[Shards] = []
        some: dict[str, Commit] = {}
        for shard in self.full:
            some[shard] = self.commits[shard]
            if sum(commit.outputs for commit in some.values()) >= rows:
                found.append(Shards(self.step, some))
                some = {}
        return [*found, Shards(self.step, some)] if some else found

    def nouns(self) -> Iterator[pa.StringArray]:
        def read(shard: str) -> pa.StringArray:
            with self.step.table_by_ranges(shard) as file:
                column = file.read(columns=["noun.text"], use_threads=False).column("noun")
            return column.combine_chunks().field("text")

        yield from map_ahead(read, self.full)

    def tables(self) -> Iterator[pa.Table]:
        for shard, table in zip(self.full, map_ahead(self.step.table, self.full), strict=True):
            labels = pa.array([self.label(shard)] * len(table), pa.string())
            yield table.append_column("shard", labels)


def new_shards(
    step: StepFolder, made_from: MadeFrom, known: Sequence[dict[str, Any]], allow_incomplete: bool
) -> Shards:
    """The shards of a step that a collection does not have yet.

    Args:
        known: the collection's inputs, as its manifest has them.

    Raises:
        InputError: the step lacks shards, and that is not allowed.
        MismatchError: it was made in another way.
    """
    commits = step.commits()
    _check_made_by(made_from.embed, step)
    if step.complete() is None and not allow_incomplete:
        raise InputError(
            f"{step.store.url} is not complete: {len(commits)} shards are committed, more may "
            "follow; finish the build, or set allow_incomplete=true to use the committed ones"
        )
    there = {
        shard
        for earlier in known
        if earlier["fingerprint"] == step.fingerprint
        for shard in earlier["shards"]
    }
    return Shards(step, {shard: commits[shard] for shard in sorted(commits.keys() - there)})


def dropped_before(inputs: Sequence[References]) -> dict[str, int]:
    """The embed step's drops of all inputs, by reason."""
    counts: Counter[str] = Counter()
    for one in inputs:
        counts.update(one.drops)
    return dict(sorted(counts.items()))


def no_references(inputs: Sequence[References]) -> InputError:
    """The error for inputs without a reference."""
    steps = ", ".join(one.where for one in inputs)
    return InputError(
        f"expected references, found none in the committed shards of {steps}; the drop counts of "
        "the earlier steps say why"
    )


def different_widths(where: str, found: tuple[int, ...], before: tuple[int, ...]) -> InputError:
    """The error for embeddings of other widths than those before them."""
    return InputError(
        f"shard {where} has visual and textual embeddings of widths {found}, the shards before it "
        f"{before}: they were made by different encoders, so they cannot be in one collection"
    )


def _check_made_by(embed: dict[str, Any], step: StepFolder) -> None:
    """Raises MismatchError unless a stage of this identity made the step.

    Embeddings of different encoders cannot be compared, and the width need not reveal it.
    """
    stages = [one for one in step.identity.get("stages", []) if one["name"] == embed["name"]]
    if not stages:
        raise MismatchError(
            f"{step.store.url} was not made by the stage {embed['name']}, so it holds no references"
        )
    # Steps do not record what was added later, at its default.
    added: dict[str, Any] = {"part": "region", "norms": False}
    wanted, found = added | embed["fields"], added | stages[-1]["fields"]
    for name in ("visual", "text", "templates", "weights", "part", "norms"):
        if wanted[name] != found[name]:
            raise MismatchError(
                f"{step.store.url} was made with other settings: {name} was {found[name]} and is "
                f"now {wanted[name]}; restore the setting, or embed the images again into another "
                "folder"
            )
