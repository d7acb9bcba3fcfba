"""Evaluates a collection on held-out scenes or labelled images: tables, files and pictures.

The table answers three questions. What does the collection add over text alone (dense CLIP)? What
do proposals add, and what would perfect ones? How much do N, K and gamma matter (FOSSIL, figure 2)?
Images are streamed: each is encoded once for all rows, and its counts are committed (`counting`),
so that memory does not grow with the number of images and a stopped evaluation resumes.
"""

import csv
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.config import dump
from ovref.evaluation import report
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.counting import (
    ImageScorer,
    ScoreImages,
    labels_of_png,
    list_images,
    methods_of,
    open_steps,
)
from ovref.evaluation.knn import make_memory_bank, memory_bank_identity
from ovref.evaluation.methods import DENSE, Methods, Row, rows_of
from ovref.evaluation.metrics_semantic import scores_of_counts
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.evaluation.picture_grids import prediction_grid
from ovref.evaluation.report import rounded
from ovref.evaluation.spec import TITLES, EvaluateSpec
from ovref.evaluation.totals import Totals, overlaps_of, scored_images, sum_counts
from ovref.evaluation.trained import head_identity
from ovref.identity import fingerprint
from ovref.meter import ProgressMeter
from ovref.records import ScoredImage
from ovref.run_shard import run_shard
from ovref.storage.steps import StepFolder
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.segmenters.clip_rc import ClipRcHead

__all__ = ["EvaluateSpec", "evaluate"]

SMALL = "The miniature's small models are trained on synthetic scenes and know nothing of others."
"""Caption of tables on other images if the miniature's models were used."""

CAPTION = (
    "Measured on the miniature: small models trained on drawn scenes. These numbers show that the "
    "parts work together; they say nothing about the real models."
)
"""Caption of every table on scenes."""

Say = Callable[[str], None]
RunShards = Callable[[ScoreImages, StepFolder, StepFolder], None]
"""Makes the missing shards of the second step from the first one."""


def evaluate(
    spec: EvaluateSpec,
    progress: Say = print,
    device: str | None = None,
    run_shards: RunShards | None = None,
) -> dict[str, Any]:
    """Evaluates a collection and writes the results.

    Args:
        spec: the settings.
        progress: receives lines for people, including the finished table.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        run_shards: spreads the shards over workers; None scores them here, one after another.

    Returns:
        The content of evaluation.json: caption, protocol, rows (name, mIoU, accuracies and all
        other metrics that the data set's truth allows, in [0, 1]; None if not defined), ablations,
        ratios, per-class table, a description of each class's support (`class_support`), the
        effective specification, class list, its fingerprint and the label convention, the
        collection's fingerprint, seconds.

    Raises:
        CollectionError: the collection cannot be opened, or does not state its encoders.
        ModelError: an encoder cannot be loaded.
        InputError: the data set is incomplete or invalid (nothing is scored in that case), or the
            collection is of masked crops.
        MismatchError: the output belongs to an evaluation with other settings.
    """
    started = time.monotonic()
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    data = spec.open_data()
    with CachedModels(device, spec.features) as models, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no references for")
        collection = models.collection(spec.collection) if spec.collection else None
        methods = methods_of(spec, data, models)  # checks the settings before anything else
        images, scores = open_steps(spec, data, models)
        meter = ProgressMeter(len(data), "images", progress)
        list_images(data, images, spec.shard_size, lambda done: meter.update(done, "checked"))
        if spec.method == "clip_rc":
            compared = _of_head(models.head(spec.clip_rc.weights)[0])
        elif collection is None:
            compared = _memory(spec, data, models, progress)
        else:
            compared = _of(collection, models.collection(spec.fallback) if spec.fallback else None)
        run = run_shards or _run_here(progress, models)
        run(ScoreImages(evaluate=spec, device=device), images, scores)
        shards = images.complete() or []
        scores.finish(shards)
        rows = rows_of(spec)
        totals = sum_counts(scored_images(scores), len(rows), len(data.class_names), data.things)
        fossil = [name for name in spec.rows if name in DENSE and name != "freeda"]
        support = methods.support() if isinstance(methods, Methods) and fossil else {}
        result = _result(spec, data, compared, totals, support)
    result["seconds"] = round(time.monotonic() - started, 1)
    _write(spec, data, totals, scores, result, output)
    progress(report.text(result))
    return result


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """What images are compared with: a collection's references, a memory bank of patches, or, for a
    trained head, class names alone."""

    fingerprint: str
    size: int
    counts: Mapping[str, int]
    """Number of references by noun, or of patches by lower-case class."""
    model: str
    """Name of the visual encoder."""
    fallback: ReferenceCollection | None = None


