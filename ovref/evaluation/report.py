"""Tables of an evaluation, as aligned text and as Markdown."""

import math
from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "miou": "mIoU %",
    "mean_accuracy": "class accuracy %",
    "pixel_accuracy": "pixel accuracy %",
    "seen": "seen %",
    "unseen": "unseen %",
    "hiou": "hIoU %",
    "boundary_iou": "boundary IoU %",
    "pq": "PQ %",
    "sq": "SQ %",
    "rq": "RQ %",
    "ap": "mask AP %",
}
OWN = "own references"
RATIOS = {"over_text_only": "the better text-only row", "over_oracle": "oracle masks"}


def text(result: dict[str, Any]) -> str:
    """The result of `evaluate` as aligned text for a terminal."""
    blocks = [result["caption"], f"{result['data']}; {_collection_line(result)}"]
    blocks += [f"Protocol: {result['protocol']}", ""]
    for rows in _tables(result):
        blocks += [*aligned(rows), ""]
    return "\n".join([*blocks, *_notes(result)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal: a column of text, then columns of numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The result of `evaluate` as a Markdown page."""
    lines = ["# Evaluation", "", f"*{result['caption']}*", ""]
    lines += [f"{result['data']}; {_collection_line(result)}. Protocol: {result['protocol']}.", ""]
    for header, *rows in _tables(result):
        lines += [*markdown_table(header, rows), ""]
    for note in _notes(result):
        lines += [note, ""]
    lines += [f"## Classes, by {result['details_of']}", ""]
    header, *rows = _class_table(result["per_class"])
    lines += [*markdown_table(header, rows), ""]
    lines += [
        f"Class list {result['class_list']}. Labels: {result['convention']} "
        f"({result['class_fingerprint']}). Protocol {result['protocol_fingerprint']}.",
        "",
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: a column of text, then columns of numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; empty for None."""
    return "" if value is None else f"{100 * value:.1f}"


def rounded(value: float) -> float | None:
    """A fraction as results hold it: to four decimals, None for NaN."""
    return None if math.isnan(value) else round(float(value), 4)


def _tables(result: dict[str, Any]) -> list[list[list[str]]]:
    """The cells of each table, row by row, with its header."""
    metrics = [metric for metric in COLUMNS if metric in result["rows"][0]]

    def rows(title: str, named: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
        header = [title, *(COLUMNS[metric] for metric in metrics)]
        return [header, *([name, *(percent(row[m]) for m in metrics)] for name, row in named)]

    tables = [rows("method", [(row["name"], row) for row in result["rows"]])]
    used = result["spec"]["fossil"]
    for name, found in result["ablations"].items():
        if found:
            title = f"FOSSIL, {name if name == 'gamma' else name.upper()}"
            marks = [f"{row[name]}{' (as above)' * (row[name] == used[name])}" for row in found]
            tables.append(rows(title, list(zip(marks, found, strict=True))))
    return tables


def _class_table(classes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Worst classes first; those that do not occur last."""
    ordered = sorted(classes, key=lambda row: 2.0 if row["iou"] is None else row["iou"])
    table = [["class", "IoU %", "pixels", "references", "taken for most often", "share %"]]
    for row in ordered:
        references = f"{row['references']:,}"
        if row["support"] not in ("", OWN):
            references += f", {row['support']}"
        table.append([
            row["class"], percent(row["iou"]), f"{row['pixels']:,}", references,
            row["most_confused_with"], percent(row["confused_share"]),
        ])  # fmt: skip
    return table


def _collection_line(result: dict[str, Any]) -> str:
    references, fossil = result["collection"]["references"], result["spec"]["fossil"]
    more = result["collection"].get("fallback_references")
    if result["spec"]["method"] == "knn":
        settings = result["spec"]["knn"]
        return (
            f"{references} patches of training images, {settings['neighbours']} neighbours, "
            f"temperature {settings['temperature']}"
        )
    counted = f"{references} references" + (f" and {more} of the fallback" if more else "")
    if not any(name.startswith("fossil") for name in result["spec"]["rows"]):
        return counted
    return (
        f"{counted}, N = {fossil['n']}, K = {fossil['k']}, "
        f"gamma = {fossil['gamma']}, "
        + ("no floor" if fossil["floor"] is None else f"floor of support {fossil['floor']}")
    )


def _notes(result: dict[str, Any]) -> list[str]:
    parts = [f"{value:.2f} x {RATIOS[name]}" for name, value in result["ratios"].items()]
    notes = []
    if "fossil" in result["spec"]["rows"] and result["spec"]["method"] == "collection":
        notes = ["FOSSIL's mIoU has no ratio to its bounds, which are 0 or not defined."]
    if parts:
        notes = ["FOSSIL's mIoU is " + " and ".join(parts) + "."]
    strange = [f"{name}: {how}" for name, how in result["support"].items() if how != OWN]
    if strange:
        notes.append("Classes without references of their own: " + "; ".join(strange) + ".")
    return notes
