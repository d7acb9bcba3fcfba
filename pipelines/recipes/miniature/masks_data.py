"""Train scenes with exact label maps, for the models that are trained on masks or boxes.

SAM, GroundingDINO and MaskFormer learn from annotated images, as the originals do; nothing else in
the miniature reads this pool.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from ovref.miniature.scenes import render

SCENES, FIRST_SEED, SINGLE_EVERY = 20_000, 2_000_000, 4
"""Number of scenes, seed of the first; every fourth shows one thing alone."""
SMALLEST = 12
"""Regions of fewer pixels are no targets."""


@dataclass(frozen=True)
class MaskPool:
    """Annotated train scenes as arrays; n scenes of 64 x 64 pixels."""

    images_nhwc: np.ndarray
    """uint8 RGB (n, 64, 64, 3), memory-mapped."""
    labels_nhw: np.ndarray
    """uint8 (n, 64, 64) class ids."""
    instances_nhw: np.ndarray
    """uint8 (n, 64, 64): 0 for stuff, 1.. for single things."""
    nouns: tuple[tuple[str, ...], ...]
    """Classes that each caption names, in order."""


def load_mask_pool(work, count=SCENES):
    """The pool in `work/scenes_masks/`, rendered first if necessary (about half a minute)."""
    folder = Path(work) / "scenes_masks"
    if not (folder / "nouns.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, 64, 64, 3), np.uint8)
        labels, instances = np.empty((2, count, 64, 64), np.uint8)
        nouns = []
        for i in range(count):
            shares = {"pair_share": 0.0, "plural_share": 0.0} if i % SINGLE_EVERY == 0 else {}
            scene = render(FIRST_SEED + i, "train", **shares)
            images[i], labels[i], instances[i] = scene.image_hwc, scene.label_hw, scene.instance_hw
            nouns.append([noun.lemma for noun in scene.nouns])
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", labels)
        np.save(folder / "instances.npy", instances)
        # Written last: its existence marks the pool as complete.
        (folder / "nouns.json").write_text(json.dumps(nouns))
    return MaskPool(
        images_nhwc=np.load(folder / "images.npy", mmap_mode="r"),
        labels_nhw=np.load(folder / "labels.npy", mmap_mode="r"),
        instances_nhw=np.load(folder / "instances.npy", mmap_mode="r"),
        nouns=tuple(tuple(names) for names in json.loads((folder / "nouns.json").read_text())),
    )


def regions(label_hw, instance_hw, smallest=SMALLEST):
    """A region for each single thing and for each stuff class.

    Stuff that a thing cuts in two stays one region, since a caption names it once.

    Args:
        label_hw: (h, w) class ids.
        instance_hw: (h, w), 0 for stuff, 1.. for single things.
        smallest: regions of fewer pixels are dropped.

    Returns:
        (masks bool (n, h, w), class ids int64 (n,), bool (n,): is a thing).
    """
    masks, classes, things = [], [], []
    for number in range(1, int(instance_hw.max()) + 1):
        mask = instance_hw == number
        if mask.sum() >= smallest:
            masks.append(mask)
            classes.append(int(np.bincount(label_hw[mask]).argmax()))
            things.append(True)
    for label in np.unique(label_hw[instance_hw == 0]):
        mask = (label_hw == label) & (instance_hw == 0)
        if mask.sum() >= smallest:
            masks.append(mask)
            classes.append(int(label))
            things.append(False)
    if not masks:
        return np.zeros((0, *label_hw.shape), bool), np.zeros(0, np.int64), np.zeros(0, bool)
    return np.stack(masks), np.array(classes), np.array(things)


def boxes_of(masks_nhw):
    """Smallest boxes around non-empty masks: float32 (n, 4), x0, y0, x1, y1 in pixels, x1 and y1
    one past the last pixel."""
    boxes = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for rows, columns in (ndimage.find_objects(mask.astype(np.uint8))[0] for mask in masks_nhw)
    ]
    return np.array(boxes, np.float32).reshape(-1, 4)
