"""Every set by its name.

Facts are from the sets' own pages, mmsegmentation's converters, and the preparation scripts of
FC-CLIP and CAT-Seg. Where a set is found both as published and converted, both give the same
labels.
"""

from ovref.evaluation.named_sets.layouts import NamedSet
from ovref.evaluation.named_sets.sets_coco import COCO
from ovref.evaluation.named_sets.sets_pascal import PASCAL
from ovref.evaluation.named_sets.sets_scenes import SCENES

SETS: dict[str, NamedSet] = {each.name: each for each in (*PASCAL, *COCO, *SCENES)}
