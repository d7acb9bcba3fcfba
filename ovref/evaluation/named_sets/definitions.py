"""The sets: their class lists, and the folders and label rules they are found with.

Facts from the sets' own pages, mmsegmentation's converters, and the preparation scripts of FC-CLIP
and CAT-Seg. Where a set is found both as published and converted, both give the same labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ovref.evaluation.named_sets.names import bundled
from ovref.evaluation.named_sets.rules import LabelRule, listed, shifted

SPLITS = ("train", "val")
"""Names of splits here; layouts that call them otherwise say so."""

TRAINING = {"train": "training", "val": "validation"}
COCO_SPLITS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a set lies on disk. In paths, {split} and {id} are put in; an id may have
    folders in it."""

    what: str
    """Who lays it out like this, for messages."""
    bases: tuple[str, ...]
    """Folders below the root, each of which may hold the set."""
    images: tuple[str, ...]
    """Paths of an image, in the order they are tried."""
    labels: str
    """Path of an image's labels."""
    rule: LabelRule
    ids: str
    """The values of the label files, for messages."""
    listed_by: str = "images"
    """What lists the images of a split: `images` or `labels` (all files there are), or the path of
    a text file of ids, one a line, or of a panoptic JSON file."""
    not_labels: tuple[str, ...] = ()
    """Ends of file names that match `labels` and are of another layout."""
    splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in SPLITS})
    """What {split} becomes."""
    reader: Literal["index", "ade_full", "mat", "panoptic", "ade_instances"] = "index"
    """How a label file is read."""
    instances: str = ""
    """Path of an image's instances, for `ade_instances`."""
    short_side: int | None = None
    """Images and labels with a longer short side are made smaller, as the set's protocol has it."""


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A set that papers report numbers for."""

    name: str
    classes: str
    """Stem of its class-list files."""
    lists: tuple[str, ...]
    """Class lists that come with ovref; the first is the default."""
    layouts: tuple[Layout, ...]
    """Ways to lie on disk, in the order they are tried."""
    images: Mapping[str, int]
    """Published number of images of a split, where known."""
    unseen: tuple[str, ...] = ()
    """Classes that a zero-shot method must not have seen masks of, by the default list's names."""
    things: frozenset[int] | None = None
    """Classes that are things; None where the set does not say."""


