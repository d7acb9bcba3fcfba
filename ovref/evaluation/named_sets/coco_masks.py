"""COCO JSON masks as label maps: polygons and run lengths, drawn as pycocotools draws them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovref.class_files import ClassList
from ovref.corpora.json_stream import stream_members
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import VOID, PanopticMap
from ovref.evaluation.named_sets.coco_drawing import mask_of
from ovref.evaluation.named_sets.opening import Example, LabelledSet, check_sizes, read_image
from ovref.evaluation.named_sets.panoptic import labels_of_segments
from ovref.evaluation.named_sets.rules import IGNORE

MEMBERS = ("categories", "images", "annotations")
KEPT = ("segmentation", "category_id", "iscrowd")
"""Of an annotation, what its mask and its class are read from."""


def open_coco_masks(
    images: str | Path, annotations: str | Path, background: str = ""
) -> LabelledSet:
    """Opens COCO instance annotations as a set of label maps.

    Classes are the file's categories in the order of their ids. Where masks overlap, the smaller
    one is on top. Crowd regions are not evaluated. Each annotation is a segment of its own, a thing
    unless its category says `"isthing": 0`. The file is streamed; what is kept of an annotation is
    the text of what its mask is drawn from.

    Args:
        images: folder of the images that the file names.
        annotations: JSON file with `images`, `annotations` and `categories`.
        background: name of a first class that all other pixels have; empty ignores them.

    Raises:
        InputError: the file is not readable or not of this form, or an image is missing.
    """
    path, root = Path(annotations), Path(images)
    try:
        categories, files, masks = _read(path)
        names = {name: number for number, (name, _) in files.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"cannot read the COCO annotations {path}: {error!r}") from error
    first = 1 if background else 0
    classes = {number: index + first for index, (number, *_) in enumerate(categories)}
    if len(classes) < len(categories) or not categories:
        raise InputError(f"{path} has no categories, or two of one id")
    if len(names) < len(files) or not files:
        raise InputError(f"{path} has no images, or two of one file name")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InputError(f"{root} lacks {len(missing)} images of {path}, for one {missing[0]}")

    def read(name: str) -> Example:
        _, size = files[names[name]]
        image_hwc = read_image(root / name)
        try:
            annotations = [json.loads(text) for text in masks.get(names[name], ())]
            panoptic = _segments(annotations, size, classes, 0 if background else None)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"{path}, image {name}: {error!r}") from error
        crowd_hw = np.isin(panoptic.ids_hw, list(panoptic.crowd))
        label_hw = np.where(crowd_hw, IGNORE, labels_of_segments(panoptic)).astype(np.int32)
        check_sizes(root / name, image_hwc, path, label_hw)
        return Example(
            id=name,
            image_path=root / name,
            image_hwc=image_hwc,
            label_hw=label_hw,
            panoptic=panoptic,
        )

    own = [(background,)] if background else []
    return LabelledSet(
        name=f"{path.stem}, {len(names)} images",
        class_list=ClassList(
            name=path.name,
            source=str(path),
            classes=(*own, *((name,) for _, name, _ in categories)),
        ),
        convention="COCO JSON masks, smaller over larger, crowds ignored",
        ids=tuple(names),
        read=read,
        things=(*(False for _ in own), *(thing for *_, thing in categories)),
        folders=(root, path),
    )


def _read(
    path: Path,
) -> tuple[
    list[tuple[int, str, bool]], dict[int, tuple[str, tuple[int, int]]], dict[int, list[bytes]]
]:
    """Categories (id, name, thing), sorted; by id of an image its file name and (height, width);
    and by the same its annotations as JSON."""
    categories, files = [], {}
    masks: dict[int, list[bytes]] = defaultdict(list)
    seen, member = set(), ""
    with open(path, encoding="utf-8-sig") as file:
        for kind, each in stream_members(file, *MEMBERS):
            if kind == "member":
                member = each
                seen.add(member)
            elif member == "categories":
                thing = bool(each.get("isthing", 1))
                categories.append((int(each["id"]), str(each["name"]), thing))
            elif member == "images":
                size_hw = (int(each["height"]), int(each["width"]))
                files[int(each["id"])] = (str(each["file_name"]), size_hw)
            else:
                kept = {name: each[name] for name in KEPT if name in each}
                masks[int(each["image_id"])].append(json.dumps(kept).encode())
    if missing := [name for name in MEMBERS if name not in seen]:
        raise ValueError(f"it has no {missing[0]}")
    return sorted(categories), files, masks


def _segments(
    annotations: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    classes: Mapping[int, int],
    rest: int | None,
) -> PanopticMap:
    """The segments in the order they are drawn; where no mask is one of class `rest`, or void."""
    ids_hw = np.full(size_hw, VOID, dtype=np.int32)
    labels: dict[int, int] = {}
    crowd = set()
    drawn = [(mask_of(each["segmentation"], size_hw), each) for each in annotations]
    # Crowds first: what is annotated singly lies on them.
    drawn.sort(key=lambda pair: (not pair[1].get("iscrowd", 0), -int(pair[0].sum())))
    for id_, (mask_hw, each) in enumerate(drawn, start=1):
        ids_hw[mask_hw] = id_
        labels[id_] = classes[int(each["category_id"])]
        if each.get("iscrowd", 0):
            crowd.add(id_)
    if rest is not None:
        labels[len(drawn) + 1] = rest
        ids_hw[ids_hw == VOID] = len(drawn) + 1
    present = set(np.unique(ids_hw).tolist())  # without what is wholly covered
    labels = {id_: label for id_, label in labels.items() if id_ in present}
    return PanopticMap(ids_hw=ids_hw, labels=labels, crowd=frozenset(crowd & present))
