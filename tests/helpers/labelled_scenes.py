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


def write_open_images(root, seeds):
    """Scenes as Open Images V7: labels that people confirmed, one a scene that they rejected though
    it is there, and an image without any label that they confirmed.

    Returns the file of labels, that of class descriptions, the folder of images, and the confirmed
    and rejected names of each image.
    """
    ids = {name: f"/m/0{number:03x}" for number, name in enumerate(CLASSES)}
    (root / "train").mkdir(parents=True)
    rows, said = ["ImageID,Source,LabelName,Confidence"], {}
    for seed in seeds:
        scene = render(seed, "train")
        image = f"{seed:016x}"
        _save_photo(root / "train" / f"{image}.jpg", scene.image_hwc)
        *confirmed, rejected = (CLASSES[i] for i in np.unique(scene.label_hw).tolist())
        said[image] = set(confirmed), rejected
        rows += [f"{image},verification,{ids[rejected]},0"]
        rows += [f"{image},crowdsource-verification,{ids[name]},1" for name in confirmed]
    blank = f"{max(seeds) + 1:016x}"
    _save_photo(root / "train" / f"{blank}.jpg", scene.image_hwc)
    rows.append(f"{blank},verification,{ids[rejected]},0")
    labels = root / "oidv7-train-annotations-human-imagelabels.csv"
    labels.write_text("\n".join(rows) + "\n")
    names = root / "oidv7-class-descriptions.csv"
    described = [f"{one},{name.capitalize()}" for name, one in ids.items()]
    described = ["LabelName,DisplayName", *described, "/m/0zzz,Unseen thing"]
    names.write_text("\n".join(described) + "\n")
    return labels, names, root / "train", said


def run_lengths(mask_hw):
    """A mask as COCO's run lengths, not compressed."""
    flat = mask_hw.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    counts = [0, *counts] if flat[0] else counts
    return {"size": list(mask_hw.shape), "counts": counts}


def _annotation(number, seed, label, mask_hw):
    return {
        "id": number + 1,
        "image_id": seed + 5,
        "category_id": 2 * THINGS.index(label) + 3,
        "iscrowd": 0,
        "segmentation": run_lengths(mask_hw),
    }


def _save_photo(path, image_hwc):
    Image.fromarray(image_hwc).save(path, quality=95, subsampling=0)
