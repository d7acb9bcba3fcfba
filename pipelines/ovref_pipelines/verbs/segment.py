"""`ovref segment`: photographs, class names and a collection to overlays, label maps and COCO.

    overlays/<name>.png     the classes in their colours over the photograph
    labels/<name>.png       positions in the class list (`segment_files.label_png`)
    coco.json               a segment each, with an RLE mask
    panoptic.json, panoptic/<name>.png      the same in COCO's panoptic format
    segment.json            settings, pixels of each class, classes without references of their own,
                            skipped images with the reason

One image is segmented at a time in each process; the next is read meanwhile.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ovref.ahead import map_ahead
from ovref.config import dump, load_tree
from ovref.errors import ConfigError, InputError
from ovref.evaluation.predictions import segments_of_labels
from ovref.exchange import segment_files as files
from ovref.exchange.class_lists import Classes
from ovref.exchange.photographs import Photograph
from ovref.storage.file_store import Store
from ovref.stored_images import UnusableImageError
from ovref_inference import ReferenceCollection
from ovref_inference.collection import hub
from ovref_inference.collection.class_support import ClassSupport
from ovref_inference.models import MINIATURE
from ovref_inference.proposers.config import (
    FcClipConfig,
    MaskFormerConfig,
    ProposerConfig,
    SamConfig,
    SamGridConfig,
)
from ovref_inference.segmenters.regions import semantic
from ovref_inference.segmenters.retclip import Labelled, RetClipSegmenter
from ovref_pipelines.bar import bar
from ovref_pipelines.output import is_collection
from ovref_pipelines.tool_arguments import TRAINED

Say = Callable[[str], None]

OPEN = ("retclip", "vocseg", "corrclip")
"""Methods that take the regions of `fcclip`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings for every image. Picklable."""

    collection: str
    output: str
    classes: Classes
    method: str = "fossil"
    proposer: str = ""
    """Empty or `opencut` for the collection's own features; `none`, `mask_former:MODEL`,
    `sam_grid:MODEL`, `fcclip:FOLDER`."""
    formats: tuple[str, ...] = ("overlay", "labels", "coco")
    settings: tuple[str, ...] = ()
    """Settings of the method, as `name=value`."""
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """Result of one image, besides the files that are written."""

    photograph: Photograph
    size_hw: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    """(classes,) int64 pixels of each class."""
    coco: Sequence[dict[str, Any]] = ()
    panoptic: Sequence[dict[str, Any]] = ()
    missing: tuple[str, ...] = ()
    """Classes that the collection does not support."""
    problem: str = ""
    """Why there is nothing; empty if there is."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Result of a run."""

    output: str
    segmented: int
    problems: dict[str, str]
    """Place of an image -> why it was left out."""
    pixels: dict[str, int]
    """Pixels of each class."""
    missing: tuple[str, ...]
    borrowed: dict[str, str]
    """Class without references of its own -> what it is recognised by instead, in words."""
    seconds: float


def segment(job: Job, photographs: Sequence[Photograph], workers: int, say: Say) -> Summary:
    """Segments photographs and writes the files.

    Raises:
        InputError, ConfigError: the collection does not fit the method, or has no references for
            any of the classes; an image cannot be fetched.
        CollectionError, ModelError: as in `load_segmenter`.
    """
    config = check_proposer(job.proposer)
    if config is not None and config.fcclip is not None and job.method not in OPEN:
        raise ConfigError(
            f"--proposer fcclip says of regions what they show, which {job.method} does not ask: "
            f"give --method {' or '.join(OPEN)}"
        )
    store = Store.open(job.output)
    say(f"segment: {len(photographs)} images, {len(job.classes.names)} classes, {job.method}")
    started = time.monotonic()
    heads = files.categories(job.classes)
    outputs = {name: files.CocoFile(heads) for name in ("coco", "panoptic") if name in job.formats}
    totals = np.zeros(len(job.classes.names), dtype=np.int64)
    problems: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    # Also where other processes segment: what is wrong is found once, before they start.
    worker = Worker(job)
    borrowed = worker.borrowed
    if workers == 1:
        # The next is read while one is segmented.
        images = map_ahead(_read, photographs, threads=1)
        results: Iterator[Done] = map(worker.segment, photographs, images)
    else:
        results = _in_processes(job, photographs, workers, say)
    del worker
    try:
        with bar("images", len(photographs), say) as step:
            for number, done in enumerate(results, start=1):
                step()
                if done.problem:
                    problems[done.photograph.place] = done.problem
                    continue
                assert done.pixels is not None
                totals += done.pixels
                missing = done.missing
                height, width = done.size_hw
                image = {
                    "id": number, "file_name": done.photograph.file_name,
                    "height": height, "width": width,
                }  # fmt: skip
                for name, output in outputs.items():
                    annotations = getattr(done, name)
                    output.add(image, [{**one, "image_id": number} for one in annotations])
        for name, output in outputs.items():
            _upload(store, f"{name}.json", output)
    finally:
        for output in outputs.values():
            output.close()
    summary = Summary(
        output=store.url,
        segmented=len(photographs) - len(problems),
        problems=problems,
        pixels=dict(zip(job.classes.names, totals.tolist(), strict=True)),
        missing=missing,
        borrowed=borrowed,
        seconds=round(time.monotonic() - started, 3),
    )
    store.write("segment.json", json.dumps(_report(job, summary), indent=1).encode())
    return summary


