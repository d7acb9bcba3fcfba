"""ADE20k and Cityscapes."""

from dataclasses import replace

from ovref.evaluation.named_sets.bundled_classes import bundled
from ovref.evaluation.named_sets.layouts import TRAINING, FolderLayout, NamedSet
from ovref.evaluation.named_sets.rules import listed, shifted

_ADE = ("", "ADEChallengeData2016", "ade/ADEChallengeData2016")
ADE_INSTANCES: tuple[int, ...] = tuple(v - 1 for v in bundled("ade150", "mmseg")["instances"])
"""Class of each of the 100 categories of ADE20k's instance files, whose ids start at 1."""
_ADE_PUBLISHED = FolderLayout(
    what="ADE20k (SceneParse150) as published",
    bases=_ADE,
    images=("images/{split}/{id}.jpg",),
    labels="annotations/{split}/{id}.png",
    splits=TRAINING,
    rule=shifted(150, 1, ignored=[0]),
    ids="ADE20k's 150 ids: 1-150, 0 other",
)
_ADE150 = NamedSet(
    name="ade150",
    classes="ade150",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(
        _ADE_PUBLISHED,
        replace(
            _ADE_PUBLISHED,
            what="ADE20k prepared by Mask2Former, FC-CLIP or CAT-Seg",
            labels="annotations_detectron2/{split}/{id}.png",
            rule=shifted(150, ignored=[255]),
            ids="ADE20k's 150 classes: 0-149, 255 other",
        ),
    ),
    images={"train": 20210, "val": 2000},
    things=frozenset(ADE_INSTANCES),
)
_ADE_PANOPTIC_JSON = FolderLayout(
    what="ADE20k panoptic prepared by Mask2Former or FC-CLIP",
    bases=_ADE,
    images=("images/validation/{id}.jpg",),
    labels="ade20k_panoptic_{split}/{id}.png",
    listed_by="ade20k_panoptic_{split}.json",
    splits={"val": "val"},
    rule=shifted(150),
    ids="segment ids as colours, of 150 categories numbered 0-149",
    reader="panoptic",
)
_ADE_PANOPTIC = replace(
    _ADE150,
    name="ade_panoptic",
    layouts=(
        replace(
            _ADE_PUBLISHED,
            what="ADE20k (SceneParse150 and its instances) as published",
            instances="annotations_instance/{split}/{id}.png",
            reader="ade_instances",
        ),
        _ADE_PANOPTIC_JSON,
        replace(
            _ADE_PANOPTIC_JSON,
            images=("images/training/{id}.jpg",),
            splits={"train": "train"},
        ),
    ),
)
_ADE_FULL = ("", "ADE20K_2021_17_01", "ade/ADE20K_2021_17_01")
_ADE847 = NamedSet(
    name="ade847",
    classes="ade847",
    lists=("mask2former", "fcclip", "corrclip"),
    layouts=(
        FolderLayout(
            what="ADE20K 2021_17_01 as published (its pickled index is not read)",
            bases=_ADE_FULL,
            images=("images/ADE/{split}/{id}.jpg",),
            labels="images/ADE/{split}/{id}_seg.png",
            splits=TRAINING,
            rule=listed(bundled("ade847", "mask2former")["ids"], others_ignored=True, bits=16),
            ids="ADE20K's object ids coded as colours",
            reader="ade_full",
            short_side=512,
        ),
        FolderLayout(
            what="ADE20K 2021_17_01 prepared by Mask2Former or FC-CLIP",
            bases=_ADE_FULL,
            images=("images_detectron2/{split}/{id}.jpg",),
            labels="annotations_detectron2/{split}/{id}.tif",
            splits=TRAINING,
            rule=shifted(847, ignored=[0xFFFF], bits=16),
            ids="ADE20K's 847 classes: 0-846, 65535 other",
        ),
    ),
    images={"val": 2000},
)

_CITY_IDS = bundled("cityscapes", "mmseg")["ids"]
_CITY = FolderLayout(
    what="Cityscapes as published",
    bases=("", "cityscapes"),
    images=("leftImg8bit/{split}/{id}_leftImg8bit.png",),
    labels="gtFine/{split}/{id}_gtFine_labelIds.png",
    rule=listed(_CITY_IDS, ignored=set(range(34)) - set(_CITY_IDS)),
    ids="Cityscapes' label ids: 0-33, 19 of them evaluated",
)
_CITYSCAPES = NamedSet(
    name="cityscapes",
    classes="cityscapes",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(
        _CITY,
        replace(
            _CITY,
            what="Cityscapes converted by cityscapesscripts",
            labels="gtFine/{split}/{id}_gtFine_labelTrainIds.png",
            rule=shifted(19, ignored=[255]),
            ids="Cityscapes' training ids: 0-18, 255 void",
        ),
    ),
    images={"train": 2975, "val": 500},
)

SCENES = (_ADE150, _ADE847, _ADE_PANOPTIC, _CITYSCAPES)
