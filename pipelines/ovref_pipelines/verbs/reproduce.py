"""Reproduces a row of a paper's table: checks data and weights, builds or trains what is missing,
and prints our figure beside the paper's."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.contract import Dropped
from ovref.errors import InputError
from ovref.evaluation import report
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.evaluation.picture_grids import prediction_grid
from ovref.evaluation.spec import TITLES
from ovref.labelled_corpora import read_corpus
from ovref_inference.errors import OvrefError
from ovref_pipelines import recipe
from ovref_pipelines.build_config import BuildConfig, with_absolute_places
from ovref_pipelines.console import Console
from ovref_pipelines.verbs import evaluate as evaluating
from ovref_pipelines.verbs import train as training
from ovref_pipelines.verbs.paper_rows import PaperRow
from ovref_pipelines.verbs.row_weights import (
    models_of_row,
    other_architectures,
    state_of,
    try_models,
)
from ovref_pipelines.verbs.train import TrainConfig

LOOKED_AT = 50
"""Number of label files whose classes are counted before a build."""

PICTURE, RESULT = "look.png", "reproduce.json"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Result of the check of data and weights."""

    lines: tuple[str, ...]
    """What is there, for people."""
    problems: tuple[str, ...]
    """What must be fixed before a run."""
    partial: tuple[str, ...]
    """Counts and architectures that differ from the published ones."""


def introduction(row: PaperRow) -> str:
    """Description of a row: its figures, requirements and differences from the paper."""
    figures = ", ".join(f"{report.COLUMNS[name]} {value}" for name, value in row.figures.items())
    lines = [f"{row.paper}: {figures}", f"About {row.gpu_hours:g} GPU hours of an H100. It needs:"]
    lines += [f"  - {one}" for one in row.needs]
    for title, found in (
        ("The paper leaves open:", row.leaves_open),
        ("Not as in the paper:", row.differs),
        ("Cannot be run yet:", row.blocked),
    ):
        lines += [title, *(f"  - {one}" for one in found)] if found else []
    protocol = row.evaluate.chosen_protocol()
    lines.append("Protocol " + ("images as they are" if protocol is None else protocol.described()))
    return "\n".join(lines)


def check(row: PaperRow, shipped: PaperRow | None = None) -> Checked:
    """Looks at the data and for the weights of a row, without loading a model.

    Draws one image with its labels into the output, to be checked by eye: a class list in the wrong
    order is obvious in it.

    Args:
        row: with the user's settings.
        shipped: the row as its file has it, whose models' architectures are compared; None for
            `row` itself.
    """
    lines: list[str] = []
    problems: list[str] = []
    partial: list[str] = []

    def architectures(row: PaperRow) -> tuple[list[str], list[str]]:
        return [], other_architectures(row, shipped or row)

    for look in (_data, _trainings if row.build is None else _captions, architectures):
        try:
            said, other = look(row)
        except OvrefError as error:
            problems.append(str(error))
            continue
        lines += said
        partial += other
    for name, revision in sorted({model[1:] for model in models_of_row(row)}):
        state = state_of(name, revision)
        (problems if state.startswith("missing") else lines).append(f"{name}: {state}")
    return Checked(lines=tuple(lines), problems=tuple(problems), partial=tuple(partial))


def text(checked: Checked) -> str:
    """The result of the check, for people."""
    lines = [f"  {one}" for one in checked.lines]
    lines += [f"  NOT AS PUBLISHED: {one}" for one in checked.partial]
    lines += [f"  MISSING: {one}" for one in checked.problems]
    return "\n".join(["Found:", *lines])


def reproduce(row: PaperRow, checked: Checked, console: Console, *, partial: bool) -> str:
    """Builds the collection, or trains the head, or resumes that; evaluates it, and returns our
    figures beside the paper's.

    Args:
        checked: from `check`.
        console: prints lines for people along the way.
        partial: whether data with other than the published counts, and models of other
            architectures, may be used.

    Raises:
        InputError: something is missing, or the row cannot be run.
        ModelError: a model of the evaluation does not work; nothing is built then.
        OvrefError: as building, training and evaluating.
    """
    stops = [*row.blocked, *checked.problems, *(() if partial else checked.partial)]
    if stops:
        advice = "" if partial or not checked.partial else "; --partial accepts what differs"
        raise InputError(f"{row.paper} cannot be run: {'; '.join(stops)}{advice}")
    console.say("trying the models that the evaluation needs")
    try_models(row)
    for build in _builds_of(row):
        console.say(f"building {build.output}")
        summary = recipe.build(with_absolute_places(build), console.say)
        if summary.collection is None:
            raise InputError(f"{build.output} has no collection: shards failed permanently")
    for one in _trainings_of(row):
        console.say(f"training {one.output}")
        training.train(training.with_absolute_places(one), console)
    config = evaluating.with_absolute_places(row.evaluate)
    result = evaluating.evaluate(config, console)
    ours = next(one for one in result["rows"] if one["name"] == TITLES[row.row])
    table = comparison(row, ours)
    found = {
        "paper": row.paper,
        "figures": row.figures,
        "ours": {name: _percent(ours.get(name)) for name in row.figures},
        "data": result["data"],
        "protocol": result["protocol"],
        "not_as_published": list(checked.partial),
        "differs": list(row.differs),
    }
    path = Path(config.output) / RESULT
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return "\n".join([table, *(f"NOT AS PUBLISHED: {one}" for one in checked.partial)])