def _of(collection: ReferenceCollection, fallback: ReferenceCollection | None) -> _Compared:
    counts: dict[str, int] = {}
    for one in (fallback, collection):
        if one is not None:
            pairs = zip(one.nouns, one.noun_counts.tolist(), strict=True)
            counts |= {noun: count for noun, count in pairs if count}
    return _Compared(
        fingerprint=collection.manifest.fingerprint,
        size=len(collection),
        counts=counts,
        model=collection.visual_config.model,
        fallback=fallback,
    )


def _of_head(head: ClipRcHead) -> _Compared:
    return _Compared(
        fingerprint=fingerprint(head_identity(head)), size=0, counts={}, model=head.network.model
    )


def _memory(
    spec: EvaluateSpec, data: LabelledSet, models: CachedModels, progress: Say
) -> _Compared:
    """Makes the memory bank, before any worker needs it."""
    training = spec.open_training(data)
    meter = ProgressMeter(len(training), "images", progress)
    memory = make_memory_bank(spec, training, models, lambda done: meter.update(done, "read"))
    patches = np.bincount(memory.shares_nc.indices, minlength=len(data.class_names)).tolist()
    names = [name.strip().lower() for name in data.class_names]
    return _Compared(
        fingerprint=fingerprint(memory_bank_identity(spec, training)),
        size=len(memory.features_nd),
        counts=dict(zip(names, patches, strict=True)),
        model=spec.knn.encoder.model,
    )


def _run_here(progress: Say, models: CachedModels) -> RunShards:
    def run(spec: ScoreImages, images: StepFolder, scores: StepFolder) -> None:
        shards, commits = images.complete() or [], images.commits()
        done = set(scores.committed())
        missing = [shard for shard in shards if shard not in done]
        if not missing:
            return
        meter = ProgressMeter(sum(commits[one].outputs for one in shards), "images", progress)
        meter.begin(sum(commits[one].outputs for one in done))
        stage = ImageScorer(spec.evaluate, models)

        def counted(records: Any) -> Any:
            for item in stage(records):
                meter.count("scored")
                yield item

        for shard in missing:
            run_shard([counted], images, scores, shard)

    return run


def _result(
    spec: EvaluateSpec,
    data: LabelledSet,
    compared: _Compared,
    totals: Totals,
    support: dict[str, str],
) -> dict[str, Any]:
    rows, protocol = rows_of(spec), spec.chosen_protocol()
    found: list[dict[str, Any]] = [
        {"name": row.title, **{k: rounded(v) for k, v in totals.metrics(i, data.seen).items()}}
        for i, row in enumerate(rows)
    ]
    main = {row.name: one for row, one in zip(rows, found, strict=True) if not row.changes}
    collection: dict[str, Any] = {
        "fingerprint": compared.fingerprint, "references": compared.size
    }  # fmt: skip
    if compared.fallback is not None:
        collection["fallback_fingerprint"] = compared.fallback.manifest.fingerprint
        collection["fallback_references"] = len(compared.fallback)
    return {
        "caption": _caption(spec, compared),
        "data": data.name,
        "protocol": "images as they are" if protocol is None else protocol.described(),
        "protocol_fingerprint": fingerprint(None if protocol is None else dump(protocol))[:16],
        "convention": data.convention,
        "class_list": data.class_list.name,
        "class_fingerprint": data.class_fingerprint,
        "classes": list(data.class_names),
        "seen": None if data.seen is None else list(data.seen),
        "images": len(totals.names),
        "collection": collection,
        "rows": list(main.values()),
        "ratios": _ratios({name: one["miou"] for name, one in main.items()}),
        "ablations": _ablations(rows, found),
        "details_of": found[0]["name"],
        "per_class": _per_class(data, totals, compared, support),
        "support": support,
        "spec": dump(spec),
    }


