"""Drawn training scenes as small labelled sets in published layouts."""

import json

import numpy as np
from PIL import Image

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, THINGS


def write_ade(root, seeds, split="train"):
    """Scenes as ADE20k's SceneParse150: values from 1, 0 where the first row of pixels is.

    Returns the path of a class list whose first classes are the miniature's, one with a synonym.
    """
    folder = {"train": "training", "val": "validation"}[split]
    for part in ("images", "annotations"):
        (root / part / folder).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        scene = render(seed, "train" if split == "train" else "test")
        name = f"ADE_{split}_{seed:08d}"
        _save_photo(root / "images" / folder / f"{name}.jpg", scene.image_hwc)
        values_hw = scene.label_hw.astype(np.uint8) + 1
        values_hw[0] = 0
        Image.fromarray(values_hw).save(root / "annotations" / folder / f"{name}.png")
    names = root / "names.txt"
    others = [f"unused {number}" for number in range(150 - len(CLASSES))]
    known = [f"{name};{name} seen" if name == "sky" else name for name in CLASSES]
    names.write_text("\n".join([*known, *others]) + "\n")
    return names


def write_coco(root, seeds):
    """Things of scenes as COCO's instances: ids with gaps, run lengths, one crowd region.

    Returns the file of annotations and the folder of images.
    """
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for seed in seeds:
        scene = render(seed, "train")
        name = f"{seed:012d}.jpg"
        _save_photo(root / "images" / name, scene.image_hwc)
        height, width = scene.label_hw.shape
        images.append({"id": seed + 5, "file_name": name, "height": height, "width": width})
        for number in np.unique(scene.instance_hw[scene.instance_hw > 0]).tolist():
            mask_hw = scene.instance_hw == number
            label = CLASSES[int(scene.label_hw[mask_hw][0])]
            annotations.append(_annotation(len(annotations), seed, label, mask_hw))
        crowd_hw = np.zeros((height, width), dtype=bool)
        crowd_hw[:2] = True
        crowd = _annotation(len(annotations), seed, THINGS[0], crowd_hw)
        annotations.append(crowd | {"iscrowd": 1})
    path = root / "instances_train2017.json"
    categories = [{"id": 2 * i + 3, "name": name} for i, name in enumerate(THINGS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path, root / "images"


def _annotation(number, seed, label, mask_hw):
    flat = mask_hw.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    counts = [0, *counts] if flat[0] else counts
    return {
        "id": number + 1,
        "image_id": seed + 5,
        "category_id": 2 * THINGS.index(label) + 3,
        "iscrowd": 0,
        "segmentation": {"size": list(mask_hw.shape), "counts": counts},
    }


def _save_photo(path, image_hwc):
    Image.fromarray(image_hwc).save(path, quality=95, subsampling=0)