def text(summary: Summary) -> str:
    """The summary, for people."""
    total = max(1, sum(summary.pixels.values()))
    most = sorted(summary.pixels.items(), key=lambda item: -item[1])[:8]
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in most if count)
    lines = [f"pixels with a class: {shares or 'none'}"]
    if summary.missing:
        lines.append(f"no references, never predicted: {', '.join(summary.missing)}")
    if summary.borrowed:
        listed = ", ".join(f"{name} ({by})" for name, by in summary.borrowed.items())
        lines.append(f"no references of their own: {listed}")
    for place, problem in list(summary.problems.items())[:5]:
        lines.append(f"left out: {place}: {problem}")
    if len(summary.problems) > 5:
        lines.append(f"... {len(summary.problems)} in all, see segment.json")
    rate = summary.segmented / summary.seconds if summary.seconds else 0.0
    lines.append(f"written to {summary.output}: {summary.segmented} images, {rate:.2f} images/s")
    return "\n".join(lines)


def check_proposer(text: str) -> ProposerConfig | None:
    """The settings of a proposer that is given with its model; None for the others.

    Raises:
        ConfigError: there is no such proposer.
    """
    kind, _, model = text.partition(":")
    if kind in ("", "opencut", "none") and not model:
        return None
    if kind == "mask_former" and model:
        return ProposerConfig(mask_former=MaskFormerConfig(model=model))
    if kind == "sam_grid" and model:
        return ProposerConfig(sam_grid=SamGridConfig(sam=SamConfig(model=model)))
    if kind == "fcclip" and model:
        return ProposerConfig(fcclip=FcClipConfig(model=model))
    raise ConfigError(
        "--proposer must be opencut, none, mask_former:MODEL, sam_grid:MODEL or fcclip:FOLDER, "
        f"found {text!r}"
    )


def method_settings(job: Job, collection: ReferenceCollection | None) -> Any:
    """The settings of the method: those that fit the collection, with what is asked for.

    Raises:
        ConfigError: there is no such setting, or a value of another type or out of range.
    """
    from ovref_inference.segmenters.load import METHODS, ClipRcConfig, fitting

    if collection is None:
        kind, own = ClipRcConfig, ClipRcConfig(weights=job.collection)
    else:
        kind = METHODS[job.method][1]
        own = fitting(kind(), collection)
    tree = dump(own)
    settings = load_tree(kind, tree, f"the settings of {job.method}", job.settings)
    place = getattr(settings, "weights", "")
    elsewhere = place.startswith((MINIATURE, hub.PREFIX))
    if collection is None and not elsewhere and is_collection(place):
        raise ConfigError(
            f"{place} is a collection, but {job.method} segments with trained weights: give the "
            "output of ovref train in its place, or beside it by --set weights=FOLDER"
        )
    return settings


