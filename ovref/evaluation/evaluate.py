"""Evaluation of a collection on held-out scenes, or on a label folder: one table, and pictures.

The table answers three questions. What does the collection add over text alone (dense CLIP)? What
do proposals add, and what would perfect ones? How much do N, K and gamma matter (FOSSIL, figure 2)?
Images are encoded once; all rows reuse the features.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ovref.config import STRICT, dump
from ovref.errors import InputError
from ovref.evaluation import miniature
from ovref.evaluation.datasets import (
    HELD_OUT,
    Dataset,
    LabelFolder,
    label_folder,
    miniature_scenes,
)
from ovref.evaluation.metrics import ConfusionMatrix, Scores, split_scores
from ovref.evaluation.pictures import class_palette, prediction_grid
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.encoders.load import load_text_encoder, load_visual_encoder
from ovref_inference.proposers.config import OpenCutProposerConfig, ProposerConfig
from ovref_inference.proposers.load import label_masks, load_proposer, no_proposals
from ovref_inference.segmenters.fossil import FossilConfig, pixel_scores, prototype_scores
from ovref_inference.vectors import l2_normalised

SMALL = "The miniature's small models are trained on drawn scenes and know nothing of others."
"""Stands above tables of other images that they had a part in."""

CAPTION = (
    "Measured on the miniature: small models trained on drawn scenes. These numbers show that the "
    "parts work together; they say nothing about the real models."
)
"""Stands above every table of scenes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is evaluated, on what, and which variations are tried."""

    __pydantic_config__ = STRICT

    collection: str
    """Folder or URL of the collection; its own encoders are loaded."""
    output: str
    """Folder for evaluation.json, evaluation.md and predictions.png; made if it is missing."""
    split: Literal["validation", "test"] = "test"
    """Held-out scenes: `validation` to choose parameters, `test` to report."""
    scenes: int = 200
    """Scenes evaluated."""
    folder: LabelFolder | None = None
    """Images and label maps of your own, evaluated instead of scenes; `opencut.keys` and `clip`
    should then name models for them. Each image is brought to the encoders' sizes as a whole."""
    fossil: FossilConfig = miniature.FOSSIL
    """Configuration from which the ablations start; `windows` must be null here, for images
    are encoded once and whole. N is far below the paper's, for a small collection has few dozen
    references of a class, and whatever is retrieved beyond them is of other classes."""
    opencut: OpenCutProposerConfig = miniature.OPENCUT
    """Proposals."""
    clip: VisualEncoderConfig = miniature.CLIP
    """Dense CLIP features of the text-only baseline, in the space of the collection's texts."""
    ablate_n: tuple[int, ...] = (5, 10, 20, 40, 80, 150)
    """Retrieved references tried, everything else as in `fossil`."""
    ablate_k: tuple[int, ...] = (1, 3, 5, 10, 20)
    """Prototypes tried."""
    ablate_gamma: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Weights of the best prototype tried."""
    pictures: int = 6
    """Scenes drawn in predictions.png; 0 draws none."""

    def __post_init__(self) -> None:
        if self.split not in HELD_OUT:
            raise ValueError(f"split must be one of {HELD_OUT}, found {self.split!r}")
        if self.scenes < 1:
            raise ValueError(f"scenes must be at least 1, found {self.scenes}")
        if self.fossil.windows is not None:
            raise ValueError("fossil.windows must be null: images are encoded once and whole")
        if self.pictures < 0:
            raise ValueError(f"pictures must be at least 0, found {self.pictures}")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Scenes with everything encoded once. Made by `prepare_bench`."""

    data: Dataset
    collection: ReferenceCollection
    visual: np.ndarray
    """(images, h, w, d) features of the collection's visual encoder."""
    clip: np.ndarray
    """(images, h, w, d) dense CLIP features."""
    texts: np.ndarray
    """(classes, d) class embeddings, templates of the collection."""
    masks: dict[str, list[np.ndarray]]
    """Proposals: `none`, `opencut`, `oracle` -> (n, H, W) bool an image."""


