"""Evaluation of a collection on held-out scenes, or on a label folder: one table, and pictures.

The table answers three questions. What does the collection add over text alone (dense CLIP)? What
do proposals add, and what would perfect ones? How much do N, K and gamma matter (FOSSIL, figure 2)?
Images are encoded once; all rows reuse the features.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ovref.config import STRICT, dump
from ovref.errors import InputError
from ovref.evaluation import miniature, report
from ovref.evaluation.cached import (
    CachedEncoder,
    CachedModels,
    CachedTexts,
    RegionProposer,
    cached_proposer,
)
from ovref.evaluation.datasets import (
    HELD_OUT,
    Dataset,
    LabelFolder,
    label_folder,
    miniature_scenes,
)
from ovref.evaluation.metrics import Scores, confusion, scores_of_counts, split_scores
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.in_memory import in_memory
from ovref.evaluation.named_sets.opening import open_set
from ovref.evaluation.oracle import label_masks, oracle_proposer
from ovref.evaluation.pictures import prediction_grid
from ovref.evaluation.protocols import (
    Protocol,
    label_windows_of,
    protocol_of,
    protocol_of_windows,
    segment_with_protocol,
    windows_of,
)
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.config import OpenCutProposerConfig, ProposerConfig
from ovref_inference.proposers.load import load_proposer, no_proposals
from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.fossil import FossilConfig, FossilSegmenter, TextOnlySegmenter

SMALL = "The miniature's small models are trained on synthetic scenes and know nothing of others."
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
    dataset: str = ""
    """A set of the field by its name (`ade150`, `voc21`, ...), evaluated instead of scenes."""
    root: str = ""
    """Folder that holds `dataset`, as published or in a usual converted layout."""
    names: str = ""
    """Class list of `dataset`: `mmseg`, `fcclip`, `corrclip`, ... or the path of a text file; empty
    takes the protocol's."""
    protocol: str = ""
    """How images are resized and cut into windows and background is found: `tcl`, `corrclip`,
    `retclip`, `vocseg` or `zs3`; empty takes each image as it is, as a whole."""
    limit: int | None = None
    """The first so many images of `dataset`; null takes all. All are kept in memory."""
    folder: LabelFolder | None = None
    """Images and label maps of your own, evaluated instead of scenes; `opencut.keys` and `clip`
    should then name models for them."""
    fossil: FossilConfig = miniature.FOSSIL
    """Configuration from which the ablations start; its `windows`, in place of a protocol, are slid
    for every row. N is far below the paper's, for a small collection has few dozen references of a
    class, and whatever is retrieved beyond them is of other classes."""
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
        require_at_least("scenes", self.scenes, 1)
        if bool(self.dataset) != bool(self.root) or (self.dataset and self.folder):
            raise ValueError("give dataset with root, or folder, or neither")
        if self.limit is not None:
            require_at_least("limit", self.limit, 1)
        if self.protocol and self.fossil.windows is not None:
            raise ValueError("give protocol or fossil.windows, not both: windows would slide twice")
        self.chosen_protocol()
        require_at_least("pictures", self.pictures, 0)

    def chosen_protocol(self) -> Protocol | None:
        """The protocol, with its settings for `dataset`; None takes images as they are.

        Raises:
            ConfigError: there is no protocol of that name.
        """
        if self.fossil.windows is not None:
            return protocol_of_windows(self.fossil.windows)
        return protocol_of(self.protocol, self.dataset) if self.protocol else None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A data set and the segmenters that are measured on it, over cached models."""

    data: Dataset
    collection: ReferenceCollection
    visual: CachedEncoder
    """The collection's visual encoder."""
    clip: CachedEncoder
    """Dense CLIP features."""
    text: CachedTexts
    """The collection's text encoder."""
    proposers: dict[str, RegionProposer]
    """`none`, `opencut`, `oracle`."""
    protocol: Protocol | None = field(default=None)
    """How images come to the segmenters; None for images as they are."""

    def fossil(self, config: FossilConfig, proposer: str) -> FossilSegmenter:
        """FOSSIL with one of the proposers; windows are the protocol's."""
        config = replace(config, windows=None)
        return FossilSegmenter(
            self.collection, self.visual, self.text, self.proposers[proposer], config
        )

    def text_only(self, proposer: str) -> TextOnlySegmenter:
        """The baseline without a collection, with one of the proposers."""
        return TextOnlySegmenter(
            self.clip,
            self.text,
            self.proposers[proposer],
            templates=self.collection.manifest.templates,
            windows=None,
        )

    def predict(self, segmenter: FossilSegmenter | TextOnlySegmenter) -> list[np.ndarray]:
        """(H, W) int32 label maps of all images, one image at a time to bound memory."""
        data, protocol = self.data, self.protocol
        if protocol is None:
            return [segmenter.segment([one], data.classes)[0].labels_hw for one in data.images]
        return [
            segment_with_protocol(segmenter, one, data.classes, protocol, data.seen).labels_hw
            for one in data.images
        ]

    def scores(self, predictions: Sequence[np.ndarray]) -> Scores:
        """Metrics of label maps of all images."""
        classes = len(self.data.classes)
        pairs = zip(self.data.labels, predictions, strict=True)
        return scores_of_counts(reduce(np.add, (confusion(*pair, classes) for pair in pairs)))


