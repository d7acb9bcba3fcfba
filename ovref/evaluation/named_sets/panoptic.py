"""Panoptic labels: COCO's PNG and JSON files, and ADE20k's class and instance maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.corpora.json_stream import stream_items
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import VOID, TruePanoptic
from ovref.evaluation.named_sets.label_files import colours, panoptic_ids
from ovref.evaluation.named_sets.rules import IGNORE


@dataclass(frozen=True, kw_only=True)
class IndexedSegments:
    """The segments of one image in the JSON file."""

    classes: Mapping[int, int]
    """Segment id -> class."""
    crowd: frozenset[int]
    """Ids of crowd segments."""


def read_index(path: Path, classes: Mapping[int, int]) -> dict[str, IndexedSegments]:
    """Reads a panoptic JSON file, streamed, because it may have hundreds of megabytes.

    Args:
        path: the file.
        classes: category id -> class of the set.

    Returns:
        Stem of the image's PNG file -> segments, in file order.

    Raises:
        InputError: the file cannot be read, is not panoptic annotations, or has other categories
            than the set.
    """
    categories: set[int] = set()
    index: dict[str, IndexedSegments] = {}
    count = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for member, each in stream_items(file, "categories", "annotations"):
                if member == "categories":
                    categories.add(int(each["id"]))
                else:
                    index[Path(each["file_name"]).stem] = _segments(each, classes)
                    count += 1
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read the panoptic annotations {path}: {error}") from error
    except KeyError as error:
        raise InputError(
            f"{path} does not hold panoptic annotations of this set: {error} is missing, or is a "
            "category that the set does not have"
        ) from error
    if categories != set(classes):
        raise InputError(
            f"{path} has {len(categories)} categories from {min(categories, default='none')}, the "
            f"set {len(classes)} from {min(classes)}: these are annotations of another set"
        )
    if len(index) < count:
        raise InputError(f"{path} has two annotations of the same image")
    return index


def _segments(annotation: Mapping[str, Any], classes: Mapping[int, int]) -> IndexedSegments:
    infos = annotation["segments_info"]
    return IndexedSegments(
        classes={int(each["id"]): classes[int(each["category_id"])] for each in infos},
        crowd=frozenset(int(each["id"]) for each in infos if each.get("iscrowd", 0)),
    )


def panoptic_file(path: Path, segments: IndexedSegments) -> TruePanoptic:
    """The segments of a panoptic PNG.

    Raises:
        InputError: the file cannot be read, or one of its segments is not in the JSON file.
    """
    ids_hw = panoptic_ids(path)
    unknown = set(np.unique(ids_hw).tolist()) - {VOID} - set(segments.classes)
    if unknown:
        raise InputError(
            f"{path} has {len(unknown)} segments that its JSON file lacks, for instance id "
            f"{min(unknown)}: the two files do not belong together"
        )
    return TruePanoptic(ids_hw=ids_hw, labels=segments.classes, crowd=segments.crowd)


def ade_instances(path: Path, label_hw: np.ndarray, categories: tuple[int, ...]) -> TruePanoptic:
    """ADE20k's segments: each stuff class of the class map, then each instance on top.

    Pixels of a thing class without an instance are void.

    Args:
        path: PNG of instances: red is the category, from 1, green the instance.
        label_hw: (H, W) classes of the class map, or IGNORE.
        categories: class of each category.

    Raises:
        InputError: the file cannot be read or has another size, or an instance has no category or
            several.
    """
    colour_hwc = colours(path)
    if colour_hwc.shape[:2] != label_hw.shape:
        raise InputError(f"{path} is {colour_hwc.shape[:2]}, the map of classes {label_hw.shape}")
    ids_hw = np.zeros(label_hw.shape, dtype=np.int32)
    labels: dict[int, int] = {}
    for label in np.unique(label_hw).tolist():
        if label != IGNORE and label not in categories:
            labels[len(labels) + 1] = label
            ids_hw[label_hw == label] = len(labels)
    category_hw, instance_hw = colour_hwc[..., 0], colour_hwc[..., 1]
    for instance in np.unique(instance_hw[instance_hw > 0]).tolist():
        mask_hw = instance_hw == instance
        found = np.unique(category_hw[mask_hw]).tolist()
        if len(found) > 1 or not 1 <= found[0] <= len(categories):
            raise InputError(
                f"{path} gives instance {instance} the categories {found}, expected one of 1 to "
                f"{len(categories)}"
            )
        labels[len(labels) + 1] = categories[found[0] - 1]
        ids_hw[mask_hw] = len(labels)
    return TruePanoptic(ids_hw=ids_hw, labels=labels)


def labels_of_segments(panoptic: TruePanoptic) -> np.ndarray:
    """(H, W) int32 class of each pixel's segment, IGNORE without one."""
    ids, inverse = np.unique(panoptic.ids_hw, return_inverse=True)
    classes = [IGNORE if each == VOID else panoptic.labels[each] for each in ids.tolist()]
    return np.array(classes, dtype=np.int32)[inverse].reshape(panoptic.ids_hw.shape)
