"""COCO JSON masks, polygons and run lengths, as label maps."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovref.class_files import ClassList, check_distinct
from ovref.corpora.json_stream import stream_items
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import VOID, TruePanoptic
from ovref.evaluation.named_sets.opening import Example, LabelledSet, check_sizes, read_image
from ovref.evaluation.named_sets.panoptic import labels_of_segments
from ovref.evaluation.named_sets.rules import IGNORE
from ovref.ops.run_lengths import mask_of

KEPT = ("segmentation", "category_id", "iscrowd")
"""Fields of an annotation that its mask and its class are read from."""


def open_coco_masks(
    images: str | Path, annotations: str | Path, background: str = ""
) -> LabelledSet:
    """Opens COCO instance annotations as a set of label maps.

    Classes are the file's categories in the order of their ids. Where masks overlap, the smaller
    one is on top. Crowd regions are not evaluated. Each annotation is one segment, a thing unless
    its category has `"isthing": 0`. The file is streamed; of each annotation only the text that its
    mask is drawn from is kept.

    Args:
        images: folder of the images listed in the file.
        annotations: JSON file with `images`, `annotations` and `categories`.
        background: name of an additional first class for all other pixels; empty ignores them.

    Raises:
        InputError: the file cannot be read or is not such a file, or an image is missing.
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
        raise InputError(f"{path} has no categories, or two with the same id")
    if len(names) < len(files) or not files:
        raise InputError(f"{path} has no images, or two with the same file name")
    own = [(background,)] if background else []
    names_of_classes = (*own, *((name,) for _, name, _ in categories))
    check_distinct(names_of_classes, str(path))
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
            reason = f"an annotation has no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, image {name}: {reason}") from error
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

    return LabelledSet(
        name=f"{path.stem}, {len(names)} images",
        class_list=ClassList(
            name=path.name,
            source=str(path),
            classes=names_of_classes,
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
    with open(path, encoding="utf-8-sig") as file:
        for member, each in stream_items(file, "categories", "images", "annotations"):
            if member == "categories":
                thing = bool(each.get("isthing", 1))
                if not (name := str(each["name"]).strip()):
                    raise ValueError(f"category {each['id']} has no name")
                categories.append((int(each["id"]), name, thing))
            elif member == "images":
                size_hw = (int(each["height"]), int(each["width"]))
                if (number := int(each["id"])) in files:
                    raise ValueError(f"two images have the id {number}")
                files[number] = (str(each["file_name"]), size_hw)
            else:
                kept = {name: each[name] for name in KEPT if name in each}
                masks[int(each["image_id"])].append(json.dumps(kept).encode())
    return sorted(categories), files, masks


def _segments(
    annotations: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    classes: Mapping[int, int],
    rest: int | None,
) -> TruePanoptic:
    """The segments in drawing order; pixels without a mask are of class `rest`, or void."""
    ids_hw = np.full(size_hw, VOID, dtype=np.int32)
    labels: dict[int, int] = {}
    crowd = set()
    masks = [(mask_of(each["segmentation"], size_hw), each) for each in annotations]
    # Crowds first, below single instances.
    masks.sort(key=lambda pair: (not pair[1].get("iscrowd", 0), -int(pair[0].sum())))
    for id_, (mask_hw, each) in enumerate(masks, start=1):
        if (category := int(each["category_id"])) not in classes:
            raise ValueError(f"an annotation has category_id {category}, no category has that id")
        ids_hw[mask_hw] = id_
        labels[id_] = classes[category]
        if each.get("iscrowd", 0):
            crowd.add(id_)
    if rest is not None:
        labels[len(masks) + 1] = rest
        ids_hw[ids_hw == VOID] = len(masks) + 1
    present = set(np.unique(ids_hw).tolist())  # without those that are completely covered
    labels = {id_: label for id_, label in labels.items() if id_ in present}
    return TruePanoptic(ids_hw=ids_hw, labels=labels, crowd=frozenset(crowd & present))
