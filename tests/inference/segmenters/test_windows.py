"""Sliding windows cover every pixel, average where they overlap, and give back the image's size."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ovref_inference.segmenters import windows as module
from ovref_inference.segmenters.regions import NO_CLASS, with_background
from ovref_inference.segmenters.windows import (
    CropScores,
    WindowConfig,
    labelled,
    resize_scores,
    resized_size,
    score_images,
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


def slow_scores(image_hwc, size_hw, score, config):
    """Scores of every pixel in NumPy and Pillow's grid, all classes at once: window by window."""
    resized_hw = resized_size(image_hwc.shape[:2], config)
    resized = Image.fromarray(image_hwc).resize(resized_hw[::-1], Image.Resampling.BILINEAR)
    total, count = 0.0, np.zeros(resized_hw)
    for top, left, bottom, right in window_boxes(resized_hw, config.crop, config.stride):
        (crop,) = score([np.asarray(resized)[top:bottom, left:right]])
        pixels = slow_bilinear(crop.patches_chw.numpy(), (bottom - top, right - left))
        for number in range(crop.regions_cn.shape[1]):
            where = crop.region_hw.numpy() == number
            pixels[:, where] = crop.regions_cn.numpy()[:, number, None]
        whole = np.zeros((len(pixels), *resized_hw))
        whole[:, top:bottom, left:right] = pixels
        total = total + whole
        count[top:bottom, left:right] += 1
    return slow_bilinear(total / count, size_hw)


def slow_bilinear(scores_chw, size_hw):
    """Weights by the distance of cell centres, one axis after the other."""
    for axis, size in ((1, size_hw[0]), (2, size_hw[1])):
        cells = scores_chw.shape[axis]
        where = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
        low = np.floor(where).astype(int)
        high = np.minimum(low + 1, cells - 1)
        share = (where - low).reshape([-1 if a == axis else 1 for a in range(3)])
        scores_chw = (1 - share) * scores_chw.take(low, axis) + share * scores_chw.take(high, axis)
    return scores_chw


@pytest.mark.parametrize("at_once", [1, 700, 1 << 25])
@pytest.mark.parametrize("size_hw", [(8, 20), (31, 17), (8, 8), (5, 40)])
def test_labels_equal_those_of_the_slow_reference(size_hw, at_once, monkeypatch):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    image_hwc = rng.integers(0, 255, (*size_hw, 3)).astype(np.uint8)
    present = np.array([True, False, True, True, True, False])

    def score(crops):
        """Four patches a side and two regions, by the pixels of each crop."""
        found = []
        for crop in crops:
            own = np.random.default_rng(crop.sum())
            found.append(
                CropScores(
                    region_hw=torch.from_numpy(own.integers(-1, 2, crop.shape[:2])),
                    regions_cn=torch.from_numpy(own.random((4, 2), np.float32)),
                    patches_chw=torch.from_numpy(own.random((4, 4, 4), np.float32)),
                )
            )
        return found

    (scores,) = score_images([image_hwc], score, SMALL)
    found = labelled(partial(scores.pixels, size_hw), present, size_hw, ("x",))
    expected = slow_scores(image_hwc, size_hw, score, SMALL)
    top = np.sort(expected, axis=0)
    clear = top[-1] - top[-2] > 1e-5
    assert clear.mean() > 0.99 and found.labels_hw.dtype == np.int32
    numbers = np.flatnonzero(present)
    np.testing.assert_array_equal(found.labels_hw[clear], numbers[expected.argmax(0)][clear])
    np.testing.assert_allclose(found.max_score_hw, expected.max(0), atol=1e-5)
    np.testing.assert_allclose(found.scores_chw[present], expected, atol=1e-5)
    assert np.isneginf(found.scores_of(slice(0, 3))[1]).all()
    np.testing.assert_allclose(found.scores_of(slice(2, 4)), expected[1:3], atol=1e-5)
    assert found.missing == ("x",)


@pytest.mark.parametrize("at_once", [1, 36, 100, 1 << 22])
def test_the_first_of_equal_classes_wins_and_few_are_in_memory(monkeypatch, at_once):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    scores_chw = rng.integers(0, 3, (7, 5, 6)).astype(np.float32)
    scores_chw[:, 4, 5] = -np.inf
    asked = []

    def pixels(classes):
        asked.append(len(scores_chw[classes]))
        return torch.from_numpy(scores_chw[classes])

    found = labelled(pixels, np.ones(7, bool), (5, 6))
    assert sum(asked) == 7 and max(asked) == min(7, max(1, at_once // 30))
    np.testing.assert_array_equal(found.labels_hw, scores_chw.argmax(0))
    np.testing.assert_array_equal(found.max_score_hw, scores_chw.max(0))
    sure = with_background(found, 2.0)
    np.testing.assert_array_equal(
        sure.labels_hw, np.where(scores_chw.max(0) >= 2, found.labels_hw, NO_CLASS)
    )
    assert with_background(found, -np.inf).labels_hw[4, 5] == NO_CLASS


def test_resized_scores_interpolate_between_cell_centres():
    scores = resize_scores(torch.tensor([[[0.0, 1.0]]]), (2, 4))
    np.testing.assert_allclose(scores[0], [[0, 0.25, 0.75, 1]] * 2)


@pytest.mark.parametrize(
    "settings, field",
    [({"stride": 0}, "stride"), ({"stride": 9, "crop": 8}, "stride"), ({"short_side": 0}, "short")],
)
def test_sizes_out_of_range_are_refused(settings, field):
    with pytest.raises(ValueError, match=field):
        WindowConfig(**settings)