_VOC = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC_PUBLISHED = Layout(
    what="VOC 2012 as published",
    bases=_VOC,
    images=("JPEGImages/{id}.jpg",),
    labels="SegmentationClass/{id}.png",
    listed_by="ImageSets/Segmentation/{split}.txt",
    rule=shifted(21, ignored=[255]),
    ids="VOC's indices: 0 background, 1-20, 255 void",
)
_VOC_FCCLIP = Layout(
    what="VOC 2012 prepared by FC-CLIP",
    bases=("", "pascal_voc_d2"),
    images=("images/{split}/{id}.jpg",),
    labels="annotations_pascal21/{split}/{id}.png",
    splits=TRAINING,
    rule=shifted(21, ignored=[255]),
    ids="VOC's indices: 0 background, 1-20, 255 void",
)
_VOC_CATSEG = Layout(
    what="VOC 2012 prepared by CAT-Seg, background last",
    bases=_VOC,
    images=("JPEGImages/{id}.jpg",),
    labels="annotations_detectron2_bg/{split}/{id}.png",
    listed_by="labels",
    rule=listed([20, *range(20)], ignored=[255]),
    ids="CAT-Seg's VOC ids: 0-19, 20 background, 255 void",
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
_CONTEXT_MMSEG = Layout(
    what="Pascal Context converted by mmsegmentation",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="SegmentationClassContext/{id}.png",
    listed_by="ImageSets/SegmentationContext/{split}.txt",
    rule=shifted(60),
    ids="mmsegmentation's Context ids: 0 background, 1-59",
)
_CONTEXT_FCCLIP = Layout(
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
_CONTEXT60 = NamedSet(
    name="context60",
    classes="context60",
    lists=("mmseg", "corrclip"),
    layouts=(_CONTEXT_MMSEG,),
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
    ),
    images={"val": 5104},
)
_CONTEXT459_MAT = Layout(
    what="Pascal Context as published",
    bases=_CONTEXT,
    images=("JPEGImages/{id}.jpg",),
    labels="trainval/{id}.mat",
    listed_by="ImageSets/SegmentationContext/{split}.txt",
    rule=shifted(459, 1, ignored=[0], bits=16),
    ids="Context's 459 ids: 1-459, 0 unlabelled",
    reader="mat",
)
_CONTEXT459_TIF = Layout(
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

_COCO = ("", "coco", "coco_stuff164k", "coco-stuff")
_COCO_IMAGES = ("{split}/{id}.jpg", "images/{split}/{id}.jpg")
STUFF_IDS: tuple[int, ...] = tuple(bundled("coco_stuff", "mmseg")["ids"])
"""Values of the published stuff-and-thing maps, in the order of the classes: 171 of 0-181."""
_OBJECTS = 80
_RAW_STUFF = "raw COCO-Stuff ids: 0-181, 11 of them absent, 255 void"
_STUFF_RAW = Layout(
    what="COCO-Stuff 164k as published",
    bases=_COCO,
    images=_COCO_IMAGES,
    labels="stuffthingmaps/{split}/{id}.png",
    splits=COCO_SPLITS,
    rule=listed(STUFF_IDS, ignored=[255]),
    ids=_RAW_STUFF,
)
_STUFF_RAW_MMSEG = replace(
    _STUFF_RAW,
    what="COCO-Stuff 164k as published, in mmsegmentation's folders",
    labels="annotations/{split}/{id}.png",
    not_labels=("_labelTrainIds.png", "_instanceTrainIds.png"),
)
_STUFF_MMSEG = replace(
    _STUFF_RAW,
    what="COCO-Stuff 164k converted by mmsegmentation",
    labels="annotations/{split}/{id}_labelTrainIds.png",
    rule=shifted(171, ignored=[255]),
    ids="converted COCO-Stuff ids: 0-170, 255 void",
)
_STUFF = NamedSet(
    name="coco_stuff",
    classes="coco_stuff",
    lists=("mmseg", "fcclip", "corrclip"),
    layouts=(
        _STUFF_RAW,
        _STUFF_RAW_MMSEG,
        _STUFF_MMSEG,
        replace(
            _STUFF_MMSEG,
            what="COCO-Stuff 164k prepared by CAT-Seg",
            labels="annotations_detectron2/{split}/{id}.png",
        ),
        replace(
            _STUFF_MMSEG,
            what="COCO-Stuff 164k prepared by SAN or FC-CLIP",
            labels="stuffthingmaps_detectron2/{split}/{id}.png",
        ),
    ),
    images={"train": 118287, "val": 5000},
    things=frozenset(range(_OBJECTS)),
)
# Stuff and void are both background here: a map that ignores void is another benchmark.
_OBJECT_RULE = LabelRule(
    classes={value: index + 1 for index, value in enumerate(STUFF_IDS[:_OBJECTS])}
    | {value: 0 for value in (*STUFF_IDS[_OBJECTS:], 255)}
)
_OBJECT_MMSEG = replace(
    _STUFF_RAW,
    what="COCO-Object converted by GroupViT's script",
    labels="annotations/{split}/{id}_instanceTrainIds.png",
    rule=shifted(81),
    ids="COCO-Object ids: 0 background, 1-80",
)
_OBJECT = NamedSet(
    name="coco_object",
    classes="coco_object",
    lists=("tcl", "corrclip"),
    layouts=(
        replace(_STUFF_RAW, rule=_OBJECT_RULE),
        replace(_STUFF_RAW_MMSEG, rule=_OBJECT_RULE),
        _OBJECT_MMSEG,
    ),
    images={"train": 118287, "val": 5000},
)
_OBJECTS_ONLY = listed(STUFF_IDS[:_OBJECTS], ignored=[*STUFF_IDS[_OBJECTS:], 255])
_COCO80 = NamedSet(
    name="coco80",
    classes="coco80",
    lists=("tcl",),
    layouts=(
        replace(_STUFF_RAW, rule=_OBJECTS_ONLY),
        replace(_STUFF_RAW_MMSEG, rule=_OBJECTS_ONLY),
        replace(_OBJECT_MMSEG, rule=shifted(80, 1, ignored=[0])),
    ),
    images={"train": 118287, "val": 5000},
)
_PANOPTIC = bundled("coco_panoptic", "panopticapi")
_PANOPTIC_PUBLISHED = Layout(
    what="COCO panoptic as published",
    bases=_COCO,
    images=_COCO_IMAGES,
    labels="annotations/panoptic_{split}/{id}.png",
    listed_by="annotations/panoptic_{split}.json",
    splits=COCO_SPLITS,
    rule=listed(_PANOPTIC["ids"]),
    ids="segment ids as colours, of 133 categories numbered 1-200",
    reader="panoptic",
)
_COCO_PANOPTIC = NamedSet(
    name="coco_panoptic",
    classes="coco_panoptic",
    lists=("panopticapi", "fcclip"),
    layouts=(
        _PANOPTIC_PUBLISHED,
        replace(_PANOPTIC_PUBLISHED, labels="panoptic_{split}/{id}.png"),
        Layout(
            what="COCO panoptic prepared by Mask2Former or FC-CLIP",
            bases=_COCO,
            images=_COCO_IMAGES,
            labels="panoptic_semseg_{split}/{id}.png",
            splits=COCO_SPLITS,
            rule=shifted(133, ignored=[255]),
            ids="COCO's 133 classes: 0-132, 255 void",
        ),
    ),
    images={"train": 118287, "val": 5000},
    things=frozenset(
        index for index, (name,) in enumerate(_PANOPTIC["classes"]) if name in _PANOPTIC["things"]
    ),
)

_ADE = ("", "ADEChallengeData2016", "ade/ADEChallengeData2016")
ADE_INSTANCES: tuple[int, ...] = tuple(v - 1 for v in bundled("ade150", "mmseg")["instances"])
"""Class of each of the 100 categories of ADE20k's instance files, whose ids start at 1."""
_ADE_PUBLISHED = Layout(
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
_ADE_PANOPTIC_JSON = Layout(
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
        Layout(
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
        Layout(
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
_CITY = Layout(
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

# Zero-shot splits: SPNet's of VOC and COCO-Stuff, the ten unseen classes of ZS3Net of Context, as
# ZegFormer, ZegCLIP and CLIP-RC report them. Context counts background among the seen classes.
_VOC_15_5 = replace(
    _VOC20,
    name="voc_15_5",
    unseen=("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_STUFF_156_15 = replace(
    _STUFF,
    name="coco_stuff_156_15",
    unseen=(
        "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard",
        "clouds", "grass", "playingfield", "river", "road", "tree", "wall-concrete",
    ),
)  # fmt: skip
_CONTEXT_50_10 = replace(
    _CONTEXT60,
    name="context_50_10",
    unseen=(
        "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard",
        "aeroplane",
    ),
)  # fmt: skip

_ALL = (
    _VOC21,
    _VOC20,
    _CONTEXT60,
    _CONTEXT59,
    _CONTEXT459,
    _STUFF,
    _OBJECT,
    _COCO80,
    _COCO_PANOPTIC,
    _ADE150,
    _ADE_PANOPTIC,
    _ADE847,
    _CITYSCAPES,
    _VOC_15_5,
    _STUFF_156_15,
    _CONTEXT_50_10,
)
SETS: dict[str, NamedSet] = {each.name: each for each in _ALL}
"""Every set by its name."""
