"""Panoptic quality against a slow reference over sets of pixels, written from COCO's rules."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from ovref.evaluation.datasets import true_instances
from ovref.evaluation.metrics_panoptic import (
    PanopticQuality,
    TruePanoptic,
    panoptic_of_labels,
)
from ovref_inference.segmenters.regions import Panoptic

THINGS = (True, True, True, False, False)


def pixels(panoptic, segment):
    return {tuple(place) for place in np.argwhere(panoptic.ids_hw == segment).tolist()}


def slow_counts(images):
    """Per class: exact sum of matched IoU, and numbers of matched, wrong and missed segments."""
    iou, hit, wrong, missed = Counter(), Counter(), Counter(), Counter()
    for truth, predicted in images:
        void = pixels(truth, 0)
        found = {segment: pixels(predicted, segment) for segment in predicted.labels}
        for segment, label in truth.labels.items():
            if segment in truth.crowd:
                continue
            mine = pixels(truth, segment)
            for other in list(found):
                if predicted.labels[other] != label:
                    continue
                union = mine | (found[other] - void)
                share = Fraction(len(mine & found[other]), len(union)) if union else Fraction(0)
                if share > Fraction(1, 2):
                    iou[label] += share
                    hit[label] += 1
                    del found[other]
                    break
            else:
                missed[label] += 1
        for other, place in found.items():
            label = predicted.labels[other]
            excuse = set(void)
            crowds = [c for c in truth.labels if c in truth.crowd and truth.labels[c] == label]
            if crowds:
                excuse |= pixels(truth, crowds[-1])
            if Fraction(len(place & excuse), len(place)) <= Fraction(1, 2):
                wrong[label] += 1
    return iou, hit, wrong, missed


def slow_quality(images, classes):
    """(PQ, SQ, RQ, number of classes), means over those of `classes` that occur."""
    iou, hit, wrong, missed = slow_counts(images)
    rows = []
    for label in classes:
        total = hit[label] + Fraction(wrong[label], 2) + Fraction(missed[label], 2)
        if total:
            segmentation = iou[label] / hit[label] if hit[label] else 0
            rows.append((iou[label] / total, segmentation, hit[label] / total))
    if not rows:
        return math.nan, math.nan, math.nan, 0
    return (*(float(sum(column) / len(rows)) for column in zip(*rows, strict=True)), len(rows))


def quality(images):
    counted = PanopticQuality(THINGS)
    for truth, predicted in images:
        counted.add(truth, predicted)
    return counted.scores()


def assert_equal(images):
    scores = quality(images)
    groups = {
        "all": range(len(THINGS)),
        "things": [c for c, thing in enumerate(THINGS) if thing],
        "stuff": [c for c, thing in enumerate(THINGS) if not thing],
    }
    for name, classes in groups.items():
        found = getattr(scores, name)
        expected = slow_quality(images, classes)
        np.testing.assert_allclose(
            (found.pq, found.sq, found.rq, found.classes), expected, rtol=1e-12, err_msg=name
        )


def random_map(rng, size, void):
    """Overlapping boxes painted over each other: several instances, void, any class."""
    ids_hw = np.zeros((size, size), np.int32)
    labels = {}
    for segment in rng.permutation(np.arange(1, 9))[: rng.integers(1, 9)].tolist():
        y, x = rng.integers(0, size - 2, 2)
        height, width = rng.integers(2, size, 2)
        ids_hw[y : y + height, x : x + width] = segment
        labels[segment] = int(rng.integers(len(THINGS)))
    if void:
        ids_hw[rng.random((size, size)) < 0.15] = 0
    return ids_hw, {s: c for s, c in labels.items() if (ids_hw == s).any()}


def random_image(rng, size=12):
    ids_hw, labels = random_map(rng, size, void=rng.random() < 0.7)
    crowd = frozenset(s for s, c in labels.items() if THINGS[c] and rng.random() < 0.25)
    truth = TruePanoptic(ids_hw=ids_hw, labels=labels, crowd=crowd)
    if rng.random() < 0.7:  # a damaged copy of the truth, so that much is matched
        moved = np.roll(ids_hw, int(rng.integers(-1, 2)), axis=int(rng.integers(2)))
        moved[rng.random((size, size)) < 0.1] = int(rng.integers(0, 9))
        other = {
            s: labels.get(s, 0) if rng.random() < 0.9 else int(rng.integers(len(THINGS)))
            for s in np.unique(moved).tolist()
            if s
        }
        return truth, TruePanoptic(ids_hw=moved, labels=other)
    ids_hw, labels = random_map(rng, size, void=True)
    return truth, TruePanoptic(ids_hw=ids_hw, labels=labels)


def test_random_data_sets_equal_the_slow_reference():
    rng = np.random.default_rng(7)
    seen = np.zeros(3, int)
    for _ in range(60):
        images = [random_image(rng) for _ in range(rng.integers(1, 5))]
        assert_equal(images)
        counted = PanopticQuality(THINGS)
        for pair in images:
            counted.add(*pair)
        seen += counted.counts.sum(1)
    assert (seen > 100).all()  # the cases hold enough of every kind


def row(*segments):
    """A map of one row: (class, pixels) one after the other; class None is void."""
    ids, labels = [], {}
    for number, (label, length) in enumerate(segments, start=1):
        ids += [0 if label is None else number] * length
        if label is not None:
            labels[number] = label
    return TruePanoptic(ids_hw=np.array([ids]), labels=labels)


def crowded(panoptic, *segments):
    return TruePanoptic(ids_hw=panoptic.ids_hw, labels=panoptic.labels, crowd=frozenset(segments))


EDGES = {
    # name: truth, prediction, (matched, wrong, missed) of class 0
    "perfect": (row((0, 4), (3, 4)), row((0, 4), (3, 4)), (1, 0, 0)),
    "exactly half is no match": (row((0, 4), (3, 4)), row((0, 8)), (0, 1, 1)),
    "no prediction": (row((0, 4), (3, 4)), row((None, 8)), (0, 0, 1)),
    "no truth": (row((None, 8)), row((0, 4), (3, 4)), (0, 0, 0)),
    "neither": (row((None, 8)), row((None, 8)), (0, 0, 0)),
    "void leaves the union": (row((0, 3), (None, 5)), row((0, 8)), (1, 0, 0)),
    "half on void counts": (row((3, 4), (None, 4)), row((0, 8)), (0, 1, 0)),
    "more than half on void does not": (row((3, 3), (None, 5)), row((0, 8)), (0, 0, 0)),
    "two things found as one": (row((0, 4), (0, 4)), row((0, 8)), (0, 1, 2)),
    "one thing found as two": (row((0, 8)), row((0, 5), (0, 3)), (1, 1, 0)),
    "several instances": (row((0, 3), (0, 3), (0, 2)), row((0, 3), (0, 2), (0, 3)), (3, 0, 0)),
    "another class": (row((0, 8)), row((1, 8)), (0, 0, 1)),
    "crowd is not missed": (crowded(row((0, 4), (3, 4)), 1), row((None, 4), (3, 4)), (0, 0, 0)),
    "crowd is not matched": (crowded(row((0, 8)), 1), row((0, 8)), (0, 0, 0)),
    "crowd excuses its class": (crowded(row((0, 6), (3, 2)), 1), row((0, 3), (0, 5)), (0, 0, 0)),
    "crowd excuses no other class": (crowded(row((1, 8)), 1), row((0, 8)), (0, 1, 0)),
    "crowd and void together": (crowded(row((0, 3), (None, 2), (3, 3)), 1), row((0, 8)), (0, 0, 0)),
    "the last of two crowds": (
        crowded(row((0, 6), (0, 2)), 1, 2), row((0, 4), (0, 4)), (0, 2, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name):
    truth, predicted, counts = EDGES[name]
    counted = PanopticQuality(THINGS)
    counted.add(truth, predicted)
    assert tuple(counted.counts[:, 0]) == counts
    assert_equal([(truth, predicted)])


def test_a_listed_true_segment_without_pixels_is_missed():
    truth = TruePanoptic(ids_hw=np.ones((2, 2), int), labels={1: 0, 5: 1})
    counted = PanopticQuality(THINGS)
    counted.add(truth, TruePanoptic(ids_hw=np.ones((2, 2), int), labels={1: 0}))
    assert counted.counts[:, 1].tolist() == [0, 0, 1]


def test_nothing_judged_gives_nan_and_no_warning():
    scores = PanopticQuality(THINGS).scores()
    assert math.isnan(scores.all.pq) and scores.all.classes == 0 and np.isnan(scores.pq).all()


def test_pq_is_sq_times_rq_per_class():
    rng = np.random.default_rng(1)
    scores = quality([random_image(rng) for _ in range(5)])
    np.testing.assert_allclose(scores.pq, scores.sq * scores.rq)


def test_bad_maps_are_refused_and_count_nothing():
    counted = PanopticQuality(THINGS)
    good = row((0, 4))
    for truth, predicted, message in (
        (good, row((0, 5)), r"differ in shape: \(1, 4\) and \(1, 5\)"),
        (TruePanoptic(ids_hw=np.ones((1, 4)), labels={1: 0}), good, "truth must hold integer ids"),
        (good, TruePanoptic(ids_hw=good.ids_hw, labels={}), r"prediction has no label for \[1\]"),
        (good, TruePanoptic(ids_hw=good.ids_hw, labels={1: 5}), "labels lie in 0 to 4"),
        (good, TruePanoptic(ids_hw=good.ids_hw, labels={1: 0, 0: 0}), "ids start at 1"),
        (good, TruePanoptic(ids_hw=good.ids_hw, labels={1: 0, 2: 0}), r"found segments \[2\]"),
        (good, crowded(good, 1), "must have pixels and not be crowds"),
    ):
        with pytest.raises(ValueError, match=message):
            counted.add(truth, predicted)
    assert counted.counts.sum() == 0
    with pytest.raises(ValueError, match="at least one class"):
        PanopticQuality([])


def test_a_label_map_gives_parts_of_things_and_whole_stuff():
    label_hw = np.array([[0, 3, 0], [3, -1, 3], [1, 1, 0]])
    panoptic = panoptic_of_labels(label_hw, THINGS)
    assert panoptic.labels == {1: 0, 2: 0, 3: 0, 4: 1, 5: 3}
    np.testing.assert_array_equal(panoptic.ids_hw, [[1, 5, 2], [5, 0, 5], [4, 4, 3]])


def test_a_label_map_of_nothing_has_no_segments():
    assert panoptic_of_labels(np.full((2, 2), -1), THINGS).labels == {}


def test_predicted_segments_as_segmenters_return_them():
    ids_hw = np.ones((2, 3), np.int64)
    predicted, quality = Panoptic(ids_hw=ids_hw, labels={1: 0}), PanopticQuality([True])
    quality.add(TruePanoptic(ids_hw=ids_hw, labels={1: 0}), predicted)
    assert quality.scores().all.pq == 1
    assert true_instances(predicted, [True]).crowd.tolist() == [False]
