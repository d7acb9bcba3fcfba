"""Compares two evaluations of the same images: which is better, by how much, and where.

Intervals come from a paired bootstrap over images: both are measured on the same resampled images,
so that the difficulty of an image for both cancels out.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.config import parse
from ovref.errors import InputError
from ovref.evaluation.counting import IMAGES, SCORES
from ovref.evaluation.evaluate import draw, images_by_number
from ovref.evaluation.methods import Row, rows_of
from ovref.evaluation.metrics_semantic import shares
from ovref.evaluation.report import aligned, markdown_table, percent, rounded
from ovref.evaluation.spec import EvaluateSpec
from ovref.evaluation.totals import Overlaps, overlaps_of, scored_images
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, existing_step

SAMPLES = 1000
"""Number of bootstrap samples."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished evaluation, and its compared row."""

    folder: str
    spec: EvaluateSpec
    result: dict[str, Any]
    row: Row
    number: int
    """Index of the row."""
    images: StepFolder
    scores: StepFolder
    names: tuple[str, ...]
    """The images, in order."""


def open_run(folder: str, row: str = "") -> Run:
    """Opens the output of `ovref evaluate`.

    Args:
        folder: the output.
        row: name of a row of the table; empty takes the first.

    Raises:
        InputError: there is no finished evaluation, or it has no such row.
    """
    path = Path(folder) / "evaluation.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        spec = parse(EvaluateSpec, result["spec"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder} is not a finished evaluation: cannot read {path} ({error!r})"
        ) from error
    rows = rows_of(spec)
    titles = [one.title for one in rows]
    number = titles.index(row) if row in titles else 0 if not row else -1
    if number < 0:
        raise InputError(f"{folder} has no row {row!r}; its rows are {'; '.join(titles)}")
    store = Store.open(folder)
    images, scores = existing_step(store, IMAGES), existing_step(store, SCORES)
    if scores.complete() is None:
        raise InputError(f"{folder} is not finished: run its evaluation again to resume it")
    names = [
        name for shard in images.committed() for name in images.table(shard)["name"].to_pylist()
    ]
    return Run(
        folder=folder, spec=spec, result=result, row=rows[number], number=number,
        images=images, scores=scores, names=tuple(names),
    )  # fmt: skip


