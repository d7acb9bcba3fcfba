"""Sliding windows cover every pixel, average where they overlap, and give back the image's size."""

import numpy as np
import pytest

from ovref_inference.segmenters.windows import (
    WindowConfig,
    resize_scores,
    resized_size,
    sliding_scores,
    window_boxes,
)

SMALL = WindowConfig(short_side=8, long_side=24, crop=8, stride=4)


@pytest.mark.parametrize("size_hw", [(8, 8), (8, 9), (8, 12), (8, 23), (19, 8), (5, 8), (3, 3)])
def test_boxes_cover_the_image_with_crops_of_one_size(size_hw):
    boxes = window_boxes(size_hw, crop=8, stride=4)
    covered = np.zeros(size_hw, int)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(8, size_hw[0]), min(8, size_hw[1]))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1 and len(set(boxes)) == len(boxes)


def test_boxes_of_the_published_protocol():
    assert window_boxes((448, 448), 448, 224) == [(0, 0, 448, 448)]
    assert window_boxes((448, 600), 448, 224) == [(0, 0, 448, 448), (0, 152, 448, 600)]


def test_short_side_is_met_unless_the_long_side_would_grow_too_much():
    assert resized_size((100, 200), WindowConfig()) == (448, 896)
    assert resized_size((3000, 1000), WindowConfig()) == (1344, 448)
    assert resized_size((100, 1000), WindowConfig()) == (205, 2048)


@pytest.mark.parametrize("size_hw", [(8, 20), (16, 11), (8, 8), (4, 30)])
def test_scores_that_depend_on_pixels_only_come_back_as_if_scored_whole(size_hw):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (2, 3, 3)).astype(np.uint8)
    image_hwc = np.kron(coarse, np.ones((size_hw[0], size_hw[1], 1), np.uint8))
    image_hwc = image_hwc[: size_hw[0], : size_hw[1]]

    def score(crops):
        return [crop.transpose(2, 0, 1).astype(np.float32) for crop in crops]

    scores_chw = resize_scores(sliding_scores(image_hwc, score, SMALL), image_hwc.shape[:2])
    assert scores_chw.shape == (3, *size_hw) and scores_chw.dtype == np.float32
    np.testing.assert_allclose(scores_chw, image_hwc.transpose(2, 0, 1), atol=1e-3)


def test_overlaps_are_averaged():
    image_hwc = np.zeros((8, 12, 3), np.uint8)

    def score(crops):
        return [np.full((1, *crop.shape[:2]), i, np.float32) for i, crop in enumerate(crops)]

    scores_chw = resize_scores(sliding_scores(image_hwc, score, SMALL), image_hwc.shape[:2])
    np.testing.assert_allclose(scores_chw[0, 0], [0] * 4 + [0.5] * 4 + [1] * 4)


def test_resized_scores_interpolate_between_cell_centres():
    scores = resize_scores(np.array([[[0.0, 1.0]]]), (2, 4))
    np.testing.assert_allclose(scores[0], [[0, 0.25, 0.75, 1]] * 2)


@pytest.mark.parametrize(
    "settings, field",
    [({"stride": 0}, "stride"), ({"stride": 9, "crop": 8}, "stride"), ({"short_side": 0}, "short")],
)
def test_sizes_out_of_range_are_refused(settings, field):
    with pytest.raises(ValueError, match=field):
        WindowConfig(**settings)