def evaluate(
    spec: EvaluateSpec, progress: Callable[[str], None] = print, device: str | None = None
) -> dict[str, Any]:
    """Evaluates a collection and writes the results.

    Args:
        spec: what and on what.
        progress: receives lines for people, the finished table among them.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Returns:
        What evaluation.json holds: caption, rows (name, mIoU, accuracies and, with a split of
        classes, hIoU, in [0, 1]; None where nothing is judged), ablations, ratios, per-class IoU
        (None for a class that does not occur), the effective specification, class list and label
        convention, the collection's fingerprint, seconds.

    Raises:
        CollectionError: the collection cannot be opened, or does not say its encoders.
        ModelError: an encoder cannot be loaded.
        InputError: the label folder is not as it should be, or the collection is of masked crops.
    """
    started = time.monotonic()
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    with ReferenceCollection.open(spec.collection) as collection:
        bench = prepare_bench(spec, collection, progress, device)
        progress("segmenting")
        rows, predictions = _main_rows(spec, bench)
        ablations = _ablations(spec, bench)
        missing = [
            name
            for name, count in zip(
                bench.data.classes, _prototypes(bench, spec.fossil).counts, strict=True
            )
            if count == 0
        ]
        caption = CAPTION if spec.folder is None else _folder_caption(spec, collection)
        references = len(collection)
        identity = collection.manifest.fingerprint
    result = {
        "caption": caption,
        "data": bench.data.name,
        "convention": bench.data.convention,
        "class_fingerprint": bench.data.class_fingerprint,
        "collection": {"fingerprint": identity, "references": references},
        "rows": [_row(name, scores, bench.data) for name, scores in rows.items()],
        "ratios": _ratios(rows),
        "ablations": {
            name: [
                {name: value, **_row("FOSSIL", scores, bench.data)}
                for value, scores in found.items()
            ]
            for name, found in ablations.items()
        },
        "per_class_iou": {
            name: None if math.isnan(iou) else round(float(iou), 4)
            for name, iou in zip(bench.data.classes, rows["FOSSIL"].iou, strict=True)
        },
        "missing": missing,
        "spec": dump(spec),
        "seconds": round(time.monotonic() - started, 1),
    }
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "evaluation.md").write_text(markdown(result))
    if spec.pictures:
        _draw(spec, bench, predictions, output / "predictions.png")
    progress(table(result))
    return result


def prepare_bench(
    spec: EvaluateSpec,
    collection: ReferenceCollection,
    progress: Callable[[str], None],
    device: str | None = None,
) -> Bench:
    """Draws the scenes, or reads the images, and encodes them once.

    Raises InputError where the collection is of masked crops, which images as a whole have none of.
    """
    if collection.visual_config.masking:
        raise InputError(
            f"{spec.collection} was embedded as masked crops "
            f"({collection.visual_config.features}), and FOSSIL compares dense features with it: "
            "give a collection of dense features; `ovref tables` measures both kinds"
        )
    data = label_folder(spec.folder) if spec.folder else miniature_scenes(spec.split, spec.scenes)
    progress(f"encoding {data.name}")
    text = load_text_encoder(collection.text_config, device=device)
    propose = load_proposer(ProposerConfig(opencut=spec.opencut), device=device)
    visual = load_visual_encoder(collection.visual_config, device=device).encode(data.images)
    clip = load_visual_encoder(spec.clip, device=device).encode(data.images)
    progress("proposing masks")
    return Bench(
        data=data,
        collection=collection,
        visual=visual,
        clip=clip,
        texts=class_embeddings(text, list(data.classes), collection.manifest.templates),
        masks={
            "none": no_proposals(data.images),
            "opencut": propose(data.images),
            "oracle": [label_masks(label_hw) for label_hw in data.labels],
        },
    )


