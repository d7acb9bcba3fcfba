"""`ovref coverage`: how well a collection covers each class of a list, the weakest first."""

import io
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

from ovref.exchange.coverage import FEW, ClassCoverage

WIDTH = 110
"""Width of a table if stdout is not a terminal."""
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
    from rich.console import Console
    from rich.table import Table

    table = Table(caption_justify="left", caption=_summary(rows))
    table.add_column("class", style="bold")
    table.add_column("references")
    for head in ("by name", "synonym", "neighbour", "tight"):
        table.add_column(head, justify="right")
    table.add_column("nearest class")
    table.add_column("cosine", justify="right")
    for row in rows:
        table.add_row(
            row.name, _stands(row), *(f"{count:,}" if count else "" for count in (
                row.by_name, row.by_synonym, row.by_neighbours
            )),
            _cosine(row.tightness), f"{row.nearest or ''}{' (!)' * row.confusable}",
            _cosine(row.similarity),
        )  # fmt: skip
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    written = io.StringIO()
    Console(file=written, width=width).print(table)
    return written.getvalue().rstrip()


def as_json(rows: list[ClassCoverage]) -> str:
    """The rows, for programs."""
    classes = [asdict(row) | {"confusable": row.confusable} for row in rows]
    return json.dumps({"verdicts": _counted(rows), "classes": classes}, indent=1,
                      ensure_ascii=False)  # fmt: skip


def _counted(rows: list[ClassCoverage]) -> dict[str, int]:
    found: Counter[Any] = Counter(row.verdict for row in rows)
    return {verdict: found[verdict] for verdict in SAID}


def _summary(rows: list[ClassCoverage]) -> str:
    parts = [f"{count} {SAID[verdict]}" for verdict, count in _counted(rows).items() if count]
    if confusable := sum(row.confusable for row in rows):
        parts.append(f"{confusable} (!) may be taken for the nearest class")
    return f"{len(rows)} classes: {', '.join(parts)}"


def _stands(row: ClassCoverage) -> str:
    """Where the references come from, in words."""
    if row.noun is None or row.verdict == "none":
        return f"none (nearest: {row.noun})" if row.noun else "none"
    others = ""
    if row.others:
        rest = f" and {len(row.others) - SHOWN} more" if len(row.others) > SHOWN else ""
        others = f", with {', '.join(row.others[:SHOWN])}{rest}"
    return f"{row.verdict} ({row.noun}{others})" if row.verdict != "own" else f"own{others}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
