"""VOC 2012 and Pascal Context."""

from dataclasses import replace

from ovref.evaluation.named_sets.layouts import TRAINING, FolderLayout, NamedSet
from ovref.evaluation.named_sets.rules import listed, shifted

_VOC = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC_PUBLISHED = FolderLayout(
    what="VOC 2012 as published",
    bases=_VOC,
    images=("JPEGImages/{id}.jpg",),
    labels="SegmentationClass/{id}.png",
    listed_by="ImageSets/Segmentation/{split}.txt",
    rule=shifted(21, ignored=[255]),
    ids="VOC's indices: 0 background, 1-20, 255 void",
)
_VOC_FCCLIP = FolderLayout(
    what="VOC 2012 prepared by FC-CLIP",
    bases=("", "pascal_voc_d2"),
    images=("images/{split}/{id}.jpg",),
    labels="annotations_pascal21/{split}/{id}.png",
    splits=TRAINING,
    rule=shifted(21, ignored=[255]),
    ids="VOC's indices: 0 background, 1-20, 255 void",
)
_VOC_CATSEG = FolderLayout(
    what="VOC 2012 prepared by CAT-Seg, background last",
    bases=_VOC,
    images=("JPEGImages/{id}.jpg",),
    labels="annotations_detectron2_bg/{split}/{id}.png",
    listed_by="labels",
    rule=listed([20, *range(20)], ignored=[255]),
    ids="CAT-Seg's VOC ids: 0-19, 20 background, 255 void",
)
_VOC_AUG = replace(
    _VOC_PUBLISHED,
    what="VOC 2012 with SBD's labels, converted by mmsegmentation",
    labels="SegmentationClassAug/{id}.png",
    splits={"train": "trainaug"},
    rule=shifted(20, 1, ignored=[0, 255]),
)
_VOC20_IDS = "VOC's classes without background: 0-19, 255 void"

_VOC21 = NamedSet(
    name="voc21",
    classes="voc21",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(_VOC_PUBLISHED, _VOC_FCCLIP, _VOC_CATSEG),
    images={"train": 1464, "val": 1449},
)
_VOC20 = NamedSet(
    name="voc20",
    classes="voc20",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(
        replace(_VOC_PUBLISHED, rule=shifted(20, 1, ignored=[0, 255])),
        replace(
            _VOC_FCCLIP,
            labels="annotations_pascal20/{split}/{id}.png",
            rule=shifted(20, ignored=[255]),
            ids=_VOC20_IDS,
        ),
        replace(
            _VOC_CATSEG,
            what="VOC 2012 prepared by CAT-Seg",
            labels="annotations_detectron2/{split}/{id}.png",
            rule=shifted(20, ignored=[255]),
            ids=_VOC20_IDS,
        ),
    ),
    images={"train": 1464, "val": 1449},
)

_CONTEXT = ("", "VOC2010", "VOCdevkit/VOC2010")
_CONTEXT_MMSEG = FolderLayout(
    what="Pascal Context converted by mmsegmentation",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="SegmentationClassContext/{id}.png",
    listed_by="ImageSets/SegmentationContext/{split}.txt",
    rule=shifted(60),
    ids="mmsegmentation's Context ids: 0 background, 1-59",
)
_CONTEXT_FCCLIP = FolderLayout(
    what="Pascal Context prepared by FC-CLIP",
    bases=("", "pascal_ctx_d2"),
    images=("images/{split}/{id}.jpg",),
    labels="annotations_ctx59/{split}/{id}.png",
    splits=TRAINING,
    rule=shifted(59, ignored=[255]),
    ids="Context's classes without background: 0-58, 255 the rest",
)
_CONTEXT_CATSEG = replace(
    _CONTEXT_FCCLIP,
    what="Pascal Context prepared by CAT-Seg",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="annotations_detectron2/pc59_{split}/{id}.png",
    listed_by="labels",
    splits={"val": "val"},
)
CONTEXT60_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
"""Ids of the 459 classes that the 60 are, 0 for background."""
_CONTEXT_JSON = FolderLayout(
    what="Pascal Context as published for PASCAL in Detail",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="trainval_merged.json",
    listed_by="trainval_merged.json",
    rule=listed(CONTEXT60_IDS, bits=16),
    ids="60 of Context's 459 ids: 0 background, 2, 9, 18, ... 458",
    reader="context_json",
)
_CONTEXT60 = NamedSet(
    name="context60",
    classes="context60",
    lists=("mmseg", "corrclip"),
    layouts=(_CONTEXT_MMSEG, _CONTEXT_JSON),
    images={"val": 5104},
)
_CONTEXT59 = NamedSet(
    name="context59",
    classes="context59",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(
        replace(_CONTEXT_MMSEG, rule=shifted(59, 1, ignored=[0])),
        _CONTEXT_FCCLIP,
        _CONTEXT_CATSEG,
        replace(_CONTEXT_JSON, rule=listed(CONTEXT60_IDS[1:], ignored=[0], bits=16)),
    ),
    images={"val": 5104},
)
_CONTEXT459_MAT = FolderLayout(
    what="Pascal Context as published",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="trainval/{id}.mat",
    listed_by="ImageSets/SegmentationContext/{split}.txt",
    rule=shifted(459, 1, ignored=[0], bits=16),
    ids="Context's 459 ids: 1-459, 0 unlabelled",
    reader="mat",
)
_CONTEXT459_TIF = FolderLayout(
    what="Pascal Context prepared by FC-CLIP",
    bases=("", "pascal_ctx_d2"),
    images=("images/{split}/{id}.jpg",),
    labels="annotations_ctx459/{split}/{id}.tif",
    splits=TRAINING,
    # 255 is a class here.
    rule=shifted(459, ignored=[0xFFFF], bits=16),
    ids="Context's 459 classes: 0-458, 65535 unlabelled",
)
_CONTEXT459 = NamedSet(
    name="context459",
    classes="context459",
    lists=("catseg", "fcclip", "corrclip"),
    layouts=(
        _CONTEXT459_MAT,
        replace(_CONTEXT459_MAT, listed_by="pascalcontext_{split}.txt"),
        _CONTEXT459_TIF,
        replace(
            _CONTEXT459_TIF,
            what="Pascal Context prepared by CAT-Seg",
            bases=_CONTEXT,
            images=("JPEGImages/{id}.jpg",),
            labels="annotations_detectron2/pc459_{split}/{id}.tif",
            listed_by="labels",
            splits={"val": "val"},
        ),
    ),
    images={"val": 5104},
)

# Zero-shot splits as ZegFormer, ZegCLIP and CLIP-RC report them: SPNet's of VOC, ZS3Net's ten
# unseen classes of Context, with background among the seen ones.
_VOC_15_5 = replace(
    _VOC20,
    name="voc_15_5",
    layouts=(_VOC_AUG, *_VOC20.layouts),
    images={"train": 10582, "val": 1449},
    unseen=("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CONTEXT_50_10 = replace(
    _CONTEXT60,
    name="context_50_10",
    unseen=(
        "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard",
        "aeroplane",
    ),
)  # fmt: skip

PASCAL = (
    _VOC21,
    _VOC20,
    _CONTEXT60,
    _CONTEXT59,
    _CONTEXT459,
    _VOC_15_5,
    _CONTEXT_50_10,
)