def _ablations(
    rows: Sequence[Row], found: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {"n": [], "k": [], "gamma": []}
    for row, one in zip(rows, found, strict=True):
        for name, value in row.changes:
            tables[name].append({name: value, **one, "name": TITLES[row.name]})
    return tables


def _per_class(
    data: LabelledSet, totals: Totals, compared: _Compared, support: dict[str, str]
) -> list[dict[str, Any]]:
    """The IoU of each class in the first row, and the class it is most often confused with."""
    counts = totals.confusion[0]
    iou, true = scores_of_counts(counts).iou, counts.sum(1)
    names = [*data.class_names, "no class"]
    table = []
    for label, name in enumerate(data.class_names):
        wrong = counts[label].copy()
        wrong[label] = 0
        own = data.class_list.classes[label]
        worst = int(wrong.argmax())
        table.append({
            "class": name,
            "iou": rounded(iou[label]),
            "pixels": int(true[label]),
            "references": sum(compared.counts.get(each.strip().lower(), 0) for each in own),
            "support": support.get(name, ""),
            "most_confused_with": names[worst] if wrong[worst] else "",
            "confused_share": rounded(wrong[worst] / true[label]) if true[label] else None,
        })  # fmt: skip
    return table


def _ratios(miou: dict[str, float | None]) -> dict[str, float]:
    """FOSSIL's mIoU relative to its bounds; of the text-only rows without oracle, the better."""
    own = miou.get("fossil")
    texts = [miou[name] or 0.0 for name in ("text_only", "text_only_opencut") if name in miou]
    bounds = {"text_only": max(texts, default=0.0), "oracle": miou.get("fossil_oracle") or 0.0}
    if own is None:
        return {}
    return {f"over_{k}": round(own / bound, 3) for k, bound in bounds.items() if bound > 0}


def _caption(spec: EvaluateSpec, compared: _Compared) -> str:
    if not spec.folder and not spec.dataset:
        return CAPTION
    models = [compared.model]
    if spec.method == "collection" and any(
        "opencut" in name or name == "fossil" for name in spec.rows
    ):
        models.append(spec.opencut.keys.model)
    if spec.method == "collection" and any(n.startswith("text_only") for n in spec.rows):
        models.append(spec.clip.model)
    caption = f"Measured on labelled images with {', '.join(dict.fromkeys(models))}."
    return f"{caption} {SMALL}" if any(m.startswith("miniature:") for m in models) else caption


def _write(
    spec: EvaluateSpec,
    data: LabelledSet,
    totals: Totals,
    scores: StepFolder,
    result: dict[str, Any],
    output: Path,
) -> None:
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output / "evaluation.md").write_text(report.markdown(result), encoding="utf-8")
    names = [*data.class_names, "no class"]
    pairs = np.argwhere(totals.confusion[0])
    with open(output / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true", "predicted", "pixels"])
        table.writerows(
            [names[t], names[p], int(totals.confusion[0, t, p])] for t, p in pairs.tolist()
        )
    rows = [row for row in rows_of(spec) if not row.changes]
    overlaps = overlaps_of(scored_images(scores), range(len(rows)), len(data.class_names))
    ious = [one.iou_of_images() for one in overlaps]
    with open(output / "images.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", *(f"{row.title}: {m}" for row in rows for m in ("IoU", "right"))])
        columns = [
            column for one, iou in zip(overlaps, ious, strict=True)
            for column in (iou, one.accuracy_of_images())
        ]  # fmt: skip
        for index, name in enumerate(totals.names):
            table.writerow([name, *(rounded(column[index]) for column in columns)])
    if spec.pictures:
        count = len(totals.names)
        step = max(1, count // spec.pictures)
        # Images without an evaluated class come last.
        worst = np.argsort(ious[0], kind="stable")[: spec.pictures].tolist()
        # Three columns stay legible; FOSSIL without proposals shows more than the text-only row.
        shown = {i: row.title for i, row in enumerate(rows) if row.name != "fossil_oracle"}
        for name, chosen in (
            ("predictions", range(0, count, step)[: spec.pictures]), ("worst", worst),
        ):  # fmt: skip
            picked = images_by_number(scores, chosen)
            maps = {
                title: [one.maps[number] for one in picked]
                for number, title in list(shown.items())[:3]
            }
            draw(data, [one.name for one in picked], maps, output / f"{name}.png")


def draw(
    data: LabelledSet, names: Sequence[str], columns: Mapping[str, Sequence[bytes]], path: Path
) -> None:
    """Draws images with the truth and with predicted maps, PNGs of `png_of_labels` by title."""
    examples = [data.read(name) for name in names]
    maps = {title: list(map(labels_of_png, pngs)) for title, pngs in columns.items()}
    prediction_grid(
        [example.image_hwc for example in examples],
        {"truth": [example.label_hw for example in examples], **maps},
        data.class_names,
        path,
        colours=data.colours,
    )


def images_by_number(scores: StepFolder, chosen: Sequence[int]) -> list[ScoredImage]:
    """Scored images by index in the data set, in the given order."""
    wanted = set(chosen)
    found = {i: one for i, one in enumerate(scored_images(scores)) if i in wanted}
    return [found[number] for number in chosen]
