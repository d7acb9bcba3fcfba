"""Confusion matrix and its scores against a slow reference over sets of pixels."""

import math

import numpy as np
import pytest

from ovref.evaluation.metrics_semantic import (
    IGNORE,
    boundary_hw,
    boundary_pixels,
    confusion,
    scores_of_counts,
    sparse_confusion,
    split_scores,
)


def slow_scores(pairs, classes):
    """IoU and accuracy of every class, pixel by pixel: lists with None for what is not defined."""
    pixels = [
        (int(t), int(p))
        for truth, predicted in pairs
        for t, p in zip(truth.ravel(), predicted.ravel(), strict=True)
        if t != IGNORE
    ]
    ious, accuracies = [], []
    for c in range(classes):
        both = sum(t == c and p == c for t, p in pixels)
        either = sum(t == c or p == c for t, p in pixels)
        true = sum(t == c for t, _ in pixels)
        ious.append(both / either if either else None)
        accuracies.append(both / true if true else None)
    return ious, accuracies, sum(t == p for t, p in pixels) / len(pixels)


def mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def as_nan(values):
    return [math.nan if value is None else value for value in values]


@pytest.mark.parametrize("seed", range(5))
def test_scores_match_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    classes = 6
    counts, pairs = 0, []
    for _ in range(3):
        # Class 4 is in the truth only, class 5 in neither, class 3 in predictions only.
        truth = rng.choice([0, 1, 2, 4, IGNORE], size=(5, 7)).astype(np.int16)
        predicted = rng.choice([0, 1, 2, 3, -1], size=(5, 7))
        counts = counts + confusion(truth, predicted, classes)
        pairs.append((truth, predicted))
    scores = scores_of_counts(counts)
    ious, accuracies, pixel_accuracy = slow_scores(pairs, classes)
    np.testing.assert_allclose(scores.iou, as_nan(ious))
    np.testing.assert_allclose(scores.accuracy, as_nan(accuracies))
    assert scores.miou == pytest.approx(mean(ious))
    assert scores.mean_accuracy == pytest.approx(mean(accuracies))
    assert scores.pixel_accuracy == pytest.approx(pixel_accuracy)
    assert scores.iou[3] == 0 and scores.iou[4] == 0 and math.isnan(scores.iou[5])


def test_a_perfect_prediction_scores_one():
    truth = np.array([[0, 1], [2, 2]])
    scores = scores_of_counts(confusion(truth, truth, 3))
    assert scores.miou == 1 and scores.pixel_accuracy == 1


def test_counts_are_pooled_over_images_not_averaged():
    zero, one = np.zeros((1, 9), int), np.ones((1, 1), int)
    counts = confusion(zero, zero, 2) + confusion(one - 1, one, 2)
    assert scores_of_counts(counts).iou[0] == pytest.approx(0.9)


def test_nothing_evaluated_gives_nan_and_no_warning():
    # Predictions under ignored pixels may hold anything.
    counts = confusion(np.full((2, 2), IGNORE), np.full((2, 2), -7), 2)
    scores = scores_of_counts(counts)
    assert math.isnan(scores.miou) and math.isnan(scores.pixel_accuracy)


