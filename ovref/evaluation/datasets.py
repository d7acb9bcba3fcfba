"""Labelled images for evaluation: the miniature's scenes, and small data sets in memory.

Label maps of the same data set exist with different orders and offsets, and a mismatch looks like a
bad model. So every data set and every result has the class list, the name of its label convention
and its fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ovref.class_files import ClassList
from ovref.corpora.image_formats import FIRST_SCENE
from ovref.evaluation.metrics_ap import TrueInstances
from ovref.evaluation.metrics_panoptic import PanopticMap
from ovref.evaluation.metrics_semantic import IGNORE
from ovref.evaluation.named_sets.label_folder import seen_of
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.identity import fingerprint
from ovref.miniature import scenes
from ovref.miniature.shapes import CLASSES, STUFF_COLOURS, THINGS
from ovref_inference.ranges import require_at_least

HELD_OUT = ("validation", "test")
"""Splits with combinations of thing, colour and ground that the miniature was not trained on."""


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
    panoptic: tuple[PanopticMap, ...] | None = None
    """True segments with instances, one map per image; None if unknown."""
    seen: tuple[bool, ...] | None = None
    """Whether each class was seen in training; None without a split."""

    @property
    def class_fingerprint(self) -> str:
        """Hash of names, order and convention: 16 hexadecimal digits."""
        return fingerprint([self.convention, list(self.classes)])[:16]


def open_scenes(split: str, count: int) -> LabelledSet:
    """The first `count` held-out scenes of a split: seeds 0 to count - 1, 64 x 64 pixels, rendered
    when read.

    Args:
        split: `validation`, to choose parameters, or `test`, to report.
        count: number of scenes, at least 1.

    Raises:
        ValueError: `split` is another one (training scenes are not for evaluation), or `count` is
            below 1.
    """
    if split not in HELD_OUT:
        raise ValueError(f"split must be one of {HELD_OUT}, found {split!r}")
    require_at_least("count", count, 1)
    return _scenes(split, range(count))


def training_scenes(count: int) -> LabelledSet:
    """The first `count` scenes of the training distribution that no model was trained on, for
    methods that need training images."""
    return _scenes("train", range(FIRST_SCENE, FIRST_SCENE + count))


def _scenes(split: str, seeds: range) -> LabelledSet:
    def read(name: str) -> Example:
        scene = scenes.render(int(name), split)
        return Example(
            id=name,
            image_path=Path(f"scene_{name}"),
            image_hwc=scene.image_hwc,
            label_hw=scene.label_hw.astype(np.int32),
            panoptic=panoptic_truth(scene.label_hw, scene.instance_hw),
        )

    return LabelledSet(
        name=f"miniature {split}, {len(seeds)} scenes",
        class_list=ClassList(
            name="miniature",
            source="ovref/miniature/shapes.py",
            classes=tuple((name,) for name in CLASSES),
        ),
        convention="miniature-1: position in the class list from 0, all pixels labelled",
        ids=tuple(map(str, seeds)),
        read=read,
        things=tuple(name in THINGS for name in CLASSES),
        colours={name: next(iter(colours.values())) for name, colours in STUFF_COLOURS.items()},
    )


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
        ValueError: a name is not a class, or no class would be seen.
    """
    return replace(data, seen=seen_of(data.classes, unseen))


def panoptic_truth(label_hw: np.ndarray, instance_hw: np.ndarray) -> PanopticMap:
    """Segments of a label map and an instance map: all instances, and the rest of each class.

    Args:
        label_hw: (H, W) integer classes, or IGNORE, which becomes void.
        instance_hw: (H, W) integers: 0 for no instance (stuff), others are instance numbers. The
            pixels of one number have one class.

    Returns:
        Segments by instance number, then stuff by class.

    Raises:
        ValueError: shapes differ, or an instance has pixels of several classes.
    """
    if label_hw.shape != instance_hw.shape:
        raise ValueError(f"shapes differ: {label_hw.shape} and {instance_hw.shape}")
    ids_hw = np.zeros(label_hw.shape, dtype=np.int32)
    labels: dict[int, int] = {}
    for number in np.unique(instance_hw[instance_hw > 0]).tolist():
        found = np.unique(label_hw[instance_hw == number]).tolist()
        if len(found) > 1:
            raise ValueError(f"instance {number} has pixels of several classes: {found}")
        if found != [IGNORE]:
            labels[len(labels) + 1] = found[0]
            ids_hw[instance_hw == number] = len(labels)
    stuff_hw = (instance_hw == 0) & (label_hw != IGNORE)
    for label in np.unique(label_hw[stuff_hw]).tolist():
        labels[len(labels) + 1] = label
        ids_hw[stuff_hw & (label_hw == label)] = len(labels)
    return PanopticMap(ids_hw=ids_hw, labels=labels)


def true_instances(panoptic: PanopticMap, things: Sequence[bool]) -> TrueInstances:
    """The segments of things as instances, for average precision; stuff has none."""
    chosen = [segment for segment, label in panoptic.labels.items() if things[label]]
    return TrueInstances(
        masks_nhw=panoptic.ids_hw == np.array(chosen, dtype=np.int64)[:, None, None],
        labels=np.array([panoptic.labels[segment] for segment in chosen], dtype=np.int64),
        crowd=np.array([segment in panoptic.crowd for segment in chosen], dtype=bool),
    )
