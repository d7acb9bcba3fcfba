"""The drawn world: exact, repeatable, true to its captions, and split without overlap."""

import numpy as np
import pytest

from ovref.miniature.captions import plural
from ovref.miniature.scenes import SPLITS, combinations, render
from ovref.miniature.shapes import CLASSES, STUFF, THINGS
from scene_captions import sample_captions


@pytest.fixture(scope="module")
def scenes():
    return {split: [render(seed, split) for seed in range(150)] for split in SPLITS}


def test_arrays_have_the_promised_form(scenes):
    for scene in scenes["train"]:
        assert scene.image_hwc.shape == (64, 64, 3) and scene.image_hwc.dtype == np.uint8
        assert scene.label_hw.shape == scene.instance_hw.shape == (64, 64)
        assert scene.label_hw.dtype == scene.instance_hw.dtype == np.uint8
        assert scene.label_hw.max() < len(CLASSES)


def test_things_are_instances_and_stuff_is_not(scenes):
    for scene in scenes["train"]:
        np.testing.assert_array_equal(scene.label_hw >= len(STUFF), scene.instance_hw > 0)


def test_label_map_holds_exactly_what_the_layout_says(scenes):
    for scene in scenes["validation"]:
        layout = scene.layout
        described = {g.thing for g in layout.groups} | {layout.lower} | ({layout.upper} - {None})
        assert {CLASSES[i] for i in np.unique(scene.label_hw)} == described
        assert scene.instance_hw.max() == sum(g.count for g in layout.groups)


def test_every_noun_is_visible_and_its_span_names_it(scenes):
    for split in SPLITS:
        for scene in scenes[split]:
            assert scene.nouns
            for noun in scene.nouns:
                surface = scene.caption[noun.start : noun.end]
                assert surface in (noun.lemma, plural(noun.lemma))
                assert (scene.label_hw == CLASSES.index(noun.lemma)).sum() >= 20


def test_left_is_left_and_above_is_above(scenes):
    seen = 0
    for scene in scenes["train"]:
        layout = scene.layout
        if len(layout.groups) != 2:
            continue
        first, second = (
            np.argwhere(scene.label_hw == CLASSES.index(g.thing)).mean(0) for g in layout.groups
        )
        axis = 1 if layout.arrangement == "beside" else 0
        assert first[axis] < second[axis]
        seen += 1
    assert seen > 20


def test_same_seed_same_scene_other_seed_or_split_other_scene():
    one, same = render(7, "train"), render(7, "train")
    np.testing.assert_array_equal(one.image_hwc, same.image_hwc)
    np.testing.assert_array_equal(one.label_hw, same.label_hw)
    assert (one.caption, one.nouns) == (same.caption, same.nouns)
    assert not np.array_equal(one.image_hwc, render(8, "train").image_hwc)
    assert not np.array_equal(one.image_hwc, render(7, "test").image_hwc)


def test_splits_share_no_combination_and_show_every_thing():
    pairs = {s: {(t, *p) for t, ps in combinations(s).items() for p in ps} for s in SPLITS}
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["validation"] & pairs["test"]
    assert len(set.union(*pairs.values())) == sum(map(len, pairs.values()))
    for split in SPLITS:
        assert set(combinations(split)) == set(THINGS)
        assert all(combinations(split).values())


def test_scenes_only_use_combinations_of_their_split(scenes):
    for split in SPLITS:
        for scene in scenes[split]:
            for group in scene.layout.groups:
                assert (group.colour, group.ground) in combinations(split)[group.thing]


def test_a_scene_can_be_drawn_larger():
    scene = render(5, "train", size=96)
    assert scene.image_hwc.shape == (96, 96, 3) and scene.label_hw.shape == (96, 96)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split"):
        render(1, "dev")
    with pytest.raises(ValueError, match="size"):
        render(1, "train", size=8)


def test_sampled_captions_repeat_and_their_spans_match():
    captions = sample_captions(50, seed=3)
    assert captions == sample_captions(50, seed=3)
    assert captions != sample_captions(50, seed=4)
    for text, nouns in captions:
        for noun in nouns:
            assert text[noun.start : noun.end] in (noun.lemma, plural(noun.lemma))
