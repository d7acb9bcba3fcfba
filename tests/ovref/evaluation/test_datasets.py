"""Held-out scenes: fixed, labelled by position in the class list, never from training."""

import numpy as np
import pytest

from ovref.evaluation.datasets import miniature_scenes


def test_scenes_are_the_same_every_time_and_a_prefix_of_more_scenes():
    few, more = miniature_scenes("test", 3), miniature_scenes("test", 5)
    for index in range(3):
        np.testing.assert_array_equal(few.images[index], more.images[index])
        np.testing.assert_array_equal(few.labels[index], more.labels[index])
    assert few.class_fingerprint == more.class_fingerprint


def test_labels_are_positions_in_the_class_list():
    data = miniature_scenes("validation", 20)
    assert len(data.images) == len(data.labels) == 20
    for image, label in zip(data.images, data.labels, strict=True):
        assert image.shape == (*label.shape, 3) and label.max() < len(data.classes)


def test_splits_differ():
    test, validation = miniature_scenes("test", 1), miniature_scenes("validation", 1)
    assert not np.array_equal(test.images[0], validation.images[0])


def test_training_scenes_and_no_scenes_are_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        miniature_scenes("train", 3)
    with pytest.raises(ValueError, match="count must be at least 1"):
        miniature_scenes("test", 0)