def test_bad_label_maps_are_refused():
    good = np.zeros((2, 2), int)
    for truth, predicted, message in (
        (good, np.zeros((2, 3), int), r"differ in shape: \(2, 2\) and \(2, 3\)"),
        (good, np.zeros((2, 2)), "prediction must hold integers, found float64"),
        (good + 3, good, "truth holds label 3, expected 0 to 2"),
        (good - 2, good, "truth holds label -2, expected 0 to 2"),
        (good, good + 3, "prediction holds label 3, expected -1 to 2"),
        (good, good - 2, "prediction holds label -2"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(truth, predicted, 3)
    with pytest.raises(ValueError, match="classes must be at least 1"):
        confusion(good, good, 0)


def test_the_harmonic_mean_is_of_the_two_means():
    iou = np.array([0.8, 0.6, math.nan, 0.1, 0.3])
    found = split_scores(iou, [True, True, True, False, False])
    assert found.seen == pytest.approx(0.7) and found.unseen == pytest.approx(0.2)
    assert found.hiou == pytest.approx(2 / (1 / 0.7 + 1 / 0.2))


def test_the_harmonic_mean_without_anything_right_or_to_judge():
    assert split_scores(np.array([0.0, 0.0]), [True, False]).hiou == 0
    assert split_scores(np.array([0.5, 0.0]), [True, False]).hiou == 0
    one_side = split_scores(np.array([0.5, math.nan]), [True, False])
    assert one_side.seen == 0.5 and math.isnan(one_side.unseen) and math.isnan(one_side.hiou)
    with pytest.raises(ValueError, match="one value for each of 2 classes"):
        split_scores(np.zeros(2), [True, False, True])


@pytest.mark.parametrize(("classes", "dtype"), [(459, np.int16), (847, np.int32), (847, np.int64)])
def test_hundreds_of_classes_are_counted_like_few(classes, dtype):
    rng = np.random.default_rng(classes)
    some = [0, 254, 255, 256, classes - 1]
    truth = rng.choice([*some, IGNORE], size=(6, 9)).astype(dtype)
    predicted = rng.choice([*some, -1], size=(6, 9)).astype(dtype)
    scores = scores_of_counts(confusion(truth, predicted, classes))
    ious, accuracies, pixel_accuracy = slow_scores([(truth, predicted)], classes)
    np.testing.assert_allclose(scores.iou, as_nan(ious))
    np.testing.assert_allclose(scores.accuracy, as_nan(accuracies))
    assert scores.pixel_accuracy == pytest.approx(pixel_accuracy)


def test_confused_classes_are_those_of_the_matrix():
    rng = np.random.default_rng(3)
    truth, predicted = rng.choice([0, 2, IGNORE], (4, 5)), rng.choice([0, 1, 2, -1], (4, 5))
    counts = confusion(truth, predicted, 3)
    for true, found, pixels in sparse_confusion(truth, predicted, 3).tolist():
        assert counts[true, found] == pixels > 0
        counts[true, found] = 0
    assert not counts.any()
    assert sparse_confusion(np.full((2, 2), IGNORE), np.zeros((2, 2), int), 3).shape == (0, 3)


def slow_boundary(mask_hw, reach):
    """Pixels of the mask with one outside of it, or of the image, at most `reach` away."""
    height, width = mask_hw.shape

    def inside(row, column):
        return 0 <= row < height and 0 <= column < width and mask_hw[row, column]

    steps = range(-reach, reach + 1)
    return np.array(
        [
            [
                mask_hw[r, c] and not all(inside(r + dr, c + dc) for dr in steps for dc in steps)
                for c in range(width)
            ]
            for r in range(height)
        ]
    ).reshape(mask_hw.shape)


@pytest.mark.parametrize(
    ("size_hw", "ratio", "reach"),
    [((14, 17), 0.02, 1), ((14, 17), 0.1, 2), ((1, 1), 0.02, 1), ((40, 70), 0.05, 4)],
)
def test_boundaries_are_what_is_near_the_outside(size_hw, ratio, reach):
    rng = np.random.default_rng(1)
    for share in (0.0, 0.05, 0.5, 1.0):
        mask_hw = rng.random(size_hw) > share
        mask_hw[: size_hw[0] // 2, : size_hw[1] // 2] = share < 1
        np.testing.assert_array_equal(boundary_hw(mask_hw, ratio), slow_boundary(mask_hw, reach))


def test_boundary_pixels_are_of_each_class_without_what_is_not_evaluated():
    rng = np.random.default_rng(2)
    truth = np.repeat(np.repeat(rng.choice([0, 1, 3, IGNORE], (4, 5)), 4, 0), 4, 1)
    predicted = np.repeat(np.repeat(rng.choice([0, 1, 2, -1], (4, 5)), 4, 0), 4, 1)
    found = {label: rest for label, *rest in boundary_pixels(truth, predicted, 5).tolist()}
    assert set(found) == {0, 1, 2, 3}
    judged = np.where(truth == IGNORE, -1, predicted)
    for label, (both, either) in found.items():
        true, own = (slow_boundary(map_hw == label, 1) for map_hw in (truth, judged))
        assert both == (true & own).sum() and either == (true | own).sum()
    assert boundary_pixels(np.full((3, 3), IGNORE), np.zeros((3, 3), int), 2).shape == (0, 3)
