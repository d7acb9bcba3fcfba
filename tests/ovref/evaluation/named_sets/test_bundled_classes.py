"""Class lists: as many names as classes, each with its source, and a fingerprint of its own."""

import numpy as np
import pytest

from ovref.evaluation.named_sets.bundled_classes import bundled, bundled_list
from ovref.evaluation.named_sets.definitions import SETS

COUNTS = {
    "voc21": 21,
    "voc20": 20,
    "context60": 60,
    "context59": 59,
    "context459": 459,
    "coco_stuff": 171,
    "coco_object": 81,
    "coco80": 80,
    "coco_panoptic": 133,
    "ade150": 150,
    "ade847": 847,
    "cityscapes": 19,
}
LISTS = sorted({(each.classes, name) for each in SETS.values() for name in each.lists})


@pytest.mark.parametrize("set_name, list_name", LISTS)
def test_bundled_lists_have_a_name_for_each_class_and_a_source(set_name, list_name):
    found = bundled_list(set_name, list_name)
    assert len(found.classes) == COUNTS[set_name]
    assert all(names and all(name.strip() for name in names) for names in found.classes)
    assert "/" in found.source and "," in found.source
    # Synonyms may be shared; two classes of the same names could not be distinguished.
    assert len(set(found.classes)) == len(found.classes)


def test_every_label_rule_reaches_every_class_of_its_set():
    for each in SETS.values():
        for layout in each.layouts:
            assert set(layout.rule.classes.values()) == set(range(COUNTS[each.classes]))


@pytest.mark.parametrize(
    "set_name, list_name", [e for e in LISTS if e[1] in ("fcclip", "corrclip")]
)
def test_lists_of_a_set_have_its_classes_in_the_same_order(set_name, list_name):
    def words(names):
        return {word for name in names for word in name.replace(" ", "").split(",")}

    own = next(each for each in SETS.values() if each.classes == set_name).lists[0]
    pairs = zip(
        bundled_list(set_name, own).classes,
        bundled_list(set_name, list_name).classes,
        strict=True,
    )
    same = [bool(words(ours) & words(theirs)) for ours, theirs in pairs]
    assert np.mean(same) > 0.75  # some are renamed; a shift by one would leave next to none


def test_names_are_the_field_s_word_for_word():
    assert "diningtable" in bundled_list("voc21", "mmseg").names
    assert "table" in bundled_list("context59", "mmseg").names
    assert bundled_list("ade150", "mmseg").names[7] == "bed "
    assert bundled_list("cityscapes", "corrclip").names[11] == "people, person"
    background = bundled_list("voc21", "corrclip").classes[0]
    assert len(background) == 26 and background[0] == "sky"
    assert bundled_list("ade150", "fcclip").classes[1] == (
        "building", "buildings", "edifice", "edifices",
    )  # fmt: skip


def test_tables_of_ids():
    assert len(set(bundled("ade847", "mask2former")["ids"])) == 847
    stuff = bundled("coco_stuff", "mmseg")["ids"]
    assert sorted(set(range(182)) - set(stuff)) == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert stuff == sorted(stuff) and len(stuff) == 171
    panoptic = bundled("coco_panoptic", "panopticapi")
    assert len(panoptic["ids"]) == 133 and len(panoptic["things"]) == 80
    assert len(set(bundled("ade150", "mmseg")["instances"])) == 100


def test_the_fingerprint_depends_on_names_and_order():
    prints = {bundled_list("voc21", name).fingerprint for name in SETS["voc21"].lists}
    assert len(prints) == 3
    assert bundled_list("voc21", "mmseg").fingerprint == "6f1ece02499500ab"
