"""Oracle proposals are the true masks, of exactly the images that they are known for."""

import numpy as np
import pytest

from ovref.evaluation.oracle import label_masks, oracle_proposer


def test_oracle_masks_are_the_connected_parts_of_each_class():
    label_hw = np.array([[0, 1, 0], [0, 1, -1], [1, 0, 0]])
    masks = label_masks(label_hw)
    assert masks.shape == (5, 3, 3)
    np.testing.assert_array_equal(masks.sum(0), label_hw != -1)
    for mask in masks:
        assert len(np.unique(label_hw[mask])) == 1
    assert label_masks(np.full((2, 2), -1)).shape == (0, 2, 2)


def test_images_are_known_in_any_order_and_others_refused():
    images = [np.full((2, 3, 3), value, np.uint8) for value in range(3)]
    masks = [np.full((1, 2, 3), value == 1) for value in range(3)]
    propose = oracle_proposer(images, masks)
    assert [found.any() for found in propose([images[1], images[0]])] == [True, False]
    with pytest.raises(ValueError, match=r"others at positions \[1\]"):
        propose([images[0], images[0].transpose(1, 0, 2)])