def evaluate(
    spec: EvaluateSpec, progress: Callable[[str], None] = print, device: str | None = None
) -> dict[str, Any]:
    """Evaluates a collection and writes the results.

    Args:
        spec: what and on what.
        progress: receives lines for people, the finished table among them.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Returns:
        What evaluation.json holds: caption, protocol, rows (name, mIoU, accuracies and, with a
        split of classes, hIoU, in [0, 1]; None where not defined), ablations, ratios, per-class
        IoU (None for a class that does not occur), the support of each class in words
        (`class_support`), the effective specification, class list and label convention, the
        collection's fingerprint, seconds.

    Raises:
        CollectionError: the collection cannot be opened, or does not state its encoders.
        ModelError: an encoder cannot be loaded.
        InputError: the label folder is not as it should be, or the collection is of masked crops.
    """
    started = time.monotonic()
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)
    with CachedModels(device) as models, warnings.catch_warnings():
        # The result says so of every class, and each ablation would say it again.
        warnings.filterwarnings("ignore", message=".* has no references for")
        collection = models.collection(spec.collection)
        bench = make_bench(spec, collection, models, progress)
        progress("segmenting")
        best = bench.fossil(spec.fossil, "opencut")
        predictions = {
            "FOSSIL": bench.predict(best),
            "FOSSIL without proposals": bench.predict(bench.fossil(spec.fossil, "none")),
            "FOSSIL with oracle masks": bench.predict(bench.fossil(spec.fossil, "oracle")),
            "text only": bench.predict(bench.text_only("none")),
            "text only with OpenCut": bench.predict(bench.text_only("opencut")),
            "text only with oracle masks": bench.predict(bench.text_only("oracle")),
        }
        rows = {name: bench.scores(maps) for name, maps in predictions.items()}
        result = {
            "caption": _caption(spec, collection),
            "data": bench.data.name,
            "protocol": "images as they are"
            if bench.protocol is None
            else bench.protocol.described(),
            "convention": bench.data.convention,
            "class_fingerprint": bench.data.class_fingerprint,
            "collection": {
                "fingerprint": collection.manifest.fingerprint,
                "references": len(collection),
            },
            "rows": [_row(name, scores, bench.data) for name, scores in rows.items()],
            "ratios": _ratios(rows),
            "ablations": _ablations(spec, bench),
            "per_class_iou": {
                name: _rounded(iou)
                for name, iou in zip(bench.data.classes, rows["FOSSIL"].iou, strict=True)
            },
            "support": {
                name: str(one)
                for name, one in zip(
                    bench.data.classes, best.prepare(bench.data.classes).support, strict=True
                )
            },
            "spec": dump(spec),
            "seconds": round(time.monotonic() - started, 1),
        }
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "evaluation.md").write_text(report.markdown(result))
    if spec.pictures:
        _draw(spec, bench.data, predictions, output / "predictions.png")
    progress(report.text(result))
    return result


