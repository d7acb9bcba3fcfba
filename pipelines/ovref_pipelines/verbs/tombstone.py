"""Deletes references of a collection, lists deletions and undoes them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovref.errors import InputError
from ovref_inference import ReferenceCollection
from ovref_inference.collection import store

NAMED = 12
"""Maximum number of nouns in a summary."""


def read_ids(path: str) -> list[int]:
    """Numbers of references in a text file, separated by white space or commas.

    Raises:
        InputError: the file cannot be read, or holds anything else.
    """
    try:
        words = re.findall(r"[^\s,]+", Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the numbers of references in {path}: {error}") from error
    if not words:
        raise InputError(f"{path} holds no number of a reference")
    bad = [word for word in words if not re.fullmatch("[0-9]{1,18}", word)]
    if bad:
        raise InputError(
            f"{path} must hold numbers of references, separated by white space or commas, found "
            f"{', '.join(repr(word) for word in bad[:5])}"
        )
    return [int(word) for word in words]


def wanted(
    place: str,
    *,
    ids: Sequence[int] | None,
    keys: Sequence[str] = (),
    sources: Sequence[str] = (),
    nouns: Sequence[str] = (),
    deleted: bool = False,
) -> list[int]:
    """The references of the collection at `place` that match any of the four, sorted.

    Args:
        ids: numbers; keys, sources, nouns: as `ReferenceCollection.ids_of`.
        deleted: whether to return deleted references instead of the others.

    Raises:
        InputError: nothing was named, or it names no such reference.
    """
    nouns = [" ".join(noun.lower().split()) for noun in nouns]
    named = {"keys": keys, "sources": sources, "nouns": nouns}
    if ids is None and not any(named.values()):
        raise InputError("select references by --ids, --key, --source or --noun")
    deleted_ids = store.read_tombstones(place)["id"]
    with ReferenceCollection.open(place) as collection:
        found = collection.ids_of(**named, deleted=deleted)
        given = np.unique(np.asarray([] if ids is None else ids, dtype=np.int64))
        bad = given[~collection.has(given)]
    if len(bad):
        raise InputError(f"{place} has no references {bad[:10].tolist()}")
    given = given[np.isin(given, deleted_ids) == deleted]
    chosen = np.union1d(given, found).tolist()
    if not chosen:
        asked = "; ".join(f"{what}: {', '.join(names)}" for what, names in named.items() if names)
        kind = "deleted reference" if deleted else "reference"
        raise InputError(f"{place} has no {kind} of the {asked or 'numbers given'}")
    return chosen


def delete(place: str, ids: list[int], reason: str, *, dry_run: bool = False) -> str:
    """Deletes references and describes what was or would be done. The reason is stored as one
    line."""
    reason = " ".join(reason.split())
    if dry_run:
        return f"{len(ids)} references would be deleted: {_nouns(place, ids)}"
    store.tombstone(place, ids, reason)
    return (
        f"{len(ids)} references deleted; reducing again with base={place} stores prototypes "
        "without them; until then they are recomputed whenever the collection is opened"
    )


def undo(place: str, ids: list[int], *, dry_run: bool = False) -> str:
    """Undoes deletions and describes what was or would be done."""
    if dry_run:
        return f"{len(ids)} deletions would be undone: {_nouns(place, ids)}"
    store.untombstone(place, ids)
    return f"{len(ids)} deletions undone"


def listed(place: str) -> str:
    """The deletions, for people: the reasons, then a line per reference."""
    found = store.read_tombstones(place)
    reasons = Counter(found["reason"])
    lines = [f"{len(found['id'])} references of {place} are deleted"]
    lines += [f"  {count} because of: {reason}" for reason, count in reasons.most_common()]
    lines += [
        f"{number}\t{reason}" for number, reason in zip(found["id"], found["reason"], strict=True)
    ]
    return "\n".join(lines)


def listed_json(place: str) -> str:
    """The deletions, for programs: a list of objects with `id` and `reason`."""
    found = store.read_tombstones(place)
    pairs = zip(found["id"], found["reason"], strict=True)
    rows = [{"id": number, "reason": reason} for number, reason in pairs]
    return json.dumps(rows, ensure_ascii=False, indent=1)


def _nouns(place: str, ids: list[int]) -> str:
    """Counts by noun, the largest first."""
    with ReferenceCollection.open(place) as collection:
        names = collection.nouns
        counts = Counter(names[row] for row in collection.noun_rows(np.asarray(ids)).tolist())
    parts = [f"{count} {noun}" for noun, count in counts.most_common(NAMED)]
    return ", ".join(parts) + (", ..." if len(counts) > NAMED else "")
