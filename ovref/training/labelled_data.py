"""What every training has to say of its labelled data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovref.config import dump
from ovref.corpora.corpus_identity import identify_files
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.identity import fingerprint


def shown_classes(data: LabelledSet) -> tuple[int, ...]:
    """Positions in the set's class list of the classes whose masks may be shown to a zero-shot
    training."""
    seen = data.seen or (True,) * len(data.class_names)
    return tuple(np.flatnonzero(seen).tolist())


def data_identity(spec: Any, data: LabelledSet, without: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a training and its data, for the identity of its checkpoints: without places,
    the loop's settings, and the settings `without`."""
    settings = dump(spec)
    for name in ("output", "training", "device", *without):
        del settings[name]
    for name in ("root", "threads"):
        del settings["data"][name]
    for name in ("images", "labels", "classes") if spec.data.folder else ():
        del settings["data"]["folder"][name]
    return {
        **settings,
        "images": fingerprint(list(data.ids)),
        "files": identify_files(data.folders),
        "classes": [data.class_fingerprint, list(data.class_names)],
        "seen": [data.class_names[label] for label in shown_classes(data)],
    }


def classes_text(data: LabelledSet, shown: Sequence[int]) -> str:
    """For people: the set, and how many of its classes have masks in a training."""
    unknown = [name for label, name in enumerate(data.class_names) if label not in shown]
    without = f", {len(unknown)} without: {', '.join(unknown)}" if unknown else ""
    return f"{data.name}\n{len(shown)} classes with masks{without}"
