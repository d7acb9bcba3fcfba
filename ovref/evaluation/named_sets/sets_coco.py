"""COCO-Stuff, COCO-Object and COCO panoptic."""

from dataclasses import replace

from ovref.evaluation.named_sets.bundled_classes import bundled
from ovref.evaluation.named_sets.layouts import COCO_SPLITS, FolderLayout, NamedSet
from ovref.evaluation.named_sets.rules import LabelRule, listed, shifted

_COCO = ("", "coco", "coco_stuff164k", "coco-stuff")
_COCO_IMAGES = ("{split}/{id}.jpg", "images/{split}/{id}.jpg")
STUFF_IDS: tuple[int, ...] = tuple(bundled("coco_stuff", "mmseg")["ids"])
"""Values of the published stuff-and-thing maps, in the order of the classes: 171 of 0-181."""
_OBJECTS = 80
_RAW_STUFF = "raw COCO-Stuff ids: 0-181, 11 of them absent, 255 void"
_STUFF_RAW = FolderLayout(
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
# Both stuff and void are background: a map that ignores void is another benchmark.
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
_PANOPTIC_PUBLISHED = FolderLayout(
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
        FolderLayout(
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

# The zero-shot split of SPNet, as ZegFormer, ZegCLIP and CLIP-RC report it.
_STUFF_156_15 = replace(
    _STUFF,
    name="coco_stuff_156_15",
    unseen=(
        "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard",
        "clouds", "grass", "playingfield", "river", "road", "tree", "wall-concrete",
    ),
)  # fmt: skip

COCO = (_STUFF, _OBJECT, _COCO80, _COCO_PANOPTIC, _STUFF_156_15)
