"""COCO JSON masks as label maps: polygons and run lengths, drawn as pycocotools draws them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import VOID, PanopticMap
from ovref.evaluation.named_sets.names import ClassList
from ovref.evaluation.named_sets.opening import Example, LabelledSet, check_sizes, read_image
from ovref.evaluation.named_sets.panoptic import labels_of_segments
from ovref.evaluation.named_sets.rules import IGNORE

_SCALE = 5
"""Polygons are drawn on a grid this many times finer, as in COCO's reference code."""


def open_coco_masks(
    images: str | Path, annotations: str | Path, background: str = ""
) -> LabelledSet:
    """Opens COCO instance annotations as a set of label maps.

    Classes are the file's categories in the order of their ids. Where masks overlap, the smaller
    one is on top. Crowd regions are not evaluated. Each annotation is a segment of its own, a thing
    unless its category says `"isthing": 0`.

    Args:
        images: folder of the images that the file names.
        annotations: JSON file with `images`, `annotations` and `categories`.
        background: name of a first class that all other pixels have; empty ignores them.

    Raises:
        InputError: the file is not readable or not of this form, or an image is missing.
    """
    path, root = Path(annotations), Path(images)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        categories = sorted(
            (int(each["id"]), str(each["name"]), bool(each.get("isthing", 1)))
            for each in content["categories"]
        )
        files = {int(each["id"]): each for each in content["images"]}
        masks: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for each in content["annotations"]:
            masks[int(each["image_id"])].append(each)
        names = {str(each["file_name"]): number for number, each in files.items()}
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
        entry = files[names[name]]
        size = (int(entry["height"]), int(entry["width"]))
        image_hwc = read_image(root / name)
        try:
            panoptic = _segments(masks[names[name]], size, classes, 0 if background else None)
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
        folders=(root,),
    )


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


def mask_of(segmentation: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a list of polygons, or of run lengths as a list or a string.

    Raises:
        ValueError: run lengths of another size, or a polygon of fewer than three points.
    """
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != size_hw:
            raise ValueError(f"a mask has size {segmentation['size']}, its image {size_hw}")
        counts = segmentation["counts"]
        runs = np.array(_decoded(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        if (runs < 0).any() or runs.sum() != size_hw[0] * size_hw[1]:
            raise ValueError("run lengths do not fill the mask")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(size_hw[::-1]).T
    mask_hw = np.zeros(size_hw, dtype=bool)
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} numbers, expected pairs of at least 3")
        mask_hw |= _polygon_mask(polygon, size_hw)
    return mask_hw


def _decoded(text: str) -> list[int]:
    """Run lengths of COCO's compressed string: 5 bits a character, differences from the third."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[position]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            position, shift = position + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def _polygon_mask(polygon: Sequence[float], size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool by COCO's rule: edges are traced on a finer grid, and where they cross the
    middle of a column of pixels the mask begins or ends."""
    height, width = size_hw
    xs = [int(_SCALE * x + 0.5) for x in polygon[::2]]
    ys = [int(_SCALE * y + 0.5) for y in polygon[1::2]]
    us, vs = [], []
    for start in range(len(xs)):
        end = (start + 1) % len(xs)
        edge_us, edge_vs = _traced(xs[start], ys[start], xs[end], ys[end])
        us.append(edge_us)
        vs.append(edge_vs)
    u, v = np.concatenate(us), np.concatenate(vs)
    crosses = u[1:] != u[:-1]
    column = (np.where(u[1:] < u[:-1], u[1:], u[1:] - 1)[crosses] + 0.5) / _SCALE - 0.5
    row = (np.minimum(v[1:], v[:-1])[crosses] + 0.5) / _SCALE - 0.5
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = np.ceil(np.clip(row[kept], 0, height)).astype(np.int64)
    toggles = np.bincount(
        column[kept].astype(np.int64) * height + row, minlength=height * width + 1
    )
    return (np.cumsum(toggles[:-1]) % 2 == 1).reshape(width, height).T


def _traced(x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid points of an edge, both ends included, from the first to the second."""
    dx, dy = abs(x1 - x0), abs(y1 - y0)
    flipped = (dx >= dy and x0 > x1) or (dx < dy and y0 > y1)
    if flipped:
        x0, x1, y0, y1 = x1, x0, y1, y0
    steps = np.arange(max(dx, dy) + 1)
    if flipped:
        steps = steps[::-1]
    # Truncated, as the reference code does, which matters left of and above the image.
    if dx >= dy:
        slope = (y1 - y0) / dx if dx else 0.0
        return steps + x0, np.trunc(y0 + slope * steps + 0.5).astype(np.int64)
    slope = (x1 - x0) / dy
    return np.trunc(x0 + slope * steps + 0.5).astype(np.int64), steps + y0
