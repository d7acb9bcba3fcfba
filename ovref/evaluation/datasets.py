"""Labelled images for evaluation: the miniature's scenes.

Label maps of the same data set exist with different orders and offsets, and a mismatch looks like a
bad model. So every data set and every result has the class list, the name of its label convention
and its fingerprint.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovref.class_files import ClassList
from ovref.corpora.image_formats import FIRST_SCENE
from ovref.evaluation.metrics_ap import TrueInstances
from ovref.evaluation.metrics_panoptic import TruePanoptic, crowd_of
from ovref.evaluation.metrics_semantic import IGNORE
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.miniature import scenes
from ovref.miniature.shapes import CLASSES, STUFF_COLOURS, THINGS
from ovref_inference.ranges import require_at_least
from ovref_inference.segmenters.regions import Panoptic

HELD_OUT = ("validation", "test")
"""Splits with combinations of thing, colour and ground that the miniature was not trained on."""


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


def panoptic_truth(label_hw: np.ndarray, instance_hw: np.ndarray) -> TruePanoptic:
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
    return TruePanoptic(ids_hw=ids_hw, labels=labels)


def true_instances(panoptic: Panoptic, things: Sequence[bool]) -> TrueInstances:
    """The segments of things as instances, for average precision; stuff has none."""
    chosen = [segment for segment, label in panoptic.labels.items() if things[label]]
    return TrueInstances(
        masks_nhw=panoptic.ids_hw == np.array(chosen, dtype=np.int64)[:, None, None],
        labels=np.array([panoptic.labels[segment] for segment in chosen], dtype=np.int64),
        crowd=np.array([segment in crowd_of(panoptic) for segment in chosen], dtype=bool),
    )