def compare(
    first: Run, second: Run, output: Path, pictures: int = 6, seed: int = 0
) -> dict[str, Any]:
    """Compares two runs and writes compare.json, compare.md, images.csv and pictures.

    Args:
        first, second: runs over the same images and classes, which may differ in collection,
            settings, row or protocol.
        output: folder, created if missing.
        pictures: number of images drawn for each side; 0 draws none.
        seed: seed of the resampling.

    Returns:
        The content of compare.json: metrics of both, differences with intervals, per-class and
        per-image differences.

    Raises:
        InputError: images or classes of the runs differ, or `output` is one of them.
    """
    _check_same(first, second)
    for run in (first, second):
        if output.resolve() == Path(run.folder).resolve():
            raise InputError(
                f"{output} is an evaluation, whose images.csv would be overwritten: compare into "
                "another folder"
            )
    classes = first.result["classes"]
    (a,), (b,) = (
        overlaps_of(scored_images(run.scores), [run.number], len(classes))
        for run in (first, second)
    )
    times_sn = bootstrap_times(len(first.names), seed)
    seen = first.result.get("seen")
    metrics = metrics_of(seen if seen == second.result.get("seen") else None)
    sampled = {name: (metric(a, times_sn), metric(b, times_sn)) for name, metric in metrics.items()}
    differences = {name: interval(*values) for name, values in sampled.items()}
    images = _per_image(a, b, first.names, differences["miou"]["value"])
    result = {
        "first": _about(first) | {name: rounded(one[0]) for name, (one, _) in sampled.items()},
        "second": _about(second) | {name: rounded(one[0]) for name, (_, one) in sampled.items()},
        "data": first.result["data"],
        "class_fingerprint": first.result["class_fingerprint"],
        "differences": differences,
        "per_class": _per_class(a, b, times_sn, classes),
        "images": images,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output / "compare.md").write_text(markdown(result), encoding="utf-8")
    with open(output / "images.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(images[0]))
        table.writeheader()
        table.writerows(images)
    if pictures:
        number = {name: place for place, name in enumerate(first.names)}
        for name, chosen in (("gained", images), ("lost", images[::-1])):
            sign = 1 if name == "gained" else -1
            picked = [one["image"] for one in chosen if sign * one["effect"] > 0][:pictures]
            if picked:
                _draw(first, second, [number[one] for one in picked], output / f"{name}.png")
    return result


def bootstrap_times(images: int, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """(1 + samples, images) float64: multiplicity of each image in the data set itself, which is
    first, and in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    times_sn = rng.multinomial(images, np.full(images, 1 / images), size=samples)
    return np.concatenate([np.ones((1, images)), times_sn])


def iou_of_samples(overlaps: Overlaps, times_sn: np.ndarray) -> np.ndarray:
    """(samples, classes) float64 IoU of bootstrap samples; NaN for classes that do not occur."""
    return shares(times_sn @ overlaps.right, times_sn @ overlaps.either)


def miou_of_samples(overlaps: Overlaps, times_sn: np.ndarray) -> np.ndarray:
    """(samples,) float64 mIoU of bootstrap samples."""
    return _means(iou_of_samples(overlaps, times_sn))


def _means(shares_sc: np.ndarray) -> np.ndarray:
    """(samples,) mean over the classes that are not NaN; NaN without any."""
    known = ~np.isnan(shares_sc)
    total = np.where(known, shares_sc, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), math.nan)


def accuracy_of_samples(overlaps: Overlaps, times_sn: np.ndarray) -> np.ndarray:
    """(samples,) float64 pixel accuracy of bootstrap samples."""
    return shares(times_sn @ overlaps.right.sum(1), times_sn @ overlaps.true.sum(1))


Metric = Callable[[Overlaps, np.ndarray], np.ndarray]
METRICS: dict[str, Metric] = {
    "miou": miou_of_samples,
    "pixel_accuracy": accuracy_of_samples,
}
TITLES = {
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
    "seen": "seen mIoU %",
    "unseen": "unseen mIoU %",
    "hiou": "hIoU %",
}
"""Titles of the metrics."""


def metrics_of(seen: Sequence[bool] | None) -> dict[str, Metric]:
    """What is compared: METRICS, and with a split the mIoU of seen and of unseen classes and their
    harmonic mean."""
    if seen is None:
        return METRICS
    chosen = np.asarray(seen, dtype=bool)

    def part(which: np.ndarray) -> Metric:
        return lambda overlaps, times_sn: _means(iou_of_samples(overlaps, times_sn)[:, which])

    def harmonic(overlaps: Overlaps, times_sn: np.ndarray) -> np.ndarray:
        one, other = (part(which)(overlaps, times_sn) for which in (chosen, ~chosen))
        return np.where(one + other > 0, 2 * one * other / np.maximum(one + other, 1e-12), 0.0)

    return METRICS | {"seen": part(chosen), "unseen": part(~chosen), "hiou": harmonic}


def interval(first_s: np.ndarray, second_s: np.ndarray) -> dict[str, float]:
    """The difference of two metrics, positive if the first is better: its `value`, and `low` and
    `high`, the ends of its 95 % interval. Arguments: of the samples of `bootstrap_times`."""
    value, *sampled = (first_s - second_s).tolist()
    known = [one for one in sampled if math.isfinite(one)]
    low, high = np.quantile(known, (0.025, 0.975)) if known else (math.nan, math.nan)
    return {"value": value, "low": float(low), "high": float(high)}


def _per_class(
    a: Overlaps, b: Overlaps, times_sn: np.ndarray, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Classes sorted by absolute difference, without those that occur in neither run."""
    table = []
    for name, one, other in zip(
        classes, iou_of_samples(a, times_sn).T, iou_of_samples(b, times_sn).T, strict=True
    ):
        if math.isnan(one[0]) and math.isnan(other[0]):
            continue
        found = interval(one, other)
        table.append({
            "class": name, "first": rounded(one[0]), "second": rounded(other[0]),
            "difference": rounded(found["value"]),
            "low": rounded(found["low"]), "high": rounded(found["high"]),
        })  # fmt: skip
    return sorted(table, key=lambda row: -abs(row["difference"] or 0.0))


def _per_image(
    a: Overlaps, b: Overlaps, names: Sequence[str], difference: float
) -> list[dict[str, Any]]:
    """Images with their mIoU in both runs, sorted by `effect`, highest first: how much smaller the
    difference in mIoU would be without the image."""
    one, other = (
        _means(shares(each.right.sum(0) - each.right, each.either.sum(0) - each.either))
        for each in (a, b)
    )
    rest = np.nan_to_num(one - other)
    columns = (a.iou_of_images(), b.iou_of_images(), difference - rest)
    table = [
        {"image": name, "first": rounded(x), "second": rounded(y), "effect": round(float(z), 6)}
        for name, x, y, z in zip(names, *columns, strict=True)
    ]
    return sorted(table, key=lambda row: -row["effect"])


def _about(run: Run) -> dict[str, Any]:
    return {
        "folder": run.folder,
        "row": run.row.title,
        "collection": run.result["collection"]["fingerprint"],
        "protocol": run.result["protocol"],
    }


def _check_same(first: Run, second: Run) -> None:
    for what, one, other in (
        ("images", first.names, second.names),
        ("classes", first.result["classes"], second.result["classes"]),
        ("labels", first.result["convention"], second.result["convention"]),
    ):
        if one != other:
            raise InputError(
                f"{first.folder} and {second.folder} cannot be compared: their {what} differ: "
                f"{first.result['data']} with {len(first.result['classes'])} classes, and "
                f"{second.result['data']} with {len(second.result['classes'])}"
            )


def _draw(first: Run, second: Run, chosen: Sequence[int], path: Path) -> None:
    columns = {}
    for name, run in (("first", first), ("second", second)):
        scored = images_by_number(run.scores, chosen)
        if all(run.number in one.maps for one in scored):  # rows of ablations store no maps
            columns[f"{name}: {run.row.title}"] = [one.maps[run.number] for one in scored]
    draw(first.spec.open_data(), [first.names[number] for number in chosen], columns, path)


SHOWN = 15
"""Number of classes and images on the page; the files have all."""


def _tables(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    def signed(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{100 * value:+.{digits}f}"

    differences = [["", "first", "second", "difference", "95 % interval"]]
    for name, one in result["differences"].items():
        differences.append([
            TITLES[name], percent(result["first"][name]), percent(result["second"][name]),
            signed(one["value"]), f"{signed(one['low'])} to {signed(one['high'])}",
        ])  # fmt: skip
    classes = [["class", "first IoU %", "second IoU %", "difference", "95 % interval"]]
    classes += [
        [row["class"], percent(row["first"]), percent(row["second"]), signed(row["difference"]),
         f"{signed(row['low'])} to {signed(row['high'])}"]
        for row in result["per_class"][:SHOWN]
    ]  # fmt: skip
    images = sorted(result["images"], key=lambda row: -abs(row["effect"]))[:SHOWN]
    table = [["image", "first mIoU %", "second mIoU %", "effect on the difference"]]
    table += [
        [row["image"], percent(row["first"]), percent(row["second"]), signed(row["effect"], 2)]
        for row in images
    ]
    return [
        ("", differences),
        ("Classes that differ most", classes),
        ("Images that made the difference", table),
    ]


def _heading(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['data']}, labels {result['class_fingerprint']}",
        *(
            f"{name}: {result[name]['row']} of {result[name]['folder']} "
            f"(collection {result[name]['collection'][:12]}, protocol {result[name]['protocol']})"
            for name in ("first", "second")
        ),
    ]


def text(result: dict[str, Any]) -> str:
    """The comparison as aligned text for a terminal."""
    lines = _heading(result)
    for title, rows in _tables(result):
        lines += ["", *([title] if title else []), *aligned(rows)]
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The comparison as a Markdown page."""
    lines = ["# Comparison", "", *(f"{line}  " for line in _heading(result)), ""]
    for title, (header, *rows) in _tables(result):
        lines += [*([f"## {title}", ""] if title else []), *markdown_table(header, rows), ""]
    return "\n".join(lines)
