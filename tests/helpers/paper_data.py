"""A few small images of every data set of the papers' rows, in its published layout."""

import json

import numpy as np
import open_clip
import torch
from PIL import Image
from scipy.io import savemat

SIZE_HW = (24, 30)


def write_all(root):
    """Everything below `root` that `ovref reproduce --data` looks for."""
    rng = np.random.default_rng(0)

    def photo(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)).save(path)

    def labels(path, values, dtype=np.uint8):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.choice(np.array(values), SIZE_HW).astype(dtype)).save(path)

    def text(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    ade, full = root / "ade/ADEChallengeData2016", root / "ade/ADE20K_2021_17_01"
    voc, context = (root / f"pascal/VOCdevkit/VOC20{year}" for year in (12, 10))
    coco, city = root / "coco", root / "cityscapes"
    for number in range(2):
        name = f"ADE_val_{number:08d}"
        photo(ade / f"images/validation/{name}.jpg")
        labels(ade / f"annotations/validation/{name}.png", range(151))
        instances = np.zeros((*SIZE_HW, 3), np.uint8)
        instance_path = ade / f"annotations_instance/validation/{name}.png"
        instance_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(instances).save(instance_path)
        photo(full / f"images_detectron2/validation/{name}.jpg")
        labels(full / f"annotations_detectron2/validation/{name}.tif", range(847), np.uint16)
        name = f"2008_00000{number}"
        photo(voc / f"JPEGImages/{name}.jpg")
        labels(voc / f"SegmentationClass/{name}.png", [*range(21), 255])
        photo(context / f"JPEGImages/{name}.jpg")
        labels(context / f"SegmentationClassContext/{name}.png", range(60))
        (context / "trainval").mkdir(parents=True, exist_ok=True)
        full_hw = rng.integers(0, 460, SIZE_HW).astype(np.uint16)
        savemat(context / f"trainval/{name}.mat", {"LabelMap": full_hw})
        photo(coco / f"val2017/{number:012d}.jpg")
        labels(coco / f"stuffthingmaps/val2017/{number:012d}.png", [0, 1, 17, 95, 181, 255])
        photo(coco / f"train2017/{number:012d}.jpg")
        labels(coco / f"stuffthingmaps/train2017/{number:012d}.png", [0, 1, 17, 95, 181, 255])
        name = f"2009_00000{number}"
        photo(voc / f"JPEGImages/{name}.jpg")
        labels(voc / f"SegmentationClassAug/{name}.png", [*range(21), 255])
        photo(context / f"JPEGImages/{name}.jpg")
        labels(context / f"SegmentationClassContext/{name}.png", range(60))
        photo(city / f"leftImg8bit/val/ulm/ulm_{number}_leftImg8bit.png")
        labels(city / f"gtFine/val/ulm/ulm_{number}_gtFine_labelIds.png", range(34))
    ids = "2008_000000\n2008_000001\n"
    text(voc / "ImageSets/Segmentation/val.txt", ids)
    text(context / "ImageSets/SegmentationContext/val.txt", ids)
    ids = "2009_000000\n2009_000001\n"
    text(voc / "ImageSets/Segmentation/trainaug.txt", ids)
    text(context / "ImageSets/SegmentationContext/train.txt", ids)
    captions = [
        {"id": n, "image_id": n % 2, "caption": f"a dog and {n} cats on a road"} for n in range(3)
    ]
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(2)]
    text(
        coco / "annotations/captions_train2017.json",
        json.dumps({"images": images, "annotations": captions}),
    )
    photo(ade / "images/training/ADE_train_00000000.jpg")
    labels(ade / "annotations/training/ADE_train_00000000.png", range(12))
    text(root / "weights/ovseg/config.json", "stands in for a converted model")
    for name, clip in (("convnext_large", "convnext_large_d_320"), ("rn50x64", "RN50x64")):
        text(root / f"weights/fcclip_{name}/fcclip.json", "likewise")
        settings = json.dumps({"model_cfg": open_clip.get_model_config(clip)})
        text(root / f"weights/fcclip_{name}/clip/open_clip_config.json", settings)
    positions = torch.zeros(1).expand(1, 64, 64, 768)  # one number on disk
    torch.save({"image_encoder.pos_embed": positions}, root / "weights/sam_vit_b_01ec64.pth")
    write_open_images(root / "open_images")


OPEN_IMAGES = """\
ImageID,Source,LabelName,Confidence
000002b66c9c498e,verification,/m/014j1m,0
000002b66c9c498e,verification,/m/014sv8,1
000002b66c9c498e,crowdsource-verification,/m/0h8nl2m,1
00001bcc92282a38,verification,/m/07j7r,0
0000287ab7f53d5e,crowdsource-verification,/m/07j7r,1
0000287ab7f53d5e,verification,/m/07j7r,1
"""
"""oidv7-train-annotations-human-imagelabels.csv: labels that people confirmed or rejected."""
OPEN_IMAGES_NAMES = """\
LabelName,DisplayName
/m/014j1m,Apple
/m/014sv8,Human eye
/m/07j7r,Tree
/m/0h8nl2m,"Baked goods, sweet"
"""
"""Rows of oidv7-class-descriptions.csv, which covers more labels than any one file of labels."""


def write_open_images(base):
    """The files of Open Images V7 as they are published, with noise for photographs."""
    (base / "train").mkdir(parents=True)
    (base / "oidv7-train-annotations-human-imagelabels.csv").write_text(OPEN_IMAGES)
    (base / "oidv7-class-descriptions.csv").write_text(OPEN_IMAGES_NAMES)
    rng = np.random.default_rng(1)
    for image in ("000002b66c9c498e", "00001bcc92282a38", "0000287ab7f53d5e"):
        pixels = rng.integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"train/{image}.jpg")