def make_bench(
    spec: EvaluateSpec,
    collection: ReferenceCollection,
    models: CachedModels,
    progress: Callable[[str], None],
) -> Bench:
    """Renders the scenes, or reads the images, and loads the models.

    Raises:
        InputError: the collection is of masked crops, which FOSSIL's dense features cannot be
            compared with; or the label folder is not as it should be.
    """
    if collection.visual_config.masking:
        raise InputError(
            f"{spec.collection} was embedded as masked crops "
            f"({collection.visual_config.features}), and FOSSIL compares dense features with it: "
            "give a collection of dense features"
        )
    protocol = spec.chosen_protocol()
    data = _data(spec, protocol)
    images, labels = list(data.images), list(data.labels)
    if protocol is not None:
        images = [part for one in images for part in windows_of(one, protocol)]
        labels = [part for one in labels for part in label_windows_of(one, protocol)]
    opencut = load_proposer(ProposerConfig(opencut=spec.opencut), device=models.device)
    bench = Bench(
        data=data,
        collection=collection,
        visual=models.encoder(collection.visual_config),
        clip=models.encoder(spec.clip),
        text=models.text(collection.text_config),
        proposers={
            "none": no_proposals,
            "opencut": cached_proposer(opencut),
            "oracle": oracle_proposer(images, [label_masks(label) for label in labels]),
        },
        protocol=protocol,
    )
    # All at once, in full batches; the segmenters then find each image in the cache.
    progress(f"encoding {data.name}")
    for encoder in (bench.visual, bench.clip):
        encoder.encode(images)
    progress("proposing masks")
    bench.proposers["opencut"](images)
    return bench


def _data(spec: EvaluateSpec, protocol: Protocol | None) -> Dataset:
    if spec.dataset:
        names = spec.names
        if not names and protocol is not None:
            known = SETS[spec.dataset].lists if spec.dataset in SETS else ()
            names = protocol.names if protocol.names in known else ""
        return in_memory(open_set(spec.dataset, spec.root, names=names), spec.limit)
    return label_folder(spec.folder) if spec.folder else miniature_scenes(spec.split, spec.scenes)


def _ablations(spec: EvaluateSpec, bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """One parameter at a time from the best configuration (FOSSIL section 4.3)."""
    grids = {"n": spec.ablate_n, "k": spec.ablate_k, "gamma": spec.ablate_gamma}

    def row(name: str, value: float) -> dict[str, Any]:
        changed: dict[str, Any] = {name: value}
        segmenter = bench.fossil(replace(spec.fossil, **changed), "opencut")
        scores = bench.scores(bench.predict(segmenter))
        return {name: value, **_row("FOSSIL", scores, bench.data)}

    return {name: [row(name, value) for value in values] for name, values in grids.items()}


def _row(name: str, scores: Scores, data: Dataset) -> dict[str, Any]:
    row = {
        "name": name,
        "miou": _rounded(scores.miou),
        "mean_accuracy": _rounded(scores.mean_accuracy),
        "pixel_accuracy": _rounded(scores.pixel_accuracy),
    }
    if data.seen is not None:
        row["hiou"] = _rounded(split_scores(scores.iou, data.seen).hiou)
    return row


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _ratios(rows: dict[str, Scores]) -> dict[str, float]:
    """FOSSIL's mIoU over that of its bounds; the better text-only row without oracle counts."""
    text = max(rows["text only"].miou, rows["text only with OpenCut"].miou)
    bounds = {"text_only": text, "oracle": rows["FOSSIL with oracle masks"].miou}
    return {
        f"over_{name}": round(rows["FOSSIL"].miou / bound, 3)
        for name, bound in bounds.items()
        if bound > 0
    }


def _caption(spec: EvaluateSpec, collection: ReferenceCollection) -> str:
    if not spec.folder and not spec.dataset:
        return CAPTION
    models = (collection.visual_config.model, spec.opencut.keys.model, spec.clip.model)
    caption = f"Measured on labelled images with {', '.join(dict.fromkeys(models))}."
    return f"{caption} {SMALL}" if any(m.startswith("miniature:") for m in models) else caption


def _draw(
    spec: EvaluateSpec, data: Dataset, predictions: dict[str, list[np.ndarray]], path: Path
) -> None:
    """Images that show different classes, not the best ones: every few images in order."""
    step = max(1, len(data.images) // spec.pictures)
    chosen = range(0, len(data.images), step)[: spec.pictures]
    shown = ("FOSSIL", "FOSSIL without proposals", "text only")
    columns = {"truth": data.labels} | {name: predictions[name] for name in shown}
    prediction_grid(
        [data.images[i] for i in chosen],
        {name: [maps[i] for i in chosen] for name, maps in columns.items()},
        data.classes,
        path,
        colours=data.colours,
    )