def comparison(row: PaperRow, ours: dict[str, Any]) -> str:
    """A table of the paper's figures, ours, and the difference, in percent."""
    rows = [["", "the paper", "here", "difference"]]
    for name, theirs in row.figures.items():
        value = _percent(ours.get(name))
        own = "-" if value is None else f"{value:.1f}"
        difference = "-" if value is None else f"{value - theirs:+.1f}"
        rows.append([report.COLUMNS[name], f"{theirs:.1f}", own, difference])
    return "\n".join([row.paper, *report.aligned(rows)])


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 2)


def _data(row: PaperRow) -> tuple[list[str], list[str]]:
    """The data set: its files, counts, class list and labels."""
    data = row.evaluate.open_data()
    ids = data.ids[:: max(1, len(data) // LOOKED_AT)][:LOOKED_AT]
    seen: set[int] = set()
    shown = None
    for name in ids:
        example = data.read(name)
        classes = set(np.unique(example.label_hw).tolist()) - {-1}
        if shown is None or len(classes) > shown[0]:
            shown = (len(classes), example)
        seen |= classes
    if shown is None or not seen:
        raise InputError(f"{data.name} has no labelled pixel in its first {len(ids)} images")
    picture, example = Path(row.evaluate.output) / PICTURE, shown[1]
    picture.parent.mkdir(parents=True, exist_ok=True)
    prediction_grid([example.image_hwc], {"truth": [example.label_hw]}, data.class_names, picture)
    lines = [
        f"{data.name}; {data.convention}",
        f"class list {data.class_list.name} of {len(data.class_names)} ({data.class_fingerprint}), "
        f"{len(seen)} of them in {len(ids)} label maps",
        f"look at {picture}: are the names those of what is shown?",
    ]
    return lines, _other_count(row.evaluate.dataset, "val", data)


def _other_count(dataset: str, split: str, data: LabelledSet) -> list[str]:
    """Says so if the published number of images is known and another one."""
    published = SETS[dataset].images.get(split) if dataset in SETS else None
    return [] if published in (None, len(data)) else [f"{data.name}, as published {published}"]


def _trainings_of(row: PaperRow) -> list[TrainConfig]:
    """The trainings of a row, in order."""
    return [one for one in (row.first, row.train) if one is not None]


def _trainings(row: PaperRow) -> tuple[list[str], list[str]]:
    """The images of the trainings, of which the first is read."""
    lines, partial = [], []
    for one in _trainings_of(row):
        data = training.with_absolute_places(one).data.open()
        seen = np.unique(data.read(data.ids[0]).label_hw)
        classes = [data.class_names[label] for label in seen[seen >= 0].tolist()]
        hidden = 0 if data.seen is None or one.setting == "supervised" else data.seen.count(False)
        lines.append(
            f"{one.setting} training with {data.name}; {data.convention}; masks of {hidden} of "
            f"{len(data.class_names)} classes are not shown; {data.ids[0]} shows "
            f"{', '.join(classes[:5]) or 'no class'}"
        )
        partial += _other_count(one.data.dataset, "train", data)
    return lines, list(dict.fromkeys(partial))


def _builds_of(row: PaperRow) -> list[BuildConfig]:
    """The builds of a row, in order."""
    return [one for one in (row.build, row.fallback) if one is not None]


def _captions(row: PaperRow) -> tuple[list[str], list[str]]:
    """The corpora, read to the end if the published number of captions is known."""
    lines, partial = [], []
    for build in _builds_of(row):
        corpus = with_absolute_places(build).corpus
        images = build.uses_images
        count = 0
        for item in read_corpus(corpus, images=False if row.captions else images):
            count += not isinstance(item, Dropped)
            if count and row.captions is None:
                break
        if not count:
            raise InputError(f"{corpus.path} has no usable caption")
        if images and corpus.images is not None and not os.path.isdir(corpus.images):
            raise InputError(f"the folder of images {corpus.images} does not exist")
        if row.captions is None:
            what = "captions" if corpus.labels is None else "labelled images"
            lines.append(f"{corpus.path}: {what} are there")
            continue
        lines.append(f"{corpus.path}: {count} captions")
        if count != row.captions:
            partial.append(f"{lines[-1]}, as published {row.captions}")
    return lines, partial