class Worker:
    """The loaded models of one process."""

    def __init__(self, job: Job) -> None:
        from ovref_inference.proposers.load import load_proposals, load_proposer, no_proposals
        from ovref_inference.segmenters import load_segmenter

        self.job = job
        self.store = Store.open(job.output)
        trained = job.method in TRAINED
        collection = None if trained else ReferenceCollection.open(job.collection)
        settings = method_settings(job, collection)
        config = check_proposer(job.proposer)
        proposer: Any = no_proposals if job.proposer == "none" else None
        if config is not None and config.fcclip is not None:
            proposer = load_proposals(config, (), device=job.device)
        elif config is not None:
            proposer = load_proposer(config, device=job.device)
        try:
            self.segmenter = load_segmenter(
                collection or job.collection,
                job.method,  # type: ignore[arg-type]
                proposer=proposer,
                config=settings,
                device=job.device,
            )
            with warnings.catch_warnings():  # the summary lists these classes
                warnings.filterwarnings("ignore", message=".* has no references for")
                prepared = self.segmenter.prepare(  # type: ignore[attr-defined]
                    job.classes.query_names
                )
            self.borrowed = {} if trained else _borrowed(prepared, job.classes)
        except ValueError as error:
            hint = "; --proposer names one" if "give a proposer" in str(error) else ""
            raise InputError(f"{error}{hint}") from error

    def segment(self, photograph: Photograph, image_hwc: np.ndarray | str) -> Done:
        """Segments one image, or what `_read` says in place of one, and writes its files."""
        if isinstance(image_hwc, str):
            return Done(photograph=photograph, problem=image_hwc)
        job, classes = self.job, self.job.classes
        regions = None
        if isinstance(self.segmenter, RetClipSegmenter):
            (regions,) = self.segmenter.score([image_hwc], classes.query_names)
            found = semantic(regions)
        else:
            (found,) = self.segmenter.segment([image_hwc], classes.query_names)
        labels_hw, name = classes.labels(found.labels_hw), photograph.name
        count = len(classes.names)
        if "labels" in job.formats:
            self.store.write(f"labels/{name}.png", files.label_png(labels_hw, count))
        if "overlay" in job.formats:
            png = files.overlay_png(image_hwc, labels_hw, count)
            self.store.write(f"overlays/{name}.png", png)
        coco: list[dict[str, Any]] = []
        panoptic: list[dict[str, Any]] = []
        if {"coco", "panoptic"} & set(job.formats):
            if regions is None:
                segments = segments_of_labels(labels_hw, found.max_score_hw, classes.is_thing)
            else:
                config = self.segmenter.config  # type: ignore[attr-defined]
                segments = files.segments_of_regions(
                    regions, classes, min_score=config.min_score, overlap=config.overlap
                )
            if "coco" in job.formats:
                coco = files.coco_annotations(segments, 0)
            if "panoptic" in job.formats:
                self.store.write(f"panoptic/{name}.png", files.panoptic_png(segments))
                panoptic = [files.panoptic_annotation(segments, 0, f"{name}.png")]
        return Done(
            photograph=photograph,
            size_hw=(labels_hw.shape[0], labels_hw.shape[1]),
            pixels=np.bincount(labels_hw[labels_hw >= 0], minlength=count).astype(np.int64),
            coco=coco,
            panoptic=panoptic,
            missing=classes.missing(found.missing),
        )


_WORKER: list[Worker] = []
"""The models of this process, once `_start` has loaded them."""


def _start(job: Job) -> None:
    _WORKER.append(Worker(job))


def _one(photograph: Photograph) -> Done:
    return _WORKER[0].segment(photograph, _read(photograph))


def _read(photograph: Photograph) -> np.ndarray | str:
    """The pixels, or why there are none."""
    try:
        return photograph.image_hwc()
    except UnusableImageError as error:
        return str(error)


def _borrowed(prepared: Any, classes: Classes) -> dict[str, str]:
    """`Summary.borrowed`, from what a segmenter's `prepare` returns."""
    if isinstance(prepared, Labelled):
        missing = classes.missing(prepared.missing)
        without = classes.missing((*prepared.by_text, *prepared.missing))
        return {name: "by its text alone" for name in without if name not in missing}
    first = prepared[0] if isinstance(prepared, tuple) else prepared
    support = prepared if isinstance(first, ClassSupport) else first.support
    found: dict[str, str] = {}
    for number, name in enumerate(classes.names):
        own = [one for one, of in zip(support, classes.class_of, strict=True) if of == number]
        sources = {one.source for one in own}
        if "borrowed" in sources and "own" not in sources:
            found[name] = next(str(one) for one in own if one.source == "borrowed")
    return found


def _in_processes(
    job: Job, photographs: Sequence[Photograph], workers: int, say: Say
) -> Iterator[Done]:
    """Every image in order, from several processes."""
    say(f"segment: starting {workers} processes")
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,)) as pool:
        waiting = iter(photographs)
        # A few ahead of each worker, so that results never pile up. `map_ahead` has threads only.
        futures = [pool.submit(_one, one) for one in islice(waiting, 2 * workers)]
        while futures:
            yield futures.pop(0).result()
            futures += [pool.submit(_one, one) for one in islice(waiting, 1)]


def _upload(store: Store, name: str, output: files.CocoFile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            output.write(file)
        store.upload(path, name)


def _report(job: Job, summary: Summary) -> dict[str, Any]:
    return {
        "collection": job.collection,
        "method": job.method,
        "proposer": job.proposer or "opencut",
        "settings": list(job.settings),
        "classes": list(job.classes.names),
        "no_class": files.NO_LABEL_8
        if len(job.classes.names) <= files.NO_LABEL_8
        else files.NO_LABEL_16,
        "segmented": summary.segmented,
        "pixels": summary.pixels,
        "missing": list(summary.missing),
        "borrowed": summary.borrowed,
        "left_out": summary.problems,
        "seconds": summary.seconds,
    }
