"""Masks and heatmaps over images."""

import numpy as np

from ovref.ops.overlays import EDGE_RGB, heated, masked

IMAGE = np.full((8, 8, 3), 100, np.uint8)


def test_a_mask_dims_what_is_outside_and_has_an_outline():
    mask_hw = np.zeros((8, 8), bool)
    mask_hw[2:7, 1:6] = True
    found = masked(IMAGE, mask_hw)
    assert found[0, 0].tolist() == [28] * 3 and found[4, 3].tolist() == [100] * 3
    outline_hw = (found == EDGE_RGB).all(2)
    assert outline_hw.sum() == 16 and not (outline_hw & ~mask_hw).any()
    assert (IMAGE == 100).all()


def test_a_heatmap_is_brightest_where_the_heat_is():
    heat = np.zeros((2, 2), np.float16)
    heat[0, 0] = 1
    found = heated(IMAGE, heat).astype(int)
    assert found.shape == (8, 8, 3)
    assert found[0, 0].sum() > found[7, 7].sum() and found[0, 0, 0] > found[0, 0, 2]
