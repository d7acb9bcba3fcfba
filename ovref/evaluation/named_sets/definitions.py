"""All data sets by name.

The facts come from the sets' own pages, mmsegmentation's converters, and the preparation scripts of
FC-CLIP and CAT-Seg. A set gives the same labels as published and converted.
"""

from ovref.evaluation.named_sets.layouts import NamedSet
from ovref.evaluation.named_sets.sets_coco import COCO
from ovref.evaluation.named_sets.sets_pascal import PASCAL
from ovref.evaluation.named_sets.sets_scenes import SCENES

SETS: dict[str, NamedSet] = {each.name: each for each in (*PASCAL, *COCO, *SCENES)}
