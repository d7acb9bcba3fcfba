"""A named set as the `Dataset` in memory that `ovref evaluate` takes."""

from itertools import islice

import numpy as np

from ovref.errors import InputError
from ovref.evaluation.datasets import Dataset
from ovref.evaluation.metrics import IGNORE as IGNORE_BYTE
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.evaluation.named_sets.rules import IGNORE


def in_memory(data: LabelledSet, limit: int | None = None) -> Dataset:
    """Reads the first `limit` images, or all.

    Raises:
        InputError: as `LabelledSet.read`, or more classes than 8-bit labels can number.
    """
    if len(data.class_names) > IGNORE_BYTE:
        raise InputError(
            f"{data.name} has {len(data.class_names)} classes; a data set in memory has at most "
            f"{IGNORE_BYTE}: read it image by image"
        )
    images, labels, panoptic = [], [], []
    for example in islice(data, limit):
        images.append(example.image_hwc)
        label_hw = np.where(example.label_hw == IGNORE, IGNORE_BYTE, example.label_hw)
        labels.append(label_hw.astype(np.uint8))
        panoptic.append(example.panoptic)
    known = [each for each in panoptic if each is not None]
    return Dataset(
        name=data.name if len(images) == len(data) else f"{data.name}, the first {len(images)}",
        classes=data.class_names,
        convention=f"{data.convention}; class list {data.class_list.fingerprint}",
        images=tuple(images),
        labels=tuple(labels),
        colours={},
        things=data.things,
        panoptic=tuple(known) if known else None,
        seen=data.seen,
    )