def predict(features: np.ndarray, masks: Sequence[np.ndarray], score: Callable) -> list[np.ndarray]:
    """Label maps (H, W) of encoded images; arguments as of `segmenters.pixel_scores`."""
    return [
        pixel_scores(features_hwd, masks_nhw, score, masks_nhw.shape[1:]).argmax(0)
        for features_hwd, masks_nhw in zip(features, masks, strict=True)
    ]


def predict_fossil(bench: Bench, config: FossilConfig, masks: str) -> list[np.ndarray]:
    """FOSSIL's label maps with one kind of the bench's proposals."""
    prototypes = _prototypes(bench, config)

    def score(features_nd: np.ndarray) -> np.ndarray:
        # A class without support has -inf, which cannot be interpolated; -1 is below all scores.
        return np.maximum(prototype_scores(features_nd, prototypes, config.gamma), -1.0)

    return predict(bench.visual, bench.masks[masks], score)


def predict_text(bench: Bench, masks: str) -> list[np.ndarray]:
    """The text-only baseline's label maps with one kind of the bench's proposals."""

    def score(features_nd: np.ndarray) -> np.ndarray:
        return l2_normalised(features_nd) @ bench.texts.T

    return predict(bench.clip, bench.masks[masks], score)


def scores_of(bench: Bench, predictions: Sequence[np.ndarray]) -> Scores:
    """Metrics of label maps of all scenes of the bench."""
    matrix = ConfusionMatrix(len(bench.data.classes))
    for label_hw, predicted_hw in zip(bench.data.labels, predictions, strict=True):
        matrix.add(label_hw, predicted_hw)
    return matrix.scores()


