"""`ovref coverage`: how well a collection covers each class of a list, the weakest first."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ovref.exchange.coverage import FEW, ClassCoverage
from ovref_pipelines.console import drawn

SHOWN = 3
"""Maximum number of other nouns listed per class."""
SAID = {
    "none": "have none",
    "borrowed": "borrow those of a near noun",
    "few": f"have fewer than {FEW}",
    "own": "have references of their own",
}


def text(rows: list[ClassCoverage]) -> str:
    """A table with a summary, for people."""
    from rich.table import Table

    table = Table(caption_justify="left", caption=_summary(rows))
    table.add_column("class", style="bold")
    table.add_column("references")
    for head in ("tight", "outliers"):
        table.add_column(head, justify="right")
    table.add_column("taken for")
    table.add_column("heat", justify="right")
    table.add_column("nearest class")
    if asked := any(row.clip for row in rows):
        table.add_column("CLIP", justify="right")
    for row in rows:
        nearest = f"{row.nearest} {_cosine(row.similarity)}" if row.nearest else ""
        taken = f"{row.taken_for} {row.taken_share:.0%}" if row.taken_for else ""
        clip = f"{row.clip.cosine:.2f} {row.clip.first:.0%}" if row.clip else ""
        table.add_row(
            row.name, _stands(row), _cosine(row.tightness),
            f"{row.outliers:.0%}" if row.outliers else "", taken, _cosine(row.contrast),
            f"{nearest}{' (!)' * row.confusable}", *([clip] if asked else []),
        )  # fmt: skip
    return drawn(table)


def as_json(rows: list[ClassCoverage]) -> str:
    """The rows, for programs."""
    classes = [asdict(row) | {"confusable": row.confusable} for row in rows]
    return json.dumps({"verdicts": _counted(rows), "classes": classes}, indent=1,
                      ensure_ascii=False)  # fmt: skip


def change_text(
    before: Sequence[ClassCoverage], after: Sequence[ClassCoverage], target: int
) -> str:
    """How the classes that had fewer references than `target` have changed, as a table."""
    from rich.table import Table

    now = {row.name: row for row in after}
    changed = [(row, now[row.name]) for row in before if row.own < target]
    reached = sum(row.own >= target for _, row in changed)
    table = Table(
        caption_justify="left",
        caption=f"{reached} of {len(changed)} weak classes have {target} references or more now",
    )
    table.add_column("class", style="bold")
    for head in ("references", "tight", "nearest class", "cosine"):
        table.add_column(head)
    for old, new in changed:
        table.add_row(
            old.name, _change(f"{old.own:,}", f"{new.own:,}"),
            _change(_cosine(old.tightness), _cosine(new.tightness)),
            _change(old.nearest or "", f"{new.nearest or ''}{' (!)' * new.confusable}"),
            _change(_cosine(old.similarity), _cosine(new.similarity)),
        )  # fmt: skip
    return drawn(table)


def _change(old: str, new: str) -> str:
    return new if old == new else f"{old or '-'} -> {new or '-'}"


def _counted(rows: list[ClassCoverage]) -> dict[str, int]:
    found: Counter[Any] = Counter(row.verdict for row in rows)
    return {verdict: found[verdict] for verdict in SAID}


def _summary(rows: list[ClassCoverage]) -> str:
    parts = [f"{count} {SAID[verdict]}" for verdict, count in _counted(rows).items() if count]
    if confusable := sum(row.confusable for row in rows):
        parts.append(f"{confusable} (!) may be taken for the nearest class")
    return f"{len(rows)} classes: {', '.join(parts)}"


def _stands(row: ClassCoverage) -> str:
    """How many references there are and where they come from, in words."""
    if row.noun is None or row.verdict == "none":
        return f"none (nearest: {row.noun})" if row.noun else "none"
    if row.verdict == "borrowed":
        text = f"{row.by_neighbours:,} borrowed of {row.noun}"
    else:
        text = f"{row.own:,} {row.verdict}"
        if row.by_synonym:
            text += f", {row.by_synonym:,} by synonyms"
    if row.others:
        rest = f" and {len(row.others) - SHOWN} more" if len(row.others) > SHOWN else ""
        text += f", with {', '.join(row.others[:SHOWN])}{rest}"
    return text


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
