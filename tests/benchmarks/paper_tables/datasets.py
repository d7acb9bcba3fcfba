"""Small data sets in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ovref.evaluation.datasets import open_scenes
from ovref.evaluation.metrics_panoptic import TruePanoptic
from ovref.evaluation.named_sets.label_folder import seen_of
from ovref.evaluation.named_sets.opening import LabelledSet
from ovref.identity import fingerprint


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled images in memory."""

    name: str
    classes: tuple[str, ...]
    """Class names given to a segmenter; a label is a position in this list."""
    convention: str
    """Name and version of the label convention."""
    images: tuple[np.ndarray, ...]
    """(H, W, 3) uint8 RGB each."""
    labels: tuple[np.ndarray, ...]
    """(H, W) int32 each: positions in `classes`, or IGNORE for pixels that are not evaluated."""
    colours: dict[str, tuple[int, int, int]]
    """Colours of classes in pictures, sRGB in [0, 255]; other classes get arbitrary ones."""
    things: tuple[bool, ...] | None = None
    """Whether each class is a thing; None if unknown."""
    panoptic: tuple[TruePanoptic, ...] | None = None
    """True segments with instances, one map per image; None if unknown."""
    seen: tuple[bool, ...] | None = None
    """Whether each class was seen in training; None without a split."""

    @property
    def class_fingerprint(self) -> str:
        """Hash of names, order and convention: 16 hexadecimal digits."""
        return fingerprint([self.convention, list(self.classes)])[:16]


def in_memory(data: LabelledSet) -> Dataset:
    """Reads all images of a small set into memory.

    Raises:
        InputError: see `LabelledSet.read`.
    """
    examples = list(data)
    known = [each.panoptic for each in examples if each.panoptic is not None]
    return Dataset(
        name=data.name,
        classes=data.class_names,
        convention=data.convention,
        images=tuple(each.image_hwc for each in examples),
        labels=tuple(each.label_hw for each in examples),
        colours=dict(data.colours),
        things=data.things,
        panoptic=tuple(known) if len(known) == len(examples) else None,
        seen=data.seen,
    )


def miniature_scenes(split: str, count: int) -> Dataset:
    """`open_scenes` in memory."""
    return in_memory(open_scenes(split, count))


def with_unseen(data: Dataset, unseen: Sequence[str]) -> Dataset:
    """The data set with its classes split into unseen and seen ones, ignoring case.

    Raises:
        InputError: a name is not a class, or no class would be seen.
    """
    return replace(data, seen=seen_of(data.classes, unseen, data.name))
