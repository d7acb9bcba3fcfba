"""The annotated scenes: their regions, boxes and classes."""

import numpy as np
import pytest

from ovref.miniature.scenes import combinations, render
from ovref.miniature.shapes import CLASSES, STUFF
from recipes.miniature.masks_data import boxes_of, load_mask_pool, regions


def test_regions_are_disjoint_things_then_stuff():
    label = np.full((8, 8), 2)
    label[4:] = 3
    label[3:5, 3:5] = label[0, 0] = 9
    instance = np.zeros((8, 8), int)
    instance[3:5, 3:5], instance[0, 0] = 1, 2
    masks, classes, things = regions(label, instance, smallest=2)
    # The second thing has one pixel, and is neither a region nor part of one.
    assert classes.tolist() == [9, 2, 3] and things.tolist() == [True, False, False]
    assert masks.sum((1, 2)).tolist() == [4, 29, 30]
    assert masks.sum(0).max() == 1


def test_no_region_is_large_enough():
    masks, classes, things = regions(np.zeros((2, 2), int), np.zeros((2, 2), int), smallest=5)
    assert masks.shape == (0, 2, 2) and len(classes) == len(things) == 0


def test_regions_of_a_scene_cover_it():
    scene = render(4)
    masks, classes, things = regions(scene.label_hw, scene.instance_hw, smallest=1)
    assert masks.sum(0).min() == masks.sum(0).max() == 1
    for mask, class_id, thing in zip(masks, classes, things, strict=True):
        assert (scene.label_hw[mask] == class_id).all() and thing == (class_id >= len(STUFF))


def test_boxes_hold_the_first_and_end_after_the_last_pixel():
    mask = np.zeros((2, 6, 9), bool)
    mask[0, 1:4, 2] = mask[1, 5, 8] = True
    assert boxes_of(mask).tolist() == [[2, 1, 3, 4], [8, 5, 9, 6]]
    assert boxes_of(mask[:0]).shape == (0, 4)


def test_the_pool_is_generated_once_and_shows_train_scenes(tmp_path):
    pool = load_mask_pool(tmp_path, count=6)
    again = load_mask_pool(tmp_path, count=6)
    np.testing.assert_array_equal(pool.images_nhwc, again.images_nhwc)
    assert pool.images_nhwc.shape == (6, 64, 64, 3) and len(pool.nouns) == 6
    allowed = combinations("train")
    for label in pool.labels_nhw:
        assert all(CLASSES[c] in allowed for c in np.unique(label) if c >= len(STUFF))
    assert (pool.instances_nhw[[0, 4]].max((1, 2)) <= 1).all()  # one thing alone


def test_scenes_with_unseen_classes_are_left_out():
    pytest.importorskip("torch")
    from recipes.miniature.train_maskformer import seen_rows

    labels = np.zeros((3, 4, 4), np.uint8)
    labels[1, 0, 0] = CLASSES.index("cup")
    assert seen_rows(labels).tolist() == [0, 2]
