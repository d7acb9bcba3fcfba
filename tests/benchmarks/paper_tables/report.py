"""The papers' tables in small, as a document: rows, and whether they stand in the paper's order.

An ordering is what a paper found between two of its rows. Here it is measured again and said to
hold, to be reversed, or to be undecided where an interval over the images holds zero. Why one is
reversed is for people to find out; what they found goes into the configuration and is printed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovref.evaluation.report import markdown_table, percent
from paper_tables.predictions import METRICS, Evaluation, difference

VERDICTS = ("as in the paper", "undecided", "the other way")
"""An interval above zero, one that holds zero, one below."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """One finding of a paper about two rows of a table."""

    key: str
    """Name of the ordering, unique in the document; reasons are given by it."""
    better: str
    """Row that the paper found to be better."""
    worse: str
    """Row that it found to be worse."""
    metric: str
    """`miou`, `pq`, or `seen` or `unseen` for the mIoU of these classes."""
    paper: str
    """The paper's own numbers, in words."""


def table(
    key: str,
    title: str,
    source: str,
    rows: Mapping[str, Evaluation],
    columns: Sequence[str],
    orderings: Sequence[Ordering] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One table as plain values, for JSON and for `markdown`.

    Args:
        key: name of the table, for files.
        title: heading.
        source: of which table or figure of which paper this is the small form.
        rows: by name, all of the same images.
        columns: metrics, keys of METRICS.
        orderings: between rows.
        notes: sentences about how the table was measured.

    Raises:
        KeyError: an ordering names a row that is not there.
    """
    evaluated = []
    for ordering in orderings:
        found = difference(rows[ordering.better], rows[ordering.worse], ordering.metric)
        evaluated.append(
            {
                "key": ordering.key,
                "better": ordering.better,
                "worse": ordering.worse,
                "metric": ordering.metric,
                "paper": ordering.paper,
                "difference": _rounded(found.value),
                "low": _rounded(found.low),
                "high": _rounded(found.high),
                "verdict": _verdict(found.low, found.high),
            }
        )
    return {
        "key": key,
        "title": title,
        "source": source,
        "columns": list(columns),
        "rows": [
            {"name": name} | {m: _rounded(evaluation.metrics.get(m)) for m in columns}
            for name, evaluation in rows.items()
        ],
        "orderings": evaluated,
        "notes": list(notes),
    }


def markdown(document: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """The document as a Markdown page.

    Args:
        document: `title`, `caption`, `facts` (sentences), `tables` and `pictures` (title -> file
            beside the page).
        reasons: of orderings that are not as in the paper, by key.
    """
    lines = [f"# {document['title']}", "", f"*{document['caption']}*", ""]
    lines += [f"- {fact}" for fact in document["facts"]] + [""]
    lines += _summary(document["tables"])
    for item in document["tables"]:
        lines += ["", f"## {item['title']}", "", f"{item['source']}", ""]
        lines += _rows(item)
        for note in item["notes"]:
            lines += ["", note]
        if item["orderings"]:
            lines += ["", *_orderings(item["orderings"], reasons)]
    for title, name in document["pictures"].items():
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    return "\n".join(lines) + "\n"


def _summary(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    verdicts = [ordering["verdict"] for item in tables for ordering in item["orderings"]]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS]
    return [
        f"Of {len(verdicts)} orderings of the papers: {', '.join(counts)}. An ordering is "
        "undecided where the 95 % interval of the difference (paired bootstrap over the images) "
        "holds zero."
    ]


def _rows(item: Mapping[str, Any]) -> list[str]:
    columns = item["columns"]
    best = {
        m: max((row[m] for row in item["rows"] if row[m] is not None), default=None)
        for m in columns
    }

    def cell(row: Mapping[str, Any], metric: str) -> str:
        text, is_best = percent(row[metric]), row[metric] == best[metric]
        return f"**{text}**" if text and is_best and len(item["rows"]) > 1 else text

    rows = [[row["name"], *(cell(row, m) for m in columns)] for row in item["rows"]]
    return markdown_table(["", *(f"{METRICS[m]} %" for m in columns)], rows)


def _orderings(orderings: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> list[str]:
    lines = ["| the paper's ordering | the paper | here | |", "|---|---|---|---|"]
    explained = []
    for one in orderings:
        difference = (
            f"{_signed(one['difference'])} ({_signed(one['low'])} to {_signed(one['high'])})"
        )
        name = f"{one['better']} above {one['worse']}, {METRICS[one['metric']]}"
        lines.append(f"| {name} | {one['paper']} | {difference} | {one['verdict']} |")
        if one["verdict"] != VERDICTS[0]:
            reason = reasons.get(one["key"], "Not explained.")
            explained.append(f"- {name}, {one['verdict']}: {reason}")
    return lines + (["", *explained] if explained else [])


def _verdict(low: float, high: float) -> str:
    return VERDICTS[0] if low > 0 else VERDICTS[2] if high < 0 else VERDICTS[1]


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:+.1f}"


def _rounded(value: float | None) -> float | None:
    """Four digits; None for what is not defined, since JSON knows no NaN."""
    return None if value is None or math.isnan(value) else round(float(value), 4)