def table(result: dict[str, Any]) -> str:
    """The result as aligned text for a terminal."""
    blocks = [result["caption"], f"{result['data']}; {_collection_line(result)}", ""]
    for title, columns, rows in _tables(result):
        cells = [[title, *columns], *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            numbers = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
            blocks.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
        blocks.append("")
    return "\n".join([*blocks, _ratio_line(result)])


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    lines = ["# Evaluation", "", f"*{result['caption']}*", ""]
    lines += [f"{result['data']}; {_collection_line(result)}.", ""]
    for title, columns, rows in _tables(result):
        lines.append("| " + " | ".join([title, *columns]) + " |")
        lines.append("|---" + "|---:" * len(columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    lines += [_ratio_line(result), ""]
    lines += ["Labels: " + result["convention"] + f" ({result['class_fingerprint']}).", ""]
    return "\n".join(lines)


def _prototypes(bench: Bench, config: FossilConfig):
    return bench.collection.fossil_prototypes(bench.texts, n=config.n, k=config.k, seed=config.seed)


def _main_rows(spec: EvaluateSpec, bench: Bench) -> tuple[dict[str, Scores], dict[str, list]]:
    predictions = {
        "FOSSIL": predict_fossil(bench, spec.fossil, "opencut"),
        "FOSSIL without proposals": predict_fossil(bench, spec.fossil, "none"),
        "FOSSIL with oracle masks": predict_fossil(bench, spec.fossil, "oracle"),
        "text only": predict_text(bench, "none"),
        "text only with OpenCut": predict_text(bench, "opencut"),
        "text only with oracle masks": predict_text(bench, "oracle"),
    }
    return {name: scores_of(bench, maps) for name, maps in predictions.items()}, predictions


def _ablations(spec: EvaluateSpec, bench: Bench) -> dict[str, dict[float, Scores]]:
    """One parameter at a time from the best configuration (FOSSIL section 4.3)."""
    grids = {"n": spec.ablate_n, "k": spec.ablate_k, "gamma": spec.ablate_gamma}
    return {
        name: {
            value: scores_of(
                bench, predict_fossil(bench, replace(spec.fossil, **{name: value}), "opencut")
            )
            for value in values
        }
        for name, values in grids.items()
    }


def _row(name: str, scores: Scores, data: Dataset) -> dict[str, Any]:
    row = {
        "name": name,
        "miou": round(scores.miou, 4),
        "mean_accuracy": round(scores.mean_accuracy, 4),
        "pixel_accuracy": round(scores.pixel_accuracy, 4),
    }
    if data.seen is not None:
        hiou = split_scores(scores.iou, data.seen).hiou
        row["hiou"] = None if math.isnan(hiou) else round(hiou, 4)
    return row


def _ratios(rows: dict[str, Scores]) -> dict[str, float]:
    """FOSSIL's mIoU over that of its bounds; the better text-only row without oracle counts."""
    text = max(rows["text only"].miou, rows["text only with OpenCut"].miou)
    bounds = {"text_only": text, "oracle": rows["FOSSIL with oracle masks"].miou}
    return {
        f"over_{name}": round(rows["FOSSIL"].miou / bound, 3)
        for name, bound in bounds.items()
        if bound > 0
    }


def _tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title of the first column, the other columns, rows; numbers in per cent."""
    names = {
        "miou": "mIoU %", "mean_accuracy": "class accuracy %",
        "pixel_accuracy": "pixel accuracy %", "hiou": "hIoU %",
    }  # fmt: skip
    metrics = [metric for metric in names if metric in result["rows"][0]]
    columns = [names[metric] for metric in metrics]

    def cells(row: dict[str, Any]) -> list[str]:
        return ["" if row[m] is None else f"{100 * row[m]:.1f}" for m in metrics]

    main = [[row["name"], *cells(row)] for row in result["rows"]]
    tables = [("method", columns, main)]
    used = result["spec"]["fossil"]
    for name, rows in result["ablations"].items():
        if not rows:
            continue  # none were asked for
        marked = [f"{row[name]}{' (as above)' * (row[name] == used[name])}" for row in rows]
        cells_of = [[mark, *cells(row)] for mark, row in zip(marked, rows, strict=True)]
        tables.append((f"FOSSIL, {name if name == 'gamma' else name.upper()}", columns, cells_of))
    return tables


def _folder_caption(spec: EvaluateSpec, collection: ReferenceCollection) -> str:
    models = (collection.visual_config.model, spec.opencut.keys.model, spec.clip.model)
    caption = f"Measured on labelled images with {', '.join(dict.fromkeys(models))}."
    return f"{caption} {SMALL}" if any(m.startswith("miniature:") for m in models) else caption


def _collection_line(result: dict[str, Any]) -> str:
    fossil = result["spec"]["fossil"]
    return (
        f"{result['collection']['references']} references, N = {fossil['n']}, K = {fossil['k']}, "
        f"gamma = {fossil['gamma']}"
    )


def _ratio_line(result: dict[str, Any]) -> str:
    names = {"over_text_only": "the better text-only row", "over_oracle": "oracle masks"}
    parts = [f"{value:.2f} x {names[name]}" for name, value in result["ratios"].items()]
    return "FOSSIL's mIoU is " + " and ".join(parts) + "."


def _draw(spec: EvaluateSpec, bench: Bench, predictions: dict[str, list], path: Path) -> None:
    """Scenes that show different classes, not the best ones: every few scenes in order."""
    step = max(1, len(bench.data.images) // spec.pictures)
    chosen = range(0, len(bench.data.images), step)[: spec.pictures]
    shown = ("FOSSIL", "FOSSIL without proposals", "text only")
    palette = class_palette(len(bench.data.classes))
    for name, colour in bench.data.colours.items():
        palette[bench.data.classes.index(name)] = colour
    columns = {"truth": bench.data.labels} | {name: predictions[name] for name in shown}
    prediction_grid(
        [bench.data.images[i] for i in chosen],
        {name: [maps[i] for i in chosen] for name, maps in columns.items()},
        bench.data.classes,
        path,
        palette=palette,
    )
