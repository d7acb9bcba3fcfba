import numpy as np
import pytest

from ovref.ops.measures import components, heat_entropy
from ovref.records import NO, UNSURE, YES


def test_components_count_what_hangs_together_but_for_specks():
    mask_hw = np.full((20, 20), NO, np.uint8)
    assert components(mask_hw) == 0
    mask_hw[0:10, 0:10] = YES
    mask_hw[10:14, 10:14] = YES  # touches the first at a corner
    mask_hw[0, 15] = mask_hw[5, 17] = UNSURE
    assert components(mask_hw) == 1
    mask_hw[19, 0] = YES  # a speck, less than 2% of the mask
    assert components(mask_hw) == 1
    mask_hw[17:19, 17:19] = YES
    assert components(mask_hw) == 2


def test_entropy_is_that_of_the_shares_of_heat():
    assert heat_entropy(np.ones((3, 4), np.float16)) == pytest.approx(1)
    one = np.zeros((4, 4))
    one[2, 2] = 3
    assert heat_entropy(one) == 0
    heat = np.random.default_rng(0).random((5, 6))
    slow = -sum(p * np.log(p) for p in (heat / heat.sum()).ravel()) / np.log(30)
    assert heat_entropy(heat) == pytest.approx(slow)
    assert np.isnan(heat_entropy(np.zeros((4, 4))))
